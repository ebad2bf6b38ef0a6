"""Losses with which a cheaper model learns from the one it was made of: prediction, hidden states.

The student is a model whose attention was made sparse or linear, the teacher the model as it was.
Both see the same inputs; the student is pulled towards what the teacher predicts and, layer by
layer, towards what the teacher computes inside:

    with watch_modules(teacher, names) as wanted, torch.no_grad():
        target = teacher(**inputs)
    with watch_modules(student, names) as found:
        prediction = student(**inputs)
    loss = distillation_loss(prediction, target, found, wanted, hidden_weight=0.5).total

Used by Efficient-vDiT (arXiv 2502.06155: knowledge distillation of the sparse model; the form of
its loss is [recall]) and by CLEAR (arXiv 2412.16112: outputs of attention and predictions).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from attending.taps.running import first_tensor

Side = Literal["output", "input"]


class Distillation(NamedTuple):
    """A distillation loss and what it is made of.

    Attributes:
        total: `prediction_weight * prediction + hidden_weight * hidden`: what to differentiate.
        prediction: how far the predictions are apart, not yet weighted.
        hidden: the mean over the watched modules, not yet weighted; 0 if none were watched.
    """

    total: Float[Tensor, ""]
    prediction: Float[Tensor, ""]
    hidden: Float[Tensor, ""]


def distillation_loss(
    student: Float[Tensor, "*shape"],
    teacher: Float[Tensor, "*shape"],
    student_hidden: Mapping[str, Tensor] | None = None,
    teacher_hidden: Mapping[str, Tensor] | None = None,
    *,
    prediction_weight: float = 1.0,
    hidden_weight: float = 1.0,
    relative: bool = False,
) -> Distillation:
    """Mean squared error to the teacher's prediction and to its hidden states.

        prediction = mean (student - teacher)^2
        hidden     = (1 / |S|) sum_{l in S} mean (student_hidden[l] - teacher_hidden[l])^2
        total      = prediction_weight * prediction + hidden_weight * hidden

    No gradient reaches the teacher. Half precision is compared in float32.

    Args:
        student, teacher: the predictions (of noise, velocity, logits), of one shape.
        student_hidden, teacher_hidden: tensors by name, the same names in both, as `watch_modules`
            gives them; None for none.
        prediction_weight, hidden_weight: of the two parts.
        relative: divide each squared error by the mean square of the teacher's tensor, so that
            layers of different scale count alike. Where the teacher is 0 everywhere it is not
            divided.

    Raises:
        ValueError: for names or shapes that differ, no names, or hidden states without a gradient
            where the prediction has one: reentrant gradient checkpointing loses it.
    """
    mine, theirs = student_hidden or {}, teacher_hidden or {}
    if mine.keys() != theirs.keys():
        raise ValueError(
            f"student_hidden, teacher_hidden: expected the same names, got {sorted(mine)} and "
            f"{sorted(theirs)}. Watch the same modules, and run both models equally often."
        )
    if mine and student.requires_grad and not any(one.requires_grad for one in mine.values()):
        raise ValueError(
            "student_hidden: expected tensors with a gradient as the prediction has one, got none. "
            "Watch the student with gradients on; if it is checkpointed, with use_reentrant=False."
        )
    prediction = _squared_error("teacher", student, teacher, relative)
    errors = [
        _squared_error(f"teacher_hidden[{name!r}]", mine[name], theirs[name], relative)
        for name in mine
    ]
    first = prediction.device
    hidden = (
        torch.stack([error.to(first) for error in errors]).mean()
        if errors
        else torch.zeros_like(prediction)
    )
    total = prediction_weight * prediction + hidden_weight * hidden
    return Distillation(total, prediction, hidden)


@contextmanager
def watch_modules(
    model: nn.Module, names: Sequence[str], *, side: Side = "output"
) -> Iterator[dict[str, Tensor]]:
    """Keep what modules of a model return (or get), with its graph, while the context is open.

    Within the block the dictionary fills as the model runs; the model is not changed. A module that
    runs several times is kept as `name`, `name#1`, `name#2`, ... What gradient checkpointing runs
    again is not kept.

    Args:
        model: any module.
        names: of its modules, as in `model.named_modules()`: `"blocks.3.attn1"` for what attention
            adds to the residual stream.
        side: `"output"`, or `"input"` for the first tensor that the module is given: that of
            `"blocks.3.attn1.to_out.0"` is the output of attention, heads side by side, before its
            projection.

    Raises:
        ValueError: for a name that the model does not have, an unknown side, or, as the model runs,
            a module that returns (or is given) no tensor.
    """
    modules = dict(model.named_modules())
    missing = [name for name in names if name not in modules]
    if missing or isinstance(names, str) or not names:
        raise ValueError(
            f"names: expected names of modules of {type(model).__name__}, as in "
            f"model.named_modules(), got {names!r}"
            + (f", of which it lacks {missing}." if missing and names else ".")
        )
    if side not in ("output", "input"):
        raise ValueError(f'side: expected "output" or "input", got {side!r}.')
    kept: dict[str, Tensor] = {}
    with ExitStack() as cleanup:
        for name in dict.fromkeys(names):
            hook = _keeper(kept, name, side)
            handle = modules[name].register_forward_hook(hook, with_kwargs=True)
            cleanup.callback(handle.remove)
        yield kept


def _keeper(kept: dict[str, Tensor], name: str, side: Side) -> Callable[..., None]:
    def keep(module: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Any) -> None:
        if torch._C._current_graph_task_id() != -1:  # a checkpointed region runs again in backward
            return
        given = (*args, *kwargs.values()) if side == "input" else output
        found = first_tensor(given)
        if found is None:
            raise ValueError(
                f"names: expected modules with a tensor as {side}, got {name!r}, a "
                f"{type(module).__name__} without one."
            )
        times = sum(1 for other in kept if other == name or other.startswith(f"{name}#"))
        kept[f"{name}#{times}" if times else name] = found

    return keep


def _squared_error(name: str, student: Tensor, teacher: Tensor, relative: bool) -> Tensor:
    if student.shape != teacher.shape:
        raise ValueError(
            f"{name}: expected the shape of the student's, {list(student.shape)}, got "
            f"{list(teacher.shape)}."
        )
    dtype = torch.promote_types(student.dtype, torch.float32)
    teacher = teacher.detach().to(student.device, dtype)
    error = (student.to(dtype) - teacher).square().mean()
    if not relative:
        return error
    size = teacher.square().mean()
    return error / size.masked_fill(size == 0, 1.0)
