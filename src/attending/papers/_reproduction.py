"""What one run of a reproduction found, for one seed: plain data, to JSON and back."""

import json
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from attending.papers._json import number_from_json, number_to_json, to_text
from attending.papers._record import SCALES, Scale


@dataclass(frozen=True)
class Series:
    """One curve of the picture.

    Args:
        name: The legend; series of the same name in several seeds share a colour.
        x: Where the points are.
        y: Their values, as many.
        panel: The title of the panel that it is drawn in.
        x_label: What x is, with the unit.
        y_label: What y is, with the unit.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    panel: str = ""
    x_label: str = ""
    y_label: str = ""

    def __post_init__(self) -> None:
        if len(self.x) != len(self.y):
            raise ValueError(
                f"x, y: expected the same length in series {self.name!r}, "
                f"got {len(self.x)} and {len(self.y)}"
            )
        object.__setattr__(self, "x", tuple(float(value) for value in self.x))
        object.__setattr__(self, "y", tuple(float(value) for value in self.y))


@dataclass(frozen=True)
class Reproduction:
    """The result of one seed.

    Args:
        slug: The paper.
        scale: The scale that it ran at.
        seed: The seed that all random numbers came from.
        measurements: Our numbers by name, the same names for every seed. May be `nan` or `inf`.
        series: Curves for the picture.
        settings: What determined the run but its seed; strings, numbers, lists and dicts of them.
        seconds: How long it took. The runner fills it in.
        machine: Where it ran. The runner fills it in.
    """

    slug: str
    scale: Scale
    seed: int
    measurements: Mapping[str, float]
    series: Sequence[Series] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    seconds: float | None = None
    machine: str | None = None

    def __post_init__(self) -> None:
        if self.scale not in SCALES:
            raise ValueError(f"scale: expected one of {', '.join(SCALES)}, got {self.scale!r}")
        if not self.measurements:
            raise ValueError(f"measurements: expected at least one for {self.slug}, got none")
        numbers = {name: float(value) for name, value in self.measurements.items()}
        object.__setattr__(self, "measurements", numbers)
        object.__setattr__(self, "series", tuple(self.series))
        object.__setattr__(self, "settings", plain(self.settings))

    def to_data(self) -> dict[str, Any]:
        """As plain data that JSON can hold."""
        return {
            "slug": self.slug,
            "scale": self.scale,
            "seed": self.seed,
            "measurements": {k: number_to_json(v) for k, v in self.measurements.items()},
            "series": [
                {
                    "name": one.name,
                    "x": [number_to_json(value) for value in one.x],
                    "y": [number_to_json(value) for value in one.y],
                    "panel": one.panel,
                    "x_label": one.x_label,
                    "y_label": one.y_label,
                }
                for one in self.series
            ],
            "settings": dict(self.settings),
            "seconds": self.seconds,
            "machine": self.machine,
        }

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> "Reproduction":
        """The reproduction that `to_data` gave."""
        numbers = {k: number_from_json(v) for k, v in data["measurements"].items()}
        series = [
            Series(**one | {axis: [number_from_json(v) for v in one[axis]] for axis in ("x", "y")})
            for one in data["series"]
        ]
        return cls(**{**data, "measurements": numbers, "series": series})

    def to_json(self) -> str:
        """As JSON text."""
        return to_text(self.to_data())

    @classmethod
    def from_json(cls, text: str) -> "Reproduction":
        """The reproduction that `to_json` wrote."""
        return cls.from_data(json.loads(text))


def plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as JSON would give them back, so that they can be compared.

    Raises:
        ValueError: JSON cannot hold them.
    """
    try:
        found = json.loads(json.dumps(dict(settings), allow_nan=False, sort_keys=True))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"settings: expected strings, finite numbers, lists and dicts, got {settings!r}: "
            f"{error}"
        ) from error
    return dict(found)


def this_machine() -> str:
    """One line for people: processor, number of cores, versions, and the GPU if one was used."""
    import os

    parts = [f"{_processor()}, {os.cpu_count()} cores"]
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        parts.append(torch.cuda.get_device_name())
    parts.append(f"{platform.system()}, Python {platform.python_version()}")
    parts.append(f"torch {metadata.version('torch')}")
    return ", ".join(parts)


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return " ".join(line.partition(":")[2].split())
    except OSError:
        pass
    return platform.processor() or platform.machine()
