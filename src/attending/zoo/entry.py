"""What the zoo knows of a model before loading it, and what loading it gives."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

import torch


@dataclass(frozen=True)
class ZooModel:
    """A model ready to run, what turns text into its input, and what is known about it.

    Attributes:
        model: A class of the model's own library (transformers or diffusers), in evaluation mode,
            its attention going through ``scaled_dot_product_attention``.
        tokenizer: Text to token ids and back; ``None`` for models that do not write.
        card: Where the model is from, its licence and, for models trained by our recipes, data,
            figures and limits as the recipe measured them.
        name: The name it has in the zoo.
        processor: For models that see: images and prompts to a batch of inputs.  For models that
            paint: captions to what the model attends to.  Else ``None``.
    """

    model: Any
    tokenizer: Any
    card: dict[str, Any]
    name: str
    processor: Any = None


@dataclass(frozen=True)
class ZooRecord:
    """One line of the zoo's list.

    Attributes:
        name: What to give to ``zoo.load``.
        model_class: The class that ``zoo.load`` returns, with its package.
        parameters: How many numbers were trained; ``None`` if the weights are not installed.
        description: What it is, in one line.
        source: Where the weights are from.
        license: Under what terms.
        trainable: Whether ``zoo.train`` can make it anew.
    """

    name: str
    model_class: str
    parameters: int | None
    description: str
    source: str
    license: str
    trainable: bool


@dataclass(frozen=True)
class Recipe:
    """How a model is made.

    Attributes:
        train: ``(out_dir, settings, resume, export_to)`` to what was measured during training;
            of it, ``step``, ``seconds`` and ``curve`` are there for every recipe.
        export: ``(out_dir, folder)``, the finished run and where to ship it, to the data card, in
            which ``parameters`` and ``headline``, its one figure in words, are always there.
    """

    train: Callable[[Path, Mapping[str, Any], bool, Path | None], dict[str, Any]]
    export: Callable[[Path, Path], dict[str, Any]]


RecipeT = TypeVar("RecipeT")


def with_settings(recipe_class: type[RecipeT], settings: Mapping[str, Any], name: str) -> RecipeT:
    """The recipe of the model ``name``, a dataclass, with these changes to it.

    Raises:
        ValueError: For a setting that the recipe does not have, or a value that it refuses.
    """
    known = [field.name for field in fields(recipe_class)]  # type: ignore[arg-type]
    unknown = sorted(set(settings) - set(known))
    if unknown:
        raise ValueError(
            f"expected settings of the recipe of {name}, got {', '.join(unknown)}; the "
            f"settings are {', '.join(known)}"
        )
    return recipe_class(**settings)


def recipe_at(module: str, recipe_class: str, name: str) -> Recipe:
    """The recipe of a module, imported when it is used: most users load a model and never train it.

    Args:
        module: such as ``attending.zoo.recipes.llama_stdlib``: has the class and ``train``; the
            module named after it with ``_export`` has ``export``.
        recipe_class: The dataclass of its settings.
        name: Of the model, for errors.
    """

    def train(
        out_dir: Path, settings: Mapping[str, Any], resume: bool, export_to: Path | None
    ) -> dict[str, Any]:
        found = import_module(module)
        recipe = with_settings(getattr(found, recipe_class), settings, name)
        told: dict[str, Any] = found.train(out_dir, recipe, resume, export_to=export_to)
        return told

    def export(out_dir: Path, path: Path) -> dict[str, Any]:
        told: dict[str, Any] = import_module(f"{module}_export").export(out_dir, path)
        return told

    return Recipe(train, export)


@dataclass(frozen=True)
class ZooEntry:
    """A model of the zoo; the modules named after the models hold one each.

    Attributes:
        name: See :class:`ZooRecord`, as for the next four.
        model_class: Full name of the class.
        description: One line.
        source: Of the weights.
        license: Of the weights.
        folder: Finds the weights on this machine; ``ImportError`` if they are not installed.
        load: ``(device, dtype)`` to the loaded model.
        recipe: How to make it anew, for models we train ourselves.
        weights: Files of the folder that hold them.
    """

    name: str
    model_class: str
    description: str
    source: str
    license: str
    folder: Callable[[], Path]
    load: Callable[[torch.device | str | None, torch.dtype], ZooModel]
    recipe: Recipe | None = None
    weights: tuple[str, ...] = ("model.safetensors",)

    def record(self) -> ZooRecord:
        """The line for the zoo's list; reads no weights."""
        try:
            folder = self.folder()
            parameters = sum(count_parameters(folder / name) for name in self.weights)
        except ImportError:
            parameters = None
        return ZooRecord(
            name=self.name,
            model_class=self.model_class,
            parameters=parameters,
            description=self.description,
            source=self.source,
            license=self.license,
            trainable=self.recipe is not None,
        )


def count_parameters(path: Path) -> int:
    """Sum the sizes of the float tensors in a safetensors file, from its header alone.

    The header is JSON after eight bytes that hold its length, so nothing else is read.
    """
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return sum(
        math.prod(tensor["shape"])
        for name, tensor in header.items()
        if name != "__metadata__" and tensor["dtype"].startswith(("F", "BF"))
    )
