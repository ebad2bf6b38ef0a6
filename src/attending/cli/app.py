"""Puts the commands together, and turns what goes wrong into one line and an exit code.

A new command is a file with a function; it is entered below by name. Such a file imports nothing
slow before its function runs, so that `attending --help` answers at once.
"""

import io
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated

import typer

from attending.cli import demo, diagnose, papers, trial, zoo
from attending.cli.console import complain, say
from attending.cli.errors import CommandError, one_line

DEBUG = "--debug"

app = typer.Typer(
    name="attending",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("diagnose")(diagnose.command)
app.command("trial")(trial.command)
app.command("demo")(demo.command)
app.command("papers")(papers.list_papers)
app.command("reproduce")(papers.reproduce)
app.add_typer(zoo.app, name="zoo")


def _show_version(wanted: bool) -> None:
    if wanted:
        from attending import __version__

        say(f"attending {__version__}")
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
    # `main` takes it out of the arguments, so that it may stand after the command, too.
    debug: Annotated[bool, typer.Option(DEBUG, help="Show the traceback of an error.")] = False,
) -> None:
    """See what attention does in a PyTorch model, without ever building its map."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 a fault of ours, 2 a wrong input, 130 Ctrl-C.

    Args:
        arguments: Those after the name of the program; `None` takes them from the shell.

    Raises:
        SystemExit: always.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):
        # A token that the terminal's encoding lacks must not end a report halfway.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        app([argument for argument in given if argument != DEBUG], prog_name="attending")
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if DEBUG in given:
            traceback.print_exception(error)
        # ValueError and ImportError are how the library says what to change or to install.
        wrong_input = isinstance(error, CommandError | ValueError | ImportError)
        if wrong_input and not isinstance(error, ModuleNotFoundError):
            complain(one_line(error))
            sys.exit(2)
        complain(f"{type(error).__name__}: {one_line(error)} (a fault; {DEBUG} shows where)")
        sys.exit(1)
