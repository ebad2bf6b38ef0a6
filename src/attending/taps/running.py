"""How a model is run to be measured: with what it was given, where it is, in evaluation mode."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def run_model(model: nn.Module, batch: Any) -> Any:
    """Call a model with a batch: keyword arguments of a mapping, positional ones of a sequence."""
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, tuple | list):
        return model(*batch)
    return model(batch)


def as_batches(inputs: object) -> Iterable[Any]:
    """The batches in what was given: itself, if it is one; else whatever it iterates over."""
    if isinstance(inputs, Mapping | Tensor | tuple):
        return [inputs]
    if isinstance(inputs, str) or not isinstance(inputs, Iterable):
        raise ValueError(
            "inputs: expected a mapping of the model's arguments, a tensor, a tuple of positional "
            f"arguments, or an iterable of those, got {type(inputs).__name__}."
        )
    return inputs


def first_tensor(batch: Any) -> Tensor | None:
    """The first tensor of a batch (or of an output), whose first dimension counts the samples."""
    if isinstance(batch, Tensor):
        return batch
    values = batch.values() if isinstance(batch, Mapping) else batch
    values = values if isinstance(values, Iterable) and not isinstance(values, str) else ()
    return next((value for value in values if isinstance(value, Tensor)), None)


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch with its tensors on a device."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {name: to_device(value, device) for name, value in batch.items()}
    if isinstance(batch, tuple | list):
        return type(batch)(to_device(value, device) for value in batch)
    return batch


def device_of(model: nn.Module) -> torch.device:
    """Where a model takes its inputs: the device of its first parameter that is on any."""
    for parameter in model.parameters():
        if parameter.device.type != "meta":
            return parameter.device
    return torch.device("cpu")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, without dropout; then every module is back in the mode in which it was."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
