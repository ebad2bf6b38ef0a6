"""What the data card of ``wan-shapes`` says: measured on held-out videos, and painted."""

import time
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from attending.zoo.caption_embedding import CaptionEmbedding
from attending.zoo.entry import ZooModel
from attending.zoo.recipes.wan_shapes_data import MAX_OBJECTS, MIN_OBJECTS, mix
from attending.zoo.shapes_motion import make_moving_scenes, render_videos
from attending.zoo.video_checks import caption_scores, single_colors, single_motions
from attending.zoo.video_tasks import SHIFT, make_videos

# Of the scenes that the card's figures are measured on; others are free for other experiments.
CARD_SEED = 40_000
LEVELS = (0.1, 0.3, 0.5, 0.7, 0.85, 0.95)
STEPS, GUIDANCE = 20, 3.0  # of the painted videos that the card measures


@torch.no_grad()
def losses_by_level(
    wan: Any, text: CaptionEmbedding, *, videos: int, frames: int = 8, batch: int = 4
) -> Float[Tensor, " levels"]:
    """Mean squared error of the velocity on held-out videos, for each of :data:`LEVELS`.

    The noise is the same each time.
    """
    scenes = make_moving_scenes(
        videos, CARD_SEED, frames, min_objects=MIN_OBJECTS, max_objects=MAX_OBJECTS
    )
    clean = 2 * render_videos(scenes).transpose(1, 2) - 1
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(CARD_SEED))
    captions = [scene.caption for scene in scenes]
    sums = []
    for level in LEVELS:
        total = 0.0
        for start in range(0, videos, batch):
            part = slice(start, start + batch)
            levels = torch.full((len(captions[part]),), level)
            mixed = mix(captions[part], clean[part], noise[part], levels)
            guess = wan(
                hidden_states=mixed.noisy,
                timestep=1000 * levels,
                encoder_hidden_states=text(mixed.captions),
                return_dict=False,
            )[0]
            errors = (guess - mixed.velocity).square().mean((1, 2, 3, 4))
            total += float(errors.sum())
        sums.append(total / videos)
    return torch.tensor(sums)


def held_out_loss(wan: Any, text: CaptionEmbedding, *, videos: int) -> float:
    """The mean of :func:`losses_by_level`: to watch a run with."""
    return float(losses_by_level(wan, text, videos=videos).mean())


def paint_scores(
    wan: ZooModel, *, videos: int, frames: int, guidance_scale: float, steps: int = STEPS
) -> dict[str, float]:
    """How well painted videos of one object follow their captions, beside what is the most.

    The ceiling is what the same rules say of the videos of the world itself.
    """
    scenes = make_moving_scenes(videos, CARD_SEED + 1, frames, max_objects=1)
    painted = make_videos(
        wan,
        [scene.caption for scene in scenes],
        seed=CARD_SEED,
        frames=frames,
        steps=steps,
        guidance_scale=guidance_scale,
    )
    ceiling = caption_scores(render_videos(scenes), scenes)
    return {
        "videos": videos,
        "frames": frames,
        "guidance_scale": guidance_scale,
        **caption_scores(painted, scenes),
        "found_still": single_motions(painted).count("") / videos,
        "told_still": sum(not scene.directions[0] for scene in scenes) / videos,
        **{f"{name}_of_the_world": value for name, value in ceiling.items()},
    }


def measure(wan: ZooModel, videos: int = 36, steps: int = STEPS) -> dict[str, Any]:
    """All figures of the card; ``videos`` and ``steps`` decide how long it takes."""
    few = max(1, videos // 3)
    levels = {
        str(frames): losses_by_level(wan.model, wan.processor, videos=count, frames=frames).tolist()
        for frames, count in ((8, videos), (16, few))
    }
    began = time.perf_counter()
    paint = [paint_scores(wan, videos=videos, frames=8, guidance_scale=GUIDANCE, steps=steps)]
    seconds = time.perf_counter() - began
    paint.append(paint_scores(wan, videos=videos, frames=8, guidance_scale=1.0, steps=steps))
    paint.append(paint_scores(wan, videos=few, frames=16, guidance_scale=GUIDANCE, steps=steps))
    scenes = make_moving_scenes(videos, CARD_SEED, 8, max_objects=MAX_OBJECTS)
    clean = 2 * render_videos(scenes) - 1
    return {
        "seed": CARD_SEED,
        "loss_of_predicting_zero": 1 + float(clean.square().mean()),  # the noise has variance 1
        "levels": list(LEVELS),
        "loss_by_frames": levels,
        "loss_videos": {"8": videos, "16": few},
        "steps": steps,
        "shift": SHIFT,
        "painted": paint,
        "seconds_per_video_of_8_frames": seconds / videos,
    }


def paint_samples(wan: ZooModel, folder: Path, steps: int = STEPS) -> list[dict[str, Any]]:
    """Paint the first captions, as pictures in ``folder``, and say what the rules find in them."""
    told = []
    for frames, videos in ((8, 6), (16, 3)):
        scenes = make_moving_scenes(videos, CARD_SEED + 1, frames, max_objects=1)
        captions = [scene.caption for scene in scenes]
        painted = make_videos(
            wan,
            captions,
            seed=CARD_SEED,
            frames=frames,
            steps=steps,
            guidance_scale=GUIDANCE,
        )
        save_strips(painted, folder / f"samples-{frames}.png")
        found = zip(captions, single_colors(painted), single_motions(painted), strict=True)
        told += [
            {"frames": frames, "caption": caption, "color": color, "motion": motion}
            for caption, color, motion in found
        ]
    return told


def save_strips(videos: Float[Tensor, "videos frames 3 height width"], path: Path) -> None:
    """Write a picture: a video in each row, its frames side by side."""
    from PIL import Image

    rows = videos.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
    Image.fromarray((255 * rows).round().to(torch.uint8).numpy()).save(path)
