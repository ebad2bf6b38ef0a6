"""One more key that every query sees, and that is in no sequence: the sink, added to a state.

A learned sink of gpt-oss, the softmax-off-by-one, and the attention bias of Sun et al. (2024) are
one thing: the softmax gets one more logit z0, whose answer is a value v' (often zero). On states
(`attending.core.state`) that is a merge with the state of that one key, `output = v'`, `lse = z0`:

    p0     = sigmoid(z0 - lse)                      the mass on the sink
    lse'   = logaddexp(lse, z0)
    output = (1 - p0) * output + p0 * v'

So any kernel that returns lse computes it, for O(tokens) more work and without a longer sequence.

| method | logit | value |
| --- | --- | --- |
| softmax-off-by-one (Miller 2023), "quiet attention" | 0 | none |
| learned sinks of gpt-oss, `s_aux` in transformers | one number per head | none |
| attention bias (Sun et al. 2024, 2402.17762) | `scale * query . key_bias` | `value_bias` |

The factor `1 - p0` is a scale of the output that depends on the context. An et al.
("Systematic Outliers in Large Language Models", 2502.06415) find that models which have such a
scale grow no outliers; see `attending.nn.biased_attention` for the variants that they compare.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from attending.core.state import AttentionState, merge


def softmax_with_sink(
    state: AttentionState,
    logit: float | Float[Tensor, "*broadcast"],
    value: Float[Tensor, "*broadcast_too dim"] | None = None,
) -> AttentionState:
    """The state after one more key, which every query sees with score `logit`.

        state = attention_state(query, key, value, is_causal=True)
        softmax_with_sink(state, 0.0).output                       # softmax-off-by-one
        softmax_with_sink(state, sinks[:, None]).output            # gpt-oss: sinks is [heads]

    Args:
        state: attention over the real keys.
        logit: the score of the sink, in nats, scale included: a number, or a tensor that
            broadcasts to `[*batch, queries]` (for `[batch, heads, queries]` a number per head is
            `[heads, 1]`). -inf leaves the state as it is.
        value: what the sink answers; broadcasts to `[*batch, queries, dim]`. None is zero.

    Returns:
        The state with the sink in it: its rows over the real keys sum to
        `exp(state.lse - result.lse) = 1 - sink_probability(state.lse, logit)`. A query that sees
        no real key has the sink alone: output `value`, lse `logit`. Differentiable in all three.

    Raises:
        ValueError: if logit or value do not broadcast to the state.
    """
    output, lse = state
    score = _as_logit(logit, lse).expand(lse.shape)
    if value is None:
        answer = torch.zeros_like(output)
    else:
        _check_broadcast("value", value, tuple(output.shape))
        answer = value.to(output).expand(output.shape)
    return merge(state, AttentionState(answer, score))


def sink_probability(
    lse: Float[Tensor, "*batch queries"], logit: float | Float[Tensor, "*broadcast"]
) -> Float[Tensor, "*batch queries"]:
    """The share of attention that a sink takes, `exp(logit) / (exp(logit) + exp(lse))`.

    Args:
        lse: that of `attention_state` over the real keys.
        logit: the score of the sink, as in `softmax_with_sink`.

    Returns:
        `sigmoid(logit - lse)`: 1 for a query that sees no real key, and 0 where there is neither a
        key nor a sink (both -inf).
    """
    score = _as_logit(logit, lse)
    nothing = (score == -torch.inf) & (lse == -torch.inf)
    difference = score - lse.masked_fill(nothing, 0.0)
    return torch.sigmoid(difference)


def _as_logit(logit: float | Tensor, lse: Tensor) -> Tensor:
    if not isinstance(logit, Tensor):
        return torch.as_tensor(logit, dtype=lse.dtype, device=lse.device)
    _check_broadcast("logit", logit, tuple(lse.shape))
    return logit.to(lse)


def _check_broadcast(name: str, tensor: Tensor, full: tuple[int, ...]) -> None:
    fits = tensor.dim() <= len(full) and all(
        size in (1, whole)
        for size, whole in zip(reversed(tensor.shape), reversed(full), strict=False)
    )
    if not fits:
        hint = " A number per head needs a last dimension of 1." if name == "logit" else ""
        raise ValueError(
            f"{name}: expected a shape that broadcasts to {list(full)}, got "
            f"{list(tensor.shape)}.{hint}"
        )
