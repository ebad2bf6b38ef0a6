"""What a user may give as inputs, as batches that a model takes."""

from collections.abc import Callable, Iterable, Mapping, Sized
from itertools import islice
from typing import Any

from torch import nn

from attending.taps import running

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
    batches = running.as_batches(inputs)
    count = len(batches) if isinstance(batches, Sized) else None
    if count is not None and max_batches is not None:
        count = min(count, max_batches)
    return islice(batches, max_batches), count


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
