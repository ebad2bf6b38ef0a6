"""The loss with which a diffusion transformer learns to do with local attention: CLEAR.

A flow-matching model predicts the velocity `v = eps - x0` of `x_t = (1 - sigma) x0 + sigma eps`.
The student, whose attention is local, is pulled towards the true velocity, the teacher's prediction
of it, and what comes out of the teacher's attention layers:

    L = L_fm + alpha L_pred + beta L_attn
    L_fm   = mean (student - v)^2
    L_pred = mean (student - teacher)^2
    L_attn = (1 / |S|) sum_{l in S} mean (o_l^student - o_l^teacher)^2

with `o_l` the output of attention in layer l, heads side by side, before the projection.

Source: CLEAR (arXiv 2412.16112). alpha = beta = 0.5 and a sum over all layers are the paper's
[recall]; the official code takes 10 of FLUX's 38 single-stream blocks (`official_layers`). It
appends features to lists in its attention processors, twice where gradients are checkpointed; here
hooks keep them.
"""

from collections import ChainMap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from attending.losses.distillation import distillation_loss, watch_modules


class Linearization(NamedTuple):
    """The loss of CLEAR and what it is made of.

    Attributes:
        total: what to differentiate.
        flow_matching, prediction, attention: its parts, not yet weighted.
    """

    total: Float[Tensor, ""]
    flow_matching: Float[Tensor, ""]
    prediction: Float[Tensor, ""]
    attention: Float[Tensor, ""]


def linearization_loss(
    student: Float[Tensor, "*shape"],
    target: Float[Tensor, "*shape"],
    teacher: Float[Tensor, "*shape"],
    student_attention: Mapping[str, Tensor] | None = None,
    teacher_attention: Mapping[str, Tensor] | None = None,
    *,
    prediction_weight: float = 0.5,
    attention_weight: float = 0.5,
) -> Linearization:
    """Flow matching, and the teacher's prediction and attention.

    Equal to flow matching alone where the student does what the teacher does. No gradient reaches
    the teacher; half precision is compared in float32.

    Args:
        student, teacher: predicted velocities.
        target: the true one, noise minus clean data.
        student_attention, teacher_attention: outputs of attention by layer, as
            `watch_attention_outputs` keeps them.
        prediction_weight, attention_weight: alpha and beta.

    Raises:
        ValueError: for shapes or layers that differ.
    """
    if student.shape != target.shape:
        raise ValueError(
            f"target: expected the shape of the student's prediction, {list(student.shape)}, got "
            f"{list(target.shape)}."
        )
    learned = distillation_loss(
        student,
        teacher,
        student_attention,
        teacher_attention,
        prediction_weight=prediction_weight,
        hidden_weight=attention_weight,
    )
    dtype = torch.promote_types(student.dtype, torch.float32)
    matching = (student.to(dtype) - target.detach().to(student.device, dtype)).square().mean()
    total = matching + learned.total
    return Linearization(total, matching, learned.prediction, learned.hidden)


@contextmanager
def watch_attention_outputs(
    model: nn.Module, names: Sequence[str]
) -> Iterator[Mapping[str, Tensor]]:
    """Keep what attention modules of diffusers compute before they project it.

    Of a module with an output projection (`to_out`) that is what the projection is given; of one
    without (the single-stream blocks of FLUX), what it returns. In joint blocks these are the image
    tokens. Works under gradient checkpointing, see `watch_modules`.

    Args:
        model: the transformer.
        names: of its attention modules, such as `"transformer_blocks.0.attn"`.

    Raises:
        ValueError: for names that the model does not have.
    """
    modules = dict(model.named_modules())
    missing = [name for name in names if name not in modules]
    if missing or not names:
        raise ValueError(
            f"names: expected names of attention modules of {type(model).__name__}, got "
            f"{list(names)!r}" + (f", of which it lacks {missing}." if missing else ".")
        )
    projected = {f"{name}.to_out.0" for name in names} & modules.keys()
    plain = [name for name in names if f"{name}.to_out.0" not in projected]
    with ExitStack() as stack:
        parts = []
        if projected:
            ordered = [f"{name}.to_out.0" for name in names if name not in plain]
            parts.append(stack.enter_context(watch_modules(model, ordered, side="input")))
        if plain:
            parts.append(stack.enter_context(watch_modules(model, plain)))
        yield ChainMap(*parts)


def official_layers(names: Sequence[str], every: int = 4) -> list[str]:
    """The layers that the official code compares: single-stream blocks at every fourth place.

    Args:
        names: of all attention modules of the model, in its order.
        every: of all, counted from the first, single-stream or not.

    Raises:
        ValueError: if there is no such layer.
    """
    found = [name for place, name in enumerate(names) if place % every == 0 and "single" in name]
    if not found:
        raise ValueError(
            f'names: expected some with "single" at places 0, {every}, {2 * every}, ..., as FLUX '
            f"has them, got {list(names)}."
        )
    return found
