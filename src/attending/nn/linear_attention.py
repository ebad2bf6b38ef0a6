"""Linear attention: a map `weight[i, j] = query[i] . key[j]` of features, which is never built.

Without a softmax the order of the products is free, so that the cost is linear in the tokens:

    output[i] = sum_j (query[i] . key[j]) value[j] = query[i] @ (sum_j key[j]^T value[j])

`query` and `key` here are *features*: a method applies its kernel (elu + 1, sigmoid, ReLU, random
features, ...) before it calls. All that a query has to know of a set of keys is the pair of sums

    key_value = sum_j key[j]^T value[j]    [dim, value_dim]
    key_sum   = sum_j key[j]               [dim]

which is a `LinearAttentionState`. The states of disjoint sets of keys add up, as those of softmax
attention merge (`attending.core.state`); a new token is one more summand, so decoding takes
constant time and memory. The causal form goes through the tokens in chunks with that state and
keeps nothing else, forward and backward.

Source: Katharopoulos et al. 2020 (2006.16236), equations 4-12 (and the chunks, which are common
knowledge since, e.g. 2312.06635). `attending.nn.flow_attention` and `attending.nn.dydila` are
built on it.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attending.core.check import check_arguments, check_heads, check_tensor
from attending.nn._causal_sum import accumulation_dtype, causal_sum, full_precision
from attending.nn._key_padding import visible_keys


@dataclass(frozen=True)
class LinearAttentionState:
    """All that queries need to know of a set of keys: `state_a + state_b` is that of the union.

    Attributes:
        key_value: the sum of the outer products of keys and values, float32 or float64.
        key_sum: the sum of the keys, likewise.
    """

    key_value: Float[Tensor, "batch kv_heads dim value_dim"]
    key_sum: Float[Tensor, "batch kv_heads dim"]

    def __add__(self, other: "LinearAttentionState") -> "LinearAttentionState":
        return LinearAttentionState(self.key_value + other.key_value, self.key_sum + other.key_sum)


def linear_attention(
    query: Float[Tensor, "batch heads queries dim"],
    key: Float[Tensor, "batch kv_heads keys dim"],
    value: Float[Tensor, "batch kv_heads keys value_dim"],
    *,
    attn_mask: Bool[Tensor, "#batch #kv_heads 1 keys"] | None = None,
    is_causal: bool = False,
    enable_gqa: bool = False,
    normalize: bool = True,
) -> Float[Tensor, "batch heads queries value_dim"]:
    """Linear attention over features, in the layout of `scaled_dot_product_attention`.

        features = lambda x: torch.nn.functional.elu(x) + 1
        linear_attention(features(query), features(key), value, is_causal=True)

    Time and memory grow with the tokens, also in the backward pass: the causal form holds one state
    of `dim * value_dim` numbers and one chunk of 64 tokens at a time. Sums are taken in float32
    (float64 for float64), whatever the inputs are.

    Args:
        query, key: features. There is no scale and no softmax.
        value: what is averaged; its dim may differ.
        attn_mask: boolean, True = visible, and the same for all queries: `[batch, 1, 1, keys]`, or
            what broadcasts to it. Works together with `is_causal`.
        is_causal: query i sees keys 0..i, as in PyTorch (aligned to the top left).
        enable_gqa: let key and value have fewer heads, each shared by a group of query heads.
        normalize: divide by `query[i] . sum_j key[j]`, so that the weights of a row sum to 1. It
            presumes features that are not negative; with others the divisor may be near 0.

    Returns:
        The output, in query's dtype. With `normalize`, a query whose divisor is 0 (no visible key,
        or no feature in common with any) gets 0.

    Raises:
        ValueError: for arguments that do not fit together; the message names the argument.
    """
    check_arguments(query, key, value, enable_gqa=enable_gqa)
    visible = visible_keys(attn_mask, key)
    if not is_causal:
        return read_state(linear_state(key, value, visible), query, normalize=normalize)
    queries, keys = query.shape[2], key.shape[2]
    if keys > queries:
        key, value = key[:, :, :queries], value[:, :, :queries]
        visible = None if visible is None else visible[..., :queries]
    elif keys < queries:  # keys without features have no weight
        key, value = (torch.nn.functional.pad(t, (0, 0, 0, queries - keys)) for t in (key, value))
        visible = None if visible is None else torch.nn.functional.pad(visible, (0, queries - keys))
    key = hide(key, visible)
    return _causal(query, key, value, None, normalize)


def causal_linear_attention(
    query: Float[Tensor, "batch heads tokens dim"],
    key: Float[Tensor, "batch kv_heads tokens dim"],
    value: Float[Tensor, "batch kv_heads tokens value_dim"],
    state: LinearAttentionState | None = None,
    *,
    attn_mask: Bool[Tensor, "#batch #kv_heads 1 tokens"] | None = None,
    enable_gqa: bool = False,
    normalize: bool = True,
) -> tuple[Float[Tensor, "batch heads tokens value_dim"], LinearAttentionState]:
    """The causal form for the next tokens of a sequence, one or many, given the state before them.

        output, state = causal_linear_attention(*prompt)            # prefill
        output, state = causal_linear_attention(*token, state)      # and a token at a time

    The outputs are those of one call over the whole sequence; time and memory of a step do not
    depend on how many tokens came before.

    Args:
        query, key, value, attn_mask, enable_gqa, normalize: as in `linear_attention`.
        state: that of the tokens before; None at the start.

    Returns:
        The output and the state after these tokens. Differentiable, through the state too.

    Raises:
        ValueError: for arguments that do not fit together; the message names the argument.
    """
    check_arguments(query, key, value, enable_gqa=enable_gqa)
    if query.shape[2] != key.shape[2]:
        raise ValueError(
            f"key: expected as many tokens as query has, {query.shape[2]}, got {key.shape[2]}. The "
            "keys before them belong into state."
        )
    _check_state(state, key, value)
    visible = visible_keys(attn_mask, key)
    key = hide(key, visible)
    output = _causal(query, key, value, state, normalize)
    after = linear_state(key, value)
    return output, after if state is None else state + after


def linear_state(
    key: Float[Tensor, "batch kv_heads keys dim"],
    value: Float[Tensor, "batch kv_heads keys value_dim"],
    visible: Bool[Tensor, "#batch #kv_heads keys"] | None = None,
) -> LinearAttentionState:
    """The state of a set of keys, to be read with `read_state` any number of times.

    Args:
        key: features.
        value: their values.
        visible: False for keys that do not count.
    """
    check_arguments(key, key, value)
    dtype = accumulation_dtype(key.dtype)
    with full_precision(key):
        key = hide(key, visible).to(dtype)
        return LinearAttentionState(key.transpose(-1, -2) @ value.to(dtype), key.sum(-2))


def read_state(
    state: LinearAttentionState,
    query: Float[Tensor, "batch heads queries dim"],
    *,
    normalize: bool = True,
) -> Float[Tensor, "batch heads queries value_dim"]:
    """What queries find in a state: attention over all of its keys, `[heads % kv_heads == 0]`."""
    check_tensor("query", query)
    check_heads("state", state.key_value, query, enable_gqa=True)
    if state.key_value.shape[2] != query.shape[-1]:
        raise ValueError(
            f"query: expected dim {state.key_value.shape[2]}, that of the keys in state, got "
            f"{list(query.shape)}."
        )
    kv_heads = state.key_value.shape[1]
    with full_precision(query):
        # The query heads of a group side by side: [batch, kv_heads, group * queries, dim].
        grouped = query.to(state.key_value.dtype).unflatten(1, (kv_heads, -1)).flatten(2, 3)
        output: Tensor = grouped @ state.key_value
        if normalize:
            output = _divide(output, grouped @ state.key_sum[..., None])
    return output.to(query.dtype).reshape(*query.shape[:3], output.shape[-1])


def hide(features: Tensor, visible: Tensor | None) -> Tensor:
    """Features with 0 where a token does not count."""
    return features if visible is None else features.masked_fill(~visible[..., None], 0.0)


def _divide(output: Tensor, divisor: Tensor) -> Tensor:
    return output * divisor.masked_fill(divisor == 0, torch.inf).reciprocal()


def _causal(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: LinearAttentionState | None,
    normalize: bool,
) -> Tensor:
    dtype = accumulation_dtype(query.dtype)
    output = causal_sum(query, key, value, None if state is None else state.key_value)
    if not normalize:
        return output
    with full_precision(query):
        sums = key.to(dtype).cumsum(-2)
        if state is not None:
            sums = sums + state.key_sum[:, :, None]
        grouped = query.to(dtype).unflatten(1, (key.shape[1], -1))
        divisor = (grouped * sums[:, :, None]).sum(-1).flatten(1, 2)
        return _divide(output.to(dtype), divisor[..., None]).to(query.dtype)


def _check_state(state: LinearAttentionState | None, key: Tensor, value: Tensor) -> None:
    if state is None:
        return
    expected = (*key.shape[:2], key.shape[-1], value.shape[-1])
    if tuple(state.key_value.shape) != expected or tuple(state.key_sum.shape) != expected[:3]:
        raise ValueError(
            "state: expected that of keys and values of this shape, key_value "
            f"{list(expected)} and key_sum {list(expected[:3])}, got "
            f"{list(state.key_value.shape)} and {list(state.key_sum.shape)}."
        )
