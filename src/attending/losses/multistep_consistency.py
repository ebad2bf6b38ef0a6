"""Multistep consistency distillation: a diffusion model that jumps to the end of its segment.

Time is cut into segments. The student learns to predict, anywhere in a segment, the clean sample
that takes DDIM to the segment's end in one step; the teacher makes one small step first, and the
student itself jumps from there. One segment is consistency distillation; as many segments as the
teacher has steps is ordinary distillation of DDIM.

Source: Heek, Hoogeboom and Salimans 2024, "Multistep Consistency Models" (arXiv 2403.06807), as the
first stage of Efficient-vDiT (arXiv 2502.06155) uses it [recall]. It takes a sampler from 100 steps
to 20, the printed 5x [inferred]. For flow matching see `attending.losses.phased_consistency`.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from attending.losses._batch import along_batch
from attending.losses.phased_consistency import phase_start

CleanModel = Callable[[Float[Tensor, "batch *shape"], Float[Tensor, " batch"]], Tensor]
"""Predicts the clean sample from a noisy one and its time."""


class NoiseLevel(NamedTuple):
    """How noisy samples are: `z = alpha x + sigma noise`.

    Attributes:
        alpha, sigma: for each item of a batch.
    """

    alpha: Float[Tensor, " batch"]
    sigma: Float[Tensor, " batch"]


def cosine_level(time: Float[Tensor, " batch"]) -> NoiseLevel:
    """The variance-preserving cosine schedule: `alpha = cos(pi t / 2)`, `sigma = sin(pi t / 2)`."""
    angle = time * (torch.pi / 2)
    return NoiseLevel(angle.cos(), angle.sin())


def ddim_step(
    noisy: Float[Tensor, "batch *shape"],
    clean: Float[Tensor, "batch *shape"],
    at: NoiseLevel,
    to: NoiseLevel,
) -> Float[Tensor, "batch *shape"]:
    """One step of DDIM: `alpha_to x + (sigma_to / sigma_at) (z - alpha_at x)`.

    Args:
        noisy: z, at level `at`, whose sigma is not 0.
        clean: x, what a model predicts from it.
        at, to: the levels before and after.
    """
    ratio = along_batch(to.sigma / at.sigma, noisy)
    return along_batch(to.alpha, noisy) * clean + ratio * (
        noisy - along_batch(at.alpha, noisy) * clean
    )


def inverse_ddim_step(
    noisy: Float[Tensor, "batch *shape"],
    reached: Float[Tensor, "batch *shape"],
    at: NoiseLevel,
    to: NoiseLevel,
) -> Float[Tensor, "batch *shape"]:
    """The clean sample with which `ddim_step` gets from `noisy` to `reached`.

    x = (reached - (sigma_to / sigma_at) noisy) / (alpha_to - alpha_at sigma_to / sigma_at)

    Args:
        noisy, reached: at the levels `at` and `to`.
        at, to: the second has less noise.
    """
    ratio = to.sigma / at.sigma
    change = along_batch(to.alpha - at.alpha * ratio, noisy)
    return (reached - along_batch(ratio, noisy) * noisy) / change


def multistep_consistency_target(
    noisy: Float[Tensor, "batch *shape"],
    index: Int[Tensor, " batch"],
    *,
    student: CleanModel,
    teacher: CleanModel,
    steps: int,
    segments: int,
    level: Callable[[Float[Tensor, " batch"]], NoiseLevel] = cosine_level,
) -> Float[Tensor, "batch *shape"]:
    """What the student shall predict from `noisy` at time `(index + 1) / steps`; no gradient.

        t = (index + 1) / steps,  s = index / steps,  e = the start of the segment of s
        z_s = ddim_step(z_t, teacher(z_t, t), t -> s)
        z_e = ddim_step(z_s, student(z_s, s), s -> e)         z_s itself where s = e
        target = inverse_ddim_step(z_t, z_e, t -> e)

    The loss is `w_t |student(z_t, t) - target|^2`, or `pseudo_huber`; the paper's w is not known.

    Args:
        noisy: z_t.
        index: the teacher's step of each item, 0 to `steps - 1`.
        student, teacher: `(noisy, time) -> clean`. With guidance the teacher's is that of the
            guided prediction.
        steps: of the teacher; 100 in the paper. [inferred]
        segments: of time, so many steps the student will need; 20 in the paper. [inferred]
        level: from times to levels.

    Raises:
        ValueError: for an index that is no step, or more segments than steps.
    """
    end = phase_start(index, steps, segments)
    dtype = noisy.dtype if noisy.dtype == torch.float64 else torch.float32
    t, s, e = ((one.to(dtype) / steps) for one in (index + 1, index, end))
    with torch.no_grad():
        next_noisy = ddim_step(noisy, teacher(noisy, t), level(t), level(s))
        at_end = next_noisy
        jumps = index > end  # elsewhere the segment ends here, and at time 0 there is no noise
        if bool(jumps.any()):
            reached = ddim_step(next_noisy, student(next_noisy, s), level(s), level(e))
            at_end = torch.where(along_batch(jumps.to(dtype), noisy) > 0, reached, next_noisy)
        return inverse_ddim_step(noisy, at_end, level(t), level(e))
