"""Statistics of the columns of the map, and of the map as a whole: what each key receives.

A column sum needs every row's normaliser first. With it, the column is itself an attention, the
roles exchanged: *keys ask and queries answer* with the bias `log w[i] - lse[i]`,

    sum_i w[i] p[i, j] = exp(LSE_i(s[i, j] + log w[i] - lse[i]))

and what the exchanged attention returns as its output is the mean, over the queries that look at
the key, of any per-query feature. Under `is_causal` both sequences are read backwards, which makes
the exchanged map causal again. One fused pass, O(tokens) memory.
"""

import math
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from attending.core.kernels import CHUNK_BYTES
from attending.core.state import AttentionState, attend, merge, reweigh
from attending.core.statistics._call import Call, check_lse, prepare
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


def column_mass(
    query: Query,
    key: Key,
    query_weights: Float[Tensor, "*#batch queries"] | None = None,
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
            passes.
    """
    call = prepare(query, key, attn_mask, is_causal, scale, enable_gqa)
    weights = _log_weights(query_weights, call)
    return _received(call, check_lse(lse, call), weights, call.query).lse.exp()


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
    mass = _received(call, check_lse(lse, call), None, call.query).lse.exp()
    seen = visible_queries(call)
    return torch.where(seen > 0, mass / seen.clamp_min(1.0), torch.zeros_like(mass))


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
    pooled = _bucket_means(rows.transpose(0, 1) @ mass, rows, (lse > -math.inf).to(mass))
    if reduction == "mean":
        pooled = pooled / columns.sum(0).clamp_min(1.0)
    return pooled


def column_summary(
    query: Query,
    key: Key,
    lse: Rows,
    query_weights: Float[Tensor, "*#batch queries"] | None = None,
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
    values = [call.query] if with_entropy or size is None else []
    if size is not None:
        rows = bucket_columns(query.shape[2], size).to(call.query)
        values.append(rows.expand(*query.shape[:3], size))
    log_weights = _log_weights(query_weights, call)
    received = _received(call, lse, log_weights, torch.cat(values, -1))
    mass = received.lse.exp()
    weight = (lse > -math.inf).to(lse) * (1.0 if log_weights is None else log_weights.exp())
    total = None
    if with_entropy:
        total = _summed_entropy(call, lse, weight, mass, received.output[..., : query.shape[-1]])
    pooled = None
    if size is not None:
        columns = bucket_columns(key.shape[2], size).to(call.key)
        by_query_bucket = (mass[..., None] * received.output[..., -size:]).transpose(
            -1, -2
        ) @ columns
        pooled = _bucket_means(by_query_bucket, rows, weight)
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


def bucket_columns(tokens: int, size: int) -> Float[Tensor, "tokens size"]:
    """One-hot rows: token t of n belongs to bucket `floor(t * size / n)`."""
    bucket = torch.arange(tokens) * size // max(tokens, 1)
    return torch.nn.functional.one_hot(bucket, size).float()


def _bucket_means(sums: Tensor, rows: Tensor, weight: Tensor) -> Tensor:
    """Sums over the queries of each bucket, divided by the weight of those queries."""
    count = weight @ rows
    return sums / count.where(count > 0, torch.ones_like(count))[..., None]


def _log_weights(query_weights: Tensor | None, call: Call) -> Tensor | None:
    if query_weights is None:
        return None
    full = tuple(call.query.shape[:3])
    fits = 1 <= query_weights.dim() <= 3 and all(
        size in (1, whole)
        for size, whole in zip(reversed(query_weights.shape), reversed(full), strict=False)
    )
    if not fits or query_weights.shape[-1] != full[-1]:
        raise ValueError(
            "query_weights: expected [queries], or leading dimensions that broadcast to [batch, "
            f"heads, queries] = {list(full)}, got {list(query_weights.shape)}."
        )
    weights = query_weights.to(call.query.dtype)
    if not torch.compiler.is_compiling() and bool((weights < 0).any()):
        raise ValueError("query_weights: expected weights of at least 0, got a negative one.")
    return weights.log().expand(full)


def _received(
    call: Call, lse: Tensor, log_weights: Tensor | None, features: Tensor
) -> AttentionState:
    """The exchanged attention: lse is the log of the mass that a key receives from the queries."""
    answer = lse.masked_fill(lse == -math.inf, math.inf).neg()
    if log_weights is not None:
        answer = answer + log_weights
    key = call.key.repeat_interleave(call.groups, 1)
    bias = call.bias
    if call.is_causal:
        return _received_causal(key, call.query, features, answer, call.scale)
    if bias is None or bias.shape[2] == 1:
        state = attend(key, call.query, features, key_bias=answer, scale=call.scale)
        # A bias per key is a bias per asking row now: it only shifts the row's lse.
        return state if bias is None else reweigh(state, bias.squeeze(2))
    # A mask for every pair is there already; its transpose is copied a block of keys at a time.
    keys = key.shape[2]
    step = max(1, CHUNK_BYTES // (4 * bias.shape[0] * bias.shape[1] * max(call.query.shape[2], 1)))
    blocks = []
    for start in range(0, keys, step):
        part = bias.expand(*bias.shape[:3], keys)[..., start : start + step]
        blocks.append(
            attend(
                key[:, :, start : start + step],
                call.query,
                features,
                bias=part.transpose(-1, -2).contiguous(),
                key_bias=answer,
                scale=call.scale,
            )
        )
    return AttentionState(*(torch.cat(parts, 2) for parts in zip(*blocks, strict=True)))


def _received_causal(
    key: Tensor, query: Tensor, features: Tensor, answer: Tensor, scale: float
) -> AttentionState:
    """Key j hears the queries i >= j: causal once both sequences are read backwards."""
    square = min(query.shape[2], key.shape[2])

    def backwards(tensor: Tensor) -> Tensor:
        return tensor[:, :, :square].flip(2)

    state = attend(
        backwards(key),
        backwards(query),
        backwards(features),
        key_bias=backwards(answer),
        is_causal=True,
        scale=scale,
    )
    state = AttentionState(state.output.flip(2), state.lse.flip(2))
    if query.shape[2] > square:
        # The queries beyond the last key see all keys.
        rest = attend(
            key,
            query[:, :, square:],
            features[:, :, square:],
            key_bias=answer[:, :, square:],
            scale=scale,
        )
        state = merge(state, rest)
    unseen = key.shape[2] - square
    if unseen == 0:
        return state
    return AttentionState(
        torch.nn.functional.pad(state.output, (0, 0, 0, unseen)),
        torch.nn.functional.pad(state.lse, (0, unseen), value=-math.inf),
    )
