"""How Flow-Attention is computed: both forms, and the state of the causal one.

The formulas are in `attending.nn.flow_attention`, which checks the arguments and calls these.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from attending.nn._causal_sum import accumulation_dtype, causal_sum, full_precision
from attending.nn.linear_attention import hide, linear_state, read_state

Feature = Literal["sigmoid", "relu"]
_HIDDEN = -1e4  # a log weight whose exp is 0 beside that of any key, and which has a gradient


class Options(NamedTuple):
    """What may be chosen; `flow_attention` says what it means."""

    clamp: float | None
    feature: Feature
    eps: float
    competition: bool
    allocation: bool


@dataclass(frozen=True)
class FlowState:
    """What the causal form has to know of the tokens before: `dim * value_dim + 4 dim + 2` numbers.

    Attributes:
        key_sum: sum of phi(key).
        query_sum: sum of phi(query).
        emitted: sum of phi(key) / outgoing.
        absorbed: sum of phi(query) / incoming.
        log_competition: log of the sum of exp(conserved outgoing flow).
        key_value: sum of phi(key)^T w value.
        count: tokens so far, without padding.
    """

    key_sum: Float[Tensor, "batch heads dim"]
    query_sum: Float[Tensor, "batch heads dim"]
    emitted: Float[Tensor, "batch heads dim"]
    absorbed: Float[Tensor, "batch heads dim"]
    log_competition: Float[Tensor, "batch heads"]
    key_value: Float[Tensor, "batch heads dim value_dim"]
    count: Int[Tensor, "batch heads"]


def _features(tensor: Tensor, visible: Tensor | None, options: Options) -> Tensor:
    """phi, in the dtype of sums, with 0 for hidden tokens (phi(0) is not 0)."""
    tensor = tensor.to(accumulation_dtype(tensor.dtype))
    phi = tensor.sigmoid() if options.feature == "sigmoid" else tensor.relu() + 1e-6
    return hide(phi, visible)


def bidirectional(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    asking: Tensor | None,
    visible: Tensor | None,
    options: Options,
) -> Tensor:
    """The form in which all queries and keys see each other; the masks are `[.., .., tokens]`."""
    sinks, sources = _features(query, asking, options), _features(key, visible, options)
    queries, keys = _count(asking, sinks), _count(visible, sources)
    eps = options.eps
    with full_precision(query):

        def received(features: Tensor, total: Tensor) -> Tensor:
            """`(features + eps) . (total + eps)` of each token."""
            total = total + eps
            # A row times a matrix: several times as fast as a matrix times a column, on a CPU.
            found = (total[..., None, :] @ features.transpose(-1, -2))[..., 0, :]
            return found + eps * total.sum(-1, keepdim=True)

        incoming = received(sinks, sources.sum(-2))
        values = value.to(sources.dtype)
        if options.competition:
            absorbed = (incoming.reciprocal()[..., None, :] @ sinks)[..., 0, :]
            flow = received(sources, absorbed)
            if options.clamp is not None:
                flow = flow.clamp(-options.clamp, options.clamp)
            if visible is not None:
                flow = flow.masked_fill(~visible, _HIDDEN)
            values = values * (keys * flow.softmax(-1))[..., None]
        gate = incoming.reciprocal()
        if options.allocation:
            outgoing = received(sources, sinks.sum(-2))
            emitted = (outgoing.reciprocal()[..., None, :] @ sources)[..., 0, :]
            gate = gate * torch.sigmoid(received(sinks, emitted) * (queries / keys))
        found = read_state(linear_state(sources, values), sinks, normalize=False)
        # In place: a tensor less to make, which is where the time goes in long sequences.
        return found.mul_(gate[..., None]).to(query.dtype)


def _count(visible: Tensor | None, features: Tensor) -> Tensor:
    """Tokens that count, at least 1 since it divides; broadcasts to `[batch, heads, tokens]`."""
    if visible is None:
        return features.new_tensor(max(features.shape[2], 1))
    return visible.sum(-1, keepdim=True).clamp(min=1).to(features.dtype)


def causal(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Tensor | None,
    state: FlowState | None,
    options: Options,
    keep: bool,
) -> tuple[Tensor, FlowState | None]:
    """The causal form, after the tokens in `state`; with `keep`, the state after these, too."""
    batch, heads, tokens, dim = key.shape
    sinks, sources = _features(query, visible, options), _features(key, visible, options)
    dtype, eps = sinks.dtype, options.eps
    here = torch.ones(batch, heads, tokens, dtype=torch.long, device=key.device)
    if visible is not None:
        here = here * visible
    arrived = here.cumsum(-1)
    if state is not None:
        arrived = arrived + state.count[..., None]
    count = arrived.clamp(min=1).to(dtype)

    key_sum = query_sum = emitted = absorbed = key_value = None
    if state is not None:
        key_sum, query_sum, key_value = state.key_sum, state.query_sum, state.key_value
        emitted, absorbed = state.emitted, state.absorbed

    def rest(sink: Tensor, source: Tensor, weight: Tensor, before: Tensor | None) -> Tensor:
        """What eps adds to `sink[i] . sum_j source[j] weight[j]`, as it is in both factors."""
        spread = (source.sum(-1) * weight).cumsum(-1) + sink.sum(-1)
        if before is not None:
            spread = spread + before.sum(-1, keepdim=True)
        return eps * spread + eps**2 * dim

    def received(sink: Tensor, source: Tensor, weight: Tensor, before: Tensor | None) -> Tensor:
        """`(sink[i] + eps) . (sum_{j <= i} source[j] weight[j] + before + eps)`."""
        earlier = None if before is None else before[..., None]
        found = causal_sum(sink, source, weight[..., None], earlier)[..., 0]
        return found + rest(sink, source, weight, before)

    with full_precision(query):
        ones = torch.ones_like(count)
        incoming = count / received(sinks, sources, ones, key_sum)
        outgoing = count / received(sources, sinks, ones, query_sum)
        flow = received(sources, sinks, incoming, absorbed) / count
        if options.clamp is not None:
            flow = flow.clamp(-options.clamp, options.clamp)
        if visible is not None:
            flow = flow.masked_fill(~visible, _HIDDEN)
        total = flow.logcumsumexp(-1)
        if state is not None:
            total = torch.logaddexp(total, state.log_competition[..., None])
        values = value.to(dtype)
        if options.competition:
            values = values * (count * (flow - total).exp())[..., None]
        # One sweep for two sums over the same weights: the conserved incoming flow, the values.
        both = torch.cat([outgoing[..., None], values], -1)
        before = None
        if emitted is not None and key_value is not None:
            before = torch.cat([emitted[..., None], key_value], -1)
        found = causal_sum(sinks, sources, both, before)
        gate = incoming / count
        if options.allocation:
            conserved = found[..., 0] + rest(sinks, sources, outgoing, emitted)
            gate = gate * torch.sigmoid(conserved / count)
        output = (found[..., 1:] * gate[..., None]).to(query.dtype)
        if not keep:
            return output, None
        sums = sources.transpose(-1, -2) @ both
        taken = (incoming[..., None, :] @ sinks)[..., 0, :]
        after = FlowState(
            key_sum=_plus(sources.sum(-2), key_sum),
            query_sum=_plus(sinks.sum(-2), query_sum),
            emitted=_plus(sums[..., 0], emitted),
            absorbed=_plus(taken, absorbed),
            log_competition=total[..., -1] if tokens else _nothing(state, key, dtype),
            key_value=_plus(sums[..., 1:], key_value),
            count=_plus(here.sum(-1), state.count if state is not None else None),
        )
    return output, after


def _plus(here: Tensor, before: Tensor | None) -> Tensor:
    return here if before is None else here + before


def _nothing(state: FlowState | None, key: Tensor, dtype: torch.dtype) -> Tensor:
    """The log of no competition at all."""
    if state is not None:
        return state.log_competition
    return torch.full(key.shape[:2], _HIDDEN, dtype=dtype, device=key.device)
