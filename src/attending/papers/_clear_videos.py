"""The experiment of CLEAR: local attention in wan-shapes, as it is and after a short distillation.

Windows without training stand beside patterns of equally many keys that are not round: rows (the
tokens nearest in raster order), every n-th token, and the nearest in the whole sequence. Then the
smallest circle is trained for a few dozen steps, by distillation and by flow matching alone.
"""

import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from attending.conversion.linearize import attention_parameters, distillation_step, linearize
from attending.core.block_plan import BlockPlan
from attending.interventions.block_sparse import BlockSparse
from attending.interventions.circular_window import CircularWindow, WindowRun
from attending.papers._video_trial import Method, VideoTrial, video_trial
from attending.sparse.circular_window import circular_window_attention, circular_window_mask
from attending.sparse.window import window_plan
from attending.zoo.entry import ZooModel
from attending.zoo.recipes.wan_shapes_data import FlowBatch, step_batch

TRAINED, MATCHED = "distilled", "flow matching"
HELD_OUT = 9  # number of the batches that the velocity is compared on; training has 0, 1, ...
SHIFT = 4.0  # of the noise levels, as wan-shapes was trained


def circle(radius: int) -> str:
    """The name of a window."""
    return f"circle {radius}"


def measure(
    wan: ZooModel,
    seed: int,
    *,
    radii: Sequence[int],
    trained_radius: int,
    train_steps: int,
    train_videos: int,
    learning_rate: float,
    videos: int,
    frames: int,
    steps: int,
    guidance_scale: float,
    held_out_videos: int,
    tokens_side: int,
    text_tokens: int,
    speed_radius: int,
) -> tuple[dict[str, float], VideoTrial, dict[str, list[float]]]:
    """All numbers of one seed, the trial, and the losses of the two trainings."""
    grid = (frames, 8, 8)
    small = CircularWindow(trained_radius)
    students, losses = {}, {}
    for name, weight in ((TRAINED, 0.5), (MATCHED, 0.0)):
        students[name], losses[name] = train(
            wan, seed, train_steps, train_videos, frames, learning_rate, trained_radius, weight
        )
    methods: dict[str, Method] = {circle(radius): CircularWindow(radius) for radius in radii}
    for radius in radii:
        plans = others(grid, radius)
        shown = plans if radius == trained_radius else {"rows": plans["rows"]}
        methods |= {f"{name} {radius}": planned(plan) for name, plan in shown.items()}
    methods |= {name: with_weights(weights, small) for name, weights in students.items()}
    trial = video_trial(
        methods,
        seeds=(seed,),
        videos_per_seed=videos,
        steps=steps,
        frames=frames,
        guidance_scale=guidance_scale,
        wan=wan,
    )
    found: dict[str, float] = {}
    for name in methods:
        for figure in ("relative_l2", "psnr", "ssim", "density"):
            found[f"{figure}_{key(name)}"] = trial.values(name, figure)[0]
    free = found[f"relative_l2_{key(circle(trained_radius))}"]
    for name in students:
        found[f"recovered_{key(name)}"] = 1 - found[f"relative_l2_{key(name)}"] / free
    batch = flow_batch(HELD_OUT, seed, held_out_videos, frames)
    truth = velocity(wan, batch, None)
    found["held_out_dense"] = float((truth - batch.velocity).square().mean())
    for name in (circle(trained_radius), *students):
        own = velocity(wan, batch, methods[name])
        found[f"held_out_{key(name)}"] = float((own - batch.velocity).square().mean())
        found[f"to_teacher_{key(name)}"] = float((own - truth).square().mean())
    found["attention_speedup"] = speedup(tokens_side, text_tokens, speed_radius)
    return found, trial, losses


def key(name: str) -> str:
    """A method's name in the names of measurements."""
    return name.replace(" ", "_")


