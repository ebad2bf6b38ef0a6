"""What the monitor measured, as plain numbers."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

# Of a layer, over its heads. The end of a name says what is taken over heads and over layers.
LAYER_SCALARS = (
    "entropy_min",
    "entropy_mean",
    "entropy_max",
    "normalized_entropy_min",
    "normalized_entropy_mean",
    "normalized_entropy_max",
    "sink_mean",
    "sink_max",
    "first_token_mean",
    "first_token_max",
    "logit_max",
)


@dataclass(frozen=True)
class LayerMeasurement:
    """Attention of one module on the probe batch.

    Every statistic is first taken for each head, then over the heads; padding is left out.

    Attributes:
        name: of the module, with `#k` where a module calls attention several times.
        layer: its number, as in `attending.tap`.
        kind: whether the keys come from the same sequence.
        entropy_min, entropy_mean, entropy_max: Shannon entropy in nats, averaged over the queries.
        normalized_entropy_min, normalized_entropy_mean, normalized_entropy_max: the same over the
            log of the number of keys a query sees, averaged over the queries that see several; 1
            looks everywhere alike, as whoever sees but one key does.
        sink_mean, sink_max: the largest mean attention that one key receives from the queries
            that see it, judged among keys that a quarter of the queries see.
        first_token_mean, first_token_max: mean attention to the first token.
        logit_max: the largest score `scale * q . k + bias` of a visible pair, in nats.
        entropy_min_head, logit_max_head: the heads in which these two are found.
    """

    name: str
    layer: int | None
    kind: Literal["self", "cross"]
    entropy_min: float
    entropy_mean: float
    entropy_max: float
    normalized_entropy_min: float
    normalized_entropy_mean: float
    normalized_entropy_max: float
    sink_mean: float
    sink_max: float
    first_token_mean: float
    first_token_max: float
    logit_max: float
    entropy_min_head: int
    logit_max_head: int


@dataclass(frozen=True)
class WeightMeasurement:
    """One weight of an attention module.

    Attributes:
        name: of the parameter, as `model.layers.0.self_attn.q_proj.weight`.
        layer: the number of its layer.
        norm: spectral norm of the weight after the step.
        update_norm: spectral norm of what the step changed; None if the weight before the step is
            not known.
    """

    name: str
    layer: int | None
    norm: float
    update_norm: float | None

    @property
    def update_ratio(self) -> float | None:
        """`||W_t - W_(t-1)||_2 / ||W_t||_2`."""
        if self.update_norm is None:
            return None
        if self.norm == 0.0:
            return math.inf if self.update_norm else 0.0
        return self.update_norm / self.norm


@dataclass(frozen=True)
class Measurement:
    """All that was measured at one step.

    Attributes:
        step: steps of the optimizer that were done.
        layers: in the order in which the modules ran.
        weights: in the order of the model.
        seconds: what the measurement took.
    """

    step: int
    layers: tuple[LayerMeasurement, ...]
    weights: tuple[WeightMeasurement, ...]
    seconds: float

    def scalars(self, per_layer: bool = True) -> dict[str, float]:
        """The numbers by the names under which they are logged.

        Of the whole model, `attention/entropy_min` and the other names of `LayerMeasurement`: what
        ends in min, mean or max is the least, mean or largest over the layers. Of weights,
        `attention/weight_norm_max` and `attention/update_ratio_max`. Of one layer or weight,
        `attention/<its name>/...`.

        Args:
            per_layer: also the numbers of every layer and weight.
        """
        found: dict[str, float] = {}
        for name in LAYER_SCALARS:
            values = [getattr(layer, name) for layer in self.layers]
            found[f"attention/{name}"] = _over_layers(name, values)
        ratios = [weight.update_ratio for weight in self.weights]
        if self.weights:
            found["attention/weight_norm_max"] = _largest([w.norm for w in self.weights])
        if known := [ratio for ratio in ratios if ratio is not None]:
            found["attention/update_ratio_max"] = _largest(known)
        if not per_layer:
            return found
        for layer in self.layers:
            for name in LAYER_SCALARS:
                found[f"attention/{layer.name or 'model'}/{name}"] = getattr(layer, name)
        for weight, ratio in zip(self.weights, ratios, strict=True):
            found[f"attention/{weight.name}/norm"] = weight.norm
            if ratio is not None:
                found[f"attention/{weight.name}/update_ratio"] = ratio
        return found

    def layer_rows(self) -> list[dict[str, object]]:
        """A row for each layer."""
        return [{"step": self.step, **dataclasses.asdict(layer)} for layer in self.layers]

    def weight_rows(self) -> list[dict[str, object]]:
        """A row for each weight."""
        return [
            {"step": self.step, **dataclasses.asdict(weight), "update_ratio": weight.update_ratio}
            for weight in self.weights
        ]

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Measurement":
        """The measurement of which `dataclasses.asdict` made `data`."""
        return cls(
            step=data["step"],
            layers=tuple(LayerMeasurement(**layer) for layer in data["layers"]),
            weights=tuple(WeightMeasurement(**weight) for weight in data["weights"]),
            seconds=data["seconds"],
        )


def _over_layers(name: str, values: list[float]) -> float:
    if any(math.isnan(value) for value in values):
        return math.nan
    if name.endswith("_min"):
        return min(values)
    return max(values) if name.endswith("_max") else sum(values) / len(values)


def _largest(values: list[float]) -> float:
    return _over_layers("_max", values)
