"""Train a denoiser whose attention was made cheaper to do what it did before: short distillation.

    student = copy.deepcopy(teacher)
    method = FrameReferenceAttention(masks, tokens_per_frame=64)
    curve = distill_denoiser(student, teacher, batches, around=method, learning_rate=1e-4)
    with method(student): ...          # the student belongs with its masks

The last stage of Efficient-vDiT (arXiv 2502.06155): the student is the model under its sparse
masks, the teacher the same model with full attention. The paper trains on 0.1 % of the data of
pretraining; the form of its loss is [recall].
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from attending.losses.distillation import Side, distillation_loss, watch_modules
from attending.taps.running import evaluating, first_tensor, run_model


class DistillationStep(NamedTuple):
    """The losses of one step.

    Attributes:
        total: the weighted sum.
        prediction, hidden: its parts, not weighted.
    """

    total: float
    prediction: float
    hidden: float


def distill_denoiser(
    student: nn.Module,
    teacher: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    around: Callable[[nn.Module], AbstractContextManager[object]] | None = None,
    learning_rate: float = 1e-4,
    optimizer: torch.optim.Optimizer | None = None,
    watched: Sequence[str] = (),
    side: Side = "output",
    prediction_weight: float = 1.0,
    hidden_weight: float = 1.0,
    relative: bool = False,
    max_norm: float = 1.0,
    on_step: Callable[[int, DistillationStep], None] | None = None,
) -> list[DistillationStep]:
    """One step of training for each batch, in place: the student learns the teacher's outputs.

    Args:
        student: its parameters that require a gradient are trained. Its mode (dropout) is left as
            it is.
        teacher: runs in evaluation mode, without gradients. Another object than the student.
        batches: keyword arguments of both models: noisy samples, timesteps, captions. One for each
            step; several passes over data are the caller's.
        around: called with the student before every step, a context within which it computes, such
            as an intervention; None if the student was changed for good.
        learning_rate: of AdamW, without weight decay.
        optimizer: another one, in its place.
        watched: modules whose outputs (or inputs, see `side`) are to agree, too; see
            `attending.losses.distillation.watch_modules`.
        side, prediction_weight, hidden_weight, relative: see `distillation_loss`.
        max_norm: to which gradients are clipped.
        on_step: called with the number of each finished step, from 1, and its losses.

    Returns:
        The losses of all steps.

    Raises:
        ValueError: if teacher and student are one object, nothing is to be trained, there are no
            batches, or the loss is not finite; the student is then as the last good step left it.
    """
    if student is teacher:
        raise ValueError(
            "teacher: expected another object than the student, which would teach itself while it "
            "changes. Give copy.deepcopy(model)."
        )
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    if not trained:
        raise ValueError("student: expected parameters that require a gradient, got none.")
    if optimizer is None:
        optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0)
    curve: list[DistillationStep] = []
    for batch in batches:
        with torch.no_grad(), evaluating(teacher), _watch(teacher, watched, side) as wanted:
            target = prediction_of(run_model(teacher, batch))
        # The gradient is taken while the context is open: a checkpointed region runs in it again.
        context = nullcontext() if around is None else around(student)
        with _watch(student, watched, side) as found, context:
            loss = distillation_loss(
                prediction_of(run_model(student, batch)),
                target,
                found,
                wanted,
                prediction_weight=prediction_weight,
                hidden_weight=hidden_weight,
                relative=relative,
            )
            optimizer.zero_grad()
            loss.total.backward()
        step = DistillationStep(*(float(part.detach()) for part in loss))
        if not bool(loss.total.detach().isfinite()):
            raise ValueError(
                f"batches: expected finite losses, got {step} in step {len(curve) + 1}. Lower the "
                f"learning rate ({learning_rate}), or look at this batch."
            )
        torch.nn.utils.clip_grad_norm_(trained, max_norm)
        optimizer.step()
        curve.append(step)
        if on_step is not None:
            on_step(len(curve), step)
    if not curve:
        raise ValueError("batches: expected at least one batch, got none.")
    return curve


def _watch(
    model: nn.Module, names: Sequence[str], side: Side
) -> AbstractContextManager[dict[str, Tensor]]:
    return watch_modules(model, names, side=side) if names else nullcontext({})


def prediction_of(output: Any) -> Tensor:
    """What a denoiser predicts: the first tensor of what it returns.

    Raises:
        ValueError: if there is none.
    """
    found = first_tensor(output)
    if found is None:
        raise ValueError(
            "model: expected one that returns a tensor, or something with one in it, got "
            f"{type(output).__name__}."
        )
    return found
