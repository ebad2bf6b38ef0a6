"""Flow-Attention as its paper's code writes it down (2202.06258), for `operators.py`.

The causal form makes the running sum of the outer products of keys and values, `[tokens, dim, dim]`
numbers per head, as the official module does.
"""

import torch
from torch import Tensor

from attending.nn.flow_attention import flow_attention

EPS = 1e-6


def ours(query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> Tensor:
    """Both forms, with the sigmoid and the clamp at 1."""
    return flow_attention(query, key, value, is_causal=is_causal)


def straightforward(query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> Tensor:
    """The same, as it is written down."""
    sinks, sources = query.sigmoid(), key.sigmoid()
    return (_causal if is_causal else _bidirectional)(sinks, sources, value)


def _dot(features: Tensor, total: Tensor) -> Tensor:
    return torch.einsum("bhtd,bhd->bht", features + EPS, total + EPS)


def _bidirectional(sinks: Tensor, sources: Tensor, value: Tensor) -> Tensor:
    queries, keys = sinks.shape[2], sources.shape[2]
    incoming = 1 / _dot(sinks, sources.sum(2))
    outgoing = 1 / _dot(sources, sinks.sum(2))
    conserved_sink = _dot(sinks, (sources * outgoing[..., None]).sum(2))
    conserved_source = _dot(sources, (sinks * incoming[..., None]).sum(2)).clamp(-1, 1)
    allocation = torch.sigmoid(conserved_sink * queries / keys)
    competition = conserved_source.softmax(-1) * keys
    gathered = sources.transpose(-1, -2) @ (value * competition[..., None])
    return (sinks @ gathered) * incoming[..., None] * allocation[..., None]


def _causal(sinks: Tensor, sources: Tensor, value: Tensor) -> Tensor:
    count = torch.arange(1, sinks.shape[2] + 1, dtype=sinks.dtype)

    def dot(features: Tensor, total: Tensor) -> Tensor:
        return ((features + EPS) * (total.cumsum(2) + EPS)).sum(-1)

    incoming, outgoing = count / dot(sinks, sources), count / dot(sources, sinks)
    conserved_sink = dot(sinks, sources * outgoing[..., None]) / count
    conserved_source = (dot(sources, sinks * incoming[..., None]) / count).clamp(-1, 1)
    competing = conserved_source.exp()
    weight = competing / competing.cumsum(-1) * count
    outer = torch.einsum("bhtd,bhte->bhtde", sources, value * weight[..., None])
    found = torch.einsum("bhtd,bhtde->bhte", sinks * (incoming / count)[..., None], outer.cumsum(2))
    return found * torch.sigmoid(conserved_sink)[..., None]
