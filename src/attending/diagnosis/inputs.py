"""What a user may give as inputs, as batches that a model takes."""

from collections.abc import Callable, Iterable, Mapping, Sized
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

Forward = Callable[[nn.Module, Any], Any]


def as_batches(
    inputs: object, tokenizer: Any, max_batches: int | None
) -> tuple[Iterable[Any], int | None]:
    """The batches of what was given, and how many they are if that is known.

    Args:
        inputs: see `attending.diagnose`.
        tokenizer: turns texts into a batch.
        max_batches: how many to take at most.
    """
    if max_batches is not None and max_batches < 1:
        raise ValueError(f"max_batches: expected at least 1 or None, got {max_batches}.")
    if isinstance(inputs, str):
        inputs = [inputs]
    if isinstance(inputs, list | tuple) and inputs and all(isinstance(t, str) for t in inputs):
        if tokenizer is None:
            raise ValueError(
                "inputs: expected batches for the model, got text. Pass the tokenizer too: "
                "diagnose(model, text, tokenizer=tokenizer)."
            )
        inputs = _tokenized(list(inputs), tokenizer)
    if isinstance(inputs, Mapping | Tensor | tuple):
        return [inputs], 1
    if not isinstance(inputs, Iterable):
        raise ValueError(
            "inputs: expected a mapping of the model's arguments, a tensor, a tuple of positional "
            f"arguments, or an iterable of those, got {type(inputs).__name__}."
        )
    count = len(inputs) if isinstance(inputs, Sized) else None
    if count is not None and max_batches is not None:
        count = min(count, max_batches)
    return islice(inputs, max_batches), count


def run(model: nn.Module, batch: Any) -> Any:
    """Call a model with a batch: keyword arguments of a mapping, positional ones of a sequence."""
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, tuple | list):
        return model(*batch)
    return model(batch)


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


def _tokenized(texts: list[str], tokenizer: Any) -> Mapping[str, Any]:
    if not all(text.strip() for text in texts):
        raise ValueError("inputs: expected texts with at least one word, got an empty one.")
    if getattr(tokenizer, "pad_token", None) is None and len(texts) > 1:
        raise ValueError(
            "inputs: expected one text, since the tokenizer has no pad_token to bring several to "
            f"one length, got {len(texts)}. Set tokenizer.pad_token = tokenizer.eos_token."
        )
    limit = int(getattr(tokenizer, "model_max_length", 0))
    long = 0 < limit < 10**9  # transformers writes "no limit" as a huge number
    batch: Mapping[str, Any] = tokenizer(
        texts, return_tensors="pt", padding=len(texts) > 1, truncation=long
    )
    return batch
