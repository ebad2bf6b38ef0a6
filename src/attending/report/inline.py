"""A diagnosis in a notebook: one fragment of HTML without scripts, that takes on its colours."""

import math
from html import escape

from attending.diagnosis.record import STATISTICS, Diagnosis, Finding
from attending.report.page_data import values_of
from attending.report.stacks import (
    SEVERITY_WORDS,
    Stack,
    by_severity,
    kind_in_words,
    severities_in_words,
    shape_in_words,
    stacks_of,
)
from attending.report.text import count, number, plural, printable

_MAPS = ("entropy", "sink")
_SEVERITY_COLOURS = {"critical": "#d4483b", "warning": "#c9822b", "info": "#4a86c5"}
# One colour, from nearly clear to full: what is much stands out on white and on black alike.
_COLOUR = "#1f86d1"
_RAMP = (0.1, 0.2, 0.32, 0.45, 0.58, 0.72, 0.86, 1.0)
_FEW = 6  # findings that are told in full

_READING = "Layers run downward, heads to the right. "
_QUIET = "opacity:.68"
_FONT = "font:13px/1.5 ui-sans-serif,system-ui,-apple-system,'Segoe UI',Roboto,sans-serif"


def render_inline(diagnosis: Diagnosis) -> str:
    """Findings and two small heatmaps. Styles are on the elements, so none reach the notebook."""
    findings = by_severity(diagnosis.findings)
    title = escape(printable(diagnosis.model))
    facts = (
        f"{printable(diagnosis.model_class)} · {count(diagnosis.parameters)} parameters · "
        f"{shape_in_words(diagnosis)} · {plural(diagnosis.sequences, 'sequence')}, "
        f"{plural(diagnosis.tokens, 'token')}"
    )
    told = "".join(_finding(finding) for finding in findings[:_FEW])
    if len(findings) > _FEW:
        told += f'<li style="{_QUIET}">and {plural(len(findings) - _FEW, "more finding")}</li>'
    if not findings:
        told = "<li>Nothing found: no head and no block crossed a threshold.</li>"
    maps = "".join(_map(diagnosis, name) for name in _MAPS)
    return (
        f'<div style="{_FONT};max-width:60em;padding:.4em 0">'
        f'<div style="font-size:16px;font-weight:600">{title}</div>'
        f'<div style="{_QUIET}">{escape(facts)}</div>'
        f'<div style="margin:.8em 0 .2em;font-weight:600">'
        f"{escape(severities_in_words(findings)) or 'Findings'}</div>"
        f'<ul style="list-style:none;margin:0;padding:0">{told}</ul>'
        f'<div style="display:flex;flex-wrap:wrap;gap:1.2em 2.4em;margin:1em 0">{maps}</div>'
        f'<div style="{_QUIET}">{_READING if maps else ""}'
        f"Every head, its map and its strongest keys: <code>.to_html(path)</code></div></div>"
    )


def _finding(finding: Finding) -> str:
    colour = _SEVERITY_COLOURS[finding.severity]
    return (
        f'<li style="margin:.5em 0;padding-left:.8em;border-left:3px solid {colour}">'
        f'<span style="color:{colour};font-weight:600">{SEVERITY_WORDS[finding.severity]}</span> '
        f"<b>{escape(printable(finding.title))}</b><br>{escape(printable(finding.summary))}<br>"
        f'<span style="{_QUIET}">Threshold: {escape(printable(finding.threshold))}<br>'
        f"Source: {escape(printable(finding.source))}</span></li>"
    )


def _map(diagnosis: Diagnosis, name: str) -> str:
    """A statistic of every head, one picture per stack, all on one scale."""
    values = [values_of(layer, name) for layer in diagnosis.layers]
    known = [value for row in values for value in row if value is not None]
    if not known:
        return ""
    statistic = STATISTICS[name]
    low = statistic.low if statistic.low is not None else min(known)
    high = max(known) if max(known) > low else low + 1
    stacks = stacks_of(diagnosis)
    pictures = "".join(
        f'<div><div style="{_QUIET};font-size:11px">'
        f"{escape(printable(stack.prefix))} {escape(kind_in_words(diagnosis.layers, stack))}</div>"
        f"{_picture(stack, values, low, high, f'{statistic.label}, layers by heads')}</div>"
        for stack in stacks
    )
    ramp = "".join(
        f'<span style="display:inline-block;width:.7em;height:.7em;background:{_COLOUR};'
        f'opacity:{opacity}"></span>'
        for opacity in _RAMP
    )
    ends = [
        f"{number(100 * end)} %" if statistic.unit == "share" else number(end)
        for end in (low, high)
    ]
    unit = "" if statistic.unit == "share" else f" {statistic.unit}"
    return (
        f"<div><div><b>{statistic.label}</b> &nbsp;"
        f'<span style="{_QUIET}">{ends[0]}</span> {ramp} '
        f'<span style="{_QUIET}">{ends[1]}{unit}</span></div>'
        f'<div style="display:flex;flex-wrap:wrap;gap:.6em 1em;align-items:start">{pictures}</div>'
        "</div>"
    )


def _picture(
    stack: Stack, values: list[list[float | None]], low: float, high: float, label: str
) -> str:
    """Squares as strokes of one path per shade, so that 80 layers of 64 heads stay small."""
    paths: dict[float, list[str]] = {}
    width = max(max(len(values[row.index]) for row in stack.rows), 1)
    for y, row in enumerate(stack.rows):
        for x, value in enumerate(values[row.index]):
            if value is None:
                continue
            share = min(max((value - low) / (high - low), 0), 1)
            opacity = _RAMP[min(math.floor(share * len(_RAMP)), len(_RAMP) - 1)]
            paths.setdefault(opacity, []).append(f"M{x} {y}h.92")
    squares = "".join(f'<path opacity="{o}" d="{"".join(d)}"/>' for o, d in paths.items())
    height = len(stack.rows)
    side = max(3.0, min(14.0, 320 / max(width, height)))
    return (
        f'<svg role="img" aria-label="{escape(label)}" viewBox="0 -.5 {width} {height}" '
        f'width="{width * side:.0f}" height="{height * side:.0f}" '
        f'stroke="{_COLOUR}" stroke-width=".92" fill="none">{squares}</svg>'
    )
