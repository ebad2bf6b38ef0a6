"""A plan run by PyTorch's `flex_attention`: for CUDA, where it is compiled to one kernel.

What `flex_attention` does in silence when it is fed carelessly is what this file is about:

- without a `mask_mod` its eager form ignores the lists of blocks and attends everywhere, while the
  compiled form keeps to them; so the plan is always said twice, in lists and in a `mask_mod`;
- for a query that sees nothing the forms disagree too; here it gets output 0 and lse -inf;
- a block mask for other lengths is cut to size rather than refused; `seq_lengths` is always given.
"""

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor

from attending.core.block_plan import BlockPlan


def flex_attention_over(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: BlockPlan,
    bias: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """`(output, lse)`, differentiable where `flex_attention` is: compiled on CUDA, eager elsewhere.

    Eager, it builds the whole map: for tests.
    """
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    function: Any = flex_attention
    if query.device.type == "cuda":
        function = _compiled()
    output, aux = function(
        query,
        key,
        value,
        score_mod=None if bias is None else _adding(bias),
        block_mask=block_mask_of(plan),
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
        return_aux=AuxRequest(lse=True),
    )
    lse = aux.lse
    empty = ~_seen_rows(plan, bias).expand(lse.shape)
    return output.masked_fill(empty[..., None], 0.0), lse.masked_fill(empty, -math.inf)


def block_mask_of(plan: BlockPlan) -> Any:
    """The plan as a `BlockMask`: whole blocks, cut blocks, and a `mask_mod` that says the same.

    Kept with the plan, as making one costs some sorting.
    """
    from torch.nn.attention.flex_attention import BlockMask

    if "_flex" not in plan.__dict__:
        whole, cut = plan.whole_and_cut
        plan.__dict__["_flex"] = BlockMask.from_kv_blocks(
            *_lists(cut),
            *_lists(whole),
            BLOCK_SIZE=plan.block_size,
            mask_mod=_showing(plan),
            seq_lengths=(plan.query_length, plan.key_length),
        )
    return plan.__dict__["_flex"]


def _lists(mask: Tensor) -> tuple[Tensor, Tensor]:
    order = mask.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return mask.sum(-1, dtype=torch.int32), order.to(torch.int32)


# Lambdas, as functions that are checked at run time (jaxtyping) cannot be traced.


def _showing(plan: BlockPlan) -> Any:
    kept, (height, width) = plan.block_mask, plan.block_size
    batch_step, head_step = (int(size > 1) for size in kept.shape[:2])
    # Without an offset every query sees all keys.
    offset = plan.key_length if plan.causal_offset is None else plan.causal_offset
    return lambda batch, head, row, column: (
        kept[batch * batch_step, head * head_step, row // height, column // width]
        & (column <= row + offset)
    )


def _adding(bias: Tensor) -> Any:
    steps = [int(size > 1) for size in bias.shape]
    return lambda score, batch, head, row, column: (
        score + bias[batch * steps[0], head * steps[1], row * steps[2], column * steps[3]]
    )


def _seen_rows(plan: BlockPlan, bias: Tensor | None) -> Tensor:
    """Which queries see any key. A bias is looked at in full; without one the blocks suffice."""
    if bias is not None:
        return (plan.visible() & (bias > -math.inf)).any(-1)
    rows = torch.arange(plan.query_length, device=plan.block_mask.device)
    first = plan.block_mask.to(torch.int8).argmax(-1) * plan.block_size[1]
    some = plan.block_mask.any(-1)[..., rows // plan.block_size[0]]
    if plan.causal_offset is None:
        return some
    return some & (first[..., rows // plan.block_size[0]] <= rows + plan.causal_offset)


@cache
def _compiled() -> Any:
    """Compiled once: each compilation takes seconds."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)
