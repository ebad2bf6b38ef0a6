"""``llama-stdlib``: a small Llama trained here on the Python standard library, and shipped."""

import json
from pathlib import Path

import torch

from attending.zoo.entry import ZooEntry, ZooModel, recipe_at
from attending.zoo.loading import load_folder


def folder() -> Path:
    """The weights inside this package."""
    return Path(__file__).parent / "weights" / "llama-stdlib"


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
    from transformers import AutoModelForCausalLM

    path = folder() if path is None else path
    model, tokenizer = load_folder(AutoModelForCausalLM, path, device, dtype)
    card = json.loads((path / "card.json").read_text(encoding="utf-8"))
    return ZooModel(model, tokenizer, card, ENTRY.name)


NAME = "llama-stdlib"

ENTRY = ZooEntry(
    name=NAME,
    model_class="transformers.LlamaForCausalLM",
    description="a small Llama that writes Python: 8 causal layers, 6 query heads over 2 key heads",
    source="trained by attending.zoo.recipes.llama_stdlib on the Python standard library",
    license="weights: Apache-2.0; training text: Python Software Foundation License Version 2",
    folder=folder,
    load=load,
    recipe=recipe_at("attending.zoo.recipes.llama_stdlib", "LlamaStdlibRecipe", NAME),
)
