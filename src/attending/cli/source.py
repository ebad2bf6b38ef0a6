"""Where a text comes from. Nothing slow is imported, so that a wrong path is reported at once."""

import sys
from importlib import resources
from pathlib import Path

from attending.cli.errors import CommandError


def demo_text() -> str:
    """The text that is used when none is given: some prose, some Python."""
    return resources.files("attending.cli").joinpath("demo.txt").read_text(encoding="utf-8")


def read_text(source: str) -> str:
    """The text of a file, or of stdin for `-`.

    Raises:
        CommandError: It cannot be read, is no UTF-8, or holds nothing but whitespace.
    """
    where = "stdin" if source == "-" else source
    try:
        data = sys.stdin.buffer.read() if source == "-" else Path(source).read_bytes()
    except OSError as error:
        raise CommandError(
            f"--text {source} cannot be read ({error.strerror}); give a text file, or - for stdin"
        ) from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CommandError(
            f"--text {source}: {where} is not UTF-8 (byte {error.start} is "
            f"0x{data[error.start]:02x}); convert it, for instance with iconv -t utf-8"
        ) from error
    if not text.strip():
        raise CommandError(f"--text {source}: {where} holds no text; give at least a sentence")
    return text.replace("\r\n", "\n")
