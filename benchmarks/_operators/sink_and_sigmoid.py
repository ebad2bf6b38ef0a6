"""Softmax with a sink per head, and sigmoid attention (2409.04431), for `operators.py`.

The straightforward forms make the map, the first with one more column. So does x-transformers,
whose `Attend` is the peer of both; its sigmoid has no bias `-log n`, which costs nothing.
"""

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from attending import attention_state
from attending.nn.biased_attention import sigmoid_attention
from attending.nn.softmax_with_sink import softmax_with_sink


def sink(query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> Tensor:
    """Ours, with a sink of score 0 in each head."""
    state = attention_state(query, key, value, is_causal=is_causal)
    return softmax_with_sink(state, query.new_zeros(query.shape[1], 1)).output


def straightforward_sink(query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> Tensor:
    """The same, as it is written down: one more score in each row."""
    scores = _scores(query, key, is_causal)
    column = query.new_zeros(query.shape[1], 1, 1).expand(*scores.shape[:3], 1)
    return torch.cat([scores, column], -1).softmax(-1)[..., :-1] @ value


def sink_of_x_transformers(query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> Tensor:
    """Of the same scores; its causal mask is its own."""
    return _attend("head_learned_sink", query.shape[1], is_causal)(query, key, value)


def sigmoid(query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> Tensor:
    """Ours."""
    return sigmoid_attention(query, key, value, is_causal=is_causal)


def straightforward_sigmoid(query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> Tensor:
    """The same, as it is written down."""
    scores = _scores(query, key, is_causal) - math.log(key.shape[2])
    return torch.sigmoid(scores) @ value


def sigmoid_of_x_transformers(query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> Tensor:
    """Without the bias."""
    return _attend("sigmoid", query.shape[1], is_causal)(query, key, value)


def _scores(query: Tensor, key: Tensor, is_causal: bool) -> Tensor:
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    if is_causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(future, -torch.inf)
    return scores


@lru_cache
def _attend(option: str, heads: int, is_causal: bool) -> Any:
    from x_transformers.attend import Attend

    module = Attend(causal=is_causal, heads=heads, **{option: True})

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        found: Tensor = module(query, key, value)[0]
        return found

    return attend
