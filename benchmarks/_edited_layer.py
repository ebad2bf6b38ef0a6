"""One layer of attention over tensors that are there, and its eager map, for `interventions.py`."""

import types

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

HEADS, DIM = 12, 64


class Attention(nn.Module):
    """Attention over tensors that are there: what is measured is attention alone."""

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> None:
        super().__init__()
        self.call = (query, key, value)
        self.is_causal = is_causal

    def forward(self) -> Tensor:
        return scaled_dot_product_attention(*self.call, is_causal=self.is_causal)


def eager_map(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The map that transformers makes."""
    from transformers.models.llama.modeling_llama import eager_attention_forward

    queries, keys = query.shape[2], key.shape[2]
    hidden = torch.ones(queries, keys, dtype=torch.bool).triu(1 + keys - queries)
    mask = torch.zeros(1, 1, queries, keys)
    mask.masked_fill_(hidden, torch.finfo(torch.float32).min)
    layer = types.SimpleNamespace(num_key_value_groups=1, training=False)
    _, p = eager_attention_forward(layer, query, key, value, mask, scaling=query.shape[-1] ** -0.5)
    found: Tensor = p
    return found
