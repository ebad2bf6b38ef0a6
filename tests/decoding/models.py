"""Small random models for the tests of decoding."""

from typing import Any

import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SiglipVisionConfig,
)

VOCAB, IMAGE, EOS, PAD = 40, 39, 1, 0
PATCHES = 9

_VISION = {
    "hidden_size": 24,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "image_size": 24,
    "patch_size": 8,
    "initializer_range": 0.5,
}


def text_config(**changes: Any) -> LlamaConfig:
    return LlamaConfig(
        **{
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "initializer_range": 0.4,
            "pad_token_id": PAD,
            "eos_token_id": EOS,
            "bos_token_id": 2,
            **changes,
        }
    )


def llama(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(text_config(**changes)).eval()


def llava(siglip: bool = False, **changes: Any) -> LlavaForConditionalGeneration:
    torch.manual_seed(0)
    vision = SiglipVisionConfig(**_VISION) if siglip else CLIPVisionConfig(**_VISION)
    settings = {"vision_feature_select_strategy": "full"} if siglip else {}
    config = LlavaConfig(
        vision_config=vision,
        text_config=text_config(),
        image_token_index=IMAGE,
        image_seq_length=PATCHES,
        **{**settings, **changes},
    )
    model = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():  # an image that matters
        model.model.multi_modal_projector.linear_2.weight.mul_(40)
    model.generation_config.pad_token_id = PAD
    model.generation_config.eos_token_id = EOS
    return model


def prompts(texts: list[list[int]], images: int = 1, size: int = PATCHES) -> dict[str, Tensor]:
    """Left-padded prompts, each an image (or several) and a text."""
    rows = [[2, *([IMAGE] * size * images), *text] for text in texts]
    length = max(map(len, rows))
    ids = torch.tensor([[PAD] * (length - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(len(texts) * images, 3, 24, 24, generator=generator)
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}
