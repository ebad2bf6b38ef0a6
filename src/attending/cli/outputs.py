"""Output paths, checked before the work: minutes of measuring must not end at a full stop."""

from collections.abc import Callable
from pathlib import Path

from attending.cli.console import say
from attending.cli.errors import CommandError


def check_writable(path: Path, option: str) -> None:
    """Raise `CommandError` unless a file can be written at `path`; leaves no trace.

    Permissions, quotas and read-only disks are too many to ask about one by one, so the file is
    opened for real, for appending, and removed again if it was not there.
    """
    if path.is_dir():
        raise CommandError(f"{option} {path} is a folder; give the path of a file")
    there = path.exists()
    if not there and not path.parent.is_dir():
        raise CommandError(f"{option} {path}: there is no folder {path.parent}; make it first")
    try:
        with path.open("ab"):
            pass
        if not there:
            path.unlink()
    except OSError as error:
        raise CommandError(
            f"{option} {path} cannot be written ({error.strerror}); choose another path"
        ) from error


def check_folder(path: Path, option: str) -> None:
    """Make the folder `path` and its parents; raise `CommandError` if that is not possible."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise CommandError(f"{option} {path} is a file; give a folder") from error
    except OSError as error:
        raise CommandError(
            f"{option} {path} cannot be made ({error.strerror}); choose another folder"
        ) from error


def write(path: Path, produce: Callable[[Path], object]) -> None:
    """Let `produce` write the file `path`, and say where it is."""
    try:
        produce(path)
    except OSError as error:
        raise CommandError(f"{path} cannot be written ({error.strerror})") from error
    say(f"wrote {path}")
