"""Combiner: every head reaches every position, at the cost of sparse attention.

For training a transformer on long sequences from scratch. A query attends to some keys directly,
and to the others through one summary for each region of a plan (`attending.nn.combiner_plans`):

    k_R = max over the region of its keys, feature by feature; q_R likewise of its queries
    h_R = sum_j softmax_j(scale * q_R . key[j]) value[j]         over the region, for all queries
    out = (sum_direct exp(s_ij) value[j] + sum_R exp(scale * q_i . k_R) h_R) / (sum of all weights)

A region counts like one token, however many it holds. In the terms of `attending.core.state` this
is the merge of two states, one over the direct keys and one over the regions, whose keys are k_R
and whose values are h_R. The map that results has rows that sum to 1 and reaches everything that
softmax attention would (`combiner_map` shows it); on two tokens of one region it differs by a
factor only. It is no replacement for the softmax of trained weights: without training it is crude.

Source: Ren et al. 2107.05768, equations 4 to 12, and the official code (google-research/combiner,
JAX, against which the golden vectors hold). Differences, each because the official code has it
wrong or unlike the paper: every length works; the mixture has the paper's average, too; max pooling
is a maximum (the TF code sums); no region is counted beside its own direct keys; empty regions have
no weight. Rotary positions turn features before they are pooled, which mixes positions; the paper
uses absolute ones [inferred].
"""

from typing import get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from attending.core.check import check_arguments
from attending.nn._combiner_axial import Project, axial_output
from attending.nn._combiner_regions import Call
from attending.nn._combiner_routing import routing_state
from attending.nn._combiner_sequence import fixed_output, logsparse_state
from attending.nn._head_counts import check_head_counts
from attending.nn._key_padding import compact, key_padding, restore
from attending.nn.combiner_plans import AxialPlan, FixedPlan, LogsparsePlan, Plan, RoutingPlan
from attending.nn.partition_tree import Pooling


def combiner_attention(
    query: Float[Tensor, "batch heads tokens dim"],
    key: Float[Tensor, "batch kv_heads tokens dim"],
    value: Float[Tensor, "batch kv_heads tokens value_dim"],
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    plan: Plan,
    pool: Pooling = "max",
) -> Float[Tensor, "batch heads tokens value_dim"]:
    """Attention to some keys directly and to the rest by summaries; see the module's help.

        combiner_attention(query, key, value, is_causal=True, plan=FixedPlan(32))
        combiner_attention(query, key, value, plan=AxialPlan(columns=14, kind="mixture"))

    Args:
        query, key, value: as in `scaled_dot_product_attention`, of one length; any length.
        attn_mask: hides keys, the same for all queries: boolean `[batch, 1, 1, tokens]`, True =
            visible; goes together with `is_causal`. Hidden tokens are in no region, and as queries
            get output 0. By `FixedPlan` and `LogsparsePlan` only visible tokens have a place, so
            that padding on either side changes nothing; the other plans keep their places.
        is_causal: token i sees tokens 0..i.
        scale: of the scores, `dim ** -0.5` by default.
        enable_gqa: let key and value have fewer heads, each shared by a group of query heads. They
            are repeated, as regions have a summary for each query head.
        plan: what is direct and what are the regions; see `attending.nn.combiner_plans`.
        pool: how a region's keys and queries become one: "max" as in the paper, or "mean".

    Returns:
        The output in query's dtype. Scores are taken in float32 at least.

    Raises:
        ValueError: for a mask that differs between queries, tensors of different length, or a plan
            that does not fit.
    """
    return _combine(query, key, value, attn_mask, is_causal, scale, enable_gqa, plan, pool, None)


def combiner_map(
    query: Float[Tensor, "batch heads tokens dim"],
    key: Float[Tensor, "batch kv_heads tokens dim"],
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    plan: Plan,
    pool: Pooling = "max",
) -> Float[Tensor, "batch heads tokens tokens"]:
    """The whole map of `combiner_attention`, for those who want to see it; arguments as there."""
    tokens = key.shape[2]
    eye = torch.eye(tokens, dtype=key.dtype, device=key.device)
    return combiner_attention(
        query,
        key,
        eye.expand(*key.shape[:2], tokens, tokens),
        attn_mask,
        is_causal,
        scale,
        enable_gqa,
        plan=plan,
        pool=pool,
    )


