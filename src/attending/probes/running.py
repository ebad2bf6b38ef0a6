"""How a probe runs a model: with what it was given, and in evaluation mode until it is done."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


def run_model(model: nn.Module, batch: Any) -> Any:
    """Call a model with a batch: keyword arguments of a mapping, positional ones of a tuple."""
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, tuple):
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
    """The first tensor of a batch, whose first dimension counts the samples."""
    if isinstance(batch, Tensor):
        return batch
    values = batch.values() if isinstance(batch, Mapping) else batch
    return next((value for value in values if isinstance(value, Tensor)), None)


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
