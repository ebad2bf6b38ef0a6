"""From scenes to pixels and masks: signed distances, for many scenes at once, at any resolution."""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attending.zoo._shapes_world import BACKGROUNDS, COLORS, SHAPES, TEXTURES, SceneBatch

RGB = {
    "red": (0.88, 0.12, 0.12),
    "orange": (0.98, 0.55, 0.08),
    "yellow": (0.97, 0.92, 0.15),
    "green": (0.12, 0.68, 0.22),
    "blue": (0.12, 0.28, 0.90),
    "purple": (0.60, 0.15, 0.72),
    "white": (0.97, 0.97, 0.97),
    "black": (0.04, 0.04, 0.04),
}
# How much of the contrasting colour the marks of a texture take.
MARK = 0.45
GRAIN = {"plain": 0.06, "shaded": 0.06, "striped": 0.06, "grainy": 0.14}
PERIOD = 0.1  # of stripes and dots, as a fraction of the image's side


def render(batch: SceneBatch, size: int) -> Float[Tensor, "scenes 3 size size"]:
    """Paint the scenes, edges smoothed over one pixel, colours between 0 and 1."""
    image = _background(batch, size)
    coverage, local_x, local_y = _coverage(batch, size)
    colors = torch.tensor([RGB[name] for name in COLORS])
    paint = (colors[batch.color] + batch.tint[..., None]).clamp(0, 1)
    # The marks of dark colours are light, those of light colours are dark.
    luminance = paint @ torch.tensor([0.3, 0.6, 0.1])
    marked = paint + MARK * ((luminance < 0.4).float()[..., None] - paint)
    marks = _marks(batch.texture, local_x, local_y)
    for slot in range(batch.shape.shape[1]):
        mark = marks[:, slot, None]
        color = paint[:, slot, :, None, None] * (1 - mark) + marked[:, slot, :, None, None] * mark
        opacity = batch.opacity[:, slot, None, None, None]
        image = image + coverage[:, slot, None] * opacity * (color - image)
    return (image + _grain(batch, size)).clamp(0, 1)


def visible(batch: SceneBatch, size: int) -> Bool[Tensor, "scenes slots size size"]:
    """Which pixels show each object: it covers at least half, and nothing in front of it does."""
    covered = _coverage(batch, size)[0] >= 0.5
    in_front = covered.flip(1).cumsum(1).flip(1) - covered.long()
    return covered & (in_front == 0)


def _grid(size: int) -> tuple[Float[Tensor, "size"], Float[Tensor, "size 1"]]:
    """Centres of the pixels, x along the last axis and y along the one before."""
    centres = (torch.arange(size) + 0.5) / size
    return centres, centres[:, None]


def _coverage(
    batch: SceneBatch, size: int
) -> tuple[
    Float[Tensor, "scenes slots size size"],
    Float[Tensor, "scenes slots size size"],
    Float[Tensor, "scenes slots size size"],
]:
    """How much of each pixel each object covers, and the object's own coordinates of the pixel."""
    x, y = _grid(size)

    def wide(values: Tensor) -> Tensor:
        return values[:, :, None, None]

    right, down = x - wide(batch.x), y - wide(batch.y)
    cos, sin = wide(batch.angle.cos()), wide(batch.angle.sin())
    local_x, local_y = cos * right + sin * down, cos * down - sin * right
    coverage = torch.zeros_like(local_x)
    radius = wide(batch.radius).expand_as(local_x)
    for index, name in enumerate(SHAPES):
        chosen = (batch.shape == index) & batch.used
        if chosen.any():
            distance = _distance(name, local_x[chosen], local_y[chosen], radius[chosen])
            coverage[chosen] = (0.5 - distance * size).clamp(0, 1)
    return coverage, local_x, local_y


