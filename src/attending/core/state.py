"""Attention over a set of keys as a state, and the algebra of states.

Softmax attention of a query over a set of keys is its normalised output and the log of its
normaliser, `(output, lse)`. States over disjoint sets of keys merge into the state of the union,
and merging is associative and commutative. Every flash-attention kernel computes such states;
`attention_state` is one front to all of them.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from attending.core.bias import HIDDEN, add_key_bias, add_low_rank_bias
from attending.core.check import check_arguments
from attending.core.kernels import fused_attention
from attending.core.precision import full_precision


class AttentionState(NamedTuple):
    """Attention of each query over a set of keys.

    Attributes:
        output: the mean of the values under the softmax; 0 where the set of visible keys is empty.
        lse: the log of the sum of `exp(score)` over the visible keys, in nats, never in half
            precision; -inf where the set is empty. `exp(part.lse - whole.lse)` is the probability
            mass on a part of the keys.
    """

    output: Float[Tensor, "*batch queries dim"]
    lse: Float[Tensor, "*batch queries"]


def attention_state(
    query: Float[Tensor, "batch heads queries dim"],
    key: Float[Tensor, "batch kv_heads keys dim"],
    value: Float[Tensor, "batch kv_heads keys value_dim"],
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> AttentionState:
    """`scaled_dot_product_attention` that also returns the log of its normaliser.

        s[i, j]   = scale * query[i] . key[j] + attn_mask[i, j]
        lse[i]    = log sum_j exp s[i, j]
        output[i] = sum_j exp(s[i, j] - lse[i]) value[j]

    Runs on PyTorch's fused kernels, in memory that grows with the number of tokens and not with
    its square. Gradients flow through `output` and through `lse`, to query, key and value, and to
    a float `attn_mask` that requires one (then in blocks of rows rather than fused).

    Args:
        query, key, value: float64, float32, bfloat16 or float16. The value's dim may differ.
        attn_mask: boolean (True = visible) or a float bias; broadcasts to
            `[batch, heads, queries, keys]`.
        is_causal: query i sees keys 0..i, as in PyTorch (aligned to the top left).
        scale: finite; `dim ** -0.5` by default.
        enable_gqa: let key and value have fewer heads, each shared by a group of query heads.

    Returns:
        The state. A row that sees no key has output 0 and lse -inf, never NaN.

    Raises:
        ValueError: for arguments that do not fit together; the message names the argument.
    """
    arguments = check_arguments(query, key, value, attn_mask, is_causal, scale, enable_gqa)
    return attend(
        query, key, value, bias=arguments.bias, is_causal=is_causal, scale=arguments.scale
    )


def biased_attention_state(
    query: Float[Tensor, "batch heads queries dim"],
    key: Float[Tensor, "batch kv_heads keys dim"],
    value: Float[Tensor, "batch kv_heads keys value_dim"],
    *,
    key_bias: Float[Tensor, "#batch #kv_heads keys"] | None = None,
    low_rank_bias: tuple[Tensor, Tensor] | None = None,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> AttentionState:
    """`attention_state` with additive biases that never take the form of an N x N matrix.

    Args:
        key_bias: added to every score of key j: log weights, or -inf to hide a key. Goes together
            with `is_causal`, and has a gradient.
        low_rank_bias: `(left, right)` with `left[i] . right[j]` added to the score, such as
            `alibi_factors`.
        query, key, value, attn_mask, is_causal, scale, enable_gqa: as in `attention_state`.
    """
    arguments = check_arguments(query, key, value, attn_mask, is_causal, scale, enable_gqa)
    scale, dtype = arguments.scale, query.dtype
    if key_bias is not None and (key_bias.dim() != 3 or key_bias.shape[-1] != key.shape[2]):
        raise ValueError(
            "key_bias: expected a shape that broadcasts to [batch, kv_heads, keys] = "
            f"{list(key.shape[:3])}, got {list(key_bias.shape)}."
        )
    if low_rank_bias is not None:
        query, key, scale = add_low_rank_bias(query, key, *low_rank_bias, scale)
    state = attend(
        query,
        key,
        value.to(query.dtype),
        bias=arguments.bias,
        key_bias=key_bias,
        is_causal=is_causal,
        scale=scale,
    )
    return AttentionState(state.output.to(dtype), state.lse)


@full_precision
def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    bias: Tensor | None = None,
    key_bias: Tensor | None = None,
    is_causal: bool = False,
    scale: float,
) -> AttentionState:
    """The unchecked heart of the library: everything that looks at attention ends here.

    Unlike the public functions it takes a bias and `is_causal` together. A bias per key becomes
    part of the mask where the kernel allows that for nothing (the CPU's, without gradients), and a
    column of query and key elsewhere.
    """
    if key_bias is None:
        return AttentionState(*fused_attention(query, key, value, bias, is_causal, scale))
    needs_grad = torch.is_grad_enabled() and key_bias.requires_grad
    if query.device.type == "cpu" and bias is None and not needs_grad:
        groups = query.shape[1] // key.shape[1] if key_bias.shape[1] > 1 else 1
        row = key_bias.repeat_interleave(groups, 1)[:, :, None, :]
        return AttentionState(*fused_attention(query, key, value, row, is_causal, scale))
    dtype = value.dtype
    query, key, scale = add_key_bias(query, key, key_bias, scale)
    output, lse = fused_attention(query, key, value.to(query.dtype), bias, is_causal, scale)
    empty = lse < HIDDEN / 2
    return AttentionState(
        output.masked_fill(empty[..., None], 0.0).to(dtype), lse.masked_fill(empty, -math.inf)
    )


def merge(*states: AttentionState) -> AttentionState:
    """The state over the union of disjoint sets of keys.

        lse    = log sum_k exp lse_k
        output = sum_k exp(lse_k - lse) output_k

    Associative and commutative up to rounding; a state with lse -inf is neutral. Differentiable.
    """
    if not states:
        raise ValueError("states: expected at least one AttentionState, got none.")
    first = states[0]
    for index, state in enumerate(states):
        if state.output.shape != first.output.shape or state.lse.shape != first.output.shape[:-1]:
            raise ValueError(
                f"states[{index}]: expected output {list(first.output.shape)} and lse "
                f"{list(first.output.shape[:-1])} as in states[0], got "
                f"{list(state.output.shape)} and {list(state.lse.shape)}."
            )
    if len(states) == 1:
        return first
    lses = torch.stack([state.lse for state in states])
    # The maximum is only a shift, so it needs no gradient; where all are -inf it must not be one.
    highest = lses.detach().amax(0)
    highest = highest.masked_fill(highest == -math.inf, 0.0)
    weights = torch.exp(lses - highest)
    total = weights.sum(0)
    empty = total == 0
    total = total.masked_fill(empty, 1.0)
    shares = (weights / total).unsqueeze(-1)
    output = torch.zeros_like(first.output, dtype=shares.dtype)
    for share, state in zip(shares, states, strict=True):
        output = output + share * state.output
    lse = (highest + total.log()).masked_fill(empty, -math.inf)
    return AttentionState(output.to(first.output.dtype), lse)


def reweigh(
    state: AttentionState, log_weight: float | Float[Tensor, "*#batch #queries"]
) -> AttentionState:
    """The state as if each of its keys counted `exp(log_weight)` times.

    Within the state nothing changes; merged with others it has more or less of the mass. A log
    weight of -inf empties the state.
    """
    lse = state.lse + log_weight
    return AttentionState(state.output.masked_fill((lse == -math.inf)[..., None], 0.0), lse)
