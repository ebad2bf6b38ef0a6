"""Small real models, so that every claim of this library can be tried on this machine, offline.

>>> from attending import zoo
>>> zoo.names()
['minilm', 'llama-stdlib', 'llava-shapes', 'mdlm-stdlib', 'wan-shapes']
>>> llama = zoo.load("llama-stdlib")
>>> type(llama.model).__name__
'LlamaForCausalLM'

``minilm`` is pretrained by others and comes with a package from PyPI; ``llama-stdlib`` and
``mdlm-stdlib`` (Python, written from left to right and by filling in), ``llava-shapes`` (pictures)
and ``wan-shapes`` (videos) are trained by our own recipes and shipped with this package.  Only
safetensors and JSON are ever read.  The pictures are scenes of :mod:`attending.zoo.shapes`, of
which everything is known, and the videos those of :mod:`attending.zoo.shapes_motion`;
:mod:`attending.zoo.shapes_tasks` lets a model answer and caption, and
:mod:`attending.zoo.video_tasks` lets one paint.
"""

from pathlib import Path
from typing import Any

import torch

from attending.zoo import llama_stdlib, llava_shapes, mdlm_stdlib, minilm, wan_shapes
from attending.zoo.entry import Recipe, ZooEntry, ZooModel, ZooRecord

__all__ = ["ZooModel", "ZooRecord", "describe", "export", "load", "names", "train"]

_ENTRIES: dict[str, ZooEntry] = {
    entry.name: entry
    for entry in (
        minilm.ENTRY,
        llama_stdlib.ENTRY,
        llava_shapes.ENTRY,
        mdlm_stdlib.ENTRY,
        wan_shapes.ENTRY,
    )
}


def names() -> list[str]:
    """The names that :func:`load` knows."""
    return list(_ENTRIES)


def describe() -> list[ZooRecord]:
    """What there is: one record per model, without loading any weights."""
    return [entry.record() for entry in _ENTRIES.values()]


def load(
    name: str,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> ZooModel:
    """Load a model of the zoo, offline, in evaluation mode, with SDPA attention.

    Args:
        name: One of :func:`names`.
        device: Where the model goes; ``None`` leaves it on the CPU.
        dtype: The type of its weights in memory.

    Raises:
        ValueError: No model has that name.
        ImportError: The model's weights are in a package that is not installed.
    """
    return _entry(name).load(device, dtype)


def train(
    name: str,
    out_dir: str | Path,
    *,
    resume: bool = True,
    export_to: str | Path | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Make a model anew by its recipe.

    Args:
        name: A model that has a recipe.
        out_dir: Where the checkpoint goes.
        resume: Go on from the checkpoint in ``out_dir`` if there is one.
        export_to: A folder that receives loadable weights during training.
        **settings: Changes to the recipe, such as ``steps=100``.

    Returns:
        What was measured during training, as the recipe says.
    """
    target = None if export_to is None else Path(export_to)
    return _recipe(name).train(Path(out_dir), settings, resume, target)


def export(name: str, out_dir: str | Path, folder: str | Path) -> dict[str, Any]:
    """Measure the training run in ``out_dir`` and write weights and data card into ``folder``.

    Returns:
        The data card.
    """
    return _recipe(name).export(Path(out_dir), Path(folder))


def _entry(name: str) -> ZooEntry:
    try:
        return _ENTRIES[name]
    except KeyError:
        raise ValueError(
            f"expected the name of a zoo model, got {name!r}; the names are {', '.join(names())}"
        ) from None


def _recipe(name: str) -> Recipe:
    recipe = _entry(name).recipe
    if recipe is None:
        trained_here = [entry.name for entry in _ENTRIES.values() if entry.recipe is not None]
        raise ValueError(
            f"expected a zoo model with a recipe, got {name!r}, which was trained by others; "
            f"those with a recipe are {', '.join(trained_here)}"
        )
    return recipe
