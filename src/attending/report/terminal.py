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
    from rich.console import Console, RenderableType
    from rich.table import Table
    from rich.text import Text

_FEW = 3  # pieces of evidence per finding
_ROWS = 24  # layers of a stack that get a line
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
            lines.append(f"  - {_where(evidence, place(evidence.where))}: {_what(evidence)}")
        if len(finding.evidence) > _FEW:
            lines.append(f"  - and {len(finding.evidence) - _FEW} more")
    return "\n".join([*lines, "", _HINT])


def print_report(diagnosis: Diagnosis, console: "Console | None" = None) -> None:
    """The findings and a line per layer, as wide as the terminal; colours only in a terminal.

    Nothing that comes from the model is read as markup: a token `[red]` prints as `[red]`.
    """
    from rich.console import Console, Group
    from rich.padding import Padding
    from rich.panel import Panel

    console = console or Console()
    say = _Speaker(console)
    console.print(
        Panel(
            say(_facts(diagnosis)),
            title=say(printable(diagnosis.model), "bold"),
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
            parts.append(
                say(f"{_where(evidence, place(evidence.where))}  ", "cyan") + say(_what(evidence))
            )
        if len(finding.evidence) > _FEW:
            parts.append(say(f"and {len(finding.evidence) - _FEW} more", "dim"))
        style = _STYLES[finding.severity]
        console.print()
        console.print(
            say(f"{SEVERITY_WORDS[finding.severity]}  ", style)
            + say(printable(finding.title), "bold")
        )
        console.print(Padding(Group(*parts), (0, 0, 0, 2)))
    for stack in stacks_of(diagnosis):
        console.print()
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
        f"attending {diagnosis.version}"
    )


def _told(finding: Finding) -> list[str]:
    lines = [printable(finding.summary)]
    lines.append(f"threshold: {printable(finding.threshold)} ({printable(finding.source)})")
    if finding.methods:
        lines.append(f"methods: {', '.join(map(printable, finding.methods))}")
    return lines


def _where(evidence: Evidence, place: str) -> str:
    return place if evidence.head is None else f"{place}, head {evidence.head}"


def _what(evidence: Evidence) -> str:
    return printable(evidence.text) or number(evidence.value)


def _table(diagnosis: Diagnosis, stack: Stack, console: "Console", say: _Speaker) -> "Table":
    """A line per layer: means over its heads, as numbers and, where there is room, as bars."""
    from rich import box
    from rich.table import Table

    prefix = printable(stack.prefix)
    title = f"{prefix}  {kind_in_words(diagnosis.layers, stack)}, means over heads"
    step = -(-len(stack.rows) // _ROWS)
    if step > 1:
        title += f", every {step}th layer"
    table = Table(
        title=say(title, "dim"),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        expand=False,
    )
    names = [
        name
        for name in _COLUMNS
        if any(name in diagnosis.layers[row.index].statistics for row in stack.rows)
    ]
    # A column needs 13 characters for its title, so what is left is for the bars.
    room = (console.width - 16 - 15 * len(names)) // max(len(names), 1) + 5
    bar_width = min(room, 12) if room >= 4 else 0
    if console.width < 16 + 13 * len(names):
        names = names[: max(1, (console.width - 16) // 13)]
    table.add_column(say("layer"), justify="right", no_wrap=True)
    table.add_column(say("heads"), justify="right", no_wrap=True)
    for name in names:
        table.add_column(say(_COLUMNS[name]), no_wrap=True)
    for row in stack.rows[::step]:
        layer = diagnosis.layers[row.index]
        cells = [say(printable(row.label)), say(str(layer.num_heads), "dim")]
        for name in names:
            mean = _mean(values_of(layer, name))
            if mean is None:
                cells.append(say(""))
                continue
            full = STATISTICS[name].high or _largest_mean(diagnosis, name)
            drawn = bar(mean / full if full else 0, bar_width, say.encoding)
            cells.append(say(f"{number(mean):<6} ") + say(drawn, "blue"))
        table.add_row(*cells)
    return table


def bar(share: float, width: int, encoding: str = "utf-8") -> str:
    """A bar of at most `width` characters, in eighths of a character where those can be printed."""
    eighths = round(min(max(share, 0), 1) * width * 8)
    if not encoding.lower().replace("-", "").startswith("utf"):
        return "#" * round(eighths / 8)
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
