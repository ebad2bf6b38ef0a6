"""Combiner's plans as the official code writes them down (2107.05768), for `operators.py`.

All logits of a query, direct and of regions, side by side in one softmax. Segments have about
sqrt(2 tokens) tokens, which costs least, and rows about sqrt(tokens).
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from attending.nn.combiner import combiner_attention
from attending.nn.combiner_plans import AxialPlan, FixedPlan, LogsparsePlan


def divisor(tokens: int, most: float) -> int:
    """The largest one that is not above `most`, for the official code takes no other lengths."""
    return max(size for size in range(1, int(most) + 1) if tokens % size == 0)


def fixed(query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> Tensor:
    """Ours."""
    plan = FixedPlan(divisor(query.shape[2], (2 * query.shape[2]) ** 0.5))
    return combiner_attention(query, key, value, is_causal=is_causal, plan=plan)


def logsparse(query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> Tensor:
    """Ours."""
    return combiner_attention(query, key, value, is_causal=is_causal, plan=LogsparsePlan())


def rowmajor(query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> Tensor:
    """Ours."""
    plan = AxialPlan(divisor(query.shape[2], query.shape[2] ** 0.5))
    return combiner_attention(query, key, value, is_causal=is_causal, plan=plan)


def straightforward_fixed(query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> Tensor:
    """The same, as the official code has it."""
    tokens, dim = query.shape[2:]
    size = divisor(tokens, (2 * tokens) ** 0.5)
    query, key, value = (t.unflatten(2, (-1, size)) for t in (query * dim**-0.5, key, value))
    segments = key.shape[2]
    local = (query.amax(3)[..., None, :] @ key.mT).softmax(-1)
    answers = (local @ value).squeeze(3)
    near = query @ key.mT
    far = query @ key.amax(3).mT[:, :, None]
    if is_causal:
        near = near.masked_fill(~torch.ones(size, size, dtype=torch.bool).tril(), -torch.inf)
        hidden = torch.ones(segments, segments, dtype=torch.bool).triu()
    else:
        hidden = torch.eye(segments, dtype=torch.bool)
    far = far.masked_fill(hidden[:, None], -torch.inf)
    weights = torch.cat([near, far], -1).softmax(-1)
    output = weights[..., :size] @ value + weights[..., size:] @ answers[:, :, None]
    return output.flatten(2, 3)


def straightforward_logsparse(query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> Tensor:
    """The same, as the official code has it, with the level that it lacks at 2^k + 1 tokens."""
    if not is_causal:
        raise NotImplementedError("the official code has no bidirectional form")
    tokens, dim = query.shape[2:]
    levels = (tokens - 1).bit_length()
    rest = 2**levels - tokens
    query, key, value = (pad(t, (0, 0, 0, rest)) for t in (query * dim**-0.5, key, value))
    logits, answers = [(query * key).sum(-1)], [value]
    region_query, region_key = query, key
    for level in range(levels):
        size = 2**level
        blocks, values = key.unflatten(2, (-1, size)), value.unflatten(2, (-1, size))
        local = (region_query[..., None, :] @ blocks.mT).softmax(-1)
        answer = (local @ values).squeeze(3)
        odd = torch.arange(2**levels) // size % 2 == 1
        before = (torch.arange(2**levels) // size - 1).clamp_min(0)
        logit = (query * region_key[:, :, before]).sum(-1)
        logits.append(logit.masked_fill(~odd, -torch.inf))
        answers.append(answer[:, :, before])
        region_query = region_query.unflatten(2, (-1, 2)).amax(3)
        region_key = region_key.unflatten(2, (-1, 2)).amax(3)
    weights = torch.stack(logits, -1).softmax(-1)
    output = (weights[..., None, :] @ torch.stack(answers, -2)).squeeze(-2)
    return output[:, :, :tokens]


def straightforward_rowmajor(query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> Tensor:
    """The same, as the official code has it."""
    tokens, dim = query.shape[2:]
    size = divisor(tokens, tokens**0.5)
    query, key, value = (t.unflatten(2, (-1, size)) for t in (query * dim**-0.5, key, value))
    rows = key.shape[2]
    near = query @ key.mT
    answers = near.softmax(-1) @ value
    far = (query.transpose(2, 3) @ key.transpose(2, 3).mT).transpose(2, 3)
    if is_causal:
        near = near.masked_fill(~torch.ones(size, size, dtype=torch.bool).tril(), -torch.inf)
        hidden = torch.ones(rows, rows, dtype=torch.bool).triu()
    else:
        hidden = torch.eye(rows, dtype=torch.bool)
    far = far.masked_fill(hidden[:, None], -torch.inf)
    weights = torch.cat([near, far], -1).softmax(-1)
    across = weights[..., size:].transpose(2, 3) @ answers.transpose(2, 3)
    return (weights[..., :size] @ value + across.transpose(2, 3)).flatten(2, 3)
