"""The token differential operator of DyDiLA on focused features, as its formulas read."""

import torch
from torch import Tensor

from attending.nn.dydila import token_differential_linear_attention
from attending.nn.focused_attention import focused_kernel

POWER, SHARE = 3.0, 0.01  # where both start in training


def ours(query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> Tensor:
    """The other query and key are the first ones turned by a channel; a power for each token."""
    assert not is_causal
    asked, held = query.new_full(query.shape[:3], SHARE), key.new_full(key.shape[:3], SHARE)
    power = query.new_full(query.shape[:3], POWER)
    inputs = (query, key, query.roll(1, -1), key.roll(1, -1))
    features = (focused_kernel(one, power) for one in inputs)
    queries, keys, other_queries, other_keys = features
    return token_differential_linear_attention(
        queries, keys, value, other_queries, other_keys, asked, held, normalize="count"
    )


def straightforward(query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> Tensor:
    """The same, as it is written down."""
    assert not is_causal
    queries = _focused(query) - SHARE * _focused(query.roll(1, -1))
    keys = _focused(key) - SHARE * _focused(key.roll(1, -1))
    return queries @ (keys.transpose(-1, -2) @ (value / key.shape[2]))


def _focused(tensor: Tensor) -> Tensor:
    positive = torch.relu(tensor)
    raised = positive ** tensor.new_full((*tensor.shape[:-1], 1), POWER)
    return raised * (positive.norm(dim=-1, keepdim=True) / raised.norm(dim=-1, keepdim=True))
