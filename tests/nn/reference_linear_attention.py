"""Linear attention by its definition: the map is built, in float64."""

import torch
from torch import Tensor


def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Tensor | None = None,
    is_causal: bool = False,
    normalize: bool = True,
) -> Tensor:
    """`visible` is boolean and broadcasts to [batch, heads, queries, keys]."""
    groups = query.shape[1] // key.shape[1]
    query, key, value = query.double(), key.double(), value.double()
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    weight = query @ key.transpose(-1, -2)
    if visible is not None:
        weight = weight * visible
    if is_causal:
        weight = weight.tril()
    if normalize:
        total = weight.sum(-1, keepdim=True)
        weight = torch.where(total == 0, 0.0, weight / torch.where(total == 0, 1.0, total))
    return weight @ value
