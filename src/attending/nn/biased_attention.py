"""Attention with a learned key and value beside the sequence, and sigmoid attention.

An et al. ("Systematic Outliers in Large Language Models", ICLR 2025, 2502.06415) train models that
differ in one thing, what attention may do besides the softmax over the tokens, and look for which
of them grow outliers. Here are their variants as functions in the layout of
`scaled_dot_product_attention`; `attending.nn.self_attention.SelfAttention` has them as a layer.

With P the softmax of the scores, k' and v' a learned key and value per head, and
`p0 = sigmoid(scale * query . k' - lse)`:

| letter | variant | function | in the paper |
| --- | --- | --- | --- |
| a | softmax | `P V` | outliers |
| b | fixed bias | `P V + v'` | outliers |
| c | context-aware bias | `P V + p0 v'`, `attention_with_bias(mode="additive")` | outliers |
| d | attention bias | `(1 - p0) P V + p0 v'`, `attention_with_bias(mode="concat")` | none |
| e | context-aware scale | `S(x) P V`, `attending.nn.context_scale` | none |
| f | sigmoid attention | `sigmoid(s - log keys) V`, `sigmoid_attention` | none |

The official code of (c) and (d) makes the sequence one key longer, and ignores the bias or fails
where it does not use SDPA. Both follow from lse, so here they are one fused call and O(tokens).
"""

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from attending.core.check import check_arguments
from attending.core.kernels import map_rows, weigh
from attending.core.state import attend
from attending.nn.softmax_with_sink import sink_probability, softmax_with_sink


def attention_with_bias(
    query: Float[Tensor, "batch heads queries dim"],
    key: Float[Tensor, "batch kv_heads keys dim"],
    value: Float[Tensor, "batch kv_heads keys value_dim"],
    key_bias: Float[Tensor, "bias_heads dim"],
    value_bias: Float[Tensor, "bias_heads value_dim"],
    *,
    mode: Literal["concat", "additive"] = "concat",
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Float[Tensor, "batch heads queries value_dim"]:
    """Attention that may also look at a learned key and value, which are in no sequence.

        p0 = exp(scale * query . key_bias) / (exp(scale * query . key_bias) + sum_j exp s[j])
        "concat":    (1 - p0) * P V + p0 * value_bias    softmax over [key_bias; keys] (Sun et al.)
        "additive":             P V + p0 * value_bias    the same bias without its scale 1 - p0

    The two are variants (d) and (c) of An et al. (2502.06415). With a zero `value_bias`, "concat"
    is a softmax with a sink whose logit depends on the query.

    Args:
        query, key, value, attn_mask, is_causal, scale, enable_gqa: as in
            `scaled_dot_product_attention`. No mask hides the bias.
        key_bias: k', one for each query head, or for each key head where those are fewer.
        value_bias: v', likewise.
        mode: "concat" or "additive".

    Returns:
        The output, in query's dtype. A query that sees no key has p0 = 1: output `value_bias`.

    Raises:
        ValueError: for arguments that do not fit together; the message names the argument.
    """
    if mode not in ("concat", "additive"):
        raise ValueError(f'mode: expected "concat" or "additive", got {mode!r}.')
    arguments = check_arguments(query, key, value, attn_mask, is_causal, scale, enable_gqa)
    key_bias = _per_head("key_bias", key_bias, query, key, key.shape[-1])
    value_bias = _per_head("value_bias", value_bias, query, key, value.shape[-1])
    state = attend(
        query, key, value, bias=arguments.bias, is_causal=is_causal, scale=arguments.scale
    )
    dtype = state.lse.dtype
    logit = torch.einsum("bhqd,hd->bhq", query.to(dtype), key_bias.to(dtype)) * arguments.scale
    answer = value_bias.to(dtype)[:, None]
    if mode == "concat":
        return softmax_with_sink(state, logit, answer).output
    share = sink_probability(state.lse, logit)[..., None]
    return (state.output.to(dtype) + share * answer).to(query.dtype)


def sigmoid_attention(
    query: Float[Tensor, "batch heads queries dim"],
    key: Float[Tensor, "batch kv_heads keys dim"],
    value: Float[Tensor, "batch kv_heads keys value_dim"],
    *,
    key_length: int | None = None,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Float[Tensor, "batch heads queries value_dim"]:
    """Attention in which each key is weighed on its own: `sum_j sigmoid(s[i, j] - log n) value[j]`.

    Ramapuram et al. 2024 (2409.04431); variant (f) of An et al. (2502.06415). Rows do not sum to
    1, so the output can be near zero without a sink. Statistics of probabilities (entropy, sink
    mass) do not mean the same here.

    **A trap**: n is the number of keys of this call, as in both papers' code, so the function
    changes with the length. A model trained at 1024 tokens and scored at 256 is another model, and
    with a KV cache n grows at every step, so decoding token by token differs from one forward.
    Give `key_length`, the length in training, to fix the function.

    There is no fused kernel: the scores are made in blocks of rows (tens of megabytes), and once
    more in the backward pass.

    Args:
        query, key, value, attn_mask, is_causal, scale, enable_gqa: as in
            `scaled_dot_product_attention`. A float mask is added to the scores.
        key_length: n in the bias `-log n`; the number of keys by default.

    Returns:
        The output, in query's dtype; 0 for a query that sees no key.

    Raises:
        ValueError: for arguments that do not fit together; the message names the argument.
    """
    arguments = check_arguments(query, key, value, attn_mask, is_causal, scale, enable_gqa)
    length = key.shape[2] if key_length is None else key_length
    if length < 1 and key_length is not None:
        raise ValueError(f"key_length: expected at least 1, got {key_length}.")
    if key.shape[2] == 0 or query.numel() == 0:
        return query.new_zeros(*query.shape[:3], value.shape[-1])
    shift = math.log(length)

    def rows(scores: Tensor, value: Tensor) -> tuple[Tensor]:
        return (weigh(torch.sigmoid(scores - shift), value).to(value.dtype),)

    blocks = map_rows(rows, query, key, arguments.bias, is_causal, arguments.scale, value=value)
    return torch.cat([output for (output,) in blocks], 2)


def _per_head(name: str, bias: Tensor, query: Tensor, key: Tensor, dim: int) -> Tensor:
    """The bias of each query head, from one for each query head or each key head."""
    heads, kv_heads = query.shape[1], key.shape[1]
    if bias.dim() != 2 or bias.shape[0] not in (heads, kv_heads) or bias.shape[1] != dim:
        either = f"[{heads}, {dim}]" + (f" or [{kv_heads}, {dim}]" if kv_heads != heads else "")
        raise ValueError(f"{name}: expected [heads, dim] = {either}, got {list(bias.shape)}.")
    return bias if bias.shape[0] == heads else bias.repeat_interleave(heads // kv_heads, 0)
