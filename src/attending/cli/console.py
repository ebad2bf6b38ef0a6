"""Lines to the terminal: results on stdout, complaints on stderr, never read as markup."""

from attending.report.text import printable


def say(line: str, style: str = "") -> None:
    """One line on stdout, not wrapped, so that a path in it can be copied."""
    from rich.console import Console
    from rich.text import Text

    Console().print(Text(printable(line), style), soft_wrap=True)


def note(line: str) -> None:
    """One line on stderr about the work itself."""
    from rich.console import Console
    from rich.text import Text

    Console(stderr=True).print(Text(printable(line), "dim"), soft_wrap=True)


def complain(line: str) -> None:
    """One line on stderr about what went wrong."""
    from rich.console import Console
    from rich.text import Text

    text = Text.assemble(("error: ", "bold red"), printable(line))
    Console(stderr=True).print(text, soft_wrap=True)
