"""A tiny vision-language model of the real class, with random weights, and inputs for it."""

from typing import Any

import torch
import transformers
from torch import Tensor

IMAGE, PAD, BOS = 5, 0, 1
PATCHES = 9


def tiny_llava(**text: Any) -> Any:
    """CLIP and Llama with grouped queries, 32 wide; livelier than the initialisation."""
    torch.manual_seed(0)
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=12,
            patch_size=4,
            projection_dim=16,
        ),
        text_config=transformers.LlamaConfig(
            vocab_size=40,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=5,
            num_attention_heads=4,
            num_key_value_heads=2,
            bos_token_id=BOS,
            eos_token_id=2,
            pad_token_id=PAD,
            **text,
        ),
        image_token_id=IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        attn_implementation="sdpa",
    )
    model = transformers.LlavaForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.4)
    return model


def prompt(before: int, after: int, spans: int = 1) -> list[int]:
    """BOS, text, the image, and text after it; with several spans, text between them."""
    text = iter(range(6, 40))
    tokens = [BOS, *(next(text) for _ in range(before))]
    for _ in range(spans):
        tokens += [IMAGE] * PATCHES + [next(text) for _ in range(after)]
    return tokens


def batch_of(*prompts: list[int], images: int | None = None) -> dict[str, Tensor]:
    """Left padded."""
    width = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (width - len(one)) + one for one in prompts])
    count = int((ids == IMAGE).sum()) // PATCHES if images is None else images
    generator = torch.Generator().manual_seed(1)
    return {
        "input_ids": ids,
        "attention_mask": (ids != PAD).long(),
        "pixel_values": torch.randn(count, 3, 12, 12, generator=generator),
    }
