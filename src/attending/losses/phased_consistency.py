"""Phased consistency: a flow-matching model learns to jump to the end of its phase in one step.

The sampler's path from noise to data is cut into phases. Within a phase the student learns that
from any two neighbouring points of the path its jump to the end of the phase arrives at the same
place; the step between the two is made by the teacher. One phase is consistency distillation, as
many phases as steps is plain distillation of the Euler sampler.

    levels = noise_levels(1000, shift=3.0)[:-1].flip(0)      # of attending.diffusion, ascending
    solver = PhasedConsistencySolver(levels, steps=50, phases=4)
    index = torch.randint(50, (batch,))
    loss = phased_consistency_loss(
        solver, data, noise, index, student=student, teacher=teacher, average=ema
    )

Source: the solver of FastVideo v0.1.0, the closest runnable relative of the first stage of
Efficient-vDiT (arXiv 2502.06155); golden vectors hold us to it. Its authors say that several phases
gained them nothing over one. The paper's own form is in `attending.losses.multistep_consistency`.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from attending.losses._batch import along_batch

VelocityModel = Callable[[Float[Tensor, "batch *shape"], Float[Tensor, " batch"]], Tensor]
"""Predicts the velocity `noise - data` from a noisy sample and its sigma."""


def phase_start(index: Int[Tensor, " batch"], steps: int, phases: int) -> Int[Tensor, " batch"]:
    """The first step of the phase of each step: the largest `floor(p * steps / phases) <= index`.

    Args:
        index: of steps, counted from the clean end, from 0.
        steps: of the whole path.
        phases: as many or fewer.

    Raises:
        ValueError: unless `1 <= phases <= steps`, and for an index that is no step.
    """
    if not 1 <= phases <= steps:
        raise ValueError(f"phases: expected from 1 to {steps}, the number of steps, got {phases}.")
    if bool(((index < 0) | (index >= steps)).any()):
        raise ValueError(f"index: expected steps 0 to {steps - 1}, got {index.tolist()}.")
    edges = torch.arange(phases, device=index.device) * steps // phases
    return edges[torch.searchsorted(edges, index, right=True) - 1]


class PhasedConsistencySolver:
    """Euler steps of a flow-matching path, and jumps to the end of a phase of it.

    Of `T` noise levels (ascending) it takes every `T / steps`-th:

        sigmas[i]          = levels[(i + 1) T / steps - 1]
        sigmas_previous[i] = levels[i T / steps - 1],   levels[0] for i = 0

    So the last jump ends at the smallest level of training and not at 0, where a sampler ends: that
    is the official code's, and it is kept.

    Args:
        sigmas: noise levels, ascending, above 0.
        steps: of the Euler path; divides their number.
        phases: of the path.

    Attributes:
        sigmas, sigmas_previous: the level before and after each step, by index.
        steps, phases: as given.

    Raises:
        ValueError: for levels that do not ascend, or numbers that do not fit.
    """

    def __init__(self, sigmas: Float[Tensor, " train_steps"], steps: int, phases: int) -> None:
        count = len(sigmas) if sigmas.dim() == 1 else 0
        if not count or bool((sigmas.diff() <= 0).any()) or not bool(sigmas[0] > 0):
            raise ValueError(
                "sigmas: expected noise levels that ascend from above 0, got "
                f"{list(sigmas.shape)} from {sigmas.flatten()[:1].tolist()}. Take "
                "attending.diffusion.noise_levels(...)[:-1].flip(0)."
            )
        if steps < 1 or count % steps:
            raise ValueError(f"steps: expected a divisor of the {count} noise levels, got {steps}.")
        last = (torch.arange(steps) + 1) * count // steps - 1
        before = torch.cat([torch.zeros(1, dtype=torch.long), last[:-1]])
        self.sigmas, self.sigmas_previous = sigmas[last.to(sigmas.device)], sigmas[before]
        self.steps, self.phases = steps, phases
        phase_start(last[:1] * 0, steps, phases)  # refuses phases that do not fit

    def to(self, device: torch.device | str) -> "PhasedConsistencySolver":
        """Itself, with its levels on a device."""
        self.sigmas, self.sigmas_previous = (
            one.to(device) for one in (self.sigmas, self.sigmas_previous)
        )
        return self

    def edge_of(self, index: Int[Tensor, " batch"]) -> Int[Tensor, " batch"]:
        """The first index of the phase of each index: where its jump ends."""
        return phase_start(index, self.steps, self.phases)

    def add_noise(
        self,
        data: Float[Tensor, "batch *shape"],
        noise: Float[Tensor, "batch *shape"],
        index: Int[Tensor, " batch"],
    ) -> Float[Tensor, "batch *shape"]:
        """The sample before step `index`: `sigma noise + (1 - sigma) data`."""
        sigma = along_batch(self.sigmas[index], data)
        return sigma * noise + (1 - sigma) * data

    def step(
        self,
        sample: Float[Tensor, "batch *shape"],
        velocity: Float[Tensor, "batch *shape"],
        index: Int[Tensor, " batch"],
    ) -> Float[Tensor, "batch *shape"]:
        """One Euler step towards the data: `x + (sigma_previous - sigma) v`."""
        move = self.sigmas_previous[index] - self.sigmas[index]
        return sample + along_batch(move, sample) * velocity

    def jump(
        self,
        sample: Float[Tensor, "batch *shape"],
        velocity: Float[Tensor, "batch *shape"],
        index: Int[Tensor, " batch"],
        *,
        after_step: bool = False,
    ) -> Float[Tensor, "batch *shape"]:
        """To the end of the phase of step `index`, in one go: `x + (sigma_end - sigma) v`.

        Args:
            sample: before the step; after it with `after_step`.
            velocity: what the student predicts there.
            index: of the step.
            after_step: whether the sample has the level after the step.
        """
        here = (self.sigmas_previous if after_step else self.sigmas)[index]
        end = self.sigmas_previous[self.edge_of(index)]
        return sample + along_batch(end - here, sample) * velocity


def phased_consistency_loss(
    solver: PhasedConsistencySolver,
    data: Float[Tensor, "batch *shape"],
    noise: Float[Tensor, "batch *shape"],
    index: Int[Tensor, " batch"],
    *,
    student: VelocityModel,
    teacher: VelocityModel,
    average: VelocityModel | None = None,
    c: float = 0.001,
) -> Float[Tensor, ""]:
    """Make the student's jump from a noisy sample that from the next point of the teacher's path.

        x        = sigma_i noise + (1 - sigma_i) data
        x_before = x + (sigma_previous_i - sigma_i) teacher(x, sigma_i)
        found    = x        + (sigma_end - sigma_i)          student(x, sigma_i)
        wanted   = x_before + (sigma_end - sigma_previous_i) average(x_before, sigma_previous_i)
        loss     = pseudo_huber(found, wanted, c)

    No gradient reaches `wanted`.

    Args:
        solver: levels and phases.
        data, noise: clean samples, and Gaussian noise of their shape.
        index: a step for each, drawn evenly.
        student: `(sample, sigma) -> velocity`, with a gradient.
        teacher: the same, of the model to learn from. With guidance it is
            `v_uncond + w (v_cond - v_uncond)`: the student learns that in one call.
        average: the same, usually of an average of the student's weights; None for the student.
        c: of `pseudo_huber`.
    """
    noisy = solver.add_noise(data, noise, index)
    found = solver.jump(noisy, student(noisy, solver.sigmas[index]), index)
    with torch.no_grad():
        before = solver.step(noisy, teacher(noisy, solver.sigmas[index]), index)
        velocity = (average or student)(before, solver.sigmas_previous[index])
        wanted = solver.jump(before, velocity, index, after_step=True)
    return pseudo_huber(found, wanted, c)


def pseudo_huber(
    found: Float[Tensor, "*shape"], wanted: Float[Tensor, "*shape"], c: float = 0.001
) -> Float[Tensor, ""]:
    """`mean(sqrt((found - wanted)^2 + c^2) - c)`: the distance where large, its square where small.

    Args:
        found, wanted: of one shape.
        c: where one turns into the other; above 0.

    Raises:
        ValueError: for differing shapes, or a `c` that is not positive.
    """
    if found.shape != wanted.shape:
        raise ValueError(
            f"wanted: expected the shape of found, {list(found.shape)}, got {list(wanted.shape)}."
        )
    if not c > 0:
        raise ValueError(f"c: expected a positive number, got {c}.")
    return (((found - wanted).square() + c**2).sqrt() - c).mean()
