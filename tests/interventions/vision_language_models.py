"""A tiny vision-language model of the real class, with random weights, and inputs for it."""

from typing import Any

import torch
import transformers
from torch import Tensor

IMAGE, PAD, BOS = 5, 0, 1
PATCHES = 9
TEXT = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": BOS,
    "eos_token_id": 2,
    "pad_token_id": PAD,
}


def lively(kind: Any, config: Any) -> Any:
    """A model whose tokens differ more than those of the usual initialisation."""
    torch.manual_seed(0)
    model = kind._from_config(config, attn_implementation="sdpa").eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.4)
    return model


def tiny_llava(**text: Any) -> Any:
    """CLIP and Llama with grouped queries, 32 wide."""
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
        text_config=transformers.LlamaConfig(**TEXT, **text),
        image_token_id=IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )
    return lively(transformers.LlavaForConditionalGeneration, config)


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


def tiny_qwen2_vl() -> tuple[Any, dict[str, Tensor]]:
    """Qwen2-VL and its inputs: patches are given flat, and merged by fours."""
    config = transformers.Qwen2VLConfig(
        text_config={
            **TEXT,
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]},
        },
        vision_config={
            "depth": 2,
            "embed_dim": 16,
            "hidden_size": 32,
            "num_heads": 2,
            "patch_size": 4,
            "temporal_patch_size": 2,
        },
        image_token_id=IMAGE,
        video_token_id=2,
        vision_start_token_id=3,
        vision_end_token_id=4,
    )
    inputs = {**batch_of(prompt(2, 4)), "image_grid_thw": torch.tensor([[1, 6, 6]])}
    inputs["pixel_values"] = torch.randn(36, 96, generator=torch.Generator().manual_seed(0))
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE).int()
    return lively(transformers.Qwen2VLForConditionalGeneration, config), inputs


def tiny_intern_vl() -> tuple[Any, dict[str, Tensor]]:
    """InternVL over Qwen2 and its inputs."""
    config = transformers.InternVLConfig(
        text_config=transformers.Qwen2Config(**TEXT),
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": (24, 24),
            "patch_size": (4, 4),
        },
        image_token_id=IMAGE,
        downsample_ratio=0.5,
    )
    inputs = batch_of(prompt(2, 4))
    inputs["pixel_values"] = torch.randn(1, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    return lively(transformers.InternVLForConditionalGeneration, config), inputs
