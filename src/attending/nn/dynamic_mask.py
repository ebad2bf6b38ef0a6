"""Dynamic mask attention as functions: scores of the values, the mask, and attention under it.

    delta = value_scores(value, weight, gate)                 # one number per key, no query in it
    output = dynamic_mask_attention(query, key, value, delta, window=1024, is_causal=True)

Each key has a score delta that is made from the values alone and learned. A query keeps the
`window` visible keys whose delta is highest, and delta is added to its scores:

    delta_j = exp(A softplus(z_j)),  z = W [values of all heads]     (2508.02124, equation 3)
    output_i = sum over kept j of softmax_j(scale q_i . k_j + delta_j) v_j

(The paper prints equation 5 as a product of mask and scores; its gradients and the code add.) The
choice has no gradient; delta has one through what is added, also where no key is dropped. A choice
that looks at later keys is a leak, which the official path with a mask per key has [ran, and
reported by users]; here keys are hidden before the choice, row by row.

Nothing is as large as the map: under a causal mask the rows that keep a key are an interval
(`attending.nn.key_selection`), so a block of rows gathers the few keys it sees.
"""

import math
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import linear, softplus
from torch.utils.checkpoint import checkpoint

from attending.core.check import check_arguments, check_mask
from attending.core.masks import mask_parts, visible_entries
from attending.core.precision import full_precision
from attending.core.state import attention_state, biased_attention_state
from attending.nn._lifetime_attention import LifetimeAttention
from attending.nn.key_selection import check_window, keep_largest, key_lifetimes

Score = Literal["exp", "linear"]
MAX_EXPONENT = 10.0  # exp of it, 22026, is added to scores that shall keep two digits in float32
ROW_BYTES = 2**25  # of scores of a block of rows, under a mask that has to be read row by row


@full_precision
def value_scores(
    value: Float[Tensor, "batch kv_heads keys dim"],
    weight: Float[Tensor, "kv_heads features"],
    gate: Float[Tensor, " kv_heads"],
    bias: Float[Tensor, " kv_heads"] | None = None,
    score: Score = "exp",
) -> Float[Tensor, "batch kv_heads keys"]:
    """The score of each key, from the values of its token in all heads.

        z = weight @ concat_heads(value) + bias,   delta = exp(gate softplus(z))

    Computed in float32 at least, also under autocast. The exponent is held at 10, beyond which
    delta would only drown the products of queries and keys; gradients are 0 there.

    Args:
        value: of all tokens.
        weight: over the values of all heads, side by side: `features = kv_heads * dim`.
        gate: A, one per head of key and value. At 0 all keys score alike and `weight` has no
            gradient.
        bias: of z; the published models have none.
        score: "exp", or "linear" for `gate softplus(z)` without the exponential, as examples of
            the official kernels have it [read in their code]: another model.

    Raises:
        ValueError: for shapes that do not fit, or another score.
    """
    kv_heads, dim = value.shape[1], value.shape[3]
    if weight.shape != (kv_heads, kv_heads * dim):
        raise ValueError(
            f"weight: expected {[kv_heads, kv_heads * dim]}, a row for each head over the values "
            f"of all heads side by side, got {list(weight.shape)}."
        )
    if gate.shape != (kv_heads,):
        raise ValueError(f"gate: expected one per kv head, {[kv_heads]}, got {list(gate.shape)}.")
    if score not in get_args(Score):
        raise ValueError(f"score: expected one of {get_args(Score)}, got {score!r}.")
    dtype = torch.promote_types(value.dtype, torch.float32)
    joined = value.transpose(1, 2).flatten(2).to(dtype)
    found = linear(joined, weight.to(dtype), None if bias is None else bias.to(dtype))
    exponent = (softplus(found) * gate.to(dtype)).transpose(1, 2)
    return exponent if score == "linear" else exponent.clamp_max(MAX_EXPONENT).exp()


