"""Attention that is quick to train with on a processor, lent to a model for a step."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def training_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it, by what is fastest to train with on a processor.

    PyTorch's kernel is slow backward in bfloat16: without a mask and with few tokens, plain
    products take a third of its time, and with one the same kernel in float32 takes half of it.
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if attention_mask is None:
        weights = (scale * query @ key.mT).softmax(-1)
        return (weights.to(value.dtype) @ value).transpose(1, 2).contiguous(), None
    with torch.autocast(query.device.type, enabled=False):
        mixed = F.scaled_dot_product_attention(
            query.float(), key.float(), value.float(), attn_mask=attention_mask, scale=scale
        )
    return mixed.to(query.dtype).transpose(1, 2).contiguous(), None


@contextmanager
def fast_attention(model: Any) -> Iterator[None]:
    """Lend the model :func:`training_attention` and give it its own back."""
    from transformers import AttentionInterface

    AttentionInterface.register("zoo_training", training_attention)
    usual = model.config._attn_implementation
    model.set_attn_implementation("zoo_training")
    try:
        yield
    finally:
        model.set_attn_implementation(usual)
