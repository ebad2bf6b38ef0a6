"""Attention whose weights depend on the key's token alone: a running softmax mean of the values.

The "non-approximate" variant of Xue et al. ("Deconstructing Attention", 2510.11602). Each token has
one logit per head, made of its own query and key, and every query that sees it weighs it the same.
So the rows of the map are equal up to the causal cut, and what a sequence has to remember of its
past is one attention state per head: `dim + 1` numbers. (Without its logit's form it is the
AFT-simple of Zhai et al. 2021, 2105.14103, before the gate.)

The running mean is a scan with `merge`: states of chunks, each merged with that of all before.
"""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import silu

from attending.core.check import check_arguments
from attending.core.kernels import dense_rows
from attending.core.state import AttentionState, merge
from attending.nn._causal_sum import full_precision
from attending.nn._key_padding import visible_keys

CHUNK = 64  # tokens; the work within a chunk is quadratic in it


def nonapprox_attention(
    query: Float[Tensor, "batch heads tokens dim"],
    key: Float[Tensor, "batch kv_heads tokens dim"],
    value: Float[Tensor, "batch kv_heads tokens value_dim"],
    *,
    attn_mask: Bool[Tensor, "#batch #heads 1 tokens"] | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Float[Tensor, "batch heads tokens value_dim"]:
    """Attention with a logit per key that no query has a part in.

        a[j]      = scale * silu(query[j]) . key[j]
        output[i] = sum_{j <= i} exp(a[j]) value[j] / sum_{j <= i} exp(a[j])

    Equations 7 and 18 of the paper; 18 prints no scale, 7 does. Linear in the tokens, forward and
    backward. Without `is_causal` all queries get the same output.

    With rotary embeddings pass query and key as they are *before* the rotation. The paper's
    rotation cancels, because q and k of one token turn together; after `silu` it would not. Through
    `register_attention` a model hands over rotated ones, so there the logit also depends on the
    position; `attending.conversion.mixers` takes them before it.

    Args:
        query: the projection before SiLU, at the same tokens as the keys.
        key, value: as in `scaled_dot_product_attention`.
        attn_mask: boolean, the same for all queries, True = visible; goes with `is_causal`.
        is_causal: query i sees tokens 0..i.
        scale: `dim ** -0.5` by default.
        enable_gqa: let key and value have fewer heads, each shared by a group of query heads.

    Returns:
        The output, in query's dtype; 0 for a query that sees no token.

    Raises:
        ValueError: for arguments that do not fit together, and for cross-attention, which this
            cannot be.
    """
    check_arguments(query, key, value, None, is_causal, scale, enable_gqa)
    if query.shape[2] != key.shape[2]:
        raise ValueError(
            f"query: expected as many tokens as key has, {key.shape[2]}, got {query.shape[2]}: the "
            "logit of a token needs its query and its key. To go on from earlier tokens, use "
            "running_softmax_mean and its state."
        )
    logit = nonapprox_logit(query, key, scale)
    visible = visible_keys(attn_mask, query)
    if visible is not None:
        logit = logit.masked_fill(~visible, -math.inf)
    return running_softmax_mean(logit, value, is_causal=is_causal).output.to(query.dtype)


def nonapprox_logit(
    query: Float[Tensor, "batch heads tokens dim"],
    key: Float[Tensor, "batch kv_heads tokens dim"],
    scale: float | None = None,
) -> Float[Tensor, "batch heads tokens"]:
    """`scale * silu(query[j]) . key[j]`, at least in float32.

    Args:
        query: the projection before SiLU, and before a rotation.
        key: with as many heads, or fewer that are shared by groups.
        scale: `dim ** -0.5` by default.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    dtype = torch.promote_types(query.dtype, torch.float32)
    grouped = silu(query.to(dtype)).unflatten(1, (key.shape[1], -1))
    logit: Tensor = (grouped * key.to(dtype)[:, :, None]).sum(-1).flatten(1, 2) * scale
    return logit


def running_softmax_mean(
    logit: Float[Tensor, "batch heads tokens"],
    value: Float[Tensor, "batch kv_heads tokens value_dim"],
    *,
    is_causal: bool = True,
    state: AttentionState | None = None,
) -> AttentionState:
    """The softmax mean of the values so far, at every token, in linear time.

        output[i] = sum_{j <= i} exp(logit[j]) value[j] / sum_{j <= i} exp(logit[j])

    To go on from a sequence's earlier tokens, hand over the last row of what came before:

        past = running_softmax_mean(logit, value)
        state = AttentionState(past.output[:, :, -1:], past.lse[:, :, -1:])
        running_softmax_mean(next_logit, next_value, state=state)

    Args:
        logit: -inf hides a token.
        value: with as many heads, or fewer that are shared by groups.
        is_causal: False for the mean over all tokens, at every token.
        state: that of earlier tokens, `[batch, heads, 1, ...]`.

    Returns:
        The state of every row, output and lse, at least in float32.

    Raises:
        ValueError: if the shapes do not fit together.
    """
    batch, heads, tokens = logit.shape
    fits = value.dim() == 4 and value.shape[0] == batch and value.shape[2] == tokens
    if not fits or heads % value.shape[1]:
        raise ValueError(
            f"value: expected [batch, kv_heads, tokens, dim] for the logit {list(logit.shape)}, "
            f"got {list(value.shape)}."
        )
    rows = (batch, heads, 1)
    if state is not None and (state.lse.shape != rows or state.output.shape[:3] != rows):
        raise ValueError(
            f"state: expected one row, lse {list(rows)}, got {list(state.lse.shape)}. It is the "
            "last row of the earlier result."
        )
    dtype = torch.promote_types(logit.dtype, torch.float32)
    logit, value = logit.to(dtype), value.to(dtype)
    with full_precision(logit):
        if not is_causal:
            whole = AttentionState(*dense_rows(logit[:, :, None], value))
            if state is not None:
                whole = merge(state, whole)
            return _expand(whole, tokens)
        parts = []
        for start in range(0, tokens, CHUNK):
            here = slice(start, start + CHUNK)
            part = _causal_chunk(logit[:, :, here], value[:, :, here])
            if state is not None:
                part = merge(_expand(state, part.lse.shape[2]), part)
            state = AttentionState(part.output[:, :, -1:], part.lse[:, :, -1:])
            parts.append(part)
    if not parts:
        return AttentionState(value.new_zeros(batch, heads, 0, value.shape[-1]), logit)
    outputs, lses = zip(*parts, strict=True)
    return AttentionState(torch.cat(outputs, 2), torch.cat(lses, 2))


def _causal_chunk(logit: Tensor, value: Tensor) -> AttentionState:
    size = logit.shape[2]
    future = torch.ones(size, size, dtype=torch.bool, device=logit.device).triu(1)
    scores = logit[:, :, None].expand(-1, -1, size, -1).masked_fill(future, -math.inf)
    return AttentionState(*dense_rows(scores, value))


def _expand(state: AttentionState, rows: int) -> AttentionState:
    return AttentionState(state.output.expand(-1, -1, rows, -1), state.lse.expand(-1, -1, rows))
