"""Gradients of attention over many keys, from a part of them at a time.

For whatever computes a state in parts and keeps only the whole: the backward pass goes through the
parts again, one by one, and needs to know of the rest no more than output and lse of the whole.
"""

import math

import torch
from torch import Tensor

from attending.core.kernels import flash_cpu_gradients, fused_attention, widened


def partial_gradients(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    is_causal: bool,
    scale: float,
    output: Tensor,
    lse: Tensor,
    grad_output: Tensor,
    grad_lse: Tensor | None,
) -> tuple[Tensor, ...]:
    """Gradients of attention over many keys for the query, key and value of some of them.

    `output` and `lse` are those over all keys, and so are their gradients: with the probabilities
    `p = exp(score - lse)` of the few, `ds = p (grad_output . (v - output) + grad_lse)`. The sum
    over disjoint parts is the gradient of the whole.
    """
    if query.device.type == "cpu":
        lse = lse.masked_fill(lse == -math.inf, 0.0)
        dims = [tensor.shape[-1] for tensor in (query, key, value)]
        width = max(dims)
        query, key, value, output, grad_output = (
            widened(tensor, width) for tensor in (query, key, value, output, grad_output)
        )
        if bias is not None:
            bias = bias.to(torch.float64 if query.dtype == torch.float64 else torch.float32)
        found = flash_cpu_gradients(
            query, key, value, bias, is_causal, scale, output, lse, grad_output, grad_lse
        )
        return tuple(grad[..., :dim] for grad, dim in zip(found, dims, strict=True))
    return gradients_by_recomputing(
        query, key, value, bias, is_causal, scale, output, lse, grad_output, grad_lse
    )


def gradients_by_recomputing(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    is_causal: bool,
    scale: float,
    output: Tensor,
    lse: Tensor,
    grad_output: Tensor,
    grad_lse: Tensor | None,
) -> tuple[Tensor, ...]:
    """`partial_gradients` where a kernel's backward pass takes no lse that is not its own.

    The part as it is alone, `(own, own_lse)`, and the gradient of what it adds to the whole: its
    share is `exp(own_lse - lse)`.
    """
    with torch.enable_grad():
        leaves = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
        own, own_lse = fused_attention(leaves[0], leaves[1], leaves[2], bias, is_causal, scale)
    share = torch.exp(own_lse.detach() - lse.masked_fill(lse == -math.inf, 0.0))
    along = (grad_output * (own.detach() - output)).sum(-1)
    if grad_lse is not None:
        along = along + grad_lse
    return torch.autograd.grad(
        (own, own_lse), leaves, ((share[..., None] * grad_output).to(own.dtype), share * along)
    )