def train(
    wan: ZooModel,
    seed: int,
    steps: int,
    videos: int,
    frames: int,
    learning_rate: float,
    radius: float,
    weight: float,
) -> tuple[dict[str, Tensor], list[float]]:
    """Attention projections of a student with that radius, and how far its velocity was off.

    `weight` is that of the teacher's prediction and attention; 0 is flow matching alone.

    The rate rises over the first tenth and falls to zero, gradients are clipped at 1 as in the
    official script.
    """
    teacher: Any = wan.model
    student = linearize(copy.deepcopy(teacher), radius)
    trained = attention_parameters(student)
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0)
    losses = []
    for step in range(steps):
        batch = flow_batch(seed, step, videos, frames)
        share = min((step + 1) / max(1, steps // 10), (steps - step) / steps)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * share
        loss = distillation_step(
            student,
            teacher,
            inputs(wan, batch),
            batch.velocity,
            prediction_weight=weight,
            attention_weight=weight,
        )
        torch.autograd.backward(loss.total)
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.flow_matching.item())
    moved = {id(one) for one in trained}
    found = {name: one.detach() for name, one in student.named_parameters() if id(one) in moved}
    return found, losses


def flow_batch(seed: int, step: int, videos: int, frames: int) -> FlowBatch:
    """Videos that the recipe of wan-shapes would train on, of seeds that it does not use."""
    return step_batch(
        1000 + seed, step, videos=videos, frames=frames, size=32, shift=SHIFT, without_caption=0.1
    )


def inputs(wan: ZooModel, batch: FlowBatch) -> dict[str, Tensor]:
    """Of the model's forward."""
    with torch.no_grad():
        states = wan.processor(batch.captions)
    return {
        "hidden_states": batch.noisy,
        "timestep": 1000 * batch.levels,
        "encoder_hidden_states": states,
    }


@torch.no_grad()
def velocity(wan: ZooModel, batch: FlowBatch, method: Method) -> Tensor:
    """What the model predicts within a method."""
    model: Any = wan.model
    if method is None:
        found: Tensor = model(**inputs(wan, batch)).sample
        return found
    with method(model):
        return velocity(wan, batch, None)


def with_weights(weights: dict[str, Tensor], window: CircularWindow) -> Callable[[nn.Module], Any]:
    """A window with trained weights, while a block runs."""

    @contextmanager
    def block(model: nn.Module) -> Iterator[WindowRun]:
        state = model.state_dict()
        own = {name: state[name].clone() for name in weights}
        model.load_state_dict(weights, strict=False)
        try:
            with window(model) as run:
                yield run
        finally:
            model.load_state_dict(own, strict=False)

    return block


@lru_cache(maxsize=8)
def others(grid: tuple[int, int, int], radius: float) -> dict[str, BlockPlan]:
    """Patterns that show each query equally many tokens as the circle does on average, or more.

    `rows`: in each frame those nearest in raster order; `strided`: every n-th; `sequence`: those
    nearest in the whole sequence.
    """
    tokens, frame = math.prod(grid), grid[1] * grid[2]
    seen = float(circular_window_mask(grid, radius).float().sum(1).mean())
    width = math.ceil(seen / grid[0])
    rows = window_plan(frame, frame, block_size=1, width=width).block_mask
    stride = max(1, int(tokens / seen))

    def plan(mask: Tensor) -> BlockPlan:
        return BlockPlan.from_block_mask(mask, block_size=1, query_length=tokens, key_length=tokens)

    place = torch.arange(tokens)
    return {
        "rows": plan(rows.repeat(1, 1, grid[0], grid[0])),
        "strided": plan((place[:, None] - place) % stride == 0),
        "sequence": window_plan(tokens, tokens, block_size=1, width=math.ceil(seen)),
    }


def planned(plan: BlockPlan) -> BlockSparse:
    """The same plan at all times."""
    return BlockSparse(lambda call, moment: plan)


@torch.no_grad()
def speedup(side: int, text: int, radius: int, rounds: int = 3) -> float:
    """How many times as long full attention takes, on an image of side x side tokens and text."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, 2, side**2 + text, 64, generator=generator) for _ in range(3)
    )
    ratios = []
    for _ in range(rounds + 1):
        spent = []
        for local in (False, True):
            start = time.process_time()
            if local:
                circular_window_attention(query, key, value, (side, side), radius, text_length=text)
            else:
                nn.functional.scaled_dot_product_attention(query, key, value)
            spent.append(time.process_time() - start)
        ratios.append(spent[0] / max(spent[1], 1e-9))
    return sorted(ratios[1:])[rounds // 2]  # the first round warms up
