"""One sequence on several devices: block-sparse attention over `torch.distributed`.

Every rank holds an equal share of the tokens, in the order of the ranks, with all heads, and gets
the attention of its own queries over all keys. Two ways, both exact and with gradients:

- `key_parallel_attention`: keys and values stay where they are. Each rank gets all queries,
  computes their attention over its own keys as a state, and the states of a query are merged by
  their lse where the query lives.
- `head_parallel_attention`: each rank gets all tokens of some heads, attends, and hands the tokens
  back (all-to-all, as DeepSpeed-Ulysses and the sparse models of Efficient-vDiT, arXiv 2502.06155,
  do [recall]). Its load is even whatever the plan; heads must divide among the ranks.

What travels per layer, in units of one tensor `[batch, heads, tokens of a rank, dim]`, for P ranks:
keys `(P - 1) + (P - 1)` (queries out, outputs back), heads `4 (P - 1) / P`. So heads are cheaper on
the wire for more than two ranks; keys need no division of heads and take masks of any kind.

    torchrun --nproc-per-node 2 script.py

    share = hidden[:, rank * n : (rank + 1) * n]
    output = head_parallel_attention(query, key, value, plan)      # plan of the whole sequence

Every rank passes the same plan, that of the whole sequence. The one collective used is
`all_to_all_single`, which gloo, NCCL and MPI have.
"""

from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from attending.core.block_plan import BlockPlan
from attending.core.blocks import block_sparse_attention
from attending.core.state import AttentionState, merge


def key_parallel_attention(
    query: Float[Tensor, "batch heads local_tokens dim"],
    key: Float[Tensor, "batch kv_heads local_tokens dim"],
    value: Float[Tensor, "batch kv_heads local_tokens value_dim"],
    plan: BlockPlan,
    *,
    scale: float | None = None,
    group: dist.ProcessGroup | None = None,
) -> AttentionState:
    """The state of this rank's queries over the keys of all ranks; keys and values stay at home.

        state_r(i) = attention of query i over the keys of rank r, within the plan
        state(i)   = merge over r of state_r(i)

    How even the load is depends on the plan: a rank works as much as its columns of the map keep.

    Args:
        query, key, value: of this rank's tokens, equally many on each rank.
        plan: of the whole sequence, the same on every rank. A rank's tokens must be whole blocks of
            keys.
        scale: of the scores; `dim ** -0.5` by default.
        group: of processes; the default one if None.

    Raises:
        ValueError: for a plan that is not of the whole sequence, or whose blocks the borders of
            ranks cut.
        RuntimeError: if there is no process group.
    """
    rank, ranks = _place(group)
    tokens = query.shape[2]
    _check_plan(plan, tokens, key.shape[2], ranks)
    if tokens % plan.block_size[1]:
        raise ValueError(
            f"plan: expected blocks of keys that divide the {tokens} tokens of a rank, got "
            f"block_size {plan.block_size}. Pad the sequence, choose another block size, or use "
            "head_parallel_attention."
        )
    everywhere = _exchange(query.expand(ranks, *query.shape), group)
    queries = everywhere.permute(1, 2, 0, 3, 4).flatten(2, 3)
    mine = _columns(plan, rank, tokens)
    state = block_sparse_attention(queries, key, value, mine, scale=scale)
    # The query of every token goes home with its state: its output, and its lse as one more column.
    lse = state.lse.to(torch.promote_types(state.lse.dtype, torch.float32))
    sent = torch.cat([state.output.to(lse.dtype), lse[..., None]], -1)
    parts = _exchange(sent.unflatten(2, (ranks, tokens)).permute(2, 0, 1, 3, 4), group)
    whole = merge(*(AttentionState(part[..., :-1], part[..., -1]) for part in parts.unbind(0)))
    return AttentionState(whole.output.to(value.dtype), whole.lse)


def head_parallel_attention(
    query: Float[Tensor, "batch heads local_tokens dim"],
    key: Float[Tensor, "batch kv_heads local_tokens dim"],
    value: Float[Tensor, "batch kv_heads local_tokens value_dim"],
    plan: BlockPlan,
    *,
    scale: float | None = None,
    group: dist.ProcessGroup | None = None,
) -> Float[Tensor, "batch heads local_tokens value_dim"]:
    """Attention of this rank's queries over the keys of all ranks, computed by heads.

    tokens of a rank, all heads -> all tokens, heads of a rank -> attention -> back

    Args:
        query, key, value: of this rank's tokens, equally many on each rank.
        plan: of the whole sequence and all heads, the same on every rank.
        scale: of the scores; `dim ** -0.5` by default.
        group: of processes; the default one if None.

    Raises:
        ValueError: for a plan that is not of the whole sequence, or heads that do not divide among
            the ranks.
        RuntimeError: if there is no process group.
    """
    rank, ranks = _place(group)
    _check_plan(plan, query.shape[2], key.shape[2], ranks)
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.shape[1] % ranks:
            raise ValueError(
                f"{name}: expected heads that divide among {ranks} ranks, got {tensor.shape[1]}. "
                "Use key_parallel_attention, or repeat the heads of key and value."
            )
    mask = plan.block_mask
    if mask.shape[1] > 1:
        mask = mask.chunk(ranks, 1)[rank]
    mine = BlockPlan(mask, plan.block_size, plan.query_length, plan.key_length, plan.causal_offset)
    query, key, value = (_tokens_together(tensor, ranks, group) for tensor in (query, key, value))
    output = block_sparse_attention(query, key, value, mine, scale=scale).output
    split = output.unflatten(2, (ranks, -1)).permute(2, 0, 1, 3, 4)
    return _exchange(split, group).permute(1, 0, 2, 3, 4).flatten(1, 2)


def _tokens_together(tensor: Tensor, ranks: int, group: dist.ProcessGroup | None) -> Tensor:
    """From some tokens of all heads to all tokens of some heads."""
    split = tensor.unflatten(1, (ranks, -1)).transpose(0, 1)
    return _exchange(split, group).permute(1, 2, 0, 3, 4).flatten(2, 3)


def _place(group: dist.ProcessGroup | None) -> tuple[int, int]:
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError(
            "group: expected a process group; start the script with torchrun and call "
            "torch.distributed.init_process_group() first."
        )
    return dist.get_rank(group), dist.get_world_size(group)


def _check_plan(plan: BlockPlan, queries: int, keys: int, ranks: int) -> None:
    wanted = (queries * ranks, keys * ranks)
    if queries != keys or (plan.query_length, plan.key_length) != wanted:
        raise ValueError(
            f"plan: expected one for the whole sequence, {ranks} ranks x {queries} queries and "
            f"{keys} keys (equally many), got {plan!r}."
        )


def _columns(plan: BlockPlan, rank: int, tokens: int) -> BlockPlan:
    """The plan of all queries over the keys of a rank."""
    width = tokens // plan.block_size[1]
    offset = plan.causal_offset
    return BlockPlan(
        plan.block_mask[..., rank * width : (rank + 1) * width],
        plan.block_size,
        plan.query_length,
        tokens,
        None if offset is None else offset - rank * tokens,
    )


class _Exchange(torch.autograd.Function):
    """Part p goes to rank p; what comes back is by sender. Its own transpose, so its gradient."""

    @staticmethod
    def forward(ctx: Any, parts: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        sent = parts.contiguous()
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=group)
        return received

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _exchange(grads[0], ctx.group), None


def _exchange(parts: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """`[ranks, ...]` to `[ranks, ...]`."""
    found: Tensor = _Exchange.apply(parts, group)  # type: ignore[no-untyped-call]
    return found
