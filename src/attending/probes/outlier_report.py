"""What `find_outliers` found: plain data, a table for people, JSON, and a frame."""

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import pandas

from attending.probes.outlier_rules import Criterion


@dataclass(frozen=True)
class OutlierToken:
    """A token with an outlier: where it is, and how far out.

    Attributes:
        sequence: which sequence, counted over all batches.
        position: among the tokens that are no padding, from 0.
        token: its id, if the model was given `input_ids`.
        value: of activations the value that is furthest out, with its sign; of attention the share
            `R / T` that the key receives, as a mean over the heads.
        channel: where that value is; None of attention.
    """

    sequence: int
    position: int
    token: int | None
    value: float
    channel: int | None = None


@dataclass
class ActivationRecord:
    """Hidden states at one place, over all sequences.

    Attributes:
        name: of the module: a block, whose output it is, or a down-projection, whose input it is.
        where: "block" (the residual stream) or "down_projection".
        largest: the largest magnitude of all.
        mean, median, threshold: of the magnitudes of a sequence, averaged over the sequences.
        tokens: the outlier tokens.
        channels: the outlier channels, with their largest magnitude among the outliers.
        top: the three largest magnitudes of a sequence, averaged over the sequences.
        by_channel: the largest magnitude of every channel over all tokens: plot it to see the
            channels that stand out.
    """

    name: str
    where: Literal["block", "down_projection"]
    largest: float = 0.0
    mean: float = 0.0
    median: float = 0.0
    threshold: float = 0.0
    tokens: list[OutlierToken] = field(default_factory=list)
    channels: dict[int, float] = field(default_factory=dict)
    top: list[float] = field(default_factory=list)
    by_channel: list[float] = field(default_factory=list)


@dataclass
class WeightRecord:
    """One linear layer.

    Attributes:
        largest_ratio: the largest `max |w| / mean |w|` of its rows and columns.
        median_ratio: the median of all of them.
        rows, columns: output and input features whose ratio is an outlier, with it.
    """

    name: str
    largest_ratio: float
    median_ratio: float
    rows: dict[int, float]
    columns: dict[int, float]


@dataclass
class AttentionRecord:
    """One attention module, over all sequences.

    Attributes:
        largest_share: the largest `R / T` of a key.
        head_share: the share of each head's attention that goes to the outliers, mean over the
            sequences.
        tokens: the keys that receive at least `attention_share * T`.
        fair_tokens: the keys whose mean attention from the queries that see them is at least
            `attention_share` (`value` is that mean). The last keys are judged by few queries.
    """

    name: str
    largest_share: float = 0.0
    head_share: list[float] = field(default_factory=list)
    tokens: list[OutlierToken] = field(default_factory=list)
    fair_tokens: list[OutlierToken] = field(default_factory=list)


@dataclass(frozen=True)
class Overlap:
    """How much the kinds coincide. None where there is nothing to divide by.

    Attributes:
        activation_in_attention: of the positions with an activation outlier in any block, the share
            that are attention outliers in any layer.
        attention_in_activation: the other way round (the paper reports about 95 % of positions).
        channels_in_weight_rows: of the outlier channels of the residual stream, the share that are
            outlier rows of a down-projection (the paper reports 100 %).
        inputs_in_weight_columns: of the outlier channels in the inputs of down-projections, the
            share that are outlier columns of that layer.
    """

    activation_in_attention: float | None
    attention_in_activation: float | None
    channels_in_weight_rows: float | None
    inputs_in_weight_columns: float | None