@torch.no_grad()
def dynamic_mask(
    delta: Float[Tensor, "batch kv_heads keys"],
    window: int,
    is_causal: bool = True,
    query_offset: int = 0,
) -> Bool[Tensor, "batch kv_heads queries keys"]:
    """Which keys each query keeps, True = kept: for looking and for tests, as it is the whole map.

    `dynamic_mask_attention` never makes it; `attending.nn.key_selection.key_lifetimes` says the
    same in one number per key. Of equal deltas the most recent are kept.

    Args:
        delta: one score per key; -inf hides the key.
        window: how many keys a query keeps.
        is_causal: query i chooses among the keys 0..i + `query_offset`. Otherwise all queries
            choose the same, and there is one row.
        query_offset: keys before the first query; the queries are the last tokens of the keys.

    Raises:
        ValueError: for a window below 1 or an offset beyond the keys.
    """
    if not is_causal:
        return keep_largest(delta, window)[:, :, None]
    keys = delta.shape[-1]
    if not 0 <= query_offset <= keys:
        raise ValueError(f"query_offset: expected 0 to {keys}, the keys, got {query_offset}.")
    row = torch.arange(query_offset, keys, device=delta.device)[:, None]
    ends = key_lifetimes(delta, window)[:, :, None]
    return (torch.arange(keys, device=delta.device) <= row) & (row < ends)


@full_precision
def dynamic_mask_attention(
    query: Float[Tensor, "batch heads queries dim"],
    key: Float[Tensor, "batch kv_heads keys dim"],
    value: Float[Tensor, "batch kv_heads keys value_dim"],
    delta: Float[Tensor, "batch kv_heads keys"],
    window: int,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    query_offset: int = 0,
    scale: float | None = None,
) -> Float[Tensor, "batch heads queries value_dim"]:
    """Attention to the `window` visible keys of highest delta, with delta added to the scores.

    Exact, with gradients of query, key, value and delta. Time and memory are those of `window` keys
    per query and not of all: causal attention over 16384 tokens with 256 keys took 0.11 of the time
    of dense attention, forward, and 0.09 with the backward pass (benchmarks/README.md). With no
    more keys than the window it runs as dense attention with a bias.

    Args:
        query, key, value: as in `scaled_dot_product_attention`; query heads may share key heads.
        delta: of `value_scores`, or any score of the keys; -inf hides a key.
        window: how many keys a query keeps.
        attn_mask: what is visible, True or 0; it only hides. Padding (`[batch, 1, 1, keys]`) goes
            together with `is_causal`. Masks that are padding and causality are recognised; any
            other is read in blocks of rows, in time that grows with the whole map.
        is_causal: query i sees the keys 0..i + `query_offset`.
        query_offset: keys before the first query. 0 is PyTorch's convention; with a cache it is
            `keys - queries`.
        scale: of the products of queries and keys; `dim ** -0.5` by default.

    Returns:
        The output; 0 for a query that sees no key.

    Raises:
        ValueError: for arguments that do not fit together; the message names the argument.
    """
    arguments = check_arguments(query, key, value, None, False, scale, True)
    check_window(window)
    if delta.shape != key.shape[:3]:
        raise ValueError(
            f"delta: expected one score per key, {list(key.shape[:3])}, got {list(delta.shape)}."
        )
    asked = _asked(query, key, delta, attn_mask, is_causal, query_offset)
    delta = asked.delta.to(torch.promote_types(query.dtype, torch.float32))
    if asked.visible is not None:
        return _row_by_row(query, key, value, delta, window, asked.visible, arguments.scale)
    first, queries, keys = asked.offset, query.shape[2], key.shape[2]
    if first is not None:
        keys = first + queries
        key, value, delta = key[:, :, :keys], value[:, :, :keys], delta[:, :, :keys]
    if first is None or queries == 1:
        if keys < 2 * window:  # to hide some costs less than to gather the others
            delta = delta.masked_fill(~keep_largest(delta.detach(), window), -math.inf)
        else:
            key, value, delta = chosen_keys(key, value, delta, window)
    elif (window < keys or first) and queries:
        ends = key_lifetimes(delta.detach(), window)
        output: Tensor = LifetimeAttention.apply(  # type: ignore[no-untyped-call]
            query, key, value, delta, ends, first, arguments.scale
        )
        return output
    return biased_attention_state(
        query,
        key,
        value,
        key_bias=delta,
        is_causal=first is not None and queries > 1,
        scale=arguments.scale,
        enable_gqa=True,
    ).output


class _Asked(NamedTuple):
    """What is visible, taken apart."""

    delta: Tensor  # -inf where padding hides a key
    offset: int | None  # of the causal mask
    visible: Tensor | None  # what is left that only the mask can say


