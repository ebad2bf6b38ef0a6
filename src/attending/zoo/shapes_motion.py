"""Scenes whose objects move: videos in which the foreground and every motion are known.

>>> from attending.zoo.shapes_motion import make_moving_scene
>>> moving = make_moving_scene(seed=1, frames=12)
>>> moving.caption
'a blue triangle standing still and an orange ring moving left on a striped background.'
>>> moving.video().shape, moving.foreground().shape
(torch.Size([12, 3, 32, 32]), torch.Size([12, 32, 32]))

For training, :func:`draw_motion` gives the frames of many scenes as one
:class:`~attending.zoo._shapes_world.SceneBatch`, which renders in one call.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attending.zoo import _shapes_render
from attending.zoo._shapes_text import listing, with_article
from attending.zoo._shapes_world import HELD_OUT_SEED, SceneBatch, draw
from attending.zoo.shapes import Scene, as_batch, check_drawn, check_size, from_batch

# Word, and where an object goes, x to the right and y down.
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1), "": (0, 0)}
# How far an object travels from the first frame to the last, as a fraction of the image's side.
SHORTEST, LONGEST = 0.25, 0.5
MARGIN = 0.1  # of the centres of objects


@dataclass(frozen=True)
class MovingScene:
    """A video of a scene, each object moving straight and steadily, or standing still.

    Attributes:
        frames: The scene at each moment; its objects keep their order.
        directions: For each object ``"left"``, ``"right"``, ``"up"``, ``"down"``, or ``""`` if it
            stands still.
    """

    frames: tuple[Scene, ...]
    directions: tuple[str, ...]

    @property
    def caption(self) -> str:
        """What moves where, from left to right in the first frame, and the background."""
        first = self.frames[0]
        ordered = sorted(
            zip(first.objects, self.directions, strict=True), key=lambda pair: pair[0].x
        )
        parts = [
            with_article(thing.name) + (f" moving {direction}" if direction else " standing still")
            for thing, direction in ordered
        ]
        return f"{listing(parts)} on {with_article(first.background)} background."

    def video(self, size: int | None = None) -> Float[Tensor, "frames 3 height width"]:
        """Paint all frames, red, green and blue in [0, 1]."""
        return _shapes_render.render(as_batch(self.frames), self._side(size))

    def masks(self, size: int | None = None) -> Bool[Tensor, "frames objects height width"]:
        """The pixels that show each object in each frame; see ``Scene.masks``."""
        shown = _shapes_render.visible(as_batch(self.frames), self._side(size))
        return shown[:, : len(self.directions)]

    def foreground(self, size: int | None = None) -> Bool[Tensor, "frames height width"]:
        """The pixels that show any object."""
        return self.masks(size).any(dim=1)

    def moving(self, size: int | None = None) -> Bool[Tensor, "frames height width"]:
        """The pixels that show an object that moves."""
        moves = torch.tensor([bool(direction) for direction in self.directions])
        return self.masks(size)[:, moves].any(dim=1)

    def velocities(self) -> Float[Tensor, "objects 2"]:
        """Steps of each object from frame to frame, right and down, in fractions of the side."""
        first, last = self.frames[0].objects, self.frames[-1].objects
        steps = max(1, len(self.frames) - 1)
        return torch.tensor(
            [[(b.x - a.x) / steps, (b.y - a.y) / steps] for a, b in zip(first, last, strict=True)]
        ).reshape(-1, 2)

    def _side(self, size: int | None) -> int:
        side = self.frames[0].size if size is None else size
        check_size(side)
        return side


def make_moving_scene(
    seed: int,
    frames: int = 12,
    size: int = 32,
    *,
    min_objects: int = 1,
    max_objects: int = 3,
    still: float = 0.2,
    opacity: tuple[float, float] = (1.0, 1.0),
) -> MovingScene:
    """Draw one video: ``make_moving_scenes(1, seed, ...)[0]``."""
    return make_moving_scenes(
        1,
        seed,
        frames,
        size,
        min_objects=min_objects,
        max_objects=max_objects,
        still=still,
        opacity=opacity,
    )[0]


def make_moving_scenes(
    count: int,
    seed: int,
    frames: int = 12,
    size: int = 32,
    *,
    min_objects: int = 1,
    max_objects: int = 3,
    still: float = 0.2,
    opacity: tuple[float, float] = (1.0, 1.0),
) -> list[MovingScene]:
    """Draw ``count`` videos; the same arguments always give the same ones.

    Args:
        count: How many.
        seed: From 0 up to 2**31; training has seeds of its own, so these are held out.
        frames: At least 1 each.
        size: Pixels along each side.
        min_objects: At least 1.
        max_objects: At most 6.
        still: The share of objects that do not move.
        opacity: Of the faintest and of the clearest objects; all are clear unless it says so.
    """
    check_drawn(count, seed, min_objects, max_objects, opacity)
    check_size(size)
    generator = torch.Generator().manual_seed(HELD_OUT_SEED + seed)
    batch = draw(
        count, generator, min_objects=min_objects, max_objects=max_objects, opacity=opacity
    )
    direction, all_frames = draw_motion(batch, frames, generator, still=still)
    painted = from_batch(all_frames, size)
    words = tuple(DIRECTIONS)
    return [
        MovingScene(
            frames=tuple(painted[index * frames : (index + 1) * frames]),
            directions=tuple(words[d] for d in direction[index, : batch.count[index]].tolist()),
        )
        for index in range(count)
    ]


def draw_motion(
    batch: SceneBatch, frames: int, generator: torch.Generator, *, still: float = 0.2
) -> tuple[Int[Tensor, "scenes slots"], SceneBatch]:
    """Set the objects of scenes in motion.

    An object that would leave the image starts as far from the edge as it travels.  Objects may
    pass before or behind each other.

    Args:
        batch: The scenes.
        frames: How many moments of each.
        generator: Draws directions and distances.
        still: The share of objects that do not move.

    Returns:
        Index into ``DIRECTIONS`` for each object, and all frames as one batch, the frames of a
        scene one after another.
    """
    if frames < 1:
        raise ValueError(f"expected frames of at least 1, got {frames}")
    if not 0 <= still <= 1:
        raise ValueError(f"expected still from 0 to 1, got {still}")
    shape = batch.shape.shape
    direction = torch.randint(len(DIRECTIONS) - 1, shape, generator=generator)
    stands = torch.rand(shape, generator=generator) < still
    direction = direction.masked_fill(stands, len(DIRECTIONS) - 1)
    travel = SHORTEST + (LONGEST - SHORTEST) * torch.rand(shape, generator=generator)
    ways = torch.tensor(list(DIRECTIONS.values()), dtype=torch.float32)[direction]
    moment = torch.linspace(0, 1, frames) if frames > 1 else torch.zeros(1)

    def path(start: Tensor, way: Tensor) -> Tensor:
        lowest, highest = MARGIN + travel * (way < 0), 1 - MARGIN - travel * (way > 0)
        start = torch.where(way == 0, start, torch.clamp(start, lowest, highest))
        return (start + moment[:, None, None] * travel * way).transpose(0, 1).flatten(0, 1)

    repeated = {
        field.name: getattr(batch, field.name).repeat_interleave(frames, dim=0)
        for field in fields(batch)
    }
    all_frames = SceneBatch(**repeated)
    x, y = path(batch.x, ways[..., 0]), path(batch.y, ways[..., 1])
    return direction, replace(all_frames, x=x, y=y)


def render_videos(
    scenes: Sequence[MovingScene], size: int | None = None
) -> Float[Tensor, "scenes frames 3 height width"]:
    """Paint several videos of equally many frames at once."""
    lengths = {len(scene.frames) for scene in scenes}
    if len(lengths) != 1:
        raise ValueError(f"expected videos of one length, got lengths {sorted(lengths)}")
    return torch.stack([scene.video(size) for scene in scenes])
