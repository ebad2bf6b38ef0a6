"""The schedule of a feature cache that goes by what happens: TeaCache's accumulated drift."""

from dataclasses import dataclass

from torch import Tensor

from attending.interventions.cache_schedule import check_whole


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
        check_whole("warmup", self.warmup, 1)
        if self.until is not None:
            check_whole("until", self.until, 0)

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
        before = self._before
        self._before = signal = signal.detach().clone()
        return self.decide(step, None if before is None else relative_l1(before, signal))

    def decide(self, step: int, drift: float | None) -> bool:
        """The same from d itself; None at the first step."""
        schedule, self.drift = self.schedule, drift
        always = step < schedule.warmup or (schedule.until is not None and step >= schedule.until)
        if always or drift is None:
            self.accumulated = 0.0
            return True
        for power, coefficient in enumerate(reversed(schedule.coefficients)):
            self.accumulated += coefficient * drift**power
        if self.accumulated < schedule.threshold:
            return False
        self.accumulated = 0.0
        return True


def relative_l1(before: Tensor, after: Tensor) -> float:
    """How far a tensor moved: mean |after - before| / mean |before|, 0 for nothing from nothing."""
    before, after = before.detach().double(), after.detach().double()
    moved, size = (after - before).abs().mean(), before.abs().mean()
    return float(moved / size) if size > 0 else (float("inf") if moved > 0 else 0.0)
