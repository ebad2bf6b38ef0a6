"""A diagnosis in a terminal: plain text for `print`, colours and bars where rich can show them."""

import textwrap
from collections.abc import Iterator
from typing import TYPE_CHECKING

from attending.diagnosis.record import STATISTICS, Diagnosis, Evidence, Finding
from attending.report.page_data import values_of
from attending.report.stacks import (
    SEVERITY_WORDS,
    Stack,
    by_severity,
    kind_in_words,
    places,
    severities_in_words,
    shape_in_words,
    stacks_of,
)
from attending.report.text import count, number, plural, printable

if TYPE_CHECKING:
    from rich.console import Console, OverflowMethod, RenderableType
    from rich.table import Table
    from rich.text import Text

_FEW = 3  # pieces of evidence per finding
_ROWS = 24  # layers of a stack that get a line
_NUMBER = 6  # characters of a number
_STYLES = {"critical": "bold red", "warning": "yellow", "info": "cyan"}
# The columns of the table; a bar stands for the share of the largest value that there could be.
_COLUMNS = {
    "entropy": "entropy",
    "normalized_entropy": "normalized",
    "sink": "strongest key",
    "first_token": "first token",
}
_HINT = "to_frame() has a row per head; to_html(path) writes a page to click through."
_NOTHING = "Nothing found: no head and no block crossed a threshold."


def as_text(diagnosis: Diagnosis) -> str:
    """What `print(diagnosis)` shows: one line about the model, the findings, where to look next."""
    findings = by_severity(diagnosis.findings)
    lines = [f"{printable(diagnosis.model)}: {_facts(diagnosis)}", ""]
    lines.append(f"{severities_in_words(findings)}" if findings else _NOTHING)
    place = places(diagnosis)
    for finding in findings:
        word = SEVERITY_WORDS[finding.severity].upper()
        lines += ["", f"{word}: {printable(finding.title)}"]
        for line in _told(finding):
            lines += textwrap.wrap(line, 96, initial_indent="  ", subsequent_indent="    ")
        for evidence in finding.evidence[:_FEW]:
            line = f"{_where(evidence, place(evidence.where))}: {_what(evidence)}"
            lines += textwrap.wrap(line, 96, initial_indent="  - ", subsequent_indent="    ")
        if len(finding.evidence) > _FEW:
            lines.append(f"  - and {count(len(finding.evidence) - _FEW)} more")
    return "\n".join([*lines, "", _HINT])


def print_report(diagnosis: Diagnosis, console: "Console | None" = None) -> None:
    """The findings and a line per layer, as wide as the terminal; colours only in a terminal.

    Nothing that comes from the model is read as markup: a token `[red]` prints as `[red]`.
    """
    from rich.console import Console, Group
    from rich.padding import Padding
    from rich.panel import Panel
    from rich.text import Text

    console = console or Console()
    say = _Speaker(console)
    console.print(
        Panel(
            say(_facts(diagnosis)),
            title=say(printable(diagnosis.model), "bold not dim"),
            title_align="left",
            border_style="dim",
            padding=(0, 1),
        )
    )
    findings = by_severity(diagnosis.findings)
    console.print(say(severities_in_words(findings) if findings else _NOTHING, "bold"))
    place = places(diagnosis)
    for finding in findings:
        parts: list[RenderableType] = [say(line) for line in _told(finding)[:1]]
        parts += [say(line, "dim") for line in _told(finding)[1:]]
        for evidence in finding.evidence[:_FEW]:
            where = say(f"{_where(evidence, place(evidence.where))}  ", "cyan")
            parts.append(Text.assemble(where, say(_what(evidence))))
        if len(finding.evidence) > _FEW:
            parts.append(say(f"and {count(len(finding.evidence) - _FEW)} more", "dim"))
        severity = say(f"{SEVERITY_WORDS[finding.severity]}  ", _STYLES[finding.severity])
        console.print()
        console.print(Text.assemble(severity, say(printable(finding.title), "bold")))
        console.print(Padding(Group(*parts), (0, 0, 0, 2)))
    for stack in stacks_of(diagnosis):
        console.print()
        console.print(say(_table_title(diagnosis, stack), "dim"))
        console.print(_table(diagnosis, stack, console, say))
    console.print()
    console.print(say(_HINT, "dim"))


