"""JSON as it is stored here: numbers that are not finite become words, files appear whole."""

import json
import math
import os
from pathlib import Path
from typing import Any

_WORDS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def number_to_json(value: float) -> float | str:
    """The number itself, or `"nan"`, `"inf"`, `"-inf"`: JSON has no such numbers.

    A run that diverged is a result, and must not be lost when it is written down.
    """
    value = float(value)
    if math.isfinite(value):
        return value
    return "nan" if math.isnan(value) else ("inf" if value > 0 else "-inf")


def number_from_json(value: float | str) -> float:
    """The reverse of `number_to_json`."""
    return _WORDS[value] if isinstance(value, str) else float(value)


def to_text(data: Any) -> str:
    """Strict JSON text that ends with a newline."""
    return json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file so that nobody, at any time, finds a part of it.

    The content goes to a file beside it, which then takes its name in one step.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(beside, "wb") as file:
            file.write(content.encode("utf-8") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
