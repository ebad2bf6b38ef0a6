"""Statistics of each row of the map: where one query looks.

All take the arguments of `scaled_dot_product_attention` without the value and return
`[batch, heads, queries]`; with GQA that is one number per *query* head. They run on the fused
kernels in O(tokens) memory and are differentiable; half precision is computed in float32. An
empty row (no visible key) has every statistic 0.
"""

import math
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from attending.core.kernels import dense_rows, map_rows
from attending.core.precision import full_precision
from attending.core.state import attend
from attending.core.statistics._call import Call, check_lse, prepare
from attending.core.statistics._sweep import can_sweep, sweep

Rows = Float[Tensor, "batch heads queries"]
Query = Float[Tensor, "batch heads queries dim"]
Key = Float[Tensor, "batch kv_heads keys dim"]


class RowSummary(NamedTuple):
    """What one pass over the map tells of every row.

    Attributes:
        lse: log of the normaliser, -inf for an empty row.
        entropy: Shannon entropy in nats.
        features: the mean of the key features under the row, or None if none were given.
    """

    lse: Rows
    entropy: Rows
    features: Float[Tensor, "batch heads queries features"] | None


@full_precision
def row_summary(
    query: Query,
    key: Key,
    features: Float[Tensor, "*feature_batch keys features"] | None = None,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> RowSummary:
    """lse, entropy and expected key features of every row, in one pass for the price of about one.

    On a CPU and without gradients this is a sweep in blocks of rows that stay in the cache.
    Elsewhere it is one call of a fused kernel:

        entropy[i] = lse[i] - sum_j p[i, j] s[i, j] = lse[i] - scale * query[i] . (p @ key)[i]

    so the keys are the values of the attention, and the features are more columns beside them.
    The keys are centred first: that shifts a row's scores by a constant, which no probability
    sees, and keeps float32 exact where all keys share a large common part.
    """
    call = prepare(query, key, attn_mask, is_causal, scale, enable_gqa)
    if features is not None:
        features = key_features(features, call)
    if can_sweep(call, features):
        found = sweep(call, entropy=True, features=features)
        assert found.entropy is not None
        return RowSummary(found.lse, found.entropy, found.features)
    if call.bias is not None and not call.bias_is_mask and call.bias.shape[2] > 1:
        return _summary_in_blocks(call, features)
    mean = call.key.mean(2, keepdim=True)
    values = [call.key - mean]
    if features is not None:
        values.append(features)
    key_bias = None
    if call.bias is not None and not call.bias_is_mask:
        # The scores hold a bias per key, so its mean belongs to the mean score: one more column.
        key_bias = call.bias.masked_fill(call.bias == -math.inf, 0.0)
        if key_bias.shape[1] > 1 and call.groups > 1:
            return _summary_in_blocks(call, features)
        values.append(key_bias.transpose(-1, -2).expand(*call.key.shape[:3], 1))
    centred = call._replace(key=values[0])
    output, lse = centred.attend(torch.cat(values, -1) if len(values) > 1 else values[0])
    dim = query.shape[-1]
    mean_score = (call.query * output[..., :dim]).sum(-1) * call.scale
    if key_bias is not None:
        mean_score = mean_score + output[..., -1]
    empty = lse == -math.inf
    row_entropy = (lse - mean_score).masked_fill(empty, 0.0).clamp_min(0.0)
    if features is not None:
        features = output[..., dim : dim + features.shape[-1]]
    mean = mean.repeat_interleave(call.groups, 1)
    lse = lse + (call.query * mean).sum(-1) * call.scale
    return RowSummary(lse, row_entropy, features)


@full_precision
def entropy(
    query: Query,
    key: Key,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Rows:
    """Shannon entropy `-sum_j p log p` of each row, in nats: 0 on one key, `log n` over n evenly.

    Costs about one `scaled_dot_product_attention`. `exp(entropy)` is the number of keys that an
    even look would spread over. Not clamped from above, clamped to 0 from below (rounding).
    """
    return row_summary(query, key, None, attn_mask, is_causal, scale, enable_gqa).entropy


@full_precision
def normalized_entropy(
    query: Query,
    key: Key,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    relative_to: Literal["visible", "keys"] = "visible",
) -> Rows:
    """Entropy as a share of its largest possible value, in [0, 1].

    Args:
        relative_to: `"visible"` divides by the log of the number of keys that the row sees (0 for a
            row that sees one); `"keys"` by the log of the number of all keys, as several papers do.
            Under a causal mask these are different numbers.
    """
    if relative_to not in ("visible", "keys"):
        raise ValueError(f'relative_to: expected "visible" or "keys", got {relative_to!r}.')
    call = prepare(query, key, attn_mask, is_causal, scale, enable_gqa)
    rows = entropy(query, key, attn_mask, is_causal, scale, enable_gqa)
    count = call.visible_keys()
    if relative_to == "keys":
        count = torch.full_like(count, key.shape[2])
    return torch.where(count > 1, rows / count.clamp_min(2.0).log(), torch.zeros_like(rows))


@full_precision
def renyi_entropy(
    query: Query,
    key: Key,
    order: float = 2.0,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    lse: Rows | None = None,
) -> Rows:
    """Renyi entropy `log(sum_j p^order) / (1 - order)` of each row, in nats.

    A ratio of two normalisers, `(LSE(order * s) - order * LSE(s)) / (1 - order)`: two passes.
    Order 0 is the log of the number of visible keys, 1 is Shannon's, infinity `-log max p`.
    Within about 1e-3 of order 1 the ratio loses digits; use order 1 there.

    Args:
        lse: that of `attention_state` on the same arguments, if you have it; saves one of the two
            passes.
    """
    if not order >= 0:
        raise ValueError(f"order: expected a number of at least 0, got {order}.")
    if order == 1:
        return entropy(query, key, attn_mask, is_causal, scale, enable_gqa)
    call = prepare(query, key, attn_mask, is_causal, scale, enable_gqa)
    if order == 0:
        rows = call.visible_keys().clamp_min(1.0).log()
        return rows.expand(query.shape[:3]).clone()
    if math.isinf(order):
        top = max_probability(query, key, attn_mask, is_causal, scale, enable_gqa)
        return -top.where(top > 0, torch.ones_like(top)).log()
    # Centred keys keep the two normalisers small, so that their difference keeps its digits.
    mean = call.key.mean(2, keepdim=True)
    if lse is not None:
        shift = (call.query * mean.repeat_interleave(call.groups, 1)).sum(-1) * call.scale
        lse = check_lse(lse, call) - shift
    call = call._replace(key=call.key - mean)
    lse = call.lse() if lse is None else lse
    bias = None if call.bias is None else call.bias * order
    sharpened = call._replace(scale=call.scale * order, bias=bias).lse()
    empty = lse == -math.inf
    lse, sharpened = lse.masked_fill(empty, 0.0), sharpened.masked_fill(empty, 0.0)
    return ((sharpened - order * lse) / (1 - order)).clamp_min(0.0)


@full_precision
def second_moment(
    query: Query,
    key: Key,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Rows:
    """`sum_j p^2`, the chance that two draws from the row are the same key. Two passes."""
    ratio = participation_ratio(query, key, attn_mask, is_causal, scale, enable_gqa)
    return torch.where(ratio > 0, 1 / ratio.clamp_min(1.0), torch.zeros_like(ratio))


@full_precision
def participation_ratio(
    query: Query,
    key: Key,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    lse: Rows | None = None,
) -> Rows:
    """`1 / sum_j p^2`: how many keys the row looks at, in [1, visible keys]; 0 for an empty row.

    The exponential of the Renyi entropy of order 2. Two passes, one if you have the `lse` of
    `attention_state` on the same arguments.
    """
    rows = renyi_entropy(query, key, 2.0, attn_mask, is_causal, scale, enable_gqa, lse).exp()
    if attn_mask is None:
        return rows
    call = prepare(query, key, attn_mask, is_causal, scale, enable_gqa)
    return rows.masked_fill(call.visible_keys() == 0, 0.0)


@full_precision
def max_probability(
    query: Query,
    key: Key,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Rows:
    """`max_j p`, the largest probability of each row; its mean is a head's "confidence".

    No fused kernel reports a maximum, so this runs in blocks of rows: exact and in bounded memory.
    On a CPU and without gradients it costs about one `scaled_dot_product_attention`, elsewhere
    about as much as an eager map.
    """
    call = prepare(query, key, attn_mask, is_causal, scale, enable_gqa)
    if can_sweep(call):
        return sweep(call).max_probability
    blocks = map_rows(_row_maximum, call.query, call.key, call.bias, is_causal, call.scale)
    return torch.cat([rows for (rows,) in blocks], 2)


@full_precision
def varentropy(
    query: Query,
    key: Key,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Rows:
    """The variance of `-log p` under each row, which is that of its scores. In blocks of rows."""
    call = prepare(query, key, attn_mask, is_causal, scale, enable_gqa)
    blocks = map_rows(_row_varentropy, call.query, call.key, call.bias, is_causal, call.scale)
    return torch.cat([rows for (rows,) in blocks], 2)


@full_precision
def expected_features(
    query: Query,
    key: Key,
    features: Float[Tensor, "*feature_batch keys features"],
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Float[Tensor, "batch heads queries features"]:
    """The mean of any per-key features under each row: attention with other values. One pass.

    Args:
        features: `[keys, features]`, or with leading dimensions that broadcast to
            `[batch, kv_heads, keys, features]`.
    """
    call = prepare(query, key, attn_mask, is_causal, scale, enable_gqa)
    return call.attend(key_features(features, call)).output


@full_precision
def class_mass(
    query: Query,
    key: Key,
    key_classes: Int[Tensor, "*class_batch keys"],
    num_classes: int | None = None,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Float[Tensor, "batch heads queries classes"]:
    """The probability mass of each row on each class of keys, such as kinds of tokens.

    Args:
        key_classes: integers in [0, num_classes), `[keys]` or `[batch, keys]`.
        num_classes: the largest class + 1 by default.
    """
    if key_classes.is_floating_point() or key_classes.is_complex():
        raise ValueError(f"key_classes: expected integers, got {key_classes.dtype}.")
    if num_classes is None:
        num_classes = int(key_classes.max()) + 1 if key_classes.numel() else 1
    one_hot = torch.nn.functional.one_hot(key_classes.long(), num_classes)
    if one_hot.dim() == 3:
        one_hot = one_hot[:, None]
    features = one_hot.to(torch.promote_types(query.dtype, torch.float32))
    return expected_features(query, key, features, attn_mask, is_causal, scale, enable_gqa)


@full_precision
def key_set_mass(
    query: Query,
    key: Key,
    key_indices: Int[Tensor, " members"],
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    lse: Rows | None = None,
) -> Rows:
    """The probability mass of each row on a set of keys, `exp(lse of the set - lse)`.

    Args:
        key_indices: which keys, each once.
        lse: that of `attention_state` on the same arguments, if you have it. Then the cost is that
            of the set alone.
    """
    call = prepare(query, key, attn_mask, is_causal, scale, enable_gqa)
    whole = check_lse(lse, call)
    if key_indices.dim() != 1 or key_indices.is_floating_point():
        raise ValueError(
            "key_indices: expected a list of integers [members], got "
            f"{key_indices.dtype} {list(key_indices.shape)}."
        )
    parts = []
    for chosen in key_indices.long().split(128):
        bias = (
            None if call.bias is None else call.bias.expand(-1, -1, -1, key.shape[2])[..., chosen]
        )
        if is_causal:
            row = torch.arange(query.shape[2], device=query.device)[:, None]
            hidden = chosen > row
            causal = torch.zeros(hidden.shape, dtype=whole.dtype, device=query.device)
            bias = causal.masked_fill(hidden, -math.inf)[None, None]
        members = call.key[:, :, chosen]
        parts.append(attend(call.query, members, members, bias=bias, scale=call.scale).lse)
    if not parts:
        return torch.zeros_like(whole)
    part = torch.logsumexp(torch.stack(parts), 0) if len(parts) > 1 else parts[0]
    empty = (whole == -math.inf) | (part == -math.inf)
    return (part - whole).masked_fill(empty, -math.inf).exp()


@full_precision
def mean_distance(
    query: Query,
    key: Key,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    query_offset: int | None = None,
) -> Rows:
    """`sum_j p[i, j] |i + query_offset - j|`: how far each query looks, in tokens.

    With `is_causal` one pass; else two, since `|d| = -d + 2 max(d, 0)` and the second term is the
    attention to the keys on the left alone.

    Args:
        query_offset: the position of query 0 among the keys. By default `keys - queries` (the
            queries are the last tokens, as in decoding), and 0 under `is_causal`.
    """
    call = prepare(query, key, attn_mask, is_causal, scale, enable_gqa)
    queries, keys = query.shape[2], key.shape[2]
    if query_offset is None:
        query_offset = 0 if is_causal else keys - queries
    dtype, device = call.query.dtype, query.device
    position = torch.arange(keys, dtype=dtype, device=device)
    row = torch.arange(queries, dtype=dtype, device=device) + query_offset
    features = key_features(position[:, None], call)
    whole = call.attend(features)
    empty = whole.lse == -math.inf
    signed = whole.output.squeeze(-1) - row
    if is_causal and query_offset >= 0:
        return (-signed).masked_fill(empty, 0.0).clamp_min(0.0)
    left = torch.zeros(queries, keys, dtype=dtype, device=device)
    if queries == keys and query_offset == 0 and call.bias is None:
        before = attend(call.query, call.key, features, is_causal=True, scale=call.scale)
    else:
        left = left.masked_fill(position > row[:, None], -math.inf)[None, None]
        bias = left if call.bias is None else left + call.bias
        before = attend(call.query, call.key, features, bias=bias, scale=call.scale)
    share = (before.lse - whole.lse.masked_fill(empty, 0.0)).exp()
    distance = signed + 2 * share * (row - before.output.squeeze(-1))
    return distance.masked_fill(empty, 0.0).clamp_min(0.0)


def key_features(features: Tensor, call: Call) -> Tensor:
    """Features of the keys, checked and expanded to [batch, kv_heads, keys, features]."""
    batch, heads, keys, _ = call.key.shape
    if features.dim() < 2 or features.dim() > 4 or features.shape[-2] != keys:
        raise ValueError(
            f"features: expected [keys, features] with {keys} keys, or more leading dimensions "
            f"that broadcast to [batch, kv_heads] = {[batch, heads]}, got {list(features.shape)}."
        )
    return features.to(call.key.dtype).expand(batch, heads, keys, features.shape[-1])


def _summary_in_blocks(call: Call, features: Tensor | None) -> RowSummary:
    """With a float bias for every pair the mean score is no attention output: see the scores."""
    tensors = {} if features is None else {"features": features}
    blocks = map_rows(
        _row_entropy, call.query, call.key, call.bias, call.is_causal, call.scale, **tensors
    )
    lse, rows, *rest = (torch.cat(parts, 2) for parts in zip(*blocks, strict=True))
    return RowSummary(lse, rows, rest[0] if rest else None)


def _row_entropy(scores: Tensor, features: Tensor | None = None) -> tuple[Tensor, ...]:
    p, lse = dense_rows(scores)
    surprise = (lse[..., None] - scores).masked_fill(scores == -math.inf, 0.0)
    rows = (p * surprise).sum(-1).clamp_min(0.0)
    return (lse, rows) if features is None else (lse, rows, dense_rows(scores, features)[0])


def _row_maximum(scores: Tensor) -> tuple[Tensor]:
    return (dense_rows(scores)[0].amax(-1),)


def _row_varentropy(scores: Tensor) -> tuple[Tensor]:
    p, lse = dense_rows(scores)
    surprise = (lse[..., None] - scores).masked_fill(scores == -math.inf, 0.0)
    mean = (p * surprise).sum(-1, keepdim=True)
    return ((p * (surprise - mean).square()).sum(-1),)
