"""What ``wan-shapes`` is trained on: videos of one or two objects, their captions, and noise."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from jaxtyping import Float
from torch import Tensor

from attending.zoo._shapes_render import render
from attending.zoo._shapes_world import (
    BACKGROUNDS,
    COLORS,
    HELD_OUT_SEED,
    SHAPES,
    SceneBatch,
    draw,
)
from attending.zoo.recipes.llava_shapes_data import STEPS
from attending.zoo.shapes import from_batch
from attending.zoo.shapes_motion import DIRECTIONS, MovingScene, draw_motion

MIN_OBJECTS, MAX_OBJECTS = 1, 2
# "a red ring moving left and a blue star standing still on a plain background"
LONGEST_CAPTION = 16
# Every recipe draws from a range of seeds of its own, none from those of the held-out scenes.
FIRST_SEED = HELD_OUT_SEED // 2
WORDS = (
    "a",
    "an",
    "and",
    "background",
    "moving",
    "on",
    "standing",
    "still",
    *(word for word in DIRECTIONS if word),
    *COLORS,
    *SHAPES,
    *BACKGROUNDS,
)


@dataclass(frozen=True)
class FlowBatch:
    """A step of flow matching.

    Attributes:
        captions: Some are empty, for guidance without a classifier.
        noisy: ``(1 - s) video + s noise``, videos from -1 to 1.
        velocity: ``noise - video``, which the model is to predict.
        levels: ``s`` of each video; the model's timestep is ``1000 s``.
    """

    captions: list[str]
    noisy: Float[Tensor, "batch 3 frames size size"]
    velocity: Float[Tensor, "batch 3 frames size size"]
    levels: Float[Tensor, " batch"]


def spread_levels(videos: int, offset: float, shift: float) -> Float[Tensor, " videos"]:
    """Noise levels in [0, 1), evenly spread before ``s = shift u / (1 + (shift - 1) u)``.

    A shift above 1 favours much noise: what is where is decided while hundreds of pixels together
    barely stand out from it.
    """
    u = (offset + torch.arange(videos, dtype=torch.float64) / videos) % 1.0
    return (shift * u / (1 + (shift - 1) * u)).float()


def draw_videos(
    videos: int, frames: int, size: int, generator: torch.Generator
) -> tuple[list[str], Float[Tensor, "videos 3 frames size size"]]:
    """Captions and videos from -1 to 1, drawn and painted all at once."""
    batch = draw(
        videos,
        generator,
        min_objects=MIN_OBJECTS,
        max_objects=MAX_OBJECTS,
        opacity=(1.0, 1.0),
    )
    direction, moving = draw_motion(batch, frames, generator)
    first = SceneBatch(**{f.name: getattr(moving, f.name)[::frames] for f in fields(moving)})
    words = tuple(DIRECTIONS)
    captions = [
        MovingScene((scene,), tuple(words[d] for d in ways[: len(scene.objects)])).caption
        for scene, ways in zip(from_batch(first, size), direction.tolist(), strict=True)
    ]
    painted = render(moving, size).unflatten(0, (videos, frames))
    return captions, 2 * painted.transpose(1, 2) - 1


def step_batch(
    seed: int,
    step: int,
    *,
    videos: int,
    frames: int,
    size: int,
    shift: float,
    without_caption: float,
) -> FlowBatch:
    """The batch of one step: a function of seed and step alone, so that resuming is exact."""
    generator = torch.Generator().manual_seed(FIRST_SEED + seed * STEPS + step)
    captions, video = draw_videos(videos, frames, size, generator)
    dropped = torch.rand(videos, generator=generator) < without_caption
    offset = torch.rand((), generator=generator, dtype=torch.float64).item()
    levels = spread_levels(videos, offset, shift)
    noise = torch.randn(video.shape, generator=generator)
    captions = ["" if drop else caption for drop, caption in zip(dropped, captions, strict=True)]
    return mix(captions, video, noise, levels)


def mix(
    captions: Sequence[str],
    video: Float[Tensor, "batch 3 frames size size"],
    noise: Float[Tensor, "batch 3 frames size size"],
    levels: Float[Tensor, " batch"],
) -> FlowBatch:
    """Put noise on videos."""
    s = levels[:, None, None, None, None]
    return FlowBatch(list(captions), (1 - s) * video + s * noise, noise - video, levels)
