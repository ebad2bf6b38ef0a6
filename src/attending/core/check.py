"""One place that looks at the arguments of attention before any work is done."""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Arguments(NamedTuple):
    """Arguments that have passed: a float bias in place of the mask, a scale that is a number."""

    bias: Tensor | None  # broadcasts to [batch, heads, queries, keys]; hidden keys hold -inf
    bias_is_mask: bool  # the bias came from a boolean mask: it holds only 0 and -inf
    scale: float


def _shape(tensor: Tensor) -> str:
    return str(list(tensor.shape))


def check_tensor(name: str, tensor: object, like: Tensor | None = None) -> None:
    """Raise unless `tensor` is a 4-dimensional float tensor, of the device and dtype of `like`."""
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}.")
    if not tensor.is_floating_point():
        raise ValueError(
            f"{name}: expected a floating point tensor, got {tensor.dtype}. "
            f"Convert it first, for example {name}.float()."
        )
    if tensor.dim() != 4:
        raise ValueError(
            f"{name}: expected 4 dimensions [batch, heads, tokens, dim], got {_shape(tensor)}. "
            "Reshape it, for example with unsqueeze for a missing batch or head dimension."
        )
    if like is not None and tensor.device != like.device:
        raise ValueError(
            f"{name}: expected a tensor on {like.device}, where query is, got one on "
            f"{tensor.device}. Move it there first."
        )
    if like is not None and tensor.dtype != like.dtype:
        raise ValueError(
            f"{name}: expected {like.dtype}, the dtype of query, got {tensor.dtype}. "
            "Convert one of them first."
        )


def check_heads(name: str, tensor: Tensor, query: Tensor, enable_gqa: bool) -> None:
    """Raise unless batch and heads fit those of the query, up to the groups of GQA."""
    if tensor.shape[0] != query.shape[0]:
        raise ValueError(
            f"{name}: expected batch size {query.shape[0]}, that of query {_shape(query)}, "
            f"got {_shape(tensor)}."
        )
    heads, query_heads = tensor.shape[1], query.shape[1]
    if heads == query_heads:
        return
    if not enable_gqa:
        raise ValueError(
            f"{name}: expected {query_heads} heads, those of query {_shape(query)}, got "
            f"{_shape(tensor)}. For grouped-query attention pass enable_gqa=True."
        )
    if heads == 0 or query_heads % heads:
        raise ValueError(
            f"{name}: with enable_gqa=True the {query_heads} heads of query must be a multiple of "
            f"the heads of {name}, got {_shape(tensor)}."
        )


def check_arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor | None = None,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Arguments:
    """Raise a `ValueError` that names the argument, what was expected and what came; or convert."""
    check_tensor("query", query)
    check_tensor("key", key, query)
    check_heads("key", key, query, enable_gqa)
    if query.shape[-1] != key.shape[-1] or query.shape[-1] == 0:
        raise ValueError(
            "key: expected the last dimension to be that of query and at least 1, got query "
            f"{_shape(query)} and key {_shape(key)}."
        )
    if value is not None:
        check_tensor("value", value, query)
        if value.shape[:3] != key.shape[:3]:
            raise ValueError(
                f"value: expected the batch, heads and length of key {_shape(key)}, "
                f"got {_shape(value)}."
            )
    if scale is None:
        scale = query.shape[-1] ** -0.5
    elif not math.isfinite(scale):
        raise ValueError(f"scale: expected a finite number, got {scale}.")
    if attn_mask is None:
        return Arguments(None, True, float(scale))
    if is_causal:
        raise ValueError(
            "attn_mask: expected None when is_causal=True, as in scaled_dot_product_attention, got "
            f"{_shape(attn_mask)}. Put the causal mask into attn_mask, or pass a bias per key to "
            "biased_attention_state, which allows both."
        )
    bias, bias_is_mask = check_mask(attn_mask, query, key)
    return Arguments(bias, bias_is_mask, float(scale))


def check_mask(attn_mask: Tensor, query: Tensor, key: Tensor) -> tuple[Tensor, bool]:
    """Check a boolean or float mask and return it as a 4-dimensional float bias."""
    if not isinstance(attn_mask, Tensor):
        raise ValueError(f"attn_mask: expected a torch.Tensor, got {type(attn_mask).__name__}.")
    if attn_mask.dtype != torch.bool and not attn_mask.is_floating_point():
        raise ValueError(
            "attn_mask: expected a boolean mask (True = visible) or a float bias, got "
            f"{attn_mask.dtype}. A mask of 0 and 1 becomes boolean with attn_mask.bool()."
        )
    if attn_mask.device != query.device:
        raise ValueError(
            f"attn_mask: expected a tensor on {query.device}, where query is, got one on "
            f"{attn_mask.device}."
        )
    full = (*query.shape[:3], key.shape[2])
    fits = attn_mask.dim() <= 4 and all(
        size in (1, whole)
        for size, whole in zip(reversed(attn_mask.shape), reversed(full), strict=False)
    )
    if not fits:
        raise ValueError(
            f"attn_mask: expected a shape that broadcasts to [batch, heads, queries, keys] = "
            f"{list(full)}, got {_shape(attn_mask)}."
        )
    attn_mask = attn_mask.reshape((1,) * (4 - attn_mask.dim()) + tuple(attn_mask.shape))
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    if attn_mask.dtype == torch.bool:
        bias = torch.zeros(attn_mask.shape, dtype=dtype, device=attn_mask.device)
        return bias.masked_fill(~attn_mask, -math.inf), True
    return attn_mask.to(dtype), False
