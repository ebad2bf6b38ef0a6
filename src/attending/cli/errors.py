"""Errors of the command line: what the user reads is one line that says what to do."""

from collections.abc import Iterator
from contextlib import contextmanager


class CommandError(Exception):
    """Something that the user can put right. Its message is all that is shown; exit code 2."""


def one_line(error: BaseException) -> str:
    """The message of an error on one line; the name of its type if it has none."""
    return " ".join(str(error).split()) or type(error).__name__


@contextmanager
def told_as(what: str) -> Iterator[None]:
    """Turn whatever other libraries raise inside into a `CommandError` that begins with `what`.

    Libraries that open files of many kinds raise errors of many kinds; to the user all of them
    mean that this file or model is not usable. `--debug` still shows where each came from.
    """
    try:
        yield
    except CommandError:
        raise
    except Exception as error:
        raise CommandError(f"{what}: {one_line(error)}") from error
