"""A grid of tokens and a round window on it: what they are, and whether they fit together."""

import math
from typing import NamedTuple

from torch import Tensor

Shape = tuple[int, int, int]  # frames, height, width

Grid = tuple[int, int] | tuple[int, int, int]
"""Height and width in tokens, or frames, height and width."""


class Window(NamedTuple):
    """Which offsets a token sees: `dy^2 + dx^2 < radius^2` and `|dt| < frame_radius`.

    Attributes:
        radius: in tokens, strict.
        frame_radius: in frames, strict; None for all frames.
    """

    radius: float
    frame_radius: int | None

    def reach(self, grid: Shape) -> Shape:
        """The largest offsets along frames, rows and columns."""
        along = min(math.ceil(self.radius) - 1, max(grid))
        frames = grid[0] if self.frame_radius is None else self.frame_radius - 1
        return (frames, along, along)

    def sees(self, frames: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """Whether offsets lie in the window; the three broadcast."""
        inside = rows.square() + columns.square() < self.radius**2
        if self.frame_radius is None:
            return inside & (frames == frames)
        return inside & (frames.abs() < self.frame_radius)


def window_shape(grid: Grid, radius: float, frame_radius: int | None) -> tuple[Shape, Window]:
    """Grid and window as the internal functions take them: three axes, no radius beyond them.

    Raises:
        ValueError: as `circular_window_attention`.
    """
    if len(grid) not in (2, 3) or any(int(size) != size or size < 1 for size in grid):
        raise ValueError(
            "grid: expected (height, width) or (frames, height, width) in tokens, at least 1 each, "
            f"got {grid!r}."
        )
    if not radius > 0:
        raise ValueError(
            f"radius: expected more than 0 tokens, got {radius}. With 1 a token sees only itself."
        )
    if frame_radius is not None and (frame_radius < 1 or len(grid) == 2):
        raise ValueError(
            "frame_radius: expected at least 1 (the own frame), with a grid of (frames, height, "
            f"width), got {frame_radius} with grid {grid!r}."
        )
    sizes = tuple(int(size) for size in grid)
    shape = (1, *sizes) if len(sizes) == 2 else sizes
    # Beyond the diagonal all radii are one; so are all beyond the last frame.
    radius = min(float(radius), float(shape[1] + shape[2]))
    frames = None if frame_radius is None or frame_radius >= shape[0] else int(frame_radius)
    return (shape[0], shape[1], shape[2]), Window(radius, frames)


def check_length(name: str, tensor: Tensor, tokens: int, text_length: int) -> None:
    """Raise unless the tensor has text and grid tokens, no more and no less."""
    if text_length < 0:
        raise ValueError(f"text_length: expected at least 0, got {text_length}.")
    if tensor.shape[2] != tokens + text_length:
        raise ValueError(
            f"{name}: expected {text_length} text tokens and {tokens} of the grid, "
            f"{tokens + text_length} in all, got {tensor.shape[2]}. Check text_length and grid."
        )


def check_factor(shape: Shape, factor: int) -> None:
    """Raise unless height and width can be down-sampled by the factor."""
    if factor < 1 or shape[1] % factor or shape[2] % factor:
        raise ValueError(
            f"down_factor: expected a factor that divides height and width, {shape[1]} x "
            f"{shape[2]}, got {factor}."
        )


def check_tile(shape: Shape, tile: int) -> None:
    """Raise unless tiles fill the grid."""
    if tile < 1 or shape[1] % tile or shape[2] % tile:
        raise ValueError(
            f"tile: expected a size that divides height and width, {shape[1]} x {shape[2]}, "
            f"got {tile}."
        )
