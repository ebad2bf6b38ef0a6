"""``llava-shapes``: a small LLaVA trained here to describe coloured shapes, and shipped."""

import json
from pathlib import Path
from typing import Any

import torch

from attending.zoo.entry import ZooEntry, ZooModel, recipe_at
from attending.zoo.loading import load_folder
from attending.zoo.shapes_processor import ShapesProcessor


def folder() -> Path:
    """The weights inside this package."""
    return Path(__file__).parent / "weights" / "llava-shapes"


def load(
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    *,
    path: Path | None = None,
) -> ZooModel:
    """Load the shipped weights, or those of your own training.

    Args:
        device: Where the model goes; ``None`` leaves it on the CPU.
        dtype: Of the weights in memory; on disk they are float16.
        path: A folder written by the recipe's export, instead of the shipped one.
    """
    from transformers import LlavaForConditionalGeneration

    path = folder() if path is None else path
    model, tokenizer = load_folder(LlavaForConditionalGeneration, path, device, dtype)
    card = json.loads((path / "card.json").read_text(encoding="utf-8"))
    return ZooModel(model, tokenizer, card, ENTRY.name, make_processor(model, tokenizer))


def make_processor(model: Any, tokenizer: Any) -> ShapesProcessor:
    """The processor that fits a LLaVA's configuration."""
    config = model.config
    return ShapesProcessor(tokenizer, config.vision_config.image_size, config.image_seq_length)


NAME = "llava-shapes"

ENTRY = ZooEntry(
    name=NAME,
    model_class="transformers.LlavaForConditionalGeneration",
    description=(
        "a small LLaVA that describes coloured shapes: CLIP tower of 4 layers and 64 patches, "
        "Llama of 5 layers, 6 query heads over 2 key heads"
    ),
    source="trained by attending.zoo.recipes.llava_shapes on scenes of attending.zoo.shapes",
    license="weights and scenes: Apache-2.0",
    folder=folder,
    load=load,
    recipe=recipe_at("attending.zoo.recipes.llava_shapes", "LlavaShapesRecipe", NAME),
)
