"""When a measurement is a warning, and what can be done about it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from statistics import median
from typing import Literal

from attending.diagnosis.thresholds import Thresholds
from attending.monitor.records import LayerMeasurement, Measurement

Kind = Literal["entropy", "logit", "growth", "not finite"]


class AttentionWarning(UserWarning):
    """Attention of a model in training has passed a limit of the monitor."""


@dataclass(frozen=True)
class Limits:
    """When the monitor warns. Change any: `Limits(logit=50.0)`.

    Attributes:
        entropy: the normalized entropy of a layer, averaged over its heads, is below this. Own
            choice, that of `attending.Thresholds.collapsed_entropy`: the papers on entropy collapse
            (Zhai et al. 2023, arXiv 2303.06296) show it and give no number. Single heads may be as
            sharp by design, so it is the mean that counts. 0 turns it off.
        logit: the largest attention logit of a layer exceeds this. The threshold from which
            QK-clip scales query and key weights down in the report on Kimi K2 (2025, arXiv
            2507.20534); from memory, not checked. `math.inf` turns it off.
        growth: the largest logit of a layer is this many times the median of its last `window`
            measurements. Own choice. `math.inf` turns it off.
        growth_from: growth is a warning only from this logit on, since logits that start near 0
            double many times on the way to a healthy model. Own choice, half of `logit`; above that
            it goes without saying.
        window: see `growth`; there is no warning before there are 3 measurements.
    """

    entropy: float = Thresholds.collapsed_entropy
    logit: float = 100.0
    growth: float = 2.0
    growth_from: float = 50.0
    window: int = 10

    def __post_init__(self) -> None:
        """Refuse what is no number."""
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, int | float) or math.isnan(value):
                raise ValueError(f"{field.name}: expected a number, got {value!r}.")
        if self.window < 3:
            raise ValueError(f"window: expected at least 3 measurements, got {self.window}.")


@dataclass(frozen=True)
class Alarm:
    """A limit that a layer has passed.

    Attributes:
        step: of the measurement.
        layer: name of the module.
        kind: which limit.
        value, limit: what was measured, and what it was compared with.
        text: all of it in words, with what to do.
    """

    step: int
    layer: str
    kind: Kind
    value: float
    limit: float
    text: str


def alarms(found: Measurement, history: Sequence[Measurement], limits: Limits) -> list[Alarm]:
    """The limits that a measurement passes.

    Args:
        found: the measurement.
        history: those before it.
        limits: what is too much.
    """
    recent = history[-int(limits.window) :]
    return [
        alarm
        for layer in found.layers
        for alarm in _of_layer(found.step, layer, _logits(layer.name, recent), limits)
    ]


def _of_layer(
    step: int, layer: LayerMeasurement, logits: list[float], limits: Limits
) -> list[Alarm]:
    name, top, share = layer.name or "the model", layer.logit_max, layer.normalized_entropy_mean
    if not math.isfinite(top) or not math.isfinite(layer.entropy_mean):
        text = (
            f"step {step}: attention of {name} is not finite (largest logit {top:g}). Go back to a "
            "checkpoint from before, and lower the learning rate or clip gradients."
        )
        return [Alarm(step, layer.name, "not finite", top, math.inf, text)]
    found: list[Alarm] = []
    if share < limits.entropy:
        text = (
            f"step {step}: attention of {name} collapses: its heads have {share:.3f} of the "
            f"largest entropy on average, below {limits.entropy:g} (the lowest, head "
            f"{layer.entropy_min_head}, {layer.entropy_min:.3f} nats). Entropy that falls in many "
            "heads goes before oscillation and divergence. Lower the learning rate or warm up for "
            f"longer; {_METHODS}, entropy-guided-attention (a loss that keeps entropy in a range)."
        )
        found.append(Alarm(step, layer.name, "entropy", share, limits.entropy, text))
    usual = median(logits) if len(logits) >= 3 else math.inf
    where = f"the largest attention logit of {name} is {top:.1f} (head {layer.logit_max_head})"
    if top > limits.logit:
        text = f"step {step}: {where}, above {limits.logit:g}. {_RUNS_AWAY}"
        found.append(Alarm(step, layer.name, "logit", top, limits.logit, text))
    elif top > max(limits.growth * usual, limits.growth_from):
        text = (
            f"step {step}: {where}, {top / usual if usual else math.inf:.1f} times the median of "
            f"the last {len(logits)} measurements, {usual:.1f}. {_RUNS_AWAY}"
        )
        found.append(Alarm(step, layer.name, "growth", top, limits.growth * usual, text))
    return found


_METHODS = "methods in `attending papers`: sigma-reparam (bounds the weights' spectral norms)"
_RUNS_AWAY = (
    "Logits that run away end in one-hot attention and overflow half precision. Lower the learning "
    f"rate, or bound the logits: normalise queries and keys, or {_METHODS}."
)


def _logits(name: str, history: Sequence[Measurement]) -> list[float]:
    return [
        layer.logit_max
        for found in history
        for layer in found.layers
        if layer.name == name and math.isfinite(layer.logit_max)
    ]
