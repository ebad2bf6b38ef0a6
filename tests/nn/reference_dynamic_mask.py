"""Dynamic mask attention by its definition, a query at a time, in float64."""

import math

import torch
from torch import Tensor


def scores(value: Tensor, weight: Tensor, gate: Tensor) -> Tensor:
    """`exp(A softplus(W v))`, v the values of all heads of a token side by side."""
    joined = torch.cat(list(value.unbind(1)), -1)
    z = torch.stack([joined @ row for row in weight], 1)
    return torch.exp(gate[:, None] * torch.log(1 + torch.exp(z)))


def kept(delta: list[float], visible: list[bool], window: int) -> set[int]:
    """The best visible keys; of equal ones the later."""
    order = sorted((j for j in range(len(delta)) if visible[j]), key=lambda j: (-delta[j], -j))
    return set(order[:window])


def keep_mask(delta: Tensor, visible: Tensor, window: int) -> Tensor:
    """`[batch, kv_heads, queries, keys]`; `visible` broadcasts to it."""
    batch, heads, keys = delta.shape
    queries = visible.shape[2]
    visible = visible.expand(batch, heads, queries, keys)
    mask = torch.zeros(batch, heads, queries, keys, dtype=torch.bool)
    for b in range(batch):
        for h in range(heads):
            for i in range(queries):
                for j in kept(delta[b, h].tolist(), visible[b, h, i].tolist(), window):
                    mask[b, h, i, j] = True
    return mask


def attention(query: Tensor, key: Tensor, value: Tensor, delta: Tensor, mask: Tensor) -> Tensor:
    """Softmax over the kept keys of each query, by loops; 0 where nothing is kept."""
    groups = query.shape[1] // key.shape[1]
    rows = []
    for b in range(query.shape[0]):
        for h in range(query.shape[1]):
            g = h // groups
            for i in range(query.shape[2]):
                chosen = mask[b, g, i].nonzero().flatten()
                if not len(chosen):
                    rows.append(value.new_zeros(value.shape[-1]))
                    continue
                score = key[b, g, chosen] @ query[b, h, i] / math.sqrt(query.shape[-1])
                share = torch.softmax(score + delta[b, g, chosen], 0)
                rows.append(share @ value[b, g, chosen])
    return torch.stack(rows).view(*query.shape[:3], value.shape[-1])
