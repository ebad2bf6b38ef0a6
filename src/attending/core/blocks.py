"""Attention over some blocks of the map, as a state: time and memory for what is kept, no more.

    plan = BlockPlan.from_block_mask(mask, block_size=128, query_length=n, key_length=n)
    state = block_sparse_attention(query, key, value, plan)
    merge(state, pooled_rest)                       # a state like any other

How it is done: rows of blocks that keep equally many blocks are gathered, some at a time so that
their keys and values stay in the cache, and one call of the fused kernel serves them all. No mask
is involved, which alone would cost as much as the dense map. Blocks that a diagonal cuts are a part
of their own, merged by its lse. The backward pass gathers again, with the output and lse of the
whole, so that it keeps nothing but those.
"""

import math
from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from attending.core._block_cells import Cells
from attending.core._flex import flex_attention_over
from attending.core.block_plan import BlockPlan
from attending.core.check import check_arguments, check_mask
from attending.core.kernels import fused_attention
from attending.core.partial_gradients import partial_gradients
from attending.core.precision import full_precision
from attending.core.state import AttentionState, attend, merge

Backend = Literal["auto", "gather", "flex"]

# Queries x keys up to which a mask costs less than gathering does, unless little is kept of many.
SMALL_MAP = 512 * 512
LITTLE, MANY = 0.45, 2**19  # density, and queries x keys over batch and heads


class BlockStatistics(NamedTuple):
    """What blocks of the map hold.

    Attributes:
        mass: the share of each row's probability in each key block; 0 where it is not kept.
        maximum: the highest score of each block; -inf where it is not kept.
    """

    mass: Float[Tensor, "batch heads queries key_blocks"]
    maximum: Float[Tensor, "batch heads query_blocks key_blocks"]


@full_precision
def block_sparse_attention(
    query: Float[Tensor, "batch heads queries dim"],
    key: Float[Tensor, "batch kv_heads keys dim"],
    value: Float[Tensor, "batch kv_heads keys value_dim"],
    plan: BlockPlan,
    *,
    bias: Tensor | None = None,
    scale: float | None = None,
    backend: Backend = "auto",
) -> AttentionState:
    """The state of each query over the keys in the blocks that the plan keeps.

    Differentiable, through `output` and `lse`, in query, key and value. A plan that keeps
    everything runs as dense attention, and one that keeps much of a small map as a mask.

    Args:
        query, key, value: as in `attention_state`; query heads may share key heads.
        plan: for these lengths; its batch and heads are 1 or those of the query.
        bias: boolean (True = visible) or float, broadcasts to `[batch, heads, queries, keys]`, for
            what differs within blocks: padding as `[batch, 1, 1, keys]`. It has no gradient here.
        scale: of the scores; `dim ** -0.5` by default.
        backend: "gather" runs PyTorch's fused kernels on gathered blocks, on any device. "flex"
            runs `flex_attention`, which is one compiled kernel on CUDA, for plans and dims that it
            takes, and the whole map elsewhere. "auto" is "gather": which of the two is faster on a
            GPU was not measured yet (`benchmarks/sparse.py` on one would tell).

    Returns:
        The state; output 0 and lse -inf for a query that sees no key.

    Raises:
        ValueError: for arguments that do not fit together; the message names the argument.
    """
    arguments = check_arguments(query, key, value, None, False, scale, True)
    _check_plan(plan, query, key)
    if backend not in get_args(Backend):
        raise ValueError(f"backend: expected one of {get_args(Backend)}, got {backend!r}.")
    if bias is not None:
        if bias.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                "bias: expected one without a gradient, as it would be summed over the whole map; "
                "got one that requires it. Detach it, or use attention_state."
            )
        bias, _ = check_mask(bias, query, key)
    if plan.is_dense and plan.causal_offset in (None, 0):
        causal = plan.causal_offset == 0
        return attend(query, key, value, bias=bias, is_causal=causal, scale=arguments.scale)
    if query.numel() == 0 or key.numel() == 0 or value.shape[-1] == 0:
        return attend(query, key[:, :, :0], value[:, :, :0], scale=arguments.scale)
    if backend == "flex":
        return AttentionState(*flex_attention_over(query, key, value, plan, bias, arguments.scale))
    if _is_small(query, key, plan):
        hiding, _ = check_mask(plan.visible(), query, key)
        hiding = hiding if bias is None else hiding + bias
        return attend(query, key, value, bias=hiding, scale=arguments.scale)
    output, lse = _BlockSparse.apply(  # type: ignore[no-untyped-call]
        query, key, value, plan, bias, arguments.scale
    )
    return AttentionState(output, lse)


