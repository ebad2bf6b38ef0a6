"""A training run in one safetensors file: weights, optimizer moments and the words beside them.

One file, because replacing one file is atomic: a crash leaves the old checkpoint or the new one,
never half of each.  No pickle, so a checkpoint from a stranger cannot run code.
"""

import json
import os
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn


class Resumable(Protocol):
    """An optimizer, or several that act as one."""

    def state_dict(self) -> dict[str, Any]:
        """With ``"state"``: for each parameter's number its tensors."""
        ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None:
        """Take up what :meth:`state_dict` gave."""
        ...


def save_checkpoint(
    path: Path,
    model: nn.Module,
    optimizer: Resumable,
    losses: list[float],
    state: dict[str, Any],
) -> None:
    """Write everything a run needs to go on, replacing ``path`` at once.

    Args:
        path: The checkpoint's file.
        model: Its parameters are stored once each, however many modules share them.
        optimizer: The per-parameter tensors of its state; hyper-parameters belong to the recipe.
        losses: One training loss per step so far.
        state: What JSON can hold: step, recipe, seconds, measurements.
    """
    tensors = {f"model.{name}": value.detach() for name, value in model.named_parameters()}
    for index, moments in optimizer.state_dict()["state"].items():
        for name, value in moments.items():
            tensors[f"optimizer.{index}.{name}"] = torch.as_tensor(value)
    tensors["losses"] = torch.tensor(losses, dtype=torch.float64)
    unfinished = path.with_suffix(".unfinished")
    save_file(
        {name: value.cpu().contiguous() for name, value in tensors.items()},
        unfinished,
        metadata={"state": json.dumps(state)},
    )
    os.replace(unfinished, path)


def read_state(path: Path) -> dict[str, Any]:
    """The JSON part of a checkpoint, without reading its tensors."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
    if "state" not in metadata:
        raise ValueError(
            f"expected a checkpoint written by a zoo recipe, got {path}, which has no state in "
            "its header; point to another folder, or train afresh with resume=False"
        )
    state: dict[str, Any] = json.loads(metadata["state"])
    return state


def load_checkpoint(
    path: Path, model: nn.Module, optimizer: Resumable | None = None
) -> list[float]:
    """Put a checkpoint's tensors back in place and return the losses so far."""
    moments: dict[int, dict[str, Tensor]] = {}
    with safe_open(path, framework="pt") as file:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(file.get_tensor(f"model.{name}"))
        for key in file.keys():  # noqa: SIM118 - safe_open is not a mapping
            if key.startswith("optimizer."):
                _, index, name = key.split(".", 2)
                moments.setdefault(int(index), {})[name] = file.get_tensor(key)
        losses: list[float] = file.get_tensor("losses").tolist()
    if optimizer is not None:
        optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
    return losses
