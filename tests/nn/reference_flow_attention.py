"""Flow-Attention by its definition, in float64, with loops over queries and keys.

One head: query [n, dim], key [m, dim], value [m, value_dim]. Written from the formulas of the
paper and its official code, token by token, with nothing shared with the fast version.
"""

import torch
from torch import Tensor

EPS = 1e-6


def features(tensor: Tensor, feature: str) -> Tensor:
    tensor = tensor.double()
    return 1 / (1 + (-tensor).exp()) if feature == "sigmoid" else tensor.clamp(min=0) + 1e-6


def bidirectional_map(
    query: Tensor,
    key: Tensor,
    clamp: float | None = 1.0,
    feature: str = "sigmoid",
    competition: bool = True,
    allocation: bool = True,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The map [n, m] that multiplies the values, and the four flows."""
    sinks, sources = features(query, feature), features(key, feature)
    n, m = len(sinks), len(sources)
    incoming = torch.stack([((s + EPS) * (sources.sum(0) + EPS)).sum() for s in sinks])
    outgoing = torch.stack([((s + EPS) * (sinks.sum(0) + EPS)).sum() for s in sources])
    emitted = sum(sources[j] / outgoing[j] for j in range(m))
    absorbed = sum(sinks[i] / incoming[i] for i in range(n))
    conserved_sink = torch.stack([((s + EPS) * (emitted + EPS)).sum() for s in sinks])
    conserved_source = torch.stack([((s + EPS) * (absorbed + EPS)).sum() for s in sources])
    flow = conserved_source if clamp is None else conserved_source.clamp(-clamp, clamp)
    weight = m * flow.softmax(0) if competition else torch.ones_like(flow)
    gate = torch.sigmoid(conserved_sink * n / m) if allocation else torch.ones_like(incoming)
    rows = [
        torch.stack([gate[i] * (sinks[i] @ sources[j]) / incoming[i] * weight[j] for j in range(m)])
        for i in range(n)
    ]
    flows = {
        "incoming": incoming,
        "outgoing": outgoing,
        "conserved_sink": conserved_sink,
        "conserved_source": conserved_source,
    }
    return torch.stack(rows), flows


def causal_map(
    query: Tensor,
    key: Tensor,
    clamp: float | None = 1.0,
    feature: str = "sigmoid",
    competition: bool = True,
    allocation: bool = True,
) -> Tensor:
    """The map [tokens, tokens] of the causal form, row by row."""
    sinks, sources = features(query, feature), features(key, feature)
    tokens = len(sinks)
    key_sum = query_sum = emitted = absorbed = torch.zeros_like(sinks[0])
    flows: list[Tensor] = []
    weights: list[Tensor] = []
    rows = []
    for i in range(tokens):
        count = i + 1
        key_sum, query_sum = key_sum + sources[i], query_sum + sinks[i]
        inverse_in = count / ((sinks[i] + EPS) * (key_sum + EPS)).sum()
        inverse_out = count / ((sources[i] + EPS) * (query_sum + EPS)).sum()
        emitted = emitted + sources[i] * inverse_out
        absorbed = absorbed + sinks[i] * inverse_in
        conserved_sink = ((sinks[i] + EPS) * (emitted + EPS)).sum() / count
        flow = ((sources[i] + EPS) * (absorbed + EPS)).sum() / count
        if clamp is not None:
            flow = flow.clamp(-clamp, clamp)
        flows.append(flow)
        share = torch.stack(flows).softmax(0)[-1]  # exp(flow) / sum of exp so far
        weights.append(count * share if competition else torch.ones(()))
        gate = torch.sigmoid(conserved_sink) if allocation else torch.ones(())
        row = [
            gate * inverse_in / count * (sinks[i] @ sources[j]) * weights[j] for j in range(count)
        ]
        rows.append(torch.stack([*row, *[torch.zeros((), dtype=torch.float64)] * (tokens - count)]))
    return torch.stack(rows)


def flow_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Tensor | None = None,
    asking: Tensor | None = None,
    is_causal: bool = False,
    **options: object,
) -> Tensor:
    """All heads; `visible` [batch, keys] and `asking` [batch, queries]. Padding is cut out."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    output = torch.zeros(*query.shape[:3], value.shape[-1], dtype=torch.float64)
    for batch in range(query.shape[0]):
        keys = torch.arange(key.shape[2]) if visible is None else visible[batch].nonzero()[:, 0]
        rows = torch.arange(query.shape[2]) if asking is None else asking[batch].nonzero()[:, 0]
        if len(keys) == 0 or len(rows) == 0:
            continue
        for head in range(query.shape[1]):
            one = (query[batch, head, rows], key[batch, head, keys])
            whole = (
                causal_map(*one, **options) if is_causal else bidirectional_map(*one, **options)[0]
            )
            found = whole @ value[batch, head, keys].double()
            output[batch, head] = output[batch, head].index_copy(0, rows, found)
    return output