@torch.no_grad()
@full_precision
def block_statistics(
    query: Float[Tensor, "batch heads queries dim"],
    key: Float[Tensor, "batch kv_heads keys dim"],
    plan: BlockPlan,
    lse: Float[Tensor, "batch heads queries"],
    *,
    bias: Tensor | None = None,
    scale: float | None = None,
) -> BlockStatistics:
    """Mass and highest score of each block that the plan keeps, given the lse of the rows.

    Args:
        query, key, plan, bias, scale: as in `block_sparse_attention`.
        lse: what the masses are shares of: that of `block_sparse_attention`, or of all keys.
    """
    arguments = check_arguments(query, key, None, None, False, scale, True)
    _check_plan(plan, query, key)
    bias = None if bias is None else check_mask(bias, query, key)[0]
    cells = Cells.of(query, key, key[..., :0], plan, bias, arguments.scale)
    rows, columns = plan.block_mask.shape[2:]
    dtype = lse.dtype
    mass = query.new_zeros(cells.count, plan.block_size[0], columns, dtype=dtype)
    maximum = query.new_full((cells.count, columns), -math.inf, dtype=dtype)
    levels = cells.queries(lse[..., None]).squeeze(-1)
    levels = levels.masked_fill(levels == -math.inf, math.inf)
    for part in cells.parts():
        scores = (cells.query[part.rows].to(dtype) @ part.key.squeeze(1).to(dtype).mT) * cells.scale
        if part.bias is not None:
            scores = scores + part.bias.squeeze(1)
        if part.is_causal:
            scores = scores.masked_fill(torch.ones_like(scores).triu(1) > 0, -math.inf)
        short = part.blocks.shape[1] * plan.block_size[1] - scores.shape[-1]
        scores = pad(scores, (0, short), value=-math.inf).unflatten(-1, (-1, plan.block_size[1]))
        shares = torch.exp(scores - levels[part.rows][..., None, None]).sum(-1)
        column = part.blocks[:, None].expand(shares.shape)
        mass[part.rows] = mass[part.rows].scatter(-1, column, shares)
        real = scores.amax(-1).masked_fill(~cells.real[part.rows][..., None], -math.inf).amax(1)
        maximum[part.rows] = maximum[part.rows].scatter(-1, part.blocks, real)
    batch, heads, queries = query.shape[:3]
    return BlockStatistics(
        mass.view(batch, heads, -1, columns)[:, :, :queries],
        maximum.view(batch, heads, rows, columns),
    )


def _is_small(query: Tensor, key: Tensor, plan: BlockPlan) -> bool:
    pairs = query.shape[2] * key.shape[2]
    many = pairs * query.shape[0] * query.shape[1] >= MANY
    return pairs <= SMALL_MAP and not (many and plan.density <= LITTLE)


class _BlockSparse(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        plan: BlockPlan,
        bias: Tensor | None,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        cells = Cells.of(query, key, value, plan, bias, scale)
        dtype = torch.promote_types(query.dtype, torch.float32)
        output = query.new_empty(*cells.query.shape[:2], value.shape[-1])
        output[cells.unseen] = 0
        lse = query.new_full(cells.query.shape[:2], -math.inf, dtype=dtype)
        for part in cells.parts(may_mask=True):
            asked = cells.query[part.rows][:, None]
            found = AttentionState(
                *fused_attention(asked, part.key, part.value, part.bias, part.is_causal, scale)
            )
            if part.is_cut:
                before = AttentionState(output[part.rows][:, None], lse[part.rows][:, None])
                found = merge(before, found)
            output[part.rows], lse[part.rows] = found.output[:, 0], found.lse[:, 0].to(dtype)
        output, lse = cells.whole(output), cells.whole(lse[..., None]).squeeze(-1)
        ctx.save_for_backward(query, key, value, bias, output, lse)
        ctx.plan, ctx.scale = plan, scale
        ctx.set_materialize_grads(False)
        return output, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output, grad_lse):  # type: ignore[no-untyped-def]
        query, key, value, bias, output, lse = ctx.saved_tensors
        cells = Cells.of(query, key, value, ctx.plan, bias, ctx.scale)
        if grad_output is None:
            grad_output = torch.zeros_like(output)
        sums = [
            torch.zeros(one.shape, dtype=lse.dtype, device=one.device)
            for one in (cells.query, cells.key, cells.value)
        ]
        outputs, grads = cells.queries(output), cells.queries(grad_output)
        lses = cells.queries(lse[..., None]).squeeze(-1)
        grad_lses = None if grad_lse is None else cells.queries(grad_lse[..., None]).squeeze(-1)
        for part in cells.parts():
            rows = part.rows
            found = partial_gradients(
                cells.query[rows][:, None],
                part.key,
                part.value,
                part.bias,
                part.is_causal,
                ctx.scale,
                outputs[rows][:, None],
                lses[rows][:, None],
                grads[rows][:, None],
                None if grad_lses is None else grad_lses[rows][:, None],
            )
            sums[0][rows] += found[0][:, 0]
            index = part.places.flatten()
            room = part.blocks.shape[1] * ctx.plan.block_size[1] - part.key.shape[2]
            for total, grad in zip(sums[1:], found[1:], strict=True):
                grad = pad(grad, (0, 0, 0, room)).to(total.dtype)
                total.index_add_(0, index, grad.reshape(len(index), -1, grad.shape[-1]))
        grad_query = cells.whole(sums[0]).to(query.dtype)
        grad_key, grad_value = (
            total.view(*one.shape[:2], -1, one.shape[-1])[:, :, : one.shape[2]].to(one.dtype)
            for total, one in zip(sums[1:], (key, value), strict=True)
        )
        return grad_query, grad_key, grad_value, None, None, None


def _check_plan(plan: BlockPlan, query: Tensor, key: Tensor) -> None:
    lengths = (query.shape[2], key.shape[2])
    if (plan.query_length, plan.key_length) != lengths:
        raise ValueError(
            f"plan: expected one for {lengths[0]} queries and {lengths[1]} keys, got {plan!r}."
        )
    fits = all(n in (1, m) for n, m in zip(plan.block_mask.shape[:2], query.shape[:2], strict=True))
    if not fits or plan.block_mask.device != query.device:
        raise ValueError(
            f"plan: expected batch and heads of 1 or {list(query.shape[:2])}, on {query.device}, "
            f"got block_mask {list(plan.block_mask.shape)} on {plan.block_mask.device}."
        )