def _distance(shape: str, x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    """Distance to the outline, negative inside (a bound of it near corners)."""
    if shape == "circle":
        return torch.hypot(x, y) - radius
    if shape == "ring":
        return (torch.hypot(x, y) - 0.75 * radius).abs() - 0.25 * radius
    if shape == "square":
        return torch.maximum(x.abs(), y.abs()) - 0.88 * radius
    if shape == "cross":
        arm, width = radius, 0.36 * radius
        across = torch.maximum(x.abs() - arm, y.abs() - width)
        upright = torch.maximum(x.abs() - width, y.abs() - arm)
        return torch.minimum(across, upright)
    if shape == "triangle":  # equilateral, pointing up
        half = 0.5 * math.sqrt(3)
        slopes = half * x.abs() - 0.5 * y
        return torch.maximum(slopes - 0.55 * radius, y - 0.75 * radius)
    if shape == "star":  # five points: the sector of one point, mirrored and repeated
        sector = 2 * math.pi / 5
        turn = torch.atan2(x, -y)
        turn = (turn - sector * torch.round(turn / sector)).abs()
        length = torch.hypot(x, y)
        along, aside = length * turn.cos(), length * turn.sin()
        # The edge goes from the tip (R, 0) to the inner corner at half a sector.
        inner = 0.45 * 1.1 * radius
        corner_x, corner_y = inner * math.cos(sector / 2), inner * math.sin(sector / 2)
        edge_x, edge_y = corner_x - 1.1 * radius, corner_y
        cross = (along - 1.1 * radius) * edge_y - aside * edge_x
        return cross / torch.hypot(edge_x, edge_y)
    raise AssertionError(f"no shape {shape}")


def _marks(texture: Tensor, x: Tensor, y: Tensor) -> Float[Tensor, "scenes slots size size"]:
    """Where the texture of an object shows its second colour, from 0 to 1."""
    wave_x = torch.sin(x * (2 * math.pi / PERIOD))
    wave_y = torch.sin(y * (2 * math.pi / PERIOD))
    patterns = {
        "solid": torch.zeros_like(x),
        "striped": (0.5 + 1.5 * wave_y).clamp(0, 1),
        "dotted": (3 * (wave_x * wave_x * wave_y * wave_y) - 0.5).clamp(0, 1),
    }
    marks = patterns["solid"]
    for index, name in enumerate(TEXTURES):
        marks = torch.where((texture == index)[:, :, None, None], patterns[name], marks)
    return marks


def _background(batch: SceneBatch, size: int) -> Float[Tensor, "scenes 3 size size"]:
    """Plain, shaded from top to bottom, or faintly striped; the grain comes later."""
    x, y = _grid(size)
    patterns = {
        "plain": torch.zeros(size, size),
        "shaded": 0.3 * (y - 0.5).expand(size, size),
        "striped": 0.07 * torch.sin((x + y) * (2 * math.pi * 6)).sign(),
        "grainy": torch.zeros(size, size),
    }
    pattern = torch.stack([patterns[name] for name in BACKGROUNDS])[batch.background]
    return batch.shade[:, :, None, None] + pattern[:, None]


def _grain(batch: SceneBatch, size: int) -> Float[Tensor, "scenes 1 size size"]:
    """Noise of the pixels: a hash of place and seed, so that a scene always looks the same."""
    rows = torch.arange(size, dtype=torch.int64)
    place: Int[Tensor, "size size"] = rows[:, None] * 374761393 + rows * 668265263
    mixed = (place + batch.grain.long()[:, None, None] * 2246822519) & 0xFFFFFFFF
    for shift, factor in ((15, 2246822519), (13, 3266489917)):
        mixed = ((mixed ^ (mixed >> shift)) * factor) & 0xFFFFFFFF
    mixed = mixed ^ (mixed >> 16)
    amplitude = torch.tensor([GRAIN[name] for name in BACKGROUNDS])[batch.background]
    return ((mixed.float() / 2**31 - 1) * amplitude[:, None, None])[:, None]
