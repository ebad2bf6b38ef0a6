"""What a diagnosis holds: plain data, that goes to JSON and back without loss of meaning."""

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import pandas

Severity = Literal["info", "warning", "critical"]


@dataclass(frozen=True)
class Statistic:
    """What a column of the table means."""

    name: str
    label: str
    unit: str
    description: str
    low: float | None  # the end of the range that means little; None where open
    high: float | None


STATISTICS: dict[str, Statistic] = {
    s.name: s
    for s in (
        Statistic(
            "entropy",
            "Entropy",
            "nats",
            "Shannon entropy of a row, averaged over the queries: 0 looks at one key.",
            0.0,
            None,
        ),
        Statistic(
            "normalized_entropy",
            "Normalized entropy",
            "share of log n",
            "Entropy over the log of the number of keys the query sees: 1 looks everywhere alike.",
            0.0,
            1.0,
        ),
        Statistic(
            "effective_keys",
            "Effective keys",
            "keys",
            "1 / sum p^2 of a row, averaged over the queries: how many keys it really looks at.",
            1.0,
            None,
        ),
        Statistic(
            "sink",
            "Strongest key",
            "share",
            "The largest mean attention that one key receives from the queries that see it.",
            0.0,
            1.0,
        ),
        Statistic(
            "first_token",
            "First token",
            "share",
            "Attention to the first token, averaged over the queries.",
            0.0,
            1.0,
        ),
        Statistic(
            "mean_distance",
            "Mean distance",
            "tokens",
            "How far away the attended keys are, averaged over the queries.",
            0.0,
            None,
        ),
        Statistic(
            "local_mass",
            "Local mass",
            "share",
            "Attention that stays within the query's bucket of the pooled map or the next ones.",
            0.0,
            1.0,
        ),
        Statistic(
            "block_density",
            "Block density",
            "share",
            "The smallest share of the visible buckets of the pooled map with 95 % of its mass.",
            0.0,
            1.0,
        ),
        Statistic(
            "similarity",
            "Most similar head",
            "CKA",
            "The largest linear CKA of the head's output with that of another head of the layer.",
            0.0,
            1.0,
        ),
        Statistic(
            "max_probability",
            "Max probability",
            "share",
            "The largest probability of a row, averaged over the queries (a head's confidence).",
            0.0,
            1.0,
        ),
    )
}


@dataclass(frozen=True)
class TopKey:
    """A key that a head looks at much: which token it is, and its mean attention."""

    token: str
    position: int  # among the tokens that are no padding
    sequence: int  # which sequence of the inputs
    importance: float  # mean attention from the queries that see the key


@dataclass
class LayerRecord:
    """One attention module: statistics of its heads over all inputs."""

    name: str  # qualified module name, with #k when a module calls attention several times
    layer: int | None
    kind: Literal["self", "cross"]
    is_causal: bool
    head_dim: int
    statistics: dict[str, list[float]]  # by name, one number per head
    class_mass: dict[str, list[float]] = field(default_factory=dict)  # by token class
    top_keys: list[list[TopKey]] = field(default_factory=list)  # per head, strongest first
    pooled: list[list[list[float]]] = field(default_factory=list)  # per head, size x size
    similarity: list[list[float]] = field(default_factory=list)  # heads x heads, linear CKA
    # Per head, the mean importance of a token where it is the strongest key of a sequence.
    strong_keys: dict[str, list[float]] = field(default_factory=dict)
    longest: int = 0  # keys of the longest sequence

    @property
    def num_heads(self) -> int:
        return len(next(iter(self.statistics.values()), []))


@dataclass
class HiddenRecord:
    """The output of one block: the hidden states that the next block reads."""

    name: str
    layer: int | None
    token_similarity: float  # mean cosine over pairs of different tokens
    effective_rank: float
    max_abs: float
    median_abs: float
    mean_abs: float
    max_token: str  # where the largest activation is
    max_position: int
    max_channel: int


