"""The picture of a reproduction, as PNG."""

import io
import math
from collections.abc import Sequence
from typing import Any

from attending.papers._experiment import Experiment
from attending.papers._reproduction import Reproduction

_MISSING = (
    'the picture of a reproduction needs matplotlib: pip install "attending[prove]". '
    "picture=False (--no-picture) does without it."
)


def require_matplotlib() -> None:
    """Raise ImportError, with what to install, if there is no matplotlib."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ImportError(_MISSING) from error


def draw(experiment: Experiment, reproductions: Sequence[Reproduction], caption: str) -> bytes:
    """The picture's PNG: the paper's own plot, or else its series, or else its measurements."""
    require_matplotlib()
    from matplotlib.figure import Figure  # without pyplot: no window, no state

    figure = Figure(figsize=(9.0, 4.5), layout="constrained")
    if experiment.plot is not None:
        experiment.plot(reproductions, figure)
    elif any(one.series for one in reproductions):
        plot_series(reproductions, figure)
    else:
        plot_measurements(reproductions, figure)
    figure.suptitle(caption, fontsize=10)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()


def plot_series(reproductions: Sequence[Reproduction], figure: Any) -> None:
    """A panel for each `panel` of the series, a colour for each name, a line for each seed."""
    panels = list(dict.fromkeys(one.panel for run in reproductions for one in run.series))
    names = list(dict.fromkeys(one.name for run in reproductions for one in run.series))
    colours = {name: f"C{index % 10}" for index, name in enumerate(names)}
    grid = figure.subplots(1, len(panels), squeeze=False)[0]
    for panel, axes in zip(panels, grid, strict=True):
        labelled: set[str] = set()
        for one in (one for run in reproductions for one in run.series if one.panel == panel):
            label = None if one.name in labelled else one.name
            labelled.add(one.name)
            marker = "o" if len(one.x) == 1 else None
            axes.plot(one.x, one.y, color=colours[one.name], alpha=0.7, label=label, marker=marker)
            axes.set_xlabel(one.x_label)
            axes.set_ylabel(one.y_label)
        axes.set_title(panel, fontsize=9)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)


def plot_measurements(reproductions: Sequence[Reproduction], figure: Any) -> None:
    """A row for each measurement, a dot for each seed; each measurement has an axis of its own."""
    names = list(reproductions[0].measurements)
    grid = figure.subplots(len(names), 1, squeeze=False)[:, 0]
    for name, axes in zip(names, grid, strict=True):
        values = [run.measurements[name] for run in reproductions]
        finite = [value for value in values if math.isfinite(value)]
        axes.plot(finite, [0.0] * len(finite), "o", alpha=0.6)
        axes.set_yticks([0.0], [name])
        axes.grid(axis="x", alpha=0.3)
