"""The module that stands in the place of a decoder's attention in transformers."""

from functools import cache as remember
from typing import Any

import torch
from torch import Tensor, nn

from attending.nn._attention_adapter import Adapter, Operator
from attending.nn.differential_attention import (
    DifferentialOutputs,
    differential_outputs,
    join_values,
    split_values,
)
from attending.nn.grouped_differential_attention import GroupedDifferentialAttention


class DifferentialDecoderAttention(nn.Module):
    """A `GroupedDifferentialAttention`, called as the attention of a decoder of transformers.

    Args:
        attention: the layer.
        config: that of the model, which knows what kind of masks it makes.

    Attributes:
        attention: the layer, so that `state_dict` has `...self_attn.attention.q_proj.weight`.
    """

    is_causal = True

    def __init__(self, attention: GroupedDifferentialAttention, config: Any) -> None:
        super().__init__()
        self.attention = attention
        self.config = config
        self.layer_idx = attention.layer_idx

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        cache: Any = None,
        past_key_values: Any = None,
        **others: Any,
    ) -> tuple[Tensor, None]:
        """The output, and None for the map, of which there are two."""
        layer = self.attention
        query, key, value = layer.project(hidden_states, position_embeddings=position_embeddings)
        halves = split_values(value)
        cache = past_key_values if cache is None else cache
        if cache is not None:
            key, halves = cache.update(key, halves, self.layer_idx)
        both, _ = _adapter(layer.heads.ratio)(
            self, query, key, halves, attention_mask, scaling=layer.head_dim**-0.5, **others
        )
        sizes = [layer.heads.num_signal, layer.heads.num_noise]
        signal, noise = both.transpose(1, 2).split(sizes, 1)
        return layer.combine(DifferentialOutputs(signal, noise), hidden_states), None


def _two_passes(
    query: Tensor,
    key: Tensor,
    halves: Tensor,
    *,
    ratio: int,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Outputs of the signal heads, then of the noise heads."""
    outputs = differential_outputs(
        query,
        key,
        join_values(halves),
        ratio=ratio,
        attn_mask=attn_mask,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=True,
    )
    return torch.cat(outputs, 1)


@remember
def _adapter(ratio: int) -> Adapter:
    """One for all layers, so that a mask that they share is read once."""
    operator = Operator("attending.conversion._differential_layer:_two_passes", decodes=True)
    return Adapter("differential", operator, _two_passes, {"ratio": ratio})
