"""Reversed attention by its definition, in float64, message by message.

One head: query [n, dim], key [m, dim], value [n, value_dim], weights [n], visible [n, m]. Written
from the formulas; nothing is shared with the fast version.
"""

import torch
from torch import Tensor


def shares(query: Tensor, key: Tensor, visible: Tensor, scale: float) -> Tensor:
    """A_F [n, m]: how a sender divides one unit among those that it may send to."""
    rows = []
    for i in range(len(query)):
        scores = torch.stack([scale * (query[i] * key[j]).sum() for j in range(len(key))])
        weight = torch.where(visible[i], scores, -torch.inf)
        if not bool(visible[i].any()):
            rows.append(torch.zeros_like(scores))
            continue
        weight = (weight - scores[visible[i]].max()).exp()
        rows.append(weight / weight.sum())
    return torch.stack(rows)


def reversed_attention(
    query: Tensor, key: Tensor, value: Tensor, weights: Tensor, visible: Tensor, scale: float
) -> Tensor:
    """Each sender hands its weighted value out."""
    share = shares(query, key, visible, scale)
    received = []
    for j in range(len(key)):
        parts = [share[i, j] * weights[i] * value[i] for i in range(len(query))]
        received.append(torch.stack(parts).sum(0))
    return torch.stack(received)


def whole(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weights: Tensor,
    visible: Tensor,
    scale: float,
) -> Tensor:
    """All heads of a batch, with GQA: [batch, heads, keys, value_dim]."""
    query, key, value, weights = (one.double() for one in (query, key, value, weights))
    group = query.shape[1] // key.shape[1]
    return torch.stack(
        [
            torch.stack(
                [
                    reversed_attention(
                        query[b, h],
                        key[b, h // group],
                        value[b, h // group],
                        weights[b, h],
                        visible[b, h],
                        scale,
                    )
                    for h in range(query.shape[1])
                ]
            )
            for b in range(query.shape[0])
        ]
    )