@dataclass(frozen=True)
class Evidence:
    """One observation behind a finding."""

    where: str  # a module name, or "model"
    head: int | None
    value: float
    text: str


@dataclass(frozen=True)
class Finding:
    """Something worth knowing, with the threshold that made it one and where that comes from."""

    kind: str
    title: str
    severity: Severity
    summary: str
    threshold: str
    source: str
    evidence: tuple[Evidence, ...]
    methods: tuple[str, ...]  # slugs of the catalogue: papers that address it


@dataclass
class Diagnosis:
    """What `attending.diagnose` found: tables, findings, and ways to show them.

    Print it for the findings; `to_frame()` is one row per head, `to_json(path)` everything,
    `to_html(path)` a page that works offline. In a notebook it shows itself.
    """

    model: str  # a name for people
    model_class: str
    parameters: int
    attention_implementation: str
    sequences: int
    tokens: int  # without padding
    preview: list[str]  # the first tokens of the first sequence
    layers: list[LayerRecord]
    hidden: list[HiddenRecord]
    findings: list[Finding]
    thresholds: dict[str, float]
    version: str

    def to_frame(self) -> "pandas.DataFrame":
        """One row per head: module, layer, kind, head, its statistics and masses by token class."""
        try:
            import pandas
        except ImportError as error:
            raise ImportError(
                'Diagnosis.to_frame needs pandas: pip install "attending[frames]". '
                "to_json and to_html work without it."
            ) from error
        return pandas.DataFrame(self.to_rows())

    def to_rows(self) -> list[dict[str, object]]:
        """The rows of `to_frame`, without pandas."""
        rows: list[dict[str, object]] = []
        for layer in self.layers:
            for head in range(layer.num_heads):
                row: dict[str, object] = {
                    "name": layer.name,
                    "layer": layer.layer,
                    "kind": layer.kind,
                    "head": head,
                }
                row |= {name: values[head] for name, values in layer.statistics.items()}
                row |= {f"mass_{name}": mass[head] for name, mass in layer.class_mass.items()}
                rows.append(row)
        return rows

    def to_json(self, path: str | Path | None = None) -> str:
        """Everything as JSON text; also written to `path` if one is given. NaN is null there."""
        text = json.dumps(_finite(dataclasses.asdict(self)), indent=1, allow_nan=False)
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    @classmethod
    def from_json(cls, text: str) -> "Diagnosis":
        """The diagnosis that `to_json` wrote."""
        data = _or_nan(json.loads(text))
        data["layers"] = [
            LayerRecord(
                **layer | {"top_keys": [[TopKey(**k) for k in head] for head in layer["top_keys"]]}
            )
            for layer in data["layers"]
        ]
        data["hidden"] = [HiddenRecord(**hidden) for hidden in data["hidden"]]
        data["findings"] = [
            Finding(
                **finding
                | {
                    "evidence": tuple(Evidence(**e) for e in finding["evidence"]),
                    "methods": tuple(finding["methods"]),
                }
            )
            for finding in data["findings"]
        ]
        return cls(**data)

    def to_html(self, path: str | Path | None = None) -> str:
        """One self-contained page; also written to `path` if one is given."""
        from attending.report.html import render

        text = render(self)
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    def __str__(self) -> str:
        from attending.report.terminal import as_text

        return as_text(self)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        from attending.report.html import render_inline

        return render_inline(self)


_MAY_BE_NONE = {"layer", "head"}


def _finite(value: Any) -> Any:
    """JSON has no numbers that are not finite: None in their place."""
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _or_nan(value: Any) -> Any:
    """The other way round; what was infinite is NaN now."""
    if isinstance(value, dict):
        return {
            name: None if one is None and name in _MAY_BE_NONE else _or_nan(one)
            for name, one in value.items()
        }
    if isinstance(value, list):
        return [_or_nan(one) for one in value]
    return math.nan if value is None else value
