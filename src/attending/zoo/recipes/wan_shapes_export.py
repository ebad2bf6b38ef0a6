"""Turns a training run of ``wan-shapes`` into the folder that is shipped, with its data card."""

import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from attending.zoo.caption_embedding import CaptionEmbedding
from attending.zoo.recipes.wan_shapes_data import MAX_OBJECTS, MIN_OBJECTS, mix
from attending.zoo.recipes.wan_shapes_trainee import Trainee
from attending.zoo.recipes.weights_folder import write_weights
from attending.zoo.shapes_motion import make_moving_scenes, render_videos

# Of the scenes that the card's figures are measured on; others are free for other experiments.
CARD_SEED = 40_000
LEVELS = (0.1, 0.3, 0.5, 0.7, 0.85, 0.95)


def write(trainee: Trainee, folder: Path, card: dict[str, Any]) -> None:
    """Write the averaged weights, in float16, and the card."""
    write_weights(trainee.average_wan, None, folder, card)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".unfinished-") as name:
        trainee.average_text.save(Path(name))
        for file in sorted(Path(name).iterdir()):
            file.chmod(0o644)
            os.replace(file, folder / file.name)


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
