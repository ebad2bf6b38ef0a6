"""``llama-stdlib``: a small Llama trained here on the Python standard library, and shipped."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from attending.zoo.entry import Recipe, ZooEntry, ZooModel, with_settings
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


def _train(
    out_dir: Path, settings: Mapping[str, Any], resume: bool, export_to: Path | None
) -> dict[str, Any]:
    # Imported here: most users load the model and never train it.
    from attending.zoo.recipes.llama_stdlib import LlamaStdlibRecipe, train

    recipe = with_settings(LlamaStdlibRecipe, settings, ENTRY.name)
    return train(out_dir, recipe, resume, export_to=export_to)


def _export(out_dir: Path, path: Path) -> dict[str, Any]:
    from attending.zoo.recipes.llama_stdlib_export import export

    return export(out_dir, path)


ENTRY = ZooEntry(
    name="llama-stdlib",
    model_class="transformers.LlamaForCausalLM",
    description="a small Llama that writes Python: 8 causal layers, 6 query heads over 2 key heads",
    source="trained by attending.zoo.recipes.llama_stdlib on the Python standard library",
    license="weights: Apache-2.0; training text: Python Software Foundation License Version 2",
    folder=folder,
    load=load,
    recipe=Recipe(train=_train, export=_export),
)
