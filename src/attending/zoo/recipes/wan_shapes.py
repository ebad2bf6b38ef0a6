"""The recipe of ``wan-shapes``: a small video diffusion transformer that paints moving shapes.

A real ``diffusers.WanTransformer3DModel`` on the pixels of 32 x 32 videos, patches of 4 x 4 pixels
of one frame, so 64 tokens a frame.  It learns flow matching (Lipman et al. 2023, in the form of
Wan): of a video ``x0`` and noise ``n``,

    x_s = (1 - s) x0 + s n,    model(x_s, 1000 s, caption) = n - x0

with ``s`` drawn by :func:`attending.zoo.recipes.wan_shapes_data.spread_levels`.  The captions of
:mod:`attending.zoo.shapes_motion` are read by a small text encoder that is trained along; some are
left out, for guidance without a classifier.

Short videos come first, since what things look like is learned from them for less: a video always
shows the same motion from start to end, in 4, 8 or 16 frames.  A step has equally many tokens at
any length.  The shipped weights are the running average of those trained.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from attending.zoo.caption_embedding import CaptionEmbedding
from attending.zoo.recipes.llava_shapes_data import SEEDS, STEPS
from attending.zoo.recipes.training_loop import run_steps
from attending.zoo.recipes.two_optimizers import share_of_rate
from attending.zoo.recipes.wan_shapes_data import (
    LONGEST_CAPTION,
    WORDS,
    FlowBatch,
    step_batch,
)
from attending.zoo.recipes.wan_shapes_trainee import Trainee


@dataclass(frozen=True)
class WanShapesRecipe:
    """Everything that decides the trained weights.

    The matrices of the blocks are trained by Muon, all else by AdamW.  The learning rates of both
    rise over the first ``warmup_steps``, stay, and fall linearly to zero over the last
    ``cooldown`` of all steps.  The first ``short`` of all steps see videos of 4 frames, the last
    ``long`` by turns those of 16 and of 8 frames, and those between 8.  ``compiled`` needs a C++
    compiler and saves up to a sixth of the time.
    """

    size: int = 32
    patch: int = 4
    heads: int = 5
    head_dim: int = 32
    layers: int = 8
    ffn: int = 480
    text_dim: int = 96
    time_dim: int = 64
    frames_per_step: int = 32
    short: float = 0.3
    long: float = 0.25
    steps: int = 5200
    warmup_steps: int = 100
    cooldown: float = 0.4
    learning_rate: float = 1.2e-3
    muon_learning_rate: float = 3e-3
    weight_decay: float = 0.05
    momentum: float = 0.95
    beta1: float = 0.9
    beta2: float = 0.95
    clip: float = 1.0
    average: float = 0.997
    shift: float = 4.0
    without_caption: float = 0.12
    seed: int = 0
    bfloat16: bool = True
    compiled: bool = True
    evaluate_every: int = 260

    def __post_init__(self) -> None:
        """Refuse what would fail only after minutes of training."""
        for name in ("steps", "evaluate_every", "warmup_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} of at least 1, got {getattr(self, name)}")
        if not 0 <= self.seed < SEEDS // 2:
            raise ValueError(f"expected seed from 0 up to {SEEDS // 2}, got {self.seed}")
        if self.steps > STEPS:
            raise ValueError(f"expected steps of at most {STEPS}, got {self.steps}")
        if self.frames_per_step % 16:
            raise ValueError(
                "expected frames_per_step to be a multiple of 16, the frames of the longest video, "
                f"got {self.frames_per_step}"
            )
        if self.size % self.patch:
            raise ValueError(f"expected patch to divide size ({self.size}), got {self.patch}")

    def rate_at(self, step: int) -> float:
        """Share of the full learning rate: linear up, level, linear down."""
        left = self.steps - step
        return share_of_rate(step, self.warmup_steps, left, self.cooldown * self.steps)

    def frames_at(self, step: int) -> int:
        """How long the videos of a step are."""
        if step < self.short * self.steps:
            return 4
        if step < (1 - self.long) * self.steps:
            return 8
        return 16 if step % 2 else 8

    def batch_at(self, step: int) -> FlowBatch:
        """What a step learns from."""
        frames = self.frames_at(step)
        return step_batch(
            self.seed,
            step,
            videos=self.frames_per_step // frames,
            frames=frames,
            size=self.size,
            shift=self.shift,
            without_caption=self.without_caption,
        )


def build_model(recipe: WanShapesRecipe) -> tuple[Any, CaptionEmbedding]:
    """The untrained ``WanTransformer3DModel`` and text encoder, from the recipe's seed."""
    from diffusers import WanTransformer3DModel

    with torch.random.fork_rng(devices=[]):  # the caller's random numbers are not ours to move
        torch.manual_seed(recipe.seed)
        wan = WanTransformer3DModel(
            patch_size=(1, recipe.patch, recipe.patch),
            num_attention_heads=recipe.heads,
            attention_head_dim=recipe.head_dim,
            in_channels=3,
            out_channels=3,
            text_dim=recipe.text_dim,
            freq_dim=recipe.time_dim,
            ffn_dim=recipe.ffn,
            num_layers=recipe.layers,
            rope_max_seq_len=64,
        )
        text = CaptionEmbedding(WORDS, recipe.text_dim, LONGEST_CAPTION)
    torch.nn.init.zeros_(wan.proj_out.weight)  # as Wan starts: it first predicts nothing
    return wan, text


def train(
    out_dir: str | Path,
    recipe: WanShapesRecipe | None = None,
    resume: bool = True,
    *,
    export_to: str | Path | None = None,
    on_step: Callable[[int, float], None] | None = None,
) -> dict[str, Any]:
    """Train ``wan-shapes`` and return what was measured on the way.

    Args:
        out_dir: Where the checkpoint goes.
        recipe: The hyper-parameters; ``None`` is the published recipe.
        resume: Go on from the checkpoint in ``out_dir`` if there is one.
        export_to: A folder that receives loadable weights at each measurement.
        on_step: Called with the number of finished steps and the loss of the last one.

    Returns:
        As :func:`attending.zoo.recipes.training_loop.run_steps`.
    """
    from attending.zoo.recipes.wan_shapes_card import held_out_loss
    from attending.zoo.recipes.wan_shapes_export import write

    recipe = WanShapesRecipe() if recipe is None else recipe
    trainee = Trainee(*build_model(recipe))
    if recipe.compiled:
        trainee.compile_blocks()

    def backward(step: int) -> float:
        loss = trainee.loss(recipe.batch_at(step), recipe.bfloat16)
        torch.autograd.backward(loss)
        return loss.item()

    def publish(state: dict[str, Any]) -> None:
        if export_to is not None:
            write(trainee, Path(export_to), {"finished": False, **state})

    return run_steps(
        Path(out_dir),
        trainee,
        recipe,
        backward,
        lambda _: {
            "held_out_loss": held_out_loss(trainee.average_wan, trainee.average_text, videos=12)
        },
        resume=resume,
        publish=publish,
        after_step=lambda finished: trainee.average(finished, recipe.average),
        on_step=on_step,
    )
