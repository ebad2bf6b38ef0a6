"""From the runs of all seeds to mean, spread and verdict, beside the paper's own figures."""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from attending.papers._experiment import Experiment
from attending.papers._json import number_from_json, number_to_json, to_text
from attending.papers._record import VERDICTS, Figure, Rule, Scale, Verdict
from attending.papers._reproduction import Reproduction
from attending.papers._store import StoredRun


@dataclass(frozen=True)
class Spread:
    """One measurement over all seeds. `deviation` is that of a sample, `nan` for one seed."""

    values: tuple[float, ...]
    mean: float
    deviation: float
    lowest: float
    highest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Mean and spread of the values; `nan` where one of them is `nan`."""
        broken = any(math.isnan(value) for value in values)
        mean, deviation = _mean_and_deviation(values)
        return cls(
            values=tuple(values),
            mean=mean,
            deviation=deviation,
            lowest=math.nan if broken else min(values),
            highest=math.nan if broken else max(values),
        )

    def in_words(self) -> str:
        """`mean ± deviation [lowest, highest]`; the value alone if there is but one."""
        if len(self.values) == 1:
            return f"{self.mean:.4g}"
        return f"{self.mean:.4g} ± {self.deviation:.2g} [{self.lowest:.4g}, {self.highest:.4g}]"


def _mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    if not all(math.isfinite(value) for value in values):
        return sum(values) / len(values), math.nan
    try:
        deviation = statistics.stdev(values) if len(values) > 1 else math.nan
        return statistics.fmean(values), deviation
    except OverflowError:  # a loss on its way to infinity
        return sum(value / len(values) for value in values), math.inf


@dataclass(frozen=True)
class Summary:
    """All that is known of a reproduction: what `<slug>.json` holds.

    `reason` says why, where a verdict was not left to the rule.
    """

    slug: str
    title: str
    arxiv: str | None
    claim: str
    scale: Scale
    seeds: tuple[int, ...]
    verdict: Verdict
    reason: str
    rule: str
    figures: tuple[Figure, ...]
    measurements: Mapping[str, Spread]
    settings: Mapping[str, Any]
    machines: tuple[str, ...]
    seconds: float
    finished: str
    command: str
    version: str
    fingerprint: str

    def to_json(self) -> str:
        """As JSON text."""
        data = asdict(self)
        for spread in data["measurements"].values():
            for name in ("mean", "deviation", "lowest", "highest"):
                spread[name] = number_to_json(spread[name])
            spread["values"] = [number_to_json(value) for value in spread["values"]]
        return to_text(data)

    @classmethod
    def from_json(cls, text: str) -> "Summary":
        """The summary that `to_json` wrote."""
        data = json.loads(text)
        data["figures"] = tuple(Figure(**figure) for figure in data["figures"])
        for name in ("seeds", "machines"):
            data[name] = tuple(data[name])
        data["measurements"] = {
            name: Spread(
                values=tuple(number_from_json(value) for value in spread.pop("values")),
                **{key: number_from_json(value) for key, value in spread.items()},
            )
            for name, spread in data["measurements"].items()
        }
        return cls(**data)


def summarize(experiment: Experiment, runs: Sequence[StoredRun], command: str) -> Summary:
    """Mean and spread over the runs, and the verdict that the paper's rule gives.

    Raises:
        ValueError: The runs differ in what they measured, or lack what a figure names.
    """
    from attending import __version__

    paper = experiment.paper
    found = [run.reproduction for run in sorted(runs, key=lambda run: run.reproduction.seed)]
    for one in found:
        check_measurements(experiment, one, found[0])
    values = {name: [one.measurements[name] for one in found] for name in found[0].measurements}
    scale = found[0].scale
    verdict, reason = judge(experiment.rule, scale, values)
    return Summary(
        slug=paper.slug,
        title=paper.title,
        arxiv=paper.arxiv,
        claim=paper.claim,
        scale=scale,
        seeds=tuple(one.seed for one in found),
        verdict=verdict,
        reason=reason,
        rule=experiment.rule.words,
        figures=paper.figures,
        measurements={name: Spread.of(numbers) for name, numbers in values.items()},
        settings=found[0].settings,
        machines=tuple(sorted({one.machine for one in found if one.machine is not None})),
        seconds=round(sum(one.seconds or 0.0 for one in found), 3),
        finished=max(run.finished for run in runs),
        command=command,
        version=__version__,
        fingerprint=runs[0].fingerprint,
    )


def judge(rule: Rule, scale: Scale, values: Mapping[str, Sequence[float]]) -> tuple[Verdict, str]:
    """The rule's verdict on the values, and the reason if the rule was not asked."""
    if scale not in rule.scales:
        reason = f"the rule is for scale {' or '.join(rule.scales)}; {scale} shows that it runs"
        return "out of reach here", reason
    verdict = rule.judge(values)
    if verdict not in VERDICTS:
        raise ValueError(f"rule: expected one of {', '.join(VERDICTS)}, got {verdict!r}")
    return verdict, ""


def check_measurements(experiment: Experiment, one: Reproduction, first: Reproduction) -> None:
    """Raise `ValueError` if a run lacks a measurement that another run or a figure has."""
    slug = experiment.paper.slug
    if one.measurements.keys() != first.measurements.keys():
        differing = sorted(one.measurements.keys() ^ first.measurements.keys())
        raise ValueError(
            f"measurements: expected the same for every seed of {slug}; seeds {first.seed} and "
            f"{one.seed} differ in {', '.join(differing)}. Report nan for what came to nothing."
        )
    named = {figure.measurement for figure in experiment.paper.figures} - {None}
    missing = sorted(str(name) for name in named - one.measurements.keys())
    if missing:
        raise ValueError(
            f"measurements: the figures of {slug} name {', '.join(missing)}, which seed {one.seed} "
            f"did not measure; it measured {', '.join(one.measurements)}"
        )
