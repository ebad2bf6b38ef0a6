"""Flow-Attention: linear attention in which keys compete and queries are gated, by conserved flow.

For training a transformer (encoder, cross-attention, causal) whose attention is linear in the
tokens and should not be as flat as plain linear attention. Values flow from keys (sources) to
queries (sinks) through the weights `phi(query[i]) . phi(key[j])`. A source that may emit 1 in all
has to choose, and so has a sink that may take 1 in all; the flow that is left for each after the
*other* side was so normalised says how much it deserves. It is trained from scratch: no pretrained
softmax weights fit it.

With phi the sigmoid, eps = 1e-6, n queries and m keys (numbers of tokens that are no padding):

    incoming[i]    I  = (phi(q_i) + eps) . (sum_j phi(k_j) + eps)
    outgoing[j]    O  = (phi(k_j) + eps) . (sum_i phi(q_i) + eps)
    conserved in   I' = (phi(q_i) + eps) . (sum_j phi(k_j) / O_j + eps)       each source emits 1
    conserved out  O' = (phi(k_j) + eps) . (sum_i phi(q_i) / I_i + eps)       each sink takes 1
    competition    w  = m * softmax_j(clamp(O', -1, 1))
    aggregation    A  = phi(q_i) / I_i . (sum_j phi(k_j)^T w_j v_j)
    allocation     R  = sigmoid(I' * n / m) * A

The rows of the implied map do not sum to 1: for n = m to about 0.73. There is no `scale`.

The causal form is not this restricted to a prefix. With c = i + 1 and all sums over j <= i,

    I = (phi(q_i) + eps) . (sum phi(k) + eps) / c,     O = (phi(k_i) + eps) . (sum phi(q) + eps) / c
    I' = (phi(q_i) + eps) . (sum phi(k) / O + eps) / c,  O' likewise, clamped
    w_i = c * exp(O'_i) / sum exp(O'),                   fixed when key i arrives
    R_i = sigmoid(I'_i) * phi(q_i) / (I_i c) . (sum phi(k)^T w v)

The official code makes `[tokens, dim, dim]` numbers per head for it. Here it goes in chunks with
the sums as its state (`attending.nn.linear_attention`), forward and backward.

**The clamp takes most of the competition away.** The O' sum to n, so their mean is n / m and with
as many queries as keys it is 1: the official clamp at 1 cuts everything above the mean, about half
of the keys; with clearly more queries than keys it cuts all, w is 1 everywhere, and what is left is
gated plain linear attention. `flow_attention` keeps the clamp, since that is what was published
and trained. `unclamped_flow_attention` is the same without it.

Source: Wu et al., "Flowformer", ICML 2022 (2202.06258), and the official code (thuml/Flowformer at
61f5d8c, `Flow_Attention.py`), which this equals to 1e-10 in float64. Factors m and n/m, eps and
clamp are those of the code. The official copies differ in the clamp (5 for text, 10 for decision
transformers, none for time series) and in phi (ReLU + 1e-6 in the JAX code, which also takes the
softmax over heads; that is not reproduced). None of them applies padding; it is done here by
leaving padded tokens out of all sums and counts [inferred].
"""

import math
from typing import get_args

from jaxtyping import Bool, Float
from torch import Tensor

from attending.core.check import check_arguments
from attending.nn._flow import Feature, FlowState, Options, bidirectional, causal
from attending.nn._key_padding import visible_keys

__all__ = ["FlowState", "flow_attention", "flow_attention_with_state", "unclamped_flow_attention"]


def flow_attention(
    query: Float[Tensor, "batch heads queries dim"],
    key: Float[Tensor, "batch kv_heads keys dim"],
    value: Float[Tensor, "batch kv_heads keys value_dim"],
    *,
    attn_mask: Bool[Tensor, "#batch #heads 1 keys"] | None = None,
    query_mask: Bool[Tensor, "#batch #heads 1 queries"] | None = None,
    is_causal: bool = False,
    enable_gqa: bool = False,
    clamp: float = 1.0,
    feature: Feature = "sigmoid",
    eps: float = 1e-6,
    competition: bool = True,
    allocation: bool = True,
) -> Float[Tensor, "batch heads queries value_dim"]:
    """Flow-Attention; the formulas are in the module's docstring.

    Time and memory grow with the tokens. Sums are taken in float32 (float64 for float64).

    Args:
        query, key, value: as in `scaled_dot_product_attention`, before phi. Queries take part in
            the competition of the keys, so an output depends on all queries (in the causal form,
            on those before).
        attn_mask: boolean, True = visible, the same for all queries: `[batch, 1, 1, keys]`, or what
            broadcasts to it. Works together with `is_causal`.
        query_mask: the same for queries: `[batch, 1, 1, queries]`. Without it, `attn_mask` holds
            for the queries too where there are as many as keys (self-attention), and otherwise all
            queries count. Outputs of hidden queries are 0.
        is_causal: the causal form, for self-attention. No output depends on a later token.
        enable_gqa: let key and value have fewer heads; each is repeated for its group of query
            heads (the competition is that of a query head, so nothing can be shared).
        clamp: bound of the conserved outgoing flow before the softmax, 1 in the official core.
            See the module's docstring, and `unclamped_flow_attention`.
        feature: phi: "sigmoid", or "relu" for `relu(x) + 1e-6`.
        eps: as in the formulas.
        competition, allocation: without the one, w is 1; without the other, R is A. Without both
            it is plain normalised linear attention up to eps.

    Returns:
        The output, in query's dtype; 0 for queries that are hidden or see no key.

    Raises:
        ValueError: for arguments that do not fit together; the message names the argument.
    """
    if not clamp > 0 or math.isinf(clamp):
        raise ValueError(
            f"clamp: expected a finite number above 0, got {clamp}. Without the clamp it is "
            "another method, unclamped_flow_attention."
        )
    options = Options(clamp, feature, eps, competition, allocation)
    return _attend(query, key, value, attn_mask, query_mask, is_causal, enable_gqa, options)


