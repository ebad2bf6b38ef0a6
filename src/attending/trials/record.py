"""What a trial holds: plain data, that goes to JSON and back."""

import dataclasses
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from attending.trials.samples import Estimate, Measure, Samples, change, estimate

if TYPE_CHECKING:
    import pandas

Status = Literal["ran", "not applicable", "failed"]


@dataclass
class TrialRow:
    """One contender: the plain model, a method, or a stack of methods.

    Attributes:
        name: as it was called.
        methods: what it consists of, the outermost first; empty for the plain model.
        status: "not applicable" where a method refused the model, "failed" where it broke.
        notes: why, and what its blocks warned of.
        samples: by the name of the measure; empty if it did not run to the end.
        counts: what its methods counted in their last block.
        texts: the first of what it wrote.
    """

    name: str
    methods: list[str]
    status: Status = "ran"
    notes: list[str] = field(default_factory=list)
    samples: dict[str, Samples] = field(default_factory=dict)
    counts: dict[str, float] = field(default_factory=dict)
    texts: list[str] = field(default_factory=list)


@dataclass
class Trial:
    """What `attending.trial` found: a row per contender, the plain model first.

    Print it for the table; `to_frame()` has it as a frame, `to_json(path)` every sample,
    `to_html(path)` a page that works offline. In a notebook it shows itself.

    Attributes:
        model: a name for people.
        model_class: of the model.
        parameters: how many.
        device: where it ran.
        inputs: what it ran on, in words.
        repeats: how often each contender was timed.
        seed: of the order of the contenders, and of sampled text.
        clock: what the times are.
        measures: the columns.
        rows: the contenders.
        prompts: what the texts of the rows go on from.
        version: of attending.
    """

    model: str
    model_class: str
    parameters: int
    device: str
    inputs: str
    repeats: int
    seed: int
    clock: str
    measures: list[Measure]
    rows: list[TrialRow]
    prompts: list[str]
    version: str

    @property
    def plain(self) -> TrialRow:
        """The row of the plain model."""
        return self.rows[0]

    def __getitem__(self, name: str) -> TrialRow:
        """The row of that name."""
        for row in self.rows:
            if row.name == name:
                return row
        names = ", ".join(repr(row.name) for row in self.rows)
        raise KeyError(f"no contender {name!r}; there are {names}")

    def __iter__(self) -> Iterator[TrialRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def estimate(self, row: TrialRow | str, measure: Measure | str) -> Estimate | None:
        """The value of a cell with its spread; None where there is none."""
        row, measure = self._row(row), self._measure(measure)
        samples = row.samples.get(measure.name)
        return estimate(samples, measure.average) if samples and samples.values else None

    def change(self, row: TrialRow | str, measure: Measure | str) -> Estimate | None:
        """What a cell is against plain, paired: a difference or a ratio, as the measure says.

        Returns:
            None where there is nothing to compare, or where the value itself compares.
        """
        row, measure = self._row(row), self._measure(measure)
        if measure.against_plain:
            return None
        samples, plain = row.samples.get(measure.name), self.plain.samples.get(measure.name)
        if samples is None or plain is None:
            return None
        return change(samples, plain, measure.average)

    def to_rows(self) -> list[dict[str, object]]:
        """The rows of `to_frame`, without pandas."""
        rows: list[dict[str, object]] = []
        for row in self.rows:
            cells: dict[str, object] = {
                "name": row.name,
                "methods": " + ".join(row.methods),
                "status": row.status,
                "note": "; ".join(row.notes),
            }
            for measure in self.measures:
                own, against = self.estimate(row, measure), self.change(row, measure)
                name = measure.name
                cells[name] = math.nan if own is None else own.value
                cells[f"{name}_spread"] = _spread(own)
                if measure.against_plain:
                    continue
                cells[f"{name}_{measure.compares}"] = math.nan if against is None else against.value
                cells[f"{name}_{measure.compares}_spread"] = _spread(against)
            rows.append(cells)
        return rows

    def to_frame(self) -> "pandas.DataFrame":
        """One row per contender: each measure, its spread, and its change against plain."""
        try:
            import pandas
        except ImportError as error:
            raise ImportError(
                'Trial.to_frame needs pandas: pip install "attending[frames]". to_rows, to_json '
                "and to_html work without it."
            ) from error
        return pandas.DataFrame(self.to_rows())

    def to_json(self, path: str | Path | None = None) -> str:
        """Everything as JSON text; also written to `path` if one is given.

        Numbers that are not finite are the strings "nan", "inf" and "-inf" there.
        """
        text = json.dumps(_written(dataclasses.asdict(self)), indent=1, allow_nan=False)
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    @classmethod
    def from_json(cls, text: str) -> "Trial":
        """The trial that `to_json` wrote."""
        data = json.loads(text)
        measures = [Measure(**measure) for measure in data["measures"]]
        rows = [
            TrialRow(
                **row
                | {
                    "samples": {
                        name: Samples(
                            tuple(map(float, one["values"])),
                            None if one["weights"] is None else tuple(map(float, one["weights"])),
                        )
                        for name, one in row["samples"].items()
                    },
                    "counts": {name: float(value) for name, value in row["counts"].items()},
                }
            )
            for row in data["rows"]
        ]
        return cls(**data | {"measures": measures, "rows": rows})

    def to_html(self, path: str | Path | None = None) -> str:
        """One self-contained page; also written to `path` if one is given."""
        from attending.report.trial_html import render

        text = render(self)
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    def __str__(self) -> str:
        from attending.report.trial_terminal import as_text

        return as_text(self)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        from attending.report.trial_html import render_inline

        return render_inline(self)

    def _row(self, row: TrialRow | str) -> TrialRow:
        return self[row] if isinstance(row, str) else row

    def _measure(self, measure: Measure | str) -> Measure:
        if isinstance(measure, Measure):
            return measure
        for known in self.measures:
            if known.name == measure:
                return known
        names = ", ".join(repr(known.name) for known in self.measures)
        raise KeyError(f"no measure {measure!r}; there are {names}")


def _spread(found: Estimate | None) -> float:
    return math.nan if found is None or found.spread is None else found.spread


def _written(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _written(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_written(one) for one in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
