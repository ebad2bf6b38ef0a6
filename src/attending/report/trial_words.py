"""The numbers of a trial in words, the same in a terminal and on a page."""

from collections.abc import Mapping, Sequence
from typing import Literal

from attending.report.text import count, number, plural, printable
from attending.trials.record import Trial, TrialRow
from attending.trials.samples import Average, Estimate, Measure

_SURE = 2  # spreads that a change has to be away from none to be called better or worse


def facts(trial: Trial) -> str:
    """What was run, on what, in a line."""
    return (
        f"{printable(trial.model_class)}, {count(trial.parameters)} parameters, "
        f"{printable(trial.device)}; {printable(trial.inputs)}; "
        f"{plural(trial.repeats, 'repeat')}, {trial.clock}; attending {printable(trial.version)}"
    )


def value_in_words(measure: Measure, value: float) -> str:
    """A value with its unit, where the unit is not in the label: `12.3`, `4.1 %`, `23 MB`."""
    if measure.unit == "share":
        return f"{number(100 * value)} %"
    if measure.unit == "bytes":
        return f"{number(value / 1e6)} MB"
    if measure.unit.endswith("/s"):
        return f"{number(value)} /s"
    return number(value)


def estimate_in_words(measure: Measure, found: Estimate | None) -> str:
    """`12.3 ±0.4`; "-" where there is none."""
    if found is None:
        return "-"
    text = value_in_words(measure, found.value)
    if not found.spread:
        return text
    amount, _, unit = text.partition(" ")
    scale = {"share": 100.0, "bytes": 1e-6}.get(measure.unit, 1.0)
    return f"{amount} ±{number(scale * found.spread, 2)}{' ' + unit if unit else ''}"


def change_in_words(measure: Measure, found: Estimate | None) -> str:
    """`x1.02 ±0.01` of a ratio, `+0.3 ±0.1` of a difference; "" where there is none."""
    if found is None:
        return ""
    if measure.compares == "ratio":
        text = f"x{number(found.value)}"
        return f"{text} ±{number(found.spread, 2)}" if found.spread else text
    text = estimate_in_words(measure, found)
    return f"+{text}" if found.value > 0 else text


def cell(trial: Trial, row: TrialRow, measure: Measure) -> str:
    """The value, and for all but the plain model the change in brackets."""
    text = estimate_in_words(measure, trial.estimate(row, measure))
    change = "" if row is trial.plain else change_in_words(measure, trial.change(row, measure))
    return f"{text} ({change})" if change else text


def verdict(trial: Trial, row: TrialRow, measure: Measure) -> Literal["better", "worse", ""]:
    """Whether a change is one for better or worse, by more than twice its spread."""
    change = trial.change(row, measure)
    if row is trial.plain or measure.better is None or change is None:
        return ""
    gap = change.value - (1.0 if measure.compares == "ratio" else 0.0)
    if change.spread is None or not abs(gap) > _SURE * change.spread:
        return ""
    return "better" if (gap > 0) == (measure.better == "higher") else "worse"


def note_of(row: TrialRow) -> str:
    """Status and notes in a line; "" where all is well."""
    notes = "; ".join(printable(note).removesuffix(".") for note in row.notes)
    if row.status == "ran":
        return notes
    return f"{row.status}: {notes}" if notes else row.status


def average_in_words(average: Average, over: Sequence[str]) -> str:
    """What the values, their spreads and the changes are."""
    what = " or ".join(f"{one}s" for one in over)
    if average == "mean":
        return f"Means over {what} ± standard error, and the difference from plain, paired."
    if average == "geometric mean":
        return f"Geometric means over {what} ± standard error, and the ratio to plain, paired."
    return f"Medians over {what} ± half the range, and the median ratio to plain."


def legend(trial: Trial) -> list[str]:
    """How the numbers are to be read: a line for each kind of average."""
    lines = []
    for average in dict.fromkeys(measure.average for measure in trial.measures):
        overs = dict.fromkeys(m.over for m in trial.measures if m.average == average)
        lines.append(average_in_words(average, list(overs)))
    return lines


def counts_in_words(counts: Mapping[str, float]) -> str:
    """`edited_calls 24, heads 6`."""
    return ", ".join(f"{printable(name)} {number(value)}" for name, value in counts.items())
