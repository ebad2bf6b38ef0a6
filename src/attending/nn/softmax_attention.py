"""Softmax attention and the softmax-off-by-one as functions from tensors to a tensor.

`attending.core.state` gives the state, output and lse. These give the output alone, in the form in
which all operators of `attending.nn` are called and registered.
"""

from jaxtyping import Float
from torch import Tensor

from attending.core.state import attention_state
from attending.nn.softmax_with_sink import softmax_with_sink


def softmax_attention(
    query: Float[Tensor, "batch heads queries dim"],
    key: Float[Tensor, "batch kv_heads keys dim"],
    value: Float[Tensor, "batch kv_heads keys value_dim"],
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Float[Tensor, "batch heads queries value_dim"]:
    """`softmax(scale * query key^T) value`, by way of `attention_state`.

    Args:
        query, key, value, attn_mask, is_causal, scale, enable_gqa: as in
            `scaled_dot_product_attention`.

    Returns:
        The output, in query's dtype; 0 for a query that sees no key.

    Raises:
        ValueError: for arguments that do not fit together; the message names the argument.
    """
    return attention_state(query, key, value, attn_mask, is_causal, scale, enable_gqa).output


def softmax_off_by_one(
    query: Float[Tensor, "batch heads queries dim"],
    key: Float[Tensor, "batch kv_heads keys dim"],
    value: Float[Tensor, "batch kv_heads keys value_dim"],
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Float[Tensor, "batch heads queries value_dim"]:
    """Attention that may also look at nothing: `exp(s[j]) / (1 + sum_k exp s[k])` weighs value j.

    Miller, "Attention is off by one" (2023). It is `softmax_with_sink` at a logit of 0: the
    softmax over the keys and one more key of score 0 and value 0.

    Args:
        query, key, value, attn_mask, is_causal, scale, enable_gqa: as in
            `scaled_dot_product_attention`.

    Returns:
        The output, in query's dtype; 0 for a query that sees no key.

    Raises:
        ValueError: for arguments that do not fit together; the message names the argument.
    """
    state = attention_state(query, key, value, attn_mask, is_causal, scale, enable_gqa)
    return softmax_with_sink(state, 0.0).output
