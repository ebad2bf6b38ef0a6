"""What the parts of a trial have in common.

A stage first compares the contenders (`compare`, once; also their warm-up), then runs with each of
them in every repeat (`repeat`), and at the end says what it found (`finish`).
"""

import random
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from attending.taps.running import first_tensor
from attending.trials.contenders import Contender
from attending.trials.samples import Measure, Samples

Found = dict[str, dict[str, Samples]]  # by contender and measure


class Stage(Protocol):
    """A part of a trial.

    Attributes:
        part: what the notes call it; "" if it has none.
        steps: so many of `compare` for each contender.
        same: whether all that a contender gave is that of the plain model, where that is known.
    """

    part: str
    steps: int
    same: dict[str, bool]

    def compare(self, contenders: Sequence[Contender], step: Callable[[str], None]) -> None:
        """Once, before the repeats; `step(name)` is called after each contender."""

    def repeat(self, contender: Contender, number: int) -> None:
        """Once in every repeat: what it does goes through `contender.run`."""

    def finish(self, contenders: Sequence[Contender]) -> tuple[list[Measure], Found]:
        """What was found, of the contenders that ran to the end; the first is the plain model."""


class Clock:
    """Time of a run: of the processor where one thread computes, else as it passes.

    With one thread, what else runs on the machine then counts as little as can be.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        single = device.type == "cpu" and torch.get_num_threads() == 1
        self._read = time.process_time if single else time.perf_counter
        self.words = "processor time of one thread" if single else "wall-clock time"

    def read(self) -> float:
        """Seconds, after all that the device was given is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()
        return self._read()


def speed(name: str, label: str, unit: str, what: str) -> Measure:
    """The measure of how fast something is."""
    return Measure(name, label, f"{unit}/s", what, "higher", "median", "repeat")


def memory(name: str, label: str, what: str) -> Measure:
    """The measure of the peak memory of something."""
    words = (
        f"The most bytes that {what} holds at once beyond weights and inputs, as PyTorch's "
        "allocator counts them."
    )
    return Measure(name, label, "bytes", words, "lower", "median", "repeat")


def shuffled(contenders: Sequence[Contender], seed: int) -> list[Contender]:
    """Another order in every repeat, so that a drift of the machine hits all alike."""
    order = list(contenders)
    random.Random(seed).shuffle(order)
    return order


def over_repeats(values: Sequence[Sequence[float]]) -> Samples:
    """A sample per text or item: its mean over the repeats."""
    return Samples(tuple(sum(own) / len(own) for own in zip(*values, strict=True)))


def device_of_batches(batches: Sequence[Any]) -> torch.device:
    """Where the first tensor of the batches is."""
    for batch in batches:
        tensor = first_tensor(batch)
        if tensor is not None:
            return tensor.device
    return torch.device("cpu")