def _asked(
    query: Tensor,
    key: Tensor,
    delta: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    query_offset: int,
) -> _Asked:
    queries, keys = query.shape[2], key.shape[2]
    if not 0 <= query_offset <= max(keys - queries, 0) or (is_causal and queries > keys):
        raise ValueError(
            f"query_offset: expected 0 to keys - queries = {keys - queries}, got {query_offset}. "
            "Under a causal mask each query has a key of its own."
        )
    offset = query_offset if is_causal else None
    if attn_mask is None:
        return _Asked(delta, offset, None)
    check_mask(attn_mask, query, key)
    attn_mask = attn_mask.reshape((1,) * (4 - attn_mask.dim()) + tuple(attn_mask.shape))
    visible = visible_entries(attn_mask)
    if attn_mask.dtype != torch.bool and not bool((attn_mask[visible] == 0).all()):
        raise ValueError(
            "attn_mask: expected a mask that only hides, boolean or of 0 and -inf; got other "
            "numbers. A bias that depends on the query would have a part in the choice of keys."
        )
    if visible.shape[2] > 1 and not is_causal:
        parts = mask_parts(visible, query.shape[0], queries, keys)
        causal = parts.is_causal and queries <= keys
        if causal or parts.is_full:
            offset = keys - queries if causal else None
            if parts.key_visible is None:
                return _Asked(delta, offset, None)
            visible = parts.key_visible[:, None, None]
    if visible.shape[2] == 1 and visible.shape[1] in (1, key.shape[1]):
        hidden = ~visible[:, :, 0].expand(-1, -1, keys)
        return _Asked(delta.masked_fill(hidden, -math.inf), offset, None)
    if is_causal:
        past = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(query_offset)
        visible = visible & past
    return _Asked(delta, None, visible)


def chosen_keys(
    key: Tensor, value: Tensor, delta: Tensor, window: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The best `window` keys of each head, with values and scores, in the order they came in.

    What all queries choose without a causal mask, and what a cache needs to keep.
    """
    if window >= key.shape[2]:
        return key, value, delta
    kept = keep_largest(delta.detach(), window)
    index = (~kept).to(torch.uint8).argsort(dim=-1, stable=True)[..., :window]
    return (
        _at(key, index),
        _at(value, index),
        # Where fewer are visible than the window, some that are not kept fill it up.
        delta.gather(2, index).masked_fill(~kept.gather(2, index), -math.inf),
    )


def _at(tensor: Tensor, index: Tensor) -> Tensor:
    """Some tokens of each head; `gather` is several times slower."""
    batch, heads, tokens, dim = tensor.shape
    first = torch.arange(batch * heads, device=tensor.device).view(batch, heads, 1) * tokens
    rows = tensor.reshape(batch * heads * tokens, dim)
    return rows.index_select(0, (index + first).flatten()).view(*index.shape, dim)


def _row_by_row(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    delta: Tensor,
    window: int,
    visible: Tensor,
    scale: float,
) -> Tensor:
    """Under any mask: the choice of each row by itself, in blocks of rows."""
    batch, heads, queries, _ = query.shape
    keys = key.shape[2]
    groups = heads // key.shape[1]

    def block(query: Tensor, key: Tensor, value: Tensor, delta: Tensor, seen: Tensor) -> Tensor:
        per_head = seen.shape[1] > 1
        scores = delta.repeat_interleave(groups, 1) if per_head else delta
        rows = scores[:, :, None].masked_fill(~seen, -math.inf)
        rows = rows.masked_fill(~keep_largest(rows.detach(), window), -math.inf)
        rows = rows if per_head else rows.repeat_interleave(groups, 1)
        return attention_state(
            query, key, value, attn_mask=rows, scale=scale, enable_gqa=True
        ).output

    step = max(1, ROW_BYTES // (4 * batch * heads * max(keys, 1)))
    outputs = []
    for start in range(0, queries, step):
        seen = visible if visible.shape[2] == 1 else visible[:, :, start : start + step]
        given = (query[:, :, start : start + step], key, value, delta, seen)
        if torch.is_grad_enabled():
            outputs.append(checkpoint(block, *given, use_reentrant=False))
        else:
            outputs.append(block(*given))
    return torch.cat(outputs, 2)
