"""Videos (or images) from a flow matching model: start from noise, follow the velocity to the data.

    x = noise
    for s falling from 1 to 0:
        v = model(x, 1000 s, condition)          # what the model says noise - data is
        x = x - (s - next s) v                   # Euler's step

This is how Wan, Flux and Stable Diffusion 3 are sampled in their simplest form.  The loop knows
nothing of the model but how diffusers calls its transformers: the zoo's ``wan-shapes``, any
``WanTransformer3DModel``, or a function.

>>> from attending import zoo
>>> from attending.diffusion import sample_flow
>>> wan = zoo.load("wan-shapes")
>>> condition = wan.processor(["a red circle moving left on a plain background."])
>>> video = sample_flow(wan.model, condition, shape=(3, 8, 32, 32), steps=2)
>>> video.shape
torch.Size([1, 3, 8, 32, 32])
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from attending.diffusion.seeds import row_seeds


@dataclass(frozen=True, eq=False)
class FlowStep:
    """What is known right before a step.

    Attributes:
        index: Number of this step, from 0.
        steps: How many there will be in all.
        level: ``s``, how much of the sample is noise, from 1 down to above 0.
        next_level: ``s`` after this step; 0 after the last.
        sample: ``x`` as the model will read it, a copy.
    """

    index: int
    steps: int
    level: float
    next_level: float
    sample: Float[Tensor, "batch channels frames height width"]


def noise_levels(steps: int, shift: float = 1.0) -> Float[Tensor, " steps_and_end"]:
    """The ``steps + 1`` values of ``s`` between which a sampler steps, from 1 to 0.

        s = shift u / (1 + (shift - 1) u),    u = 1, 1 - 1 / steps, ..., 1 / steps, 0

    This is what diffusers' ``FlowMatchEulerDiscreteScheduler(shift=shift)`` makes of
    ``sigmas = linspace(1, 1 / steps, steps)``, as the pipelines of Wan and Flux ask for.  (Asked
    for a number of steps alone, that scheduler ends its grid elsewhere.)

    Args:
        steps: At least 1.
        shift: Above 1 more of the steps are taken where there is much noise.  A model needs this
            the more numbers a sample has that depend on each other (Esser et al. 2024, equation
            23): the same noise hides less of a large picture.

    Raises:
        ValueError: An argument is out of range.
    """
    if steps < 1:
        raise ValueError(f"steps: expected at least 1, got {steps}")
    if not 0 < shift < math.inf:
        raise ValueError(f"shift: expected a positive number, got {shift}; 1 is no shift")
    u = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    return shift * u / (shift * u + (1 - u))  # so that 1 stays 1, whatever the rounding


@torch.no_grad()
def sample_flow(
    model: Callable[..., Any],
    encoder_hidden_states: Float[Tensor, "batch tokens dim"],
    *,
    shape: Sequence[int],
    steps: int = 20,
    guidance_scale: float = 1.0,
    unconditional: Float[Tensor, "batch tokens dim"] | None = None,
    shift: float = 3.0,
    seed: int | Sequence[int] = 0,
    on_step: Callable[[FlowStep], None] | None = None,
) -> Float[Tensor, "batch channels frames height width"]:
    """Draw one sample for each condition by Euler's steps from ``s = 1`` to ``s = 0``.

    With guidance the velocity is (Ho and Salimans 2022)

        v = v(unconditional) + guidance_scale (v(condition) - v(unconditional)).

    In each step the model is called with the condition and then, if there is guidance, without;
    each call runs within ``model.cache_context("cond")`` or ``("uncond")`` where the model has
    such contexts, as diffusers' pipelines do for the sake of caches.

    Args:
        model: Called as ``model(hidden_states=, timestep=, encoder_hidden_states=)``, the timestep
            being ``1000 s`` for each row; returns the velocity, or an output with ``.sample``.
        encoder_hidden_states: The conditions.
        shape: Of one sample: ``(channels, frames, height, width)``.
        steps: How many steps; the model is called once or twice in each.
        guidance_scale: 1 is the model as it is, without a second call; more follows the condition
            more closely, at the price of variety.
        unconditional: What stands for no condition, for guidance; one row may serve all.
        shift: See :func:`noise_levels`; 3 is what Wan uses for small videos.
        seed: Of row ``i`` it is ``seed + i``, or the ``i``-th of several.  The noise of a row does
            not depend on the rows beside it, nor on the device.
        on_step: Called before every step.

    Returns:
        The samples in float32, not clipped.

    Raises:
        ValueError: An argument is out of range; guidance without ``unconditional``; the model is in
            training mode.

    Note:
        The sample is kept in float32 and given to the model in the type of the conditions.
        diffusers' ``WanPipeline`` takes multi-step solvers (UniPC) by default; this is its simplest
        scheduler, so that what a method changes in the model is all that differs.
    """
    levels = noise_levels(steps, shift).tolist()
    size = tuple(shape)
    if len(size) != 4 or min(size) < 1:
        raise ValueError(
            "shape: expected (channels, frames, height, width) of one sample, got "
            f"{size}; the batch is that of encoder_hidden_states"
        )
    if encoder_hidden_states.ndim != 3 or not len(encoder_hidden_states):
        raise ValueError(
            "encoder_hidden_states: expected [batch, tokens, dim] with at least one row, got "
            f"{list(encoder_hidden_states.shape)}"
        )
    rows, device = len(encoder_hidden_states), encoder_hidden_states.device
    branches = {"cond": encoder_hidden_states}
    if guidance_scale != 1:
        branches["uncond"] = _unconditional(unconditional, encoder_hidden_states, guidance_scale)
    if getattr(model, "training", False):
        raise ValueError(
            "model: expected one in evaluation mode, got one in training mode; call model.eval()"
        )
    noise = [
        torch.randn(size, generator=torch.Generator().manual_seed(each))
        for each in row_seeds(seed, rows)
    ]
    sample = torch.stack(noise).to(device)
    for index, (level, next_level) in enumerate(pairwise(levels)):
        if on_step is not None:
            on_step(FlowStep(index, steps, level, next_level, sample.clone()))
        timestep = torch.full((rows,), 1000 * level, device=device)
        found = {}
        for name, states in branches.items():
            with _cache_context(model, name):
                found[name] = _velocity(model, sample.to(states.dtype), timestep, states)
        velocity = found["cond"]
        if "uncond" in found:
            velocity = found["uncond"] + guidance_scale * (velocity - found["uncond"])
        sample = sample - (level - next_level) * velocity
    return sample


def _unconditional(unconditional: Tensor | None, condition: Tensor, scale: float) -> Tensor:
    if not math.isfinite(scale):
        raise ValueError(f"guidance_scale: expected a finite number, got {scale}")
    if unconditional is None:
        raise ValueError(
            f"unconditional: expected states of no condition for guidance_scale {scale}, got None; "
            'give them (for wan-shapes: wan.processor([""])), or leave guidance_scale at 1'
        )
    wrong_rows = len(unconditional) not in (1, len(condition))
    if unconditional.ndim != 3 or wrong_rows or unconditional.shape[2] != condition.shape[2]:
        raise ValueError(
            "unconditional: expected one row, or as many as conditions, of their size "
            f"{list(condition.shape)}, got {list(unconditional.shape)}"
        )
    return unconditional.to(condition).expand(len(condition), -1, -1)


def _cache_context(model: Any, name: str) -> AbstractContextManager[Any]:
    context = getattr(model, "cache_context", None)
    return nullcontext() if context is None else context(name)


def _velocity(model: Any, sample: Tensor, timestep: Tensor, states: Tensor) -> Tensor:
    output = model(hidden_states=sample, timestep=timestep, encoder_hidden_states=states)
    velocity: Tensor = output if isinstance(output, Tensor) else output.sample
    if velocity.shape != sample.shape:
        raise ValueError(
            f"model: expected a velocity of the sample's shape {list(sample.shape)}, got "
            f"{list(velocity.shape)}"
        )
    return velocity.float()
