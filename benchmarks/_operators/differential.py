"""Differential attention as the papers write it down (2410.05258, 2510.06949), for `operators.py`.

Two maps, in full, and their difference times the values. Of the four heads of query, key and value,
1:1 makes two signal and two noise heads, with two pairs of keys and two values of twice the width;
3:1 makes three and one, with one pair. Values are put side by side, and outputs in the shape of the
query (those of 3:1 in part as a sum), within the time measured, for all contenders alike.
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from attending.nn.differential_attention import differential_attention

WEIGHT = 0.5


def _values(value: Tensor, pairs: int) -> Tensor:
    """`[batch, pairs, tokens, 2 * dim]` of the first `2 * pairs` heads."""
    halves: Tensor = value[:, : 2 * pairs].unflatten(1, (pairs, 2))
    return halves.transpose(2, 3).flatten(3)


def _four_heads(output: Tensor) -> Tensor:
    """Outputs of the signal heads in the shape of the query."""
    batch, heads, tokens, width = output.shape
    if heads == 2:
        return output.reshape(batch, 4, tokens, width // 2)
    first, second = output.chunk(2, -1)
    return pad(first + second, (0, 0, 0, 0, 0, 1))


def one_to_one(query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> Tensor:
    """Ours."""
    return _four_heads(
        differential_attention(query, key, _values(value, 2), WEIGHT, is_causal=is_causal)
    )


def three_to_one(query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> Tensor:
    """Ours."""
    output = differential_attention(
        query, key[:, :2], _values(value, 1), WEIGHT, ratio=3, is_causal=is_causal
    )
    return _four_heads(output)


def _map(query: Tensor, key: Tensor, is_causal: bool) -> Tensor:
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    if is_causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(future, -torch.inf)
    return scores.softmax(-1)


def straightforward_one_to_one(
    query: Tensor, key: Tensor, value: Tensor, is_causal: bool
) -> Tensor:
    """As it is written down."""
    signal = _map(query[:, 0::2], key[:, 0::2], is_causal)
    noise = _map(query[:, 1::2], key[:, 1::2], is_causal)
    return _four_heads((signal - WEIGHT * noise) @ _values(value, 2))


def straightforward_three_to_one(
    query: Tensor, key: Tensor, value: Tensor, is_causal: bool
) -> Tensor:
    """As it is written down, with one noise map for three signal maps."""
    signal = _map(query[:, :3], key[:, :1], is_causal)
    noise = _map(query[:, 3:], key[:, 1:2], is_causal)
    return _four_heads((signal - WEIGHT * noise) @ _values(value, 1))


class _Given(nn.Module):
    """A projection that gives what it was told to give."""

    given: Tensor

    def forward(self, hidden: Tensor) -> Tensor:
        return self.given


@lru_cache(maxsize=1)
def _layer(heads: int, dim: int) -> Any:
    from transformers import DiffLlamaConfig
    from transformers.models.diffllama.modeling_diffllama import DiffLlamaAttention

    config = DiffLlamaConfig(
        hidden_size=heads * dim, num_attention_heads=heads, num_key_value_heads=heads, head_dim=dim
    )
    config._attn_implementation = "sdpa"
    layer = DiffLlamaAttention(config, 0)
    layer.q_proj, layer.k_proj, layer.v_proj = _Given(), _Given(), _Given()
    layer.o_proj = nn.Identity()
    return layer


def diffllama(query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> Tensor:
    """The attention of transformers' DiffLlama, its projections taken out; 1:1.

    It has a rotation and a norm besides, which cost little. Its heads are in another order.
    """
    layer = _layer(query.shape[1], query.shape[3])
    for projection, tensor in ((layer.q_proj, query), (layer.k_proj, key), (layer.v_proj, value)):
        projection.given = tensor.transpose(1, 2).flatten(2)
    hidden = layer.q_proj.given
    cosine = torch.ones(1, query.shape[2], query.shape[3])
    layer.is_causal = is_causal
    output: Tensor = layer(hidden, (cosine, torch.zeros_like(cosine)), None)[0]
    return output.view(*query.transpose(1, 2).shape).transpose(1, 2)