class CombinerAttention(nn.Module):
    """Multi-head self-attention by a plan, `[batch, tokens, embed_dim]` in and out.

    Args:
        embed_dim: width of the input and of the output.
        num_heads: heads, each `embed_dim // num_heads` wide.
        plan: see `attending.nn.combiner_plans`. With `row_key="proj"` the keys of other rows are
            `summary_out(summary_norm(x + dropout(summary_in(h))))`, with h the means of the values
            of all heads (the keys for "wsum_proj") and x the input, as in the official models.
        pool: "max" or "mean".
        bias: biases in the four projections; the official models have none.
        dropout: within the projection of summaries, nowhere else.
        device, dtype: of the parameters.

    Raises:
        ValueError: for a number of heads that does not divide the width.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        plan: Plan,
        pool: Pooling = "max",
        bias: bool = False,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_head_counts(embed_dim, num_heads)
        self.num_heads, self.plan, self.pool = num_heads, plan, pool
        factory = {"device": device, "dtype": dtype}
        self.q_proj = nn.Linear(embed_dim, embed_dim, bias=bias, **factory)
        self.k_proj = nn.Linear(embed_dim, embed_dim, bias=bias, **factory)
        self.v_proj = nn.Linear(embed_dim, embed_dim, bias=bias, **factory)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias, **factory)
        self.projects = isinstance(plan, AxialPlan) and "proj" in plan.row_key
        if self.projects:
            self.summary_in = nn.Linear(embed_dim, embed_dim, bias=False, **factory)
            self.summary_norm = nn.LayerNorm(embed_dim, **factory)  # type: ignore[arg-type]
            self.summary_out = nn.Linear(embed_dim, embed_dim, bias=False, **factory)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        hidden: Float[Tensor, "batch tokens embed_dim"],
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Float[Tensor, "batch tokens embed_dim"]:
        """Attend; `attn_mask` and `is_causal` as in `combiner_attention`."""
        query, key, value = (
            self._split(project(hidden)) for project in (self.q_proj, self.k_proj, self.v_proj)
        )

        def keys(means: Tensor) -> Tensor:
            mixed = self.dropout(self.summary_in(means.transpose(1, 2).flatten(2)))
            rest = mixed.shape[1] - hidden.shape[1]
            along = nn.functional.pad(hidden, (0, 0, 0, rest)) + mixed
            return self._split(self.summary_out(self.summary_norm(along)))

        project = keys if self.projects else None
        merged = _combine(
            query, key, value, attn_mask, is_causal, None, False, self.plan, self.pool, project
        )
        return self.out_proj(merged.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def _split(self, projected: Tensor) -> Tensor:
        split: Tensor = projected.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        return split

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, plan={self.plan}, pool={self.pool!r}"


def _combine(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    plan: Plan,
    pool: Pooling,
    project: Project | None,
) -> Tensor:
    scale = check_arguments(query, key, value, scale=scale, enable_gqa=enable_gqa).scale
    _check_plan(query, key, plan, pool, project)
    visible = key_padding(attn_mask, query)
    groups = query.shape[1] // key.shape[1] if key.shape[1] else 1
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    if query.numel() == 0:
        return query.new_zeros(*query.shape[:3], value.shape[-1])
    order, cut = None, visible
    if visible is not None and isinstance(plan, FixedPlan | LogsparsePlan):
        (query, key, value), cut, order = compact((query, key, value), visible)
    call = Call(query, key, value, cut, is_causal, scale, pool)
    if isinstance(plan, FixedPlan):
        output = fixed_output(call, plan.segment_length)
    elif isinstance(plan, LogsparsePlan):
        output = logsparse_state(call).output
    elif isinstance(plan, AxialPlan):
        output = axial_output(call, plan, project)
    else:
        output = routing_state(call, plan.assign).output
    if order is not None:
        output = restore(output, order)
    return output if visible is None else output.masked_fill(~visible[:, None, :, None], 0.0)


def _check_plan(
    query: Tensor, key: Tensor, plan: Plan, pool: Pooling, project: Project | None
) -> None:
    if query.shape[2] != key.shape[2]:
        raise ValueError(
            "key: expected as many tokens as query, since regions pool queries and keys, got query "
            f"{list(query.shape)} and key {list(key.shape)}."
        )
    if pool not in get_args(Pooling):
        raise ValueError(f"pool: expected one of {get_args(Pooling)}, got {pool!r}.")
    if not isinstance(plan, get_args(Plan)):
        names = ", ".join(kind.__name__ for kind in get_args(Plan))
        raise ValueError(f"plan: expected one of {names}, got {plan!r}.")
    if isinstance(plan, AxialPlan) and "proj" in plan.row_key and project is None:
        raise ValueError(
            f"plan: row_key={plan.row_key!r} has parameters of its own; use CombinerAttention, or "
            'row_key="none" or "wsum".'
        )
    if isinstance(plan, RoutingPlan):
        shape, full = list(plan.assign.shape), list(query.shape[:3])
        fits = shape[-1] == full[-1] and all(
            size in (1, whole) for size, whole in zip(reversed(shape), reversed(full), strict=False)
        )
        if not fits:
            raise ValueError(
                f"plan: expected assign to broadcast to [batch, heads, tokens] = {full}, got "
                f"{shape}."
            )