def unclamped_flow_attention(
    query: Float[Tensor, "batch heads queries dim"],
    key: Float[Tensor, "batch kv_heads keys dim"],
    value: Float[Tensor, "batch kv_heads keys value_dim"],
    *,
    attn_mask: Bool[Tensor, "#batch #heads 1 keys"] | None = None,
    query_mask: Bool[Tensor, "#batch #heads 1 queries"] | None = None,
    is_causal: bool = False,
    enable_gqa: bool = False,
    feature: Feature = "sigmoid",
    eps: float = 1e-6,
) -> Float[Tensor, "batch heads queries value_dim"]:
    """Flow-Attention without the clamp, so that all keys compete, also those above the mean.

    Not the published method, except for the official time-series copy. The softmax is as stable
    as any: no exponential is taken without its maximum.

    Args:
        query, key, value, attn_mask, query_mask, is_causal, enable_gqa, feature, eps: as in
            `flow_attention`.

    Returns:
        The output, as `flow_attention` gives it.

    Raises:
        ValueError: for arguments that do not fit together; the message names the argument.
    """
    options = Options(None, feature, eps, True, True)
    return _attend(query, key, value, attn_mask, query_mask, is_causal, enable_gqa, options)


def flow_attention_with_state(
    query: Float[Tensor, "batch heads tokens dim"],
    key: Float[Tensor, "batch kv_heads tokens dim"],
    value: Float[Tensor, "batch kv_heads tokens value_dim"],
    state: FlowState | None = None,
    *,
    attn_mask: Bool[Tensor, "#batch #heads 1 tokens"] | None = None,
    enable_gqa: bool = False,
    clamp: float | None = 1.0,
    feature: Feature = "sigmoid",
    eps: float = 1e-6,
    competition: bool = True,
    allocation: bool = True,
) -> tuple[Float[Tensor, "batch heads tokens value_dim"], FlowState]:
    """The causal form for the next tokens, one or many, given the state of those before.

        output, state = flow_attention_with_state(*prompt)           # prefill
        output, state = flow_attention_with_state(*token, state)     # and a token at a time

    The outputs are those of `flow_attention(is_causal=True)` over the whole sequence. A step takes
    constant time and memory.

    Args:
        query, key, value, attn_mask, enable_gqa, feature, eps, competition, allocation: as in
            `flow_attention`; hidden tokens are padding.
        state: that of the tokens before, None at the start.
        clamp: as in `flow_attention`; None goes with `unclamped_flow_attention`.

    Returns:
        The output and the state after these tokens, both differentiable.

    Raises:
        ValueError: for arguments that do not fit together; the message names the argument.
    """
    if clamp is not None and not clamp > 0:
        raise ValueError(f"clamp: expected a number above 0 or None, got {clamp}.")
    options = Options(clamp, feature, eps, competition, allocation)
    key, value = _check(query, key, value, enable_gqa, options)
    if query.shape[2] != key.shape[2]:
        raise ValueError(
            f"key: expected as many tokens as query has, {query.shape[2]}, got {key.shape[2]}. "
            "What came before belongs into state."
        )
    if state is not None:
        expected = (*key.shape[:2], key.shape[-1], value.shape[-1])
        if tuple(state.key_value.shape) != expected:
            raise ValueError(
                f"state: expected one whose key_value is {list(expected)}, [batch, heads, dim, "
                f"value_dim] of these tokens, got {list(state.key_value.shape)}."
            )
    visible = visible_keys(attn_mask, key)
    output, after = causal(query, key, value, visible, state, options, keep=True)
    assert after is not None
    return output, after


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    query_mask: Tensor | None,
    is_causal: bool,
    enable_gqa: bool,
    options: Options,
) -> Tensor:
    key, value = _check(query, key, value, enable_gqa, options)
    visible, asking = visible_keys(attn_mask, key), visible_keys(query_mask, query, "query_mask")
    same_length = query.shape[2] == key.shape[2]
    if asking is None and same_length:
        asking = visible
    if not is_causal:
        return bidirectional(query, key, value, asking, visible, options)
    if not same_length:
        raise ValueError(
            f"is_causal: expected as many queries as keys, got {query.shape[2]} and "
            f"{key.shape[2]}. To go on from earlier tokens use flow_attention_with_state, since "
            "the earlier queries matter too."
        )
    if query_mask is not None:
        raise ValueError(
            "query_mask: expected None with is_causal=True, where a token is query and key; hide "
            "it with attn_mask."
        )
    return causal(query, key, value, visible, None, options, keep=False)[0]


def _check(
    query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool, options: Options
) -> tuple[Tensor, Tensor]:
    """Key and value, with as many heads as query."""
    check_arguments(query, key, value, enable_gqa=enable_gqa)
    if options.feature not in get_args(Feature):
        raise ValueError(f"feature: expected one of {get_args(Feature)}, got {options.feature!r}.")
    if not options.eps > 0:
        raise ValueError(f"eps: expected a number above 0, got {options.eps}.")
    groups = query.shape[1] // key.shape[1] if key.shape[1] else 1
    if groups == 1:
        return key, value
    return key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
