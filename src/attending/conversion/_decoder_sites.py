"""Where the attention of a model of transformers is, and how another module gets there."""

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from torch import nn

Layer = TypeVar("Layer")


def body_of(model: nn.Module) -> Any:
    """The model without a head: what holds the layers and the config."""
    body: Any = getattr(model, "base_model", model)
    return body


def sites_of(body: nn.Module, classes: Iterable[str]) -> list[tuple[str, Any]]:
    """The modules of these classes, by name, in order."""
    wanted = set(classes)
    return [(name, one) for name, one in body.named_modules() if type(one).__name__ in wanted]


def put_layers(
    body: Any, made: Iterable[tuple[str, Layer]], module: Callable[[Layer, Any], nn.Module]
) -> None:
    """Put `module(layer, config)` in the place of the module of that name, in its mode."""
    for name, layer in made:
        old = body.get_submodule(name)
        body.set_submodule(name, module(layer, body.config).train(old.training))
