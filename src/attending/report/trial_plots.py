"""What the plots of a trial show: for each measure, every contender's change against plain.

A plot is drawn by the page's style sheet: places are shares of its width. Ratios stand on a
logarithmic scale, so that twice and half are as far from plain.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from attending.report.trial_words import change_in_words, estimate_in_words, value_in_words, verdict
from attending.trials.record import Trial, TrialRow
from attending.trials.samples import Estimate, Measure

_ROOM = 0.06  # of the width, beside the outermost mark
_DOTS = 120  # samples that are drawn


@dataclass(frozen=True)
class Mark:
    """A contender in a plot: places from 0 to 1, None where there is nothing to draw."""

    name: str
    words: str
    verdict: str
    centre: float | None
    low: float | None
    high: float | None
    dots: tuple[float, ...]


@dataclass(frozen=True)
class Plot:
    """One measure: its contenders on one scale, and where plain is on it."""

    measure: Measure
    plain: float
    low: str
    high: str
    marks: tuple[Mark, ...]


def plots_of(trial: Trial) -> list[Plot]:
    """A plot for each measure in which anything differs from plain."""
    found = [_plot(trial, measure) for measure in trial.measures]
    return [plot for plot in found if plot is not None]


def _plot(trial: Trial, measure: Measure) -> Plot | None:
    rows = [row for row in trial if row.status == "ran" and row is not trial.plain]
    shown: list[tuple[TrialRow, Estimate, list[float]]] = []
    for row in rows:
        estimate = _estimate(trial, row, measure)
        if estimate is not None and math.isfinite(estimate.value):
            shown.append((row, estimate, _dots(trial, row, measure)))
    neutral = _neutral(trial, measure)
    if neutral is None or not any(estimate.value != neutral for _, estimate, _ in shown):
        return None
    logarithmic = measure.compares == "ratio" and not measure.against_plain
    forward: Callable[[float], float] = _log if logarithmic else float
    ends = [forward(neutral)]
    for _, estimate, dots in shown:
        spread = estimate.spread or 0.0
        ends += [forward(estimate.value - spread), forward(estimate.value + spread)]
        ends += [forward(dot) for dot in dots]
    ends = [end for end in ends if math.isfinite(end)]
    low, high = min(ends), max(ends)

    def place(value: float) -> float | None:
        where = forward(value)
        if not math.isfinite(where) or high == low:
            return None
        return _ROOM + (1 - 2 * _ROOM) * (where - low) / (high - low)

    marks = tuple(
        _mark(trial, row, measure, estimate, dots, place) for row, estimate, dots in shown
    )
    back: Callable[[float], float] = math.exp if logarithmic else float
    words = [_end(measure, back(end)) for end in (low, high)]
    return Plot(measure, place(neutral) or 0.5, words[0], words[1], marks)


def _mark(
    trial: Trial,
    row: TrialRow,
    measure: Measure,
    estimate: Estimate,
    dots: Sequence[float],
    place: Callable[[float], float | None],
) -> Mark:
    spread = estimate.spread or 0.0
    if measure.against_plain:
        words = estimate_in_words(measure, estimate)
    else:
        words = change_in_words(measure, estimate)
    return Mark(
        row.name,
        words,
        verdict(trial, row, measure),
        place(estimate.value),
        place(estimate.value - spread),
        place(estimate.value + spread),
        tuple(where for dot in dots if (where := place(dot)) is not None),
    )


def _estimate(trial: Trial, row: TrialRow, measure: Measure) -> Estimate | None:
    if measure.against_plain:
        return trial.estimate(row, measure)
    return trial.change(row, measure)


def _neutral(trial: Trial, measure: Measure) -> float | None:
    """Where plain is."""
    if measure.against_plain:
        plain = trial.estimate(trial.plain, measure)
        return None if plain is None else plain.value
    return 1.0 if measure.compares == "ratio" else 0.0


def _dots(trial: Trial, row: TrialRow, measure: Measure) -> list[float]:
    """The single samples, against plain where the measure is not by itself."""
    own, plain = row.samples.get(measure.name), trial.plain.samples.get(measure.name)
    if own is None or len(own.values) < 2:
        return []
    values = list(own.values)
    if not measure.against_plain:
        if plain is None or len(plain.values) != len(values):
            return []
        pairs = zip(values, plain.values, strict=True)
        if measure.compares == "ratio":
            values = [a / b for a, b in pairs if b]
        else:
            values = [a - b for a, b in pairs]
    return values[:: -(-len(values) // _DOTS)] if values else []


def _end(measure: Measure, value: float) -> str:
    if measure.compares == "ratio" and not measure.against_plain:
        return f"x{value:.3g}"
    text = value_in_words(measure, value)
    return f"+{text}" if value > 0 and not measure.against_plain else text


def _log(value: float) -> float:
    return math.log(value) if value > 0 else -math.inf
