"""What a column of a trial means, and how its samples become a value with a spread.

A sample is the measure of one sequence (quality) or of one repeat (speed). All contenders see the
same sequences and the same repeats, so a change against plain is paired: sample by sample, before
it is averaged. That takes out what is hard about a sequence, or slow about a moment.
"""

import math
import statistics
from dataclasses import dataclass
from typing import Literal

Average = Literal["mean", "geometric mean", "median"]


@dataclass(frozen=True)
class Measure:
    """A column of the table.

    Attributes:
        name: in `Trial.to_frame` and JSON.
        label: for people.
        unit: of the values; "" for a number without one.
        description: what it is, in a sentence or two.
        better: which way is better; None where neither is as such.
        average: over the samples. "mean": the change is a difference and the spread a standard
            error. "geometric mean", for what multiplies, such as perplexity: the change is a ratio.
            "median", for what a busy machine disturbs: the change is the median ratio and the
            spread half the range.
        over: what one sample is: "sequence", "text", "item" or "repeat".
        against_plain: whether the value itself says how far this is from plain.
    """

    name: str
    label: str
    unit: str
    description: str
    better: Literal["higher", "lower"] | None = None
    average: Average = "mean"
    over: str = "repeat"
    against_plain: bool = False

    @property
    def compares(self) -> Literal["difference", "ratio"]:
        """How a change against plain is said."""
        return "difference" if self.average == "mean" else "ratio"


@dataclass(frozen=True)
class Samples:
    """The samples of one measure and one contender, and how much each counts (None: alike)."""

    values: tuple[float, ...]
    weights: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Estimate:
    """An average of samples, and its spread; None where there is only one sample."""

    value: float
    spread: float | None


def estimate(samples: Samples, average: Average) -> Estimate:
    """The average of the samples.

    The spread of a mean `m = sum w x / sum w` is its standard error
    `sqrt(n / (n - 1) sum w^2 (x - m)^2) / sum w`; a geometric mean is the exponential of the mean
    of the logarithms, and its spread is `m` times the standard error of those; the spread of a
    median is half the range.

    Args:
        samples: at least one.
        average: which.
    """
    if average == "median":
        values = samples.values
        spread = (max(values) - min(values)) / 2 if len(values) > 1 else None
        return Estimate(statistics.median(values), spread)
    if average == "geometric mean":
        inner = estimate(Samples(tuple(map(_log, samples.values)), samples.weights), "mean")
        value = _exp(inner.value)
        return Estimate(value, None if inner.spread is None else value * inner.spread)
    return _mean(samples)


def change(samples: Samples, plain: Samples, average: Average) -> Estimate | None:
    """What changed against plain, paired: a difference for means, else a ratio.

    Returns:
        None if the two do not have the same samples.
    """
    if len(samples.values) != len(plain.values) or not samples.values:
        return None
    pairs = list(zip(samples.values, plain.values, strict=True))
    if average == "mean":
        return _mean(Samples(tuple(a - b for a, b in pairs), samples.weights))
    return estimate(Samples(tuple(_ratio(a, b) for a, b in pairs), samples.weights), average)


def _mean(samples: Samples) -> Estimate:
    values = samples.values
    weights = samples.weights or (1.0,) * len(values)
    total, n = sum(weights), len(values)
    value = sum(w * x for w, x in zip(weights, values, strict=True)) / total
    if n < 2:
        return Estimate(value, None)
    squares = sum((w * (x - value)) ** 2 for w, x in zip(weights, values, strict=True))
    return Estimate(value, math.sqrt(squares * n / (n - 1)) / total)


def _ratio(one: float, other: float) -> float:
    if other == 0:
        return 1.0 if one == 0 else math.inf
    return one / other


def _log(value: float) -> float:
    return -math.inf if value == 0 else math.log(value) if value > 0 else math.nan


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
