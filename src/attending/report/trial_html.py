"""A trial as one HTML page that works offline, without any script, and as a notebook fragment."""

from html import escape

from attending.report.page import environment, policy, template_text
from attending.report.text import printable
from attending.report.trial_plots import plots_of
from attending.report.trial_words import (
    cell,
    change_in_words,
    counts_in_words,
    estimate_in_words,
    facts,
    legend,
    note_of,
    verdict,
)
from attending.trials.record import Trial, TrialRow
from attending.trials.samples import Measure

_COLOURS = {"better": "#2f8f5b", "worse": "#d4483b"}
_FONT = "font:13px/1.5 ui-sans-serif,system-ui,-apple-system,'Segoe UI',Roboto,sans-serif"


def render(trial: Trial) -> str:
    """One self-contained page: no server, no network, no script, nothing but the file."""
    ran = [row for row in trial if row.status == "ran"]
    text = (
        environment()
        .get_template("trial.html.j2")
        .render(
            policy=policy(),
            css=template_text("page.css") + template_text("trial.css"),
            t=trial,
            ran=ran,
            table=[[_cell(trial, row, measure) for measure in trial.measures] for row in ran],
            plots=plots_of(trial),
            legend=legend(trial),
            notes=[(row, note_of(row)) for row in trial],
            counts={row.name: counts_in_words(row.counts) for row in trial},
            texts=_texts(trial),
        )
    )
    # A lone surrogate in a name could be held by a str, but not be written to a file.
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def render_inline(trial: Trial) -> str:
    """The table for a notebook. Styles are on the elements, so none reach the notebook."""
    ran = [row for row in trial if row.status == "ran"]
    edge = "border-bottom:1px solid rgba(128,128,128,.3);padding:3px 12px 3px 0"
    head = "".join(
        f'<th style="text-align:left;{edge}">{escape(printable(row.name))}</th>' for row in ran
    )
    body = ""
    for measure in trial.measures:
        cells = ""
        for row in ran:
            colour = _COLOURS.get(verdict(trial, row, measure))
            style = f";color:{colour}" if colour else ""
            cells += (
                f'<td style="text-align:left;white-space:nowrap;{edge}{style}">'
                f"{escape(cell(trial, row, measure))}</td>"
            )
        label = (
            f'<th style="text-align:left;font-weight:400;{edge}" '
            f'title="{escape(printable(measure.description))}">'
            f"{escape(printable(measure.label))}</th>"
        )
        body += f"<tr>{label}{cells}</tr>"
    notes = "".join(
        f"<li><b>{escape(printable(row.name))}</b>: {escape(text)}</li>"
        for row in trial
        if (text := note_of(row))
    )
    return (
        f'<div style="{_FONT};padding:.4em 0">'
        f'<div style="font-size:16px;font-weight:600">{escape(printable(trial.model))}</div>'
        f'<div style="opacity:.68">{escape(facts(trial))}</div>'
        f'<table style="border-collapse:collapse;margin:.8em 0"><thead><tr><th style="{edge}">'
        f"</th>{head}</tr></thead><tbody>{body}</tbody></table>"
        f'<ul style="margin:0;padding-left:1.2em">{notes}</ul>'
        f'<div style="opacity:.68">{" ".join(map(escape, legend(trial)))}<br>'
        "Samples, texts and a plot of each measure: <code>.to_html(path)</code></div></div>"
    )


def _cell(trial: Trial, row: TrialRow, measure: Measure) -> dict[str, str]:
    change = "" if row is trial.plain else change_in_words(measure, trial.change(row, measure))
    return {
        "value": estimate_in_words(measure, trial.estimate(row, measure)),
        "change": change,
        "verdict": verdict(trial, row, measure),
    }


def _texts(trial: Trial) -> list[tuple[str, list[tuple[str, str]]]]:
    """For each prompt, what each contender wrote."""
    return [
        (
            prompt,
            [(row.name, row.texts[index]) for row in trial if index < len(row.texts)],
        )
        for index, prompt in enumerate(trial.prompts)
    ]
