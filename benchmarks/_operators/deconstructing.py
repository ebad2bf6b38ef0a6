"""Taylor and non-approximate attention as "Deconstructing Attention" defines them, with the map."""

import torch
from torch import Tensor

from attending.nn.nonapprox_attention import nonapprox_attention
from attending.nn.taylor_attention import taylor_attention


def taylor(query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> Tensor:
    """Ours: `1 + s + s^2 / 2` for `exp(s)`, normalised jointly."""
    return taylor_attention(query, key, value, is_causal=is_causal)


def straightforward_taylor(query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> Tensor:
    """The same on whole maps."""
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    weights = 1 + scores + scores.square() / 2
    weights = weights.tril() if is_causal else weights
    return weights / weights.sum(-1, keepdim=True) @ value


def nonapprox(query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> Tensor:
    """Ours: a logit for each key, in which no query has a part."""
    return nonapprox_attention(query, key, value, is_causal=is_causal)


def straightforward_nonapprox(query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> Tensor:
    """The same on whole maps."""
    logit = (query * query.sigmoid() * key).sum(-1) * query.shape[-1] ** -0.5
    scores = logit[:, :, None].expand(*logit.shape, logit.shape[-1])
    if is_causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(later, -torch.inf)
    return scores.softmax(-1) @ value
