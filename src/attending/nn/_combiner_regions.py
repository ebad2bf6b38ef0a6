"""Summaries of regions: their pooled key, and the mean of their values as their pooled query sees.

A region answers like one key: with the pooled key, and with the mean of its values under the
softmax of its own pooled query. So attention over regions is attention, and a state.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from attending.core.state import attention_state
from attending.nn.partition_tree import Pooling

SMALL = 512  # direct keys and regions of a query, up to which the maps of the blocks are made


class Call(NamedTuple):
    """What a plan works on.

    Attributes:
        query, key, value: `[batch, heads, tokens, dim]`, with as many heads.
        visible: `[batch, tokens]`, None where all are.
        is_causal: whether tokens see only themselves and those before.
        scale: of the scores.
        pool: how queries and keys of a region are pooled.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    visible: Tensor | None
    is_causal: bool
    scale: float
    pool: Pooling


class Summaries(NamedTuple):
    """Regions as keys: `[..., regions, dim]`, and which of them hold a visible token."""

    key: Tensor
    value: Tensor
    filled: Tensor


def expectation(
    pooled_query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None, scale: float
) -> Tensor:
    """The mean of the values of a region under its own softmax; 0 for an empty one.

    Args:
        pooled_query: `[..., dim]`.
        key, value: of the members, `[..., members, dim]`.
        visible: of the members, `[..., members]`.
        scale: of the scores.
    """
    scores = (key @ pooled_query[..., None]).squeeze(-1)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) * scale
    if visible is not None:
        scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
    weights = scores.softmax(-1)
    if visible is not None:
        weights = weights.masked_fill(~visible, 0.0)
    return (weights.to(value.dtype)[..., None, :] @ value).squeeze(-2)


def joint_softmax(near: Tensor, far: Tensor) -> tuple[Tensor, Tensor]:
    """Weights of direct keys and of regions under their one softmax, over the last dimension.

    The merge of two states, where the blocks are so small that their maps cost less than the
    merge: no map here is wider than `SMALL`.
    """
    dtype = torch.promote_types(near.dtype, torch.float32)
    weights = torch.cat([near, far], -1).softmax(-1, dtype=dtype)
    return weights[..., : near.shape[-1]], weights[..., near.shape[-1] :]


def hide(scores: Tensor, seen: Tensor) -> Tensor:
    """Scores, in place, without what is not seen; for scores that a product has just made.

    A row that sees nothing has finite weights, not NaN.
    """
    return scores.masked_fill_(~seen, torch.finfo(scores.dtype).min)


def scaled(query: Tensor, scale: float) -> Tensor:
    """The query times the scale, in float32 at least, for scores that are no half precision."""
    return query.to(torch.promote_types(query.dtype, torch.float32)) * scale


def running_pool(features: Tensor, visible: Tensor, pool: Pooling) -> Tensor:
    """The pooled features of the tokens up to each one, along dimension -2."""
    visible = visible[..., None]
    if pool == "max":
        highest = features.masked_fill(~visible, -torch.inf).cummax(-2).values
        return highest.masked_fill(highest == -torch.inf, 0.0)
    sums = features.masked_fill(~visible, 0.0).cumsum(-2)
    return sums / visible.cumsum(-2).clamp_min(1).to(features.dtype)


def running_summaries(
    query: Tensor, key: Tensor, value: Tensor, visible: Tensor, scale: float, pool: Pooling
) -> Summaries:
    """For each token the summary of the region that ends with it.

    Args:
        query, key, value: `[batch, sequences, tokens, dim]`.
        visible: `[batch, sequences, tokens]`.
        scale: of the scores.
        pool: how to pool.
    """
    pooled = running_pool(query, visible, pool)
    tokens = key.shape[-2]
    past = torch.ones(tokens, tokens, dtype=torch.bool, device=key.device).tril()
    everything = bool(visible.all())
    inside = attention_state(
        pooled,
        key,
        value,
        None if everything else past & visible[..., None, :],
        is_causal=everything,
        scale=scale,
    )
    return Summaries(running_pool(key, visible, pool), inside.output, visible.cummax(-1).values)


def before(summaries: Summaries) -> Summaries:
    """Move `running_summaries` on by one, so that each token has the region before it."""

    def shift(tensor: Tensor) -> Tensor:
        return torch.cat([torch.zeros_like(tensor[..., :1, :]), tensor[..., :-1, :]], -2)

    filled = shift(summaries.filled[..., None]).squeeze(-1)
    return Summaries(shift(summaries.key), shift(summaries.value), filled)
