"""When a feature cache computes and when it reuses: one kind of object for all methods.

A `CacheSchedule` answers one question at each call of the model: compute, or reuse what was stored?

| schedule | computes | source |
| --- | --- | --- |
| `FixedSteps((6, 18, 26))` | the steps of a list | ProfilingDiT's code for HunyuanVideo |
| `UniformSteps(6)` | every sixth step | FORA, Delta-DiT, ProfilingDiT's code for Wan2.1 |
| `DecreasingSteps(50)` | with gaps that shrink from `longest` to `shortest` | ProfilingDiT, eq. 15 |
| `DecreasingSteps(50, inverse=True)` | the same gaps, the other way round | its ablation |
| `DriftSteps(0.1)` | when a signal has drifted far enough | TeaCache |

Each has a warm-up, in which every step is computed, and each computes the first step after it: so
nothing is ever reused that was not stored. (The official code of ProfilingDiT crashes where the
first step of the list comes later.) A step is a call of the model in one branch of the guidance, so
a sampler of second order has two for each of its own.

>>> DecreasingSteps(50).computed(50)[6:]
(6, 18, 27, 34, 39, 43, 46, 48)
>>> FixedSteps((6, 18, 26, 32, 38, 42, 46, 48), warmup=6).computed(50)[6:]
(6, 18, 26, 32, 38, 42, 46, 48)
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor


class Decider(Protocol):
    """The decisions of one generation, in one branch."""

    def __call__(self, step: int, signal: Tensor | None = None, /) -> bool:
        """Whether to compute this step. Called once for each step, in order."""
        ...


@runtime_checkable
class CacheSchedule(Protocol):
    """When to compute. Frozen; what a generation has to remember is in the `Decider`."""

    @property
    def needs_signal(self) -> bool:
        """Whether decisions go by a signal from inside the model."""
        ...

    def start(self) -> Decider:
        """The decisions of a new generation."""
        ...


@dataclass(frozen=True)
class FixedSteps:
    """Compute the steps of a list, and the warm-up.

    Attributes:
        steps: which to compute, from 0.
        warmup: how many first steps are computed in any case. The one after them is, too.

    Raises:
        ValueError: for negative numbers.
    """

    steps: tuple[int, ...]
    warmup: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", tuple(self.steps))
        _check_whole("warmup", self.warmup, 0)
        for step in self.steps:
            _check_whole("steps", step, 0)

    @property
    def needs_signal(self) -> bool:
        """No."""
        return False

    def start(self) -> Decider:
        """Decisions by the list."""
        steps = {*self.steps, self.warmup}
        return lambda step, _=None: step < self.warmup or step in steps

    def computed(self, total: int) -> tuple[int, ...]:
        """Which of `total` steps are computed."""
        return _computed(self, total)


@dataclass(frozen=True)
class UniformSteps:
    """Compute every `interval`-th step after the warm-up.

    Attributes:
        interval: 1 computes every step.
        warmup: how many first steps are computed in any case; the interval is counted from here.

    Raises:
        ValueError: for an interval below 1 or a negative warm-up.
    """

    interval: int
    warmup: int = 0

    def __post_init__(self) -> None:
        _check_whole("interval", self.interval, 1)
        _check_whole("warmup", self.warmup, 0)

    @property
    def needs_signal(self) -> bool:
        """No."""
        return False

    def start(self) -> Decider:
        """Decisions by the interval."""
        return lambda step, _=None: step < self.warmup or (step - self.warmup) % self.interval == 0

    def computed(self, total: int) -> tuple[int, ...]:
        """Which of `total` steps are computed."""
        return _computed(self, total)


@dataclass(frozen=True)
class DecreasingSteps:
    """Compute with gaps that shrink towards the end: ProfilingDiT's stepwise schedule.

    From `s = warmup` the next computed step is `s + round(T(s))`, where (eq. 15)

        T(s) = longest - (longest - shortest) (s - warmup) / (steps - warmup)

    The paper's set of steps (eq. 12, `s mod T(s) = 0`) is not well defined where T changes; its code
    has a list by hand. This greedy rule is ours; it gives the list up to 2 steps.

    Attributes:
        steps: of one generation.
        warmup: how many first steps are computed in any case; the paper's s0.
        longest: the first gap; Tmax.
        shortest: what the gap shrinks to; Tmin.
        inverse: mirror the steps, so that the gaps grow instead, and as many steps are computed.
            That the paper's inverse schedule is this mirror is inferred.

    Raises:
        ValueError: for gaps below 1, `shortest` above `longest`, or a warm-up that is not shorter
            than `steps`.
    """

    steps: int
    warmup: int = 6
    longest: float = 12.0
    shortest: float = 1.0
    inverse: bool = False

    def __post_init__(self) -> None:
        _check_whole("steps", self.steps, 1)
        _check_whole("warmup", self.warmup, 0)
        if self.warmup >= self.steps:
            raise ValueError(
                f"warmup: expected fewer than the {self.steps} steps, as there is nothing to cache "
                f"otherwise, got {self.warmup}."
            )
        if not 1 <= self.shortest <= self.longest:
            raise ValueError(
                f"longest, shortest: expected gaps with 1 <= shortest <= longest, got "
                f"{self.longest} and {self.shortest}."
            )

    @property
    def needs_signal(self) -> bool:
        """No."""
        return False

    @property
    def chosen(self) -> tuple[int, ...]:
        """The computed steps from the end of the warm-up on."""
        chosen, step = [], self.warmup
        while step < self.steps:
            chosen.append(step)
            through = (step - self.warmup) / (self.steps - self.warmup)
            step += max(1, round(self.longest - (self.longest - self.shortest) * through))
        if self.inverse:
            mirrored = (self.warmup + self.steps - step for step in reversed(chosen[1:]))
            chosen = [self.warmup, *mirrored]
        return tuple(chosen)

    def start(self) -> Decider:
        """Decisions by the rule."""
        chosen = set(self.chosen)
        return lambda step, _=None: step < self.warmup or step in chosen

    def computed(self, total: int) -> tuple[int, ...]:
        """Which of `total` steps are computed."""
        return _computed(self, total)


@dataclass(frozen=True)
class DriftSteps:
    """Compute when a signal has drifted far enough since the last computed step: TeaCache's rule.

    With the signal m of each step,

        d = mean |m[s] - m[s-1]| / mean |m[s-1]|        accumulated += polynomial(d)

    and the step is computed when `accumulated >= threshold`; then `accumulated = 0`. The m of every
    step counts, also of one that is not computed.

    Attributes:
        threshold: 0 computes every step.
        coefficients: of the polynomial, highest power first; (1, 0) is d itself. TeaCache fits them
            to each model, so that the polynomial of d is the drift of the model's output.
        warmup: how many first steps are computed in any case; at least 1.
        until: from this step on every step is computed; None if there is no such end. TeaCache
            computes the last step: `until = steps - 1`.

    Raises:
        ValueError: for a negative threshold, no coefficients, or a warm-up below 1.
    """

    threshold: float
    coefficients: tuple[float, ...] = (1.0, 0.0)
    warmup: int = 1
    until: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "coefficients", tuple(self.coefficients))
        if not self.threshold >= 0:
            raise ValueError(f"threshold: expected at least 0, got {self.threshold}.")
        if not self.coefficients:
            raise ValueError(
                "coefficients: expected at least one, highest power first, got none; (1, 0) takes "
                "the drift as it is."
            )
        _check_whole("warmup", self.warmup, 1)
        if self.until is not None:
            _check_whole("until", self.until, 0)

    @property
    def needs_signal(self) -> bool:
        """Yes."""
        return True

    def start(self) -> "DriftDecider":
        """Decisions by the drift."""
        return DriftDecider(self)


class DriftDecider:
    """The decisions of `DriftSteps` in one generation.

    Attributes:
        schedule: whose.
        accumulated: drift since the last computed step.
        drift: d of the last step, before the polynomial; None before the second step.
    """

    def __init__(self, schedule: DriftSteps) -> None:
        self.schedule = schedule
        self.accumulated = 0.0
        self.drift: float | None = None
        self._before: Tensor | None = None

    def __call__(self, step: int, signal: Tensor | None = None) -> bool:
        """Whether to compute this step, whose signal has any shape, the same in all steps."""
        if signal is None:
            raise ValueError(
                "signal: expected a tensor, as the schedule goes by its drift; got None."
            )
        schedule, before = self.schedule, self._before
        self._before = signal = signal.detach().clone()
        if before is not None:
            self.drift = relative_l1(before, signal)
        always = step < schedule.warmup or (schedule.until is not None and step >= schedule.until)
        if always or self.drift is None:
            self.accumulated = 0.0
            return True
        for power, coefficient in enumerate(reversed(schedule.coefficients)):
            self.accumulated += coefficient * self.drift**power
        if self.accumulated < schedule.threshold:
            return False
        self.accumulated = 0.0
        return True


def relative_l1(before: Tensor, after: Tensor) -> float:
    """How far a tensor moved: mean |after - before| / mean |before|, 0 for nothing from nothing."""
    moved = (after.double() - before.double()).abs().mean()
    size = before.double().abs().mean()
    return float(moved / size) if size > 0 else (float("inf") if moved > 0 else 0.0)


def runs_of(blocks: Iterable[int]) -> tuple[tuple[int, int], ...]:
    """The maximal runs of consecutive numbers, as (first, last).

    >>> runs_of([7, 1, 3, 4, 5])
    ((1, 1), (3, 5), (7, 7))
    """
    runs: list[tuple[int, int]] = []
    for block in sorted(set(blocks)):
        if runs and block == runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], block)
        else:
            runs.append((block, block))
    return tuple(runs)


def block_calls(computed: Sequence[int], steps: int, blocks: int, cached: int) -> int:
    """How many blocks run in a generation, for the arithmetic of what a schedule may save.

    ProfilingDiT on Wan2.1: 28 of 40 blocks, every sixth of 50 steps after 6.

    >>> calls = block_calls(UniformSteps(6, warmup=6).computed(50), 50, blocks=40, cached=28)
    >>> calls, round(50 * 40 / calls, 3)
    (992, 2.016)

    Args:
        computed: the steps at which all blocks run.
        steps: all of them.
        blocks: of the model.
        cached: how many of those are reused at the other steps.
    """
    return steps * blocks - (steps - len(set(computed))) * cached


def _computed(schedule: CacheSchedule, total: int) -> tuple[int, ...]:
    decide = schedule.start()
    return tuple(step for step in range(total) if decide(step))


def _check_whole(name: str, number: int, least: int) -> None:
    if isinstance(number, bool) or not isinstance(number, int) or number < least:
        raise ValueError(f"{name}: expected whole numbers from {least}, got {number!r}.")
