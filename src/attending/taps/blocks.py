"""The repeated blocks of a model, by name, for whoever hooks them."""

import re

from torch import nn

_ATTENTION = re.compile("Attention|Attn")


def blocks_of(model: nn.Module) -> dict[str, nn.Module]:
    """The repeated blocks of a model: entries of a ModuleList or Sequential that hold attention.

    Blocks in blocks are all there (the stages of a UNet and the transformer blocks in them, the
    layers of a T5 and their parts), outer ones first. See `outermost`.
    """
    containers = nn.ModuleList | nn.Sequential
    names = {
        f"{name}.{child}" if name else child
        for name, module in model.named_modules()
        if isinstance(module, containers)
        for child, _ in module.named_children()
    }
    return {
        name: module for name, module in model.named_modules() if name in names and _attends(module)
    }


def outermost(names: list[str]) -> list[str]:
    """The names that lie in no other of the names: of `a.0` and `a.0.layer.1`, the first."""
    given = set(names)
    return [
        name
        for name in names
        if not any(name[:end] in given for end, sign in enumerate(name) if sign == ".")
    ]


def _attends(module: nn.Module) -> bool:
    return any(_ATTENTION.search(type(part).__name__) for part in module.modules())
