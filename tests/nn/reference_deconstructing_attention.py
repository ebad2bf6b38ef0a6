"""The definitions of "Deconstructing Attention" in float64, with whole maps."""

import torch
from torch import Tensor


def weighted_means(weights: Tensor, value: Tensor) -> Tensor:
    """Rows of weights, divided by their sums; 0 for a row without any weight."""
    nothing = (weights == 0).all(-1, keepdim=True)
    total = torch.where(nothing, 1, weights.sum(-1, keepdim=True))
    return torch.einsum("bhqk,bhkd->bhqd", weights / total, value)


def visible(shape: tuple[int, ...], mask: Tensor | None, is_causal: bool) -> Tensor:
    seen = torch.ones(shape, dtype=torch.bool)
    if mask is not None:
        seen = seen & mask
    return seen.tril() if is_causal else seen


def taylor(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float,
    normalization: str,
) -> Tensor:
    scores = scale * torch.einsum("bhqd,bhkd->bhqk", query, key)
    seen = visible(tuple(scores.shape), mask, is_causal)
    if normalization == "joint":
        return weighted_means(torch.where(seen, 1 + scores + scores**2 / 2, 0), value)
    squares = torch.einsum("bhqd,bhkd->bhqk", query**2, key**2)
    orders = (torch.ones_like(scores), scores, squares)
    return sum(weighted_means(torch.where(seen, order, 0), value) for order in orders)


def nonapprox(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float,
) -> Tensor:
    logit = scale * (query * torch.sigmoid(query) * key).sum(-1)
    tokens = logit.shape[-1]
    seen = visible((*logit.shape, tokens), mask, is_causal)
    weights = torch.exp(logit - logit.amax(-1, keepdim=True))[:, :, None].expand(*seen.shape)
    return weighted_means(torch.where(seen, weights, 0), value)
