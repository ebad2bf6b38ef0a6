"""Statistics of the columns of the map, and of the map as a whole: what each key receives.

Every row's normaliser is needed first, and then one pass with the roles of query and key exchanged
(`attending.core.statistics._exchange`). On a CPU and without gradients there is a shorter way: a
sweep over the map in blocks of rows that stay in the cache. O(tokens) memory either way.
"""

import math
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from attending.core.precision import full_precision
from attending.core.statistics._call import Call, check_lse, prepare
from attending.core.statistics._exchange import (
    bucket_columns,
    bucket_means,
    check_weights,
    pool,
    received_state,
)
from attending.core.statistics._sweep import can_sweep, sweep
from attending.core.statistics.rows import Key, Query, Rows

Columns = Float[Tensor, "batch heads keys"]


class ColumnSummary(NamedTuple):
    """What one exchanged pass tells of a map.

    Attributes:
        mass: the attention that each key receives, `sum_i w[i] p[i, j]`.
        entropy: `sum_i w[i] H[i]`, the weighted sum of the entropies of the rows; None if it was
            not asked for.
        pooled: the map in `size x size` buckets, or None if no size was given.
    """

    mass: Columns
    entropy: Float[Tensor, "batch heads"] | None
    pooled: Float[Tensor, "batch heads size size"] | None


@full_precision
def column_mass(
    query: Query,
    key: Key,
    query_weights: Float[Tensor, "*weight_batch queries"] | None = None,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    lse: Rows | None = None,
) -> Columns:
    """The attention that each key receives, `sum_i w[i] p[i, j]`: sinks, heavy hitters, saliency.

    Args:
        query_weights: not negative; 1 for every query by default. 0 leaves a query out (padding,
            or all but the last few queries). `[queries]` or with leading dimensions that broadcast
            to `[batch, heads, queries]`.
        lse: that of `attention_state` on the same arguments, if you have it; saves one of the two
            passes (on a CPU without gradients there is one in any case).
    """
    call = prepare(query, key, attn_mask, is_causal, scale, enable_gqa)
    weights = check_weights(query_weights, call)
    return _mass(call, weights, lse)


@full_precision
def column_importance(
    query: Query,
    key: Key,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    lse: Rows | None = None,
) -> Columns:
    """Received attention averaged over the queries that can see the key; 0 if none can.

    The position-fair form of `column_mass`: under a causal mask a late key is seen by few queries.
    The sink rate of Gu et al. (2410.10781) is the share of heads where it exceeds 0.3 at key 0.
    """
    call = prepare(query, key, attn_mask, is_causal, scale, enable_gqa)
    mass = _mass(call, None, lse)
    seen = visible_queries(call)
    return torch.where(seen > 0, mass / seen.clamp_min(1.0), torch.zeros_like(mass))


@full_precision
def received_features(
    query: Query,
    key: Key,
    query_features: Float[Tensor, "*feature_batch queries features"],
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    lse: Rows | None = None,
) -> Float[Tensor, "batch heads keys features"]:
    """The transposed map times any per-query features, `sum_i p[i, j] features[i]`.

    What `expected_features` is for the rows. With one column of ones it is `column_mass`; unlike
    the weights there, features may be negative, and several columns share one pass.

    Args:
        query_features: `[queries, features]`, or with leading dimensions that broadcast to
            `[batch, heads, queries, features]`.
        lse: as in `column_mass`.
    """
    call = prepare(query, key, attn_mask, is_causal, scale, enable_gqa)
    full, shape = tuple(call.query.shape[:3]), tuple(query_features.shape)
    if (
        not 2 <= len(shape) <= 4
        or shape[-2] != full[-1]
        or any(
            size not in (1, whole)
            for size, whole in zip(reversed(shape[:-2]), reversed(full[:2]), strict=False)
        )
    ):
        raise ValueError(
            "query_features: expected [queries, features], or leading dimensions that broadcast "
            f"to [batch, heads, queries] = {list(full)}, got {list(shape)}."
        )
    features = query_features.to(call.query.dtype).expand(*full, shape[-1])
    if can_sweep(call, features, lse):
        given = None if lse is None else check_lse(lse, call)
        received = sweep(call, query_features=features, lse=given).received
        assert received is not None
        return received.transpose(-1, -2)
    given, width = check_lse(lse, call), max(1, call.query.shape[-1])
    parts = [  # a fused kernel is as wide as the wider of query and value
        state.lse.exp()[..., None] * state.output
        for state in (received_state(call, given, None, some) for some in features.split(width, -1))
    ]
    return torch.cat(parts, -1)