class _Speaker:
    """Makes text that rich prints as it is: no markup, and nothing the console cannot encode."""

    def __init__(self, console: "Console") -> None:
        self.encoding = console.encoding or "utf-8"

    def __call__(self, text: str, style: str = "") -> "Text":
        from rich.text import Text

        safe = text.encode(self.encoding, "backslashreplace").decode(self.encoding)
        return Text(safe, style=style)


def _facts(diagnosis: Diagnosis) -> str:
    return (
        f"{printable(diagnosis.model_class)}, {count(diagnosis.parameters)} parameters, "
        f"{shape_in_words(diagnosis)}, {printable(diagnosis.attention_implementation)}; "
        f"{plural(diagnosis.sequences, 'sequence')}, {plural(diagnosis.tokens, 'token')}; "
        f"attending {printable(diagnosis.version)}"
    )


def _told(finding: Finding) -> list[str]:
    lines = [printable(finding.summary)]
    lines.append(f"threshold: {printable(finding.threshold)}")
    lines.append(f"source: {printable(finding.source)}")
    if finding.methods:
        lines.append(f"methods: {', '.join(map(printable, finding.methods))}")
    return lines


def _where(evidence: Evidence, place: str) -> str:
    return place if evidence.head is None else f"{place}, head {evidence.head}"


def _what(evidence: Evidence) -> str:
    return printable(evidence.text) or number(evidence.value)


def _table_title(diagnosis: Diagnosis, stack: Stack) -> str:
    prefix = printable(stack.prefix)
    title = f"{prefix}  {kind_in_words(diagnosis.layers, stack)}, means over heads".strip()
    step = _step(stack)
    return f"{title}, one layer in {step}" if step > 1 else title


def _step(stack: Stack) -> int:
    return -(-len(stack.rows) // _ROWS)


def _table(diagnosis: Diagnosis, stack: Stack, console: "Console", say: _Speaker) -> "Table":
    """A line per layer: means over its heads, as numbers and, where there is room, as bars."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, expand=False)
    names = [
        name
        for name in _COLUMNS
        if any(name in diagnosis.layers[row.index].statistics for row in stack.rows)
    ]
    rows = stack.rows[:: _step(stack)]
    # What the columns need beside the bars: their longest text and 3 characters between two.
    labels = max(5, *(len(printable(row.label)) for row in rows)) + 8
    needed = [max(_NUMBER, len(_COLUMNS[name])) + 3 for name in names]
    while len(names) > 1 and labels + sum(needed) > console.width:
        names.pop()
        needed.pop()
    room = (console.width - labels) // max(len(names), 1) - _NUMBER - 4
    bar_width = min(room, 12) if room >= 4 else 0
    full = {name: STATISTICS[name].high or _largest_mean(diagnosis, name) for name in names}
    # The sign of an ellipsis would break a console that cannot encode it.
    cut: OverflowMethod = "ellipsis" if _is_unicode(say.encoding) else "crop"
    table.add_column(say("layer"), justify="right", overflow=cut, no_wrap=True)
    table.add_column(say("heads"), justify="right", overflow=cut, no_wrap=True)
    for name in names:
        table.add_column(say(_COLUMNS[name]), overflow=cut, no_wrap=True)
    for row in rows:
        layer = diagnosis.layers[row.index]
        cells = [say(printable(row.label)), say(str(layer.num_heads), "dim")]
        for name in names:
            mean = _mean(values_of(layer, name))
            if mean is None:
                cells.append(say("-"))
                continue
            drawn = bar(mean / full[name] if full[name] else 0, bar_width, say.encoding)
            # As wide in every table, so that the tables of a model stand in line.
            text = say(number(mean).ljust(_NUMBER))
            cells.append(Text.assemble(text, say(f" {drawn:<{bar_width}}", "blue")))
        table.add_row(*cells)
    return table


def _is_unicode(encoding: str) -> bool:
    return encoding.lower().startswith("utf")


def bar(share: float, width: int, encoding: str = "utf-8") -> str:
    """A bar of at most `width` characters, in eighths of a character where those can be printed."""
    length = min(max(share, 0), 1) * width
    if not _is_unicode(encoding):
        return "#" * round(length)
    eighths = round(length * 8)
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _largest_mean(diagnosis: Diagnosis, name: str) -> float:
    def means() -> Iterator[float]:
        for layer in diagnosis.layers:
            mean = _mean(values_of(layer, name))
            if mean is not None:
                yield mean

    return max(means(), default=0.0)