@dataclass
class OutlierReport:
    """What `find_outliers` found. Print it, or use `to_frame()`, `to_json(path)` and the lists.

    Attributes:
        criterion, tau, attention_share, weight_factor: what counted as an outlier.
        activations: a record for every block, then one for every down-projection.
        weights: a record for every linear layer in the blocks.
        attention: a record for every self-attention module.
        overlap: how much they coincide.
        channels: the outlier channels of the residual stream, and in how many blocks each is one.
            With the criterion "magnitude", as in LLM.int8, only those of a quarter of the blocks.
        sequences, tokens: what was looked at, without padding.
        skipped: attention modules without a record, and why.
    """

    criterion: Criterion
    tau: float
    attention_share: float
    weight_factor: float
    activations: list[ActivationRecord]
    weights: list[WeightRecord]
    attention: list[AttentionRecord]
    overlap: Overlap
    channels: dict[int, int]
    sequences: int
    tokens: int
    skipped: dict[str, str]

    def to_rows(self) -> list[dict[str, object]]:
        """A row for each record: kind, name, `largest`, `reference` and number of outliers."""
        rows: list[dict[str, object]] = [
            {
                "kind": "activation" if one.where == "block" else "down-projection input",
                "name": one.name,
                "largest": one.largest,
                "reference": one.median if self.criterion == "median" else one.mean,
                "outliers": len({(token.sequence, token.position) for token in one.tokens}),
                "where": _channels(one.channels),
            }
            for one in self.activations
        ]
        rows += [
            {
                "kind": "weight",
                "name": weight.name,
                "largest": weight.largest_ratio,
                "reference": weight.median_ratio,
                "outliers": len(weight.rows) + len(weight.columns),
                "where": " ".join(
                    filter(
                        None, (_channels(weight.rows, "row "), _channels(weight.columns, "col "))
                    )
                ),
            }
            for weight in self.weights
        ]
        rows += [
            {
                "kind": "attention",
                "name": layer.name,
                "largest": layer.largest_share,
                "reference": sum(layer.head_share) / max(len(layer.head_share), 1),
                "outliers": len({(token.sequence, token.position) for token in layer.tokens}),
                "where": _positions(layer.tokens),
            }
            for layer in self.attention
        ]
        return rows

    def to_frame(self) -> "pandas.DataFrame":
        """The rows of `to_rows` as a frame."""
        try:
            import pandas
        except ImportError as error:
            raise ImportError(
                'OutlierReport.to_frame needs pandas: pip install "attending[frames]". '
                "to_rows and to_json work without it."
            ) from error
        return pandas.DataFrame(self.to_rows())

    def to_json(self, path: str | Path | None = None) -> str:
        """Everything as JSON text, also written to `path` if one is given; NaN becomes null."""
        text = json.dumps(_finite(dataclasses.asdict(self)), indent=1, allow_nan=False)
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    def __str__(self) -> str:
        """The places with outliers, a line each, and the overlap."""
        with_outliers = [row for row in self.to_rows() if row["outliers"]]
        sequences = "1 sequence" if self.sequences == 1 else f"{self.sequences} sequences"
        lines = [
            f"{self.tokens} tokens in {sequences}; criterion {self.criterion!r}, "
            f"{len(with_outliers)} of {len(self.to_rows())} places with outliers"
        ]
        for row in with_outliers:
            lines.append(
                f"  {row['kind']:<21} {row['name']:<40} {row['outliers']:>5}  "
                f"{row['largest']:>10.4g} (reference {row['reference']:.4g})  {row['where']}"
            )
        if self.channels:
            lines.append("outlier channels, and in how many blocks: " + _counts(self.channels))
        for name, share in dataclasses.asdict(self.overlap).items():
            shown = "nothing to compare" if share is None else f"{share:.0%}"
            lines.append(f"overlap, {name.replace('_', ' ')}: {shown}")
        lines += [f"skipped {name}: {why}" for name, why in self.skipped.items()]
        return "\n".join(lines)


def _channels(values: dict[int, float], word: str = "channel ", most: int = 3) -> str:
    first = sorted(values, key=lambda index: -values[index])[:most]
    more = "" if len(values) <= most else f" and {len(values) - most} more"
    return f"{word}{', '.join(map(str, first))}{more}" if first else ""


def _positions(tokens: list[OutlierToken], most: int = 5) -> str:
    positions = sorted({token.position for token in tokens})
    more = "" if len(positions) <= most else f" and {len(positions) - most} more"
    return f"position {', '.join(map(str, positions[:most]))}{more}" if positions else ""


def _counts(channels: dict[int, int], most: int = 8) -> str:
    first = sorted(channels, key=lambda index: (-channels[index], index))[:most]
    more = "" if len(channels) <= most else f" and {len(channels) - most} more"
    return ", ".join(f"{index} ({channels[index]})" for index in first) + more


def _finite(data: Any) -> Any:
    """The same data with None for what JSON cannot hold: a broken model can be written down."""
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    return [_finite(value) for value in data] if isinstance(data, list) else data