@full_precision
def pooled_map(
    query: Query,
    key: Key,
    size: int,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    reduction: Literal["mass", "mean"] = "mass",
) -> Float[Tensor, "batch heads size size"]:
    """The exact map averaged to `size x size`, for looking at: one attention over bucket columns.

    Token t of n belongs to bucket `floor(t * size / n)`. Rows that are empty are left out.

    Args:
        size: buckets per side; where there are fewer tokens than buckets some buckets are empty.
        reduction: `"mass"`: mean over a bucket's queries of the mass on a bucket's keys, so rows
            sum to 1. `"mean"`: mean over all entries of the bucket.
    """
    if size < 1:
        raise ValueError(f"size: expected at least 1, got {size}.")
    if reduction not in ("mass", "mean"):
        raise ValueError(f'reduction: expected "mass" or "mean", got {reduction!r}.')
    call = prepare(query, key, attn_mask, is_causal, scale, enable_gqa)
    columns = bucket_columns(key.shape[2], size).to(call.key)
    rows = bucket_columns(query.shape[2], size).to(call.query)
    mass, lse = call.attend(columns.expand(*key.shape[:3], size))
    pooled = bucket_means(rows.transpose(0, 1) @ mass, rows, (lse > -math.inf).to(mass))
    if reduction == "mean":
        pooled = pooled / columns.sum(0).clamp_min(1.0)
    return pooled


@full_precision
def column_summary(
    query: Query,
    key: Key,
    lse: Rows,
    query_weights: Float[Tensor, "*weight_batch queries"] | None = None,
    size: int | None = None,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    with_entropy: bool = True,
) -> ColumnSummary:
    """Received attention, summed entropy and the pooled map of every head, from one pass.

    A forward pass that keeps its lse needs only this to know the mean entropy of a head:

        sum_i w[i] H[i] = sum_i w[i] lse[i] - scale * sum_j mass[j] key[j] . qbar[j]

    where qbar, the mean query that looks at the key, is the output of the exchanged attention.

    Args:
        lse: that of `attention_state` on the same arguments.
        size: also return the map in this many buckets per side, as `pooled_map` does.
        with_entropy: False where the entropies are known already; the pass is narrower then.

    Raises:
        ValueError: for a float `attn_mask` with entropy; `row_summary` has the rows' entropies.
    """
    call = prepare(query, key, attn_mask, is_causal, scale, enable_gqa)
    if with_entropy and not call.bias_is_mask:
        raise ValueError(
            "attn_mask: expected a boolean mask or None, got a float bias, whose mean is not in "
            "this pass. Use row_summary for the entropy, and with_entropy=False for the rest."
        )
    lse = check_lse(lse, call)
    weights = check_weights(query_weights, call)
    weight = (lse > -math.inf).to(lse) * (1.0 if weights is None else weights)
    rows = None if size is None else bucket_columns(query.shape[2], size).to(call.query)
    total = pooled = by_bucket = None
    if can_sweep(call, weights, lse):
        found = sweep(
            call,
            entropy=with_entropy,
            query_features=weight[..., None] if size is None else None,
            size=size,
            weights=weight,
            lse=lse,
        )
        mass, by_bucket = found.mass(), found.by_bucket
        if found.entropy is not None:
            total = (weight * found.entropy).sum(-1)
    else:
        values = [call.query] if with_entropy or rows is None else []
        if rows is not None:
            values.append(rows.expand(*query.shape[:3], rows.shape[1]))
        log_weights = None if weights is None else weights.log()
        received = received_state(call, lse, log_weights, torch.cat(values, -1))
        mass = received.lse.exp()
        if with_entropy:
            total = _summed_entropy(
                call, lse, weight, mass, received.output[..., : query.shape[-1]]
            )
        if rows is not None:
            columns = received.output[..., -rows.shape[1] :]
            by_bucket = (mass[..., None] * columns).transpose(-1, -2)
    if rows is not None and by_bucket is not None:
        pooled = pool(by_bucket, rows, weight)
    return ColumnSummary(mass, total, pooled)


def _summed_entropy(
    call: Call, lse: Tensor, weight: Tensor, mass: Tensor, mean_query: Tensor
) -> Tensor:
    """The entropies of the rows, weighted and summed: keys are centred, as in `row_summary`."""
    mean = call.key.mean(2, keepdim=True)
    centred = (call.key - mean).repeat_interleave(call.groups, 1)
    mean = mean.repeat_interleave(call.groups, 1)
    centred_lse = (lse - (call.query * mean).sum(-1) * call.scale).masked_fill(weight == 0, 0.0)
    score = call.scale * (mass * (centred * mean_query).sum(-1)).sum(-1)
    return ((weight * centred_lse).sum(-1) - score).clamp_min(0.0)


def visible_queries(call: Call) -> Tensor:
    """How many queries see each key: [batch or 1, heads or 1, keys], float."""
    queries, keys = call.query.shape[2], call.key.shape[2]
    if call.bias is not None:
        visible = (call.bias > -math.inf).expand(*call.bias.shape[:2], queries, keys)
        visible = visible.tril() if call.is_causal else visible
        return visible.sum(-2).to(call.query.dtype)
    first = torch.arange(keys, device=call.query.device) if call.is_causal else 0
    count = torch.full((keys,), queries, device=call.query.device) - first
    return count.clamp_min(0).to(call.query.dtype)[None, None]


def _mass(call: Call, weights: Tensor | None, lse: Tensor | None) -> Tensor:
    """`sum_i weights[i] p[i, j]`, with the weights checked and the lse not yet."""
    if can_sweep(call, weights, lse):
        ask = call.query.new_ones(call.query.shape[:3]) if weights is None else weights
        given = None if lse is None else check_lse(lse, call)
        return sweep(call, query_features=ask[..., None], lse=given).mass()
    log_weights = None if weights is None else weights.log()
    return received_state(call, check_lse(lse, call), log_weights, call.query).lse.exp()
