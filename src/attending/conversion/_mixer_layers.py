"""The modules that stand in the place of an attention module of transformers.

A mixer takes over the projections of the attention under their own names, so that checkpoints keep
their form, and is called as the attention was.
"""

import sys
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from attending.conversion._mixer_source import MixerSource
from attending.core.state import attention_state
from attending.nn._attention_adapter import Adapter, Operator
from attending.nn._causal_sum import full_precision
from attending.nn.gated_mlp import GatedMLP
from attending.nn.nonapprox_attention import nonapprox_logit, running_softmax_mean
from attending.nn.rotary import rotate
from attending.nn.taylor_attention import taylor_attention

Variant = Literal[
    "standard",
    "mlp",
    "taylor",
    "taylor_per_order",
    "nonapprox",
    "random_qk",
    "fixed_qk",
    "static_qk",
]

# How the attention modules that we know project: q, k and v apart, or in one matrix.
FAMILIES = {
    "LlamaAttention": "apart",
    "MistralAttention": "apart",
    "Qwen2Attention": "apart",
    "Qwen3Attention": "apart",
    "GPTNeoXAttention": "by head",
    "GPT2Attention": "in thirds",
}


def _pooled(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    """The non-approximate form on its logits, which are the only channel of `key`; query is 1."""
    if attn_mask is None and is_causal:
        return running_softmax_mean(key[..., 0], value).output
    return attention_state(query, key, value, attn_mask, is_causal, scale=1.0).output


_TAYLOR = Operator("attending.nn.taylor_attention:taylor_attention", decodes=True)
_POOLED = Operator("attending.conversion._mixer_layers:_pooled", decodes=True)
_ADAPTERS = {
    "taylor": Adapter("taylor", _TAYLOR, taylor_attention, {}),
    "taylor_per_order": Adapter(
        "taylor", _TAYLOR, taylor_attention, {"normalization": "per_order"}
    ),
    "nonapprox": Adapter("nonapprox", _POOLED, _pooled, {}),
}


class AttentionMixer(nn.Module):
    """A variant of attention with the projections of the attention that it replaces.

    Args:
        attention: the module that is replaced.
        variant: any but "mlp".
        norm: what is applied to the hidden states before the attention.
        source: of queries and keys that do not come from them.
    """

    def __init__(
        self, attention: Any, variant: Variant, norm: nn.Module, source: MixerSource
    ) -> None:
        super().__init__()
        for name, child in attention.named_children():
            self.add_module(name, child)
        self.variant = variant
        self.family = FAMILIES[type(attention).__name__]
        self.config, self.layer_idx = attention.config, attention.layer_idx
        self.scaling, self.is_causal = attention.scaling, True
        self.head_dim: int = getattr(attention, "head_dim", None) or attention.head_size
        self.num_key_value_groups: int = getattr(attention, "num_key_value_groups", 1)
        if hasattr(attention, "sliding_window"):
            self.sliding_window = attention.sliding_window
        dropout = getattr(attention, "attn_dropout", None)
        self.dropout: float = attention.attention_dropout if dropout is None else dropout.p
        self._eager = sys.modules[type(attention).__module__].eager_attention_forward
        self._shared = (norm, source)  # in a tuple, since they are other modules' children
        self.train(attention.training)

    def extra_repr(self) -> str:
        return f"variant={self.variant!r}"

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        cache: Any = None,
        layer_past: Any = None,
        past_key_values: Any = None,
        **others: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Called as the attention of each family is; what it does not know goes to the kernel."""
        caches = (one for one in (cache, layer_past, past_key_values) if one is not None)
        cache = next(caches, None)
        query, key, value = self._query_key_value(hidden_states, position_embeddings)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        output, attention = self._attend(query, key, value, attention_mask, others)
        output = output.reshape(*hidden_states.shape[:-1], -1).to(hidden_states.dtype)
        return self._merge_heads(output.contiguous()), attention

    def _query_key_value(
        self, hidden: Tensor, rotation: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        norm, source = self._shared
        if self.variant in ("random_qk", "fixed_qk") and not source.recording:
            query, key = source.read(self.layer_idx, hidden.shape[0])
            return query, key, self._project(hidden, "v")[0]
        if self.variant == "static_qk":
            query, key = self._project(norm(source.embedding), "qk")
            (value,) = self._project(hidden, "v")
        else:
            query, key, value = self._project(hidden, "qkv")
        if self.variant == "nonapprox":  # before the rotation, which then cancels
            key = nonapprox_logit(query, key, self.scaling)[..., None]
            value = value.repeat_interleave(self.num_key_value_groups, 1)
            return torch.ones_like(key), key, value
        if rotation is not None:
            query, key = rotate(query, *rotation), rotate(key, *rotation)
        if source.recording:
            source.recorded[self.layer_idx] = query, key
        return query, key, value

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        others: dict[str, Any],
    ) -> tuple[Tensor, Tensor | None]:
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        dropout = self.dropout if self.training else 0.0
        function: Callable[..., tuple[Tensor, Tensor | None]]
        if self.variant in _ADAPTERS:
            function = _ADAPTERS[self.variant]
        else:
            function = ALL_ATTENTION_FUNCTIONS.get_interface(
                self.config._attn_implementation, self._eager
            )
        arguments = {"scaling": self.scaling, "dropout": dropout, **others}
        if self.variant != "nonapprox":
            return function(self, query, key, value, mask, **arguments)
        with full_precision(query):  # logits may be large, and half precision would round them
            key = key.to(query.dtype)
            return function(self, query, key, value.to(query.dtype), mask, **arguments)

    def _project(self, hidden: Tensor, parts: str) -> list[Tensor]:
        """`[batch, heads, tokens, head_dim]` of each of the parts, letters of "qkv"."""
        if self.family == "apart":
            return [self._project_one(hidden, part) for part in parts]
        if self.family == "by head":
            joint = self.get_submodule("query_key_value")(hidden)
            pieces = joint.unflatten(-1, (-1, 3 * self.head_dim)).transpose(1, 2).chunk(3, -1)
        else:
            thirds = self.get_submodule("c_attn")(hidden).chunk(3, -1)
            pieces = [one.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for one in thirds]
        return [pieces["qkv".index(part)] for part in parts]

    def _project_one(self, hidden: Tensor, part: str) -> Tensor:
        heads = self.get_submodule(f"{part}_proj")(hidden).unflatten(-1, (-1, self.head_dim))
        norm = getattr(self, f"{part}_norm", None)
        heads = heads if norm is None else norm(heads)
        found: Tensor = heads.transpose(1, 2)
        return found

    def _merge_heads(self, output: Tensor) -> Tensor:
        name = {"apart": "o_proj", "by head": "dense", "in thirds": "c_proj"}[self.family]
        merged: Tensor = self.get_submodule(name)(output)
        return self.get_submodule("resid_dropout")(merged) if name == "c_proj" else merged


class MLPMixer(nn.Module):
    """A gated MLP, called as the attention that it replaces.

    Args:
        attention: the module that is replaced.
        mlp: what replaces it.
    """

    def __init__(self, attention: Any, mlp: GatedMLP) -> None:
        super().__init__()
        self.mlp = mlp
        self.layer_idx = attention.layer_idx
        self.train(attention.training)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        cache: Any = None,
        layer_past: Any = None,
        past_key_values: Any = None,
        **others: Any,
    ) -> tuple[Tensor, None]:
        """Each token alone. A cache gets one number for each, since models count them there."""
        for one in (cache, layer_past, past_key_values):
            if one is not None:
                count = hidden_states.new_zeros(*hidden_states.shape[:2])[:, None, :, None]
                one.update(count, count, self.layer_idx)
                break
        return self.mlp(hidden_states), None
