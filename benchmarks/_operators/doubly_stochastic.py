"""Sinkhorn attention (2110.11773, 2504.16275) and NormSoftmax (2310.12956), for `operators.py`.

Three half-steps of Sinkhorn, which is the default of the official vision model, with the full
gradient. The straightforward form keeps the map, in logs, as the official module does.
"""

import torch
from torch import Tensor

from attending.nn.doubly_stochastic import norm_softmax_attention
from attending.nn.sinkhorn_attention import sinkhorn_attention

HALF_STEPS = 3


def sinkhorn(query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> Tensor:
    """Ours."""
    return sinkhorn_attention(query, key, value, iterations=HALF_STEPS, is_causal=is_causal)


def straightforward_sinkhorn(query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> Tensor:
    """The same, as it is written down."""
    if is_causal:
        raise NotImplementedError("it has no causal form")
    scores = query @ key.mT * query.shape[-1] ** -0.5
    rows, columns = scores.new_zeros(()), scores.new_zeros(())
    for step in range(HALF_STEPS):
        total = scores + rows + columns
        if step % 2 == 0:
            rows = rows - total.logsumexp(-1, keepdim=True)
        else:
            columns = columns - total.logsumexp(-2, keepdim=True)
    return (scores + rows + columns).exp() @ value


def norm_softmax(query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> Tensor:
    """Ours, with the variance."""
    return norm_softmax_attention(query, key, value, is_causal=is_causal)


def straightforward_norm_softmax(
    query: Tensor, key: Tensor, value: Tensor, is_causal: bool
) -> Tensor:
    """The same, as it is written down; the causal one over what each row sees."""
    scores = query @ key.mT
    cap = query.shape[-1] ** 0.5
    if not is_causal:
        spread = scores.var(-1, correction=0, keepdim=True)
        return (scores / spread.clamp_max(cap)).softmax(-1) @ value
    tokens = scores.shape[-1]
    seen = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    count = torch.arange(1.0, tokens + 1)[:, None]
    mean = (scores * seen).sum(-1, keepdim=True) / count
    spread = (((scores - mean) * seen).square().sum(-1, keepdim=True) / count).clamp(1e-19, cap)
    return ((scores - mean) / spread).masked_fill(~seen, -torch.inf).softmax(-1) @ value
