"""Hierarchical attention (2509.15448) along windows of 4, 16, 64, ..., for `operators.py`.

The straightforward form writes the tied map down: the mean score of each pair of branches from the
full map of scores, the energies, the map, and the map times the values. (There is no official code;
the paper's own algorithm is the two passes that ours makes.)
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from attending.nn.hierarchical_attention import hierarchical_attention

BRANCHES = 4


def sizes(tokens: int) -> tuple[int, ...]:
    """Windows until at most four are left for the root."""
    found: list[int] = []
    while BRANCHES ** (len(found) + 1) < tokens:
        found.append(BRANCHES)
    return tuple(found)


def ours(query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> Tensor:
    """Ours."""
    if is_causal:
        raise NotImplementedError("it has no causal form")
    return hierarchical_attention(query, key, value, tree=sizes(query.shape[2]))


def straightforward(query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> Tensor:
    """The same, with the map."""
    if is_causal:
        raise NotImplementedError("it has no causal form")
    tokens = query.shape[2]
    levels = len(sizes(tokens)) + 1
    rest = BRANCHES**levels - tokens
    sums = pad(query @ key.mT * query.shape[-1] ** -0.5, (0, rest, 0, rest))
    count = pad(query.new_ones(tokens), (0, rest))
    stay = sums.diagonal(dim1=-2, dim2=-1)
    own = torch.eye(BRANCHES, dtype=torch.bool)
    shares, counts = [], []
    for _ in range(levels):
        families = sums.unflatten(-1, (-1, BRANCHES)).unflatten(-3, (-1, BRANCHES))
        siblings = families.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)
        group = count.unflatten(-1, (-1, BRANCHES))
        pairs = (group[..., :, None] * group[..., None, :]).clamp_min(1)
        scores = siblings / pairs + group.log()[..., None, :]
        scores = torch.where(own, stay.unflatten(-1, (-1, BRANCHES))[..., None], scores)
        total = scores.logsumexp(-1)
        shares.append((scores - total[..., None]).exp())
        counts.append(group)
        count = group.sum(-1)
        total = torch.where(group > 0, group * total, 0.0).sum(-1)
        stay = total / count.clamp_min(1)
        sums = families.sum((-1, -3))
    mass = torch.ones_like(stay)
    tied = query.new_zeros(*query.shape[:2], 1, 1)
    for share, group in zip(reversed(shares), reversed(counts), strict=True):
        each = mass[..., None, None] * share / group.clamp_min(1)[..., None, :]
        wider = tied.repeat_interleave(BRANCHES, -1).repeat_interleave(BRANCHES, -2)
        blocks = torch.zeros_like(wider).unflatten(-1, (-1, BRANCHES)).unflatten(-3, (-1, BRANCHES))
        blocks.diagonal(dim1=-4, dim2=-2).copy_(each.masked_fill(own, 0.0).movedim(-3, -1))
        tied = wider + blocks.flatten(-4, -3).flatten(-2, -1)
        mass = (mass[..., None] * share.diagonal(dim1=-2, dim2=-1)).flatten(-2)
    tied = tied[..., :tokens, :tokens] + torch.diag_embed(mass[..., :tokens])
    return tied @ value
