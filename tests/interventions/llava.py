"""A small LLaVA of transformers with random weights, and prompts for it."""

from typing import Any

import torch
from torch import Tensor, nn

IMAGE, PAD = 60, 0
PATCHES = 16


def make_llava(seed: int = 0, **text: Any) -> nn.Module:
    """CLIP with a class token and 16 patches, and a Llama with grouped queries."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig
    from transformers import LlavaForConditionalGeneration as Llava

    torch.manual_seed(seed)
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
        initializer_factor=3.0,
    )
    settings = {
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 64,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
        "pad_token_id": PAD,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    config = LlavaConfig(
        vision_config=vision,
        text_config=LlamaConfig(**(settings | text)),
        image_token_index=IMAGE,
        image_seq_length=PATCHES,
        vision_feature_layer=-2,
    )
    model: nn.Module = Llava(config).eval()
    # What is generated must be no placeholder and no end.
    model.generation_config.eos_token_id = None
    model.generation_config.suppress_tokens = [IMAGE]
    return model


def prompt(*pieces: int, seed: int = 0) -> Tensor:
    """Text of so many tokens, an image, text, an image, ...: `[1, tokens]`."""
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.tensor([1])]
    for place, length in enumerate(pieces):
        parts += [torch.full((PATCHES,), IMAGE)] if place else []
        parts += [torch.randint(3, 50, (length,), generator=generator)]
    return torch.cat(parts)[None]


def pixels(images: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    flat = torch.randn(images, 3, 1, 1, generator=generator)
    return flat + torch.randn(images, 3, 32, 32, generator=generator)


def batch(*prompts: Tensor, left: bool = True) -> dict[str, Tensor]:
    """Prompts of different lengths, padded, and the images for them."""
    width = max(one.shape[1] for one in prompts)
    ids = torch.full((len(prompts), width), PAD)
    mask = torch.zeros_like(ids)
    for row, one in enumerate(prompts):
        length = one.shape[1]
        place = slice(width - length, None) if left else slice(0, length)
        ids[row, place] = one[0]
        mask[row, place] = 1
    images = int((ids == IMAGE).sum()) // PATCHES
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels(images)}
