"""Set TeaCache for a model: the polynomial of its drift, and the threshold for a share of steps.

    calibration = calibrate_drift(model, lambda: pipeline(prompts))
    with calibration.teacache(share=0.5)(model) as run:      # computes about half of the steps
        pipeline(prompt)

TeaCache guesses how far a model's output moves from how far a signal at its input moves. How the
one follows from the other belongs to the model; the official code has polynomials of degree 4 for
some, fitted by the authors. Here it is fitted to samplings of your own, without a cache, by least
squares over all steps.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from attending.interventions.cache_schedule import Decider
from attending.interventions.drift_schedule import DriftDecider, DriftSteps, relative_l1
from attending.interventions.feature_cache import (
    BlockSignal,
    ProfilingCache,
    TeaCache,
)
from attending.interventions.intervention import InterventionWarning


@dataclass(frozen=True)
class DriftCalibration:
    """What samplings without a cache showed.

    Attributes:
        coefficients: of the polynomial from the signal's drift to the output's, highest power
            first.
        traces: for each generation and branch, the drift of the signal at each step but the first.
        signal: whose drift it is.
        error: root mean square of what the polynomial misses, as a share of the output's drift.
    """

    coefficients: tuple[float, ...]
    traces: tuple[tuple[float, ...], ...]
    signal: Literal["modulated", "input"] | BlockSignal
    error: float

    def share(self, threshold: float) -> float:
        """The share of the steps that TeaCache computes at a threshold, on these samplings.

        The first and the last step are computed in any case.
        """
        computed = total = 0
        for trace in self.traces:
            decider = DriftDecider(DriftSteps(threshold, self.coefficients, until=len(trace)))
            drifts = (None, *trace)
            computed += sum(decider.decide(step, drift) for step, drift in enumerate(drifts))
            total += len(drifts)
        return computed / total

    def threshold(self, share: float) -> float:
        """The lowest threshold at which at most so large a share is computed.

        Raises:
            ValueError: if no threshold computes so little, as first and last steps are computed.
        """
        low, high = 0.0, 1.0
        while self.share(high) > share:
            low, high = high, 2 * high
            if high > 1e9:
                raise ValueError(
                    f"share: expected at least {self.share(high):.3f}, which the first and last "
                    f"steps take, got {share}."
                )
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if self.share(middle) > share else (low, middle)
        return high

    def teacache(self, share: float, *, last: int | None = None) -> TeaCache:
        """TeaCache with this polynomial, set to compute about a share of the steps.

        Args:
            share: of all steps, between 0 and 1.
            last: the last step, `steps - 1`, which TeaCache always computes; by default that of
                the samplings.
        """
        until = max(len(trace) for trace in self.traces) if last is None else last
        return TeaCache(self.threshold(share), self.coefficients, self.signal, until=until)


def calibrate_drift(
    model: nn.Module,
    run: Callable[[], object],
    *,
    signal: Literal["modulated", "input"] | BlockSignal = "modulated",
    degree: int = 4,
    steps: int | None = None,
) -> DriftCalibration:
    """Fit TeaCache's polynomial to a model.

    Args:
        model: the denoiser.
        run: samples with it, without a cache; some different prompts are better than one.
        signal: as in `TeaCache`.
        degree: of the polynomial; TeaCache's is 4. Less for few samplings.
        steps: as in `TeaCache`.

    Raises:
        ValueError: if the samplings have fewer steps, all together, than the polynomial has
            coefficients.
    """
    recording = _Recording()
    cache = ProfilingCache(None, recording, signal=signal, steps=steps)

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        recording.finish(output)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InterventionWarning)  # it reuses nothing on purpose
        with torch.no_grad(), cache(model):
            handle = model.register_forward_hook(keep)
            try:
                run()
            finally:
                handle.remove()
    pairs = [pair for trace in recording.traces for pair in trace.moves]
    if len(pairs) <= degree:
        raise ValueError(
            f"run: expected samplings of more than {degree} steps after the first, got "
            f"{len(pairs)}. Sample more, or take a smaller degree."
        )
    drifts, moves = torch.tensor(pairs, dtype=torch.float64).T
    powers = drifts[:, None] ** torch.arange(degree, -1, -1)
    found = torch.linalg.lstsq(powers, moves[:, None], driver="gelsd").solution[:, 0]
    error = (powers @ found - moves).square().mean().sqrt() / moves.square().mean().sqrt()
    traces = [tuple(drift for drift, _ in trace.moves) for trace in recording.traces if trace.moves]
    return DriftCalibration(tuple(found.tolist()), tuple(traces), signal, float(error))


@dataclass(eq=False)
class _Trace:
    """The moves of signal and output in one generation and branch."""

    signal: Tensor | None = None
    output: Tensor | None = None
    drift: float | None = None
    moves: list[tuple[float, float]] = field(default_factory=list)

    def see(self, signal: Tensor) -> None:
        self.drift = None if self.signal is None else relative_l1(self.signal, signal)
        self.signal = signal.detach().clone()

    def finish(self, output: Tensor) -> None:
        if self.drift is not None and self.output is not None:
            self.moves.append((self.drift, relative_l1(self.output, output)))
        self.output = output.detach().clone()


class _Recording:
    """A schedule that computes everything and writes down what it sees."""

    def __init__(self) -> None:
        self.traces: list[_Trace] = []
        self._current: _Trace | None = None

    @property
    def needs_signal(self) -> bool:
        return True

    def start(self) -> Decider:
        trace = _Trace()
        self.traces.append(trace)

        def decide(step: int, signal: Tensor | None = None) -> bool:
            assert signal is not None
            trace.see(signal)
            self._current = trace
            return True

        return decide

    def finish(self, output: Any) -> None:
        """The forward whose signal was last seen has returned this."""
        found = getattr(output, "sample", output)
        found = found[0] if isinstance(found, tuple | list) else found
        if self._current is not None and isinstance(found, Tensor):
            self._current.finish(found)
