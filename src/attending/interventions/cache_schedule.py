"""When a feature cache computes and when it reuses: one kind of object for all methods.

A `CacheSchedule` answers one question at each call of the model: compute, or reuse what was stored?

| schedule | computes | source |
| --- | --- | --- |
| `FixedSteps((6, 18, 26))` | the steps of a list | ProfilingDiT's code for HunyuanVideo |
| `UniformSteps(6)` | every sixth step | FORA, Delta-DiT, ProfilingDiT's code for Wan2.1 |
| `DecreasingSteps(50)` | with gaps that shrink | ProfilingDiT, eq. 15 |
| `DecreasingSteps(50, inverse=True)` | the same gaps, the other way round | its ablation |
| `DriftSteps(0.1)`, in `drift_schedule` | when a signal has drifted far enough | TeaCache |

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


@runtime_checkable
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
        check_whole("warmup", self.warmup, 0)
        for step in self.steps:
            check_whole("steps", step, 0)

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
        check_whole("interval", self.interval, 1)
        check_whole("warmup", self.warmup, 0)

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

    The paper's set of steps (eq. 12, `s mod T(s) = 0`) is not well defined where T changes; its
    code has a list by hand. This greedy rule is ours; it gives that list up to 2 steps.

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
        check_whole("steps", self.steps, 1)
        check_whole("warmup", self.warmup, 0)
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


def check_whole(name: str, number: int, least: int) -> None:
    """Raise ValueError for what is no whole number, or too small a one."""
    if isinstance(number, bool) or not isinstance(number, int) or number < least:
        raise ValueError(f"{name}: expected whole numbers from {least}, got {number!r}.")
