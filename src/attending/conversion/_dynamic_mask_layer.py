"""The module that stands in the place of a decoder's attention in transformers."""

from functools import cache as remember
from typing import Any

from torch import Tensor, nn

from attending.nn._attention_adapter import Adapter, Operator
from attending.nn.dynamic_mask import dynamic_mask_attention
from attending.nn.dynamic_mask_attention import DynamicMaskAttention
from attending.nn.dynamic_mask_cache import ScoreCache


class DynamicMaskDecoderAttention(nn.Module):
    """A `DynamicMaskAttention`, called as the attention of a decoder of transformers.

    Args:
        attention: the layer.
        config: that of the model, which knows what kind of masks it makes.

    Attributes:
        attention: the layer, so that `state_dict` has `...self_attn.attention.q_proj.weight`.
    """

    is_causal = True

    def __init__(self, attention: DynamicMaskAttention, config: Any) -> None:
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
        """The output, and None for the map."""
        layer = self.attention
        query, key, value = layer.project(hidden_states, position_embeddings)
        cache = past_key_values if cache is None else cache
        if isinstance(cache, ScoreCache):
            return layer.combine(
                layer.attend_cached(query, key, value, cache, attention_mask)
            ), None
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        output, _ = _adapter()(
            self, query, key, value, attention_mask, scaling=layer.head_dim**-0.5, **others
        )
        return layer.combine(output.transpose(1, 2)), None


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    module: DynamicMaskDecoderAttention,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    layer = module.attention
    return dynamic_mask_attention(
        query,
        key,
        value,
        layer.scores(value),
        layer.keep_window,
        attn_mask=attn_mask,
        is_causal=is_causal,
        scale=scale,
    )


@remember
def _adapter() -> Adapter:
    """One for all layers, so that a mask that they share is read once."""
    operator = Operator("attending.conversion._dynamic_mask_layer:_attend", decodes=True)
    return Adapter("dynamic-mask", operator, _attend, {})
