"""A trial as a table: plain text for `print`, colours where rich can show them.

Measures run downward and contenders to the right, so that a line compares them. Where they are too
many for the width, the table goes on below.
"""

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from attending.report.text import printable
from attending.report.trial_words import (
    cell,
    facts,
    legend,
    note_of,
    verdict,
)
from attending.trials.record import Trial, TrialRow

if TYPE_CHECKING:
    from rich.console import Console

_WIDTH = 100
_GAP = 3  # as rich has it
_STYLES = {"better": "green", "worse": "red", "": ""}
HINT = "to_frame() has every number; to_html(path) writes a page; to_json(path) every sample."


def as_text(trial: Trial) -> str:
    """What `print(trial)` shows."""
    lines = _wrapped(f"{printable(trial.model)}: {facts(trial)}")
    for table in _tables(trial, _WIDTH):
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines.append("")
        for number, row in enumerate(table):
            cells = [text.ljust(width) for text, width in zip(row, widths, strict=True)]
            lines.append((" " * _GAP).join(cells).rstrip())
            if number == 0:
                lines.append("-" * (sum(widths) + _GAP * (len(widths) - 1)))
    for note in _notes(trial):
        lines += _wrapped(note) or [""]
    return "\n".join([*lines, "", *legend(trial), HINT])


def _wrapped(line: str) -> list[str]:
    return textwrap.wrap(line, _WIDTH, subsequent_indent="  ")


def print_trial(trial: Trial, console: "Console | None" = None) -> None:
    """The table as wide as the terminal; nothing that comes from the model is read as markup."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = console or Console()
    safe = _safe(console)
    console.print(Text(safe(printable(trial.model)), "bold"))
    console.print(Text(safe(facts(trial)), "dim"))
    for rows in _groups(trial, console.width):
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
        table.add_column("", no_wrap=True)
        for row in rows:
            table.add_column(Text(safe(printable(row.name))), no_wrap=True)
        for measure in trial.measures:
            cells = [
                Text(safe(cell(trial, row, measure)), _STYLES[verdict(trial, row, measure)])
                for row in rows
            ]
            table.add_row(Text(safe(printable(measure.label))), *cells)
        console.print()
        console.print(table)
    for line in _notes(trial):
        console.print(Text(safe(line), "yellow" if line else ""))
    console.print()
    for line in legend(trial):
        console.print(Text(safe(line), "dim"))
    console.print(Text(HINT, "dim"))


def _notes(trial: Trial) -> list[str]:
    found = [f"{printable(row.name)}: {text}" for row in trial if (text := note_of(row))]
    return ["", *found] if found else []


def _groups(trial: Trial, width: int) -> list[Sequence[TrialRow]]:
    """The contenders of each table: as many as fit, and at least one."""
    ran = [row for row in trial if row.status == "ran"]
    room = width - max((len(printable(m.label)) for m in trial.measures), default=0)
    groups: list[list[TrialRow]] = [[]]
    left = room
    for row in ran:
        texts = [printable(row.name), *(cell(trial, row, measure) for measure in trial.measures)]
        needed = max(map(len, texts)) + _GAP
        if groups[-1] and needed > left:
            groups.append([])
            left = room
        groups[-1].append(row)
        left -= needed
    return list(groups)


def _tables(trial: Trial, width: int) -> list[list[list[str]]]:
    return [
        [
            ["", *(printable(row.name) for row in rows)],
            *(
                [printable(measure.label), *(cell(trial, row, measure) for row in rows)]
                for measure in trial.measures
            ),
        ]
        for rows in _groups(trial, width)
    ]


class _safe:
    """Text that the console's encoding has."""

    def __init__(self, console: "Console") -> None:
        self.encoding = console.encoding or "utf-8"

    def __call__(self, text: str) -> str:
        return text.encode(self.encoding, "backslashreplace").decode(self.encoding)
