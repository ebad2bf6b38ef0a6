"""Focused linear attention: a kernel that sharpens features by a power and keeps their length.

For linear attention that is less flat than with ReLU alone. The exponential of softmax makes large
scores dominate; without it, raising the features of queries and keys to a power pulls each of them
towards its largest coordinate, so that those with a different largest coordinate see little of
each other:

    phi_p(z) = |relu(z)| * relu(z)^p / |relu(z)^p|      power for each coordinate, Euclidean norms

p = 1 is ReLU; with p to infinity what is left is the largest coordinate, with all of the length.
Source: Han et al., "FLatten Transformer" (2308.00442), with p = 3; the kernel of DyDiLA
(2601.13683), `attending.nn.dydila`, is the same with a power for each token.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attending.nn._causal_sum import accumulation_dtype
from attending.nn.linear_attention import linear_attention

PIECE = 2**17  # numbers that the kernel works on at a time


def focused_kernel(
    features: Float[Tensor, "*batch dim"], power: float | Float[Tensor, "*#batch"] = 3.0
) -> Float[Tensor, "*batch dim"]:
    """`|relu(z)| * relu(z)^p / |relu(z)^p|`: sharper, as long as `relu(z)`.

    Computed in float32 (float64 for float64), with the largest coordinate taken out before the
    power, so that no power over- or underflows. A vector without a positive coordinate gives 0.

    Args:
        features: z, queries or keys.
        power: p, above 0: a number, or one for each vector (it broadcasts to `batch`).
            Differentiable. Below 1 the gradient is infinite as a coordinate goes to 0.

    Returns:
        The features, in their dtype.

    Raises:
        ValueError: for a power that is a number and not above 0, or does not broadcast.
    """
    if not isinstance(power, Tensor):
        if not power > 0:
            raise ValueError(f"power: expected a number above 0, got {power}.")
        power = features.new_tensor(power)
    fits = power.dim() < features.dim() and all(
        size in (1, whole)
        for size, whole in zip(reversed(power.shape), reversed(features.shape[:-1]), strict=False)
    )
    if not fits:
        raise ValueError(
            f"power: expected a number or a shape that broadcasts to {list(features.shape[:-1])}, "
            f"that of features without the last dimension, got {list(power.shape)}."
        )
    dtype = accumulation_dtype(features.dtype)
    output: Tensor = _Focused.apply(  # type: ignore[no-untyped-call]
        features.to(dtype), power.to(dtype)[..., None]
    )
    return output.to(features.dtype)


class _Focused(torch.autograd.Function):
    """The kernel in float32 or float64, in pieces that stay in the cache.

    With r = relu(z), `w = (r / max r)^p` and its unit vector n, the output is `y = |r| n`. For a
    gradient g of y, with `c = g . n`,

        grad z = p (g - c n) y / r + c r / |r|     where r > 0, and 0 elsewhere
        grad p = (g - c n) . (y log r)

    The divisor max r is in neither: the kernel does not change with the scale before the power.
    """

    @staticmethod
    def forward(ctx: Any, features: Tensor, power: Tensor) -> Tensor:
        output = torch.empty_like(features, memory_format=torch.contiguous_format)
        scratch: Tensor | None = None
        for rows in _pieces(features, power, output):
            scratch = torch.empty_like(rows[0]) if scratch is None else scratch
            _focus(scratch[: len(rows[0])], *rows)
        ctx.save_for_backward(features, power, output)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        features, power, output = ctx.saved_tensors
        if torch.is_grad_enabled():  # someone differentiates the gradient: keep its graph
            grad_features, grad_power = _gradients(True, features, power, output, grad)
        else:
            grad_features = torch.empty_like(output)
            grad_power = output.new_empty(*output.shape[:-1], 1)
            wanted = ctx.needs_input_grad[1]
            parts = _pieces(features, power, output, grad, grad_features, grad_power)
            for *rows, into_features, into_power in parts:
                of_features, of_power = _gradients(wanted, *rows)
                into_features.copy_(of_features)
                if of_power is not None:
                    into_power.copy_(of_power)
        needs_features, needs_power = ctx.needs_input_grad
        return (
            grad_features if needs_features else None,
            grad_power.sum_to_size(power.shape) if needs_power and grad_power is not None else None,
        )


def _pieces(features: Tensor, power: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """All of `[..., n]` as rows, so many at a time that a few such tensors fit into the cache."""
    rows, dim = features.shape[:-1].numel(), features.shape[-1]
    if rows * dim == 0:
        return
    flat = [one.reshape(rows, one.shape[-1]) for one in (features, *others)]
    powers = power.reshape(1, 1) if power.numel() == 1 else None
    if powers is None:
        flat.insert(1, power.expand(*features.shape[:-1], 1).reshape(rows, 1))
    step = max(1, PIECE // dim)
    for parts in zip(*(one.split(step) for one in flat), strict=True):
        yield parts if powers is None else (parts[0], powers, *parts[1:])


def _gradients(
    of_power: bool, features: Tensor, power: Tensor, output: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor | None]:
    positive = features.relu()
    length = torch.linalg.vector_norm(positive, dim=-1, keepdim=True)
    inverse = length.clamp(min=torch.finfo(length.dtype).tiny).reciprocal()
    along = (grad * output).sum(-1, keepdim=True) * inverse * inverse
    across = torch.addcmul(grad, along, output, value=-1.0) * output
    positive = positive.masked_fill(features <= 0, 1.0)
    grad_features = torch.addcmul(power * across / positive, along, positive)
    grad_features = torch.ops.aten.threshold_backward(grad_features, features, 0.0)
    if not of_power:
        return grad_features, None
    return grad_features, (across * positive.log()).sum(-1, keepdim=True)


def _focus(scratch: Tensor, features: Tensor, power: Tensor, output: Tensor) -> None:
    """Write the kernel of some vectors into `output`, in few passes and without new memory."""
    torch.clamp(features, min=0.0, out=scratch)
    length = torch.linalg.vector_norm(scratch, dim=-1, keepdim=True)
    top = features.amax(-1, keepdim=True).clamp_(min=0.0).log_()
    top.masked_fill_(top == -math.inf, 0.0)
    # Logarithms of zeros and exponentials of -inf take many times longer than those of numbers. So
    # negative coordinates go along as positive ones, and are cut off at the end as relu's gradient
    # does it: where the features are not above 0.
    torch.abs(features, out=scratch).log_()
    torch.addcmul(top.mul_(power).neg_(), scratch, power, out=scratch).clamp_(max=0.0).exp_()
    torch.ops.aten.threshold_backward.grad_input(scratch, features, 0.0, grad_input=output)
    # The largest coordinate is 1 now, so that the norm is at least 1 unless all are 0.
    norm = torch.linalg.vector_norm(output, dim=-1, keepdim=True).clamp_(min=1.0)
    output.mul_(length.div_(norm))


def focused_linear_attention(
    query: Float[Tensor, "batch heads queries dim"],
    key: Float[Tensor, "batch kv_heads keys dim"],
    value: Float[Tensor, "batch kv_heads keys value_dim"],
    *,
    attn_mask: Bool[Tensor, "#batch #kv_heads 1 keys"] | None = None,
    is_causal: bool = False,
    enable_gqa: bool = False,
    power: float = 3.0,
) -> Float[Tensor, "batch heads queries value_dim"]:
    """Normalised linear attention with the focused kernel; `power=1.0` is ReLU linear attention.

    Without the depth-wise convolution that FLatten adds to the output: that needs an image.

    Args:
        query, key, value, attn_mask, is_causal, enable_gqa: as in
            `attending.nn.linear_attention.linear_attention`.
        power: as in `focused_kernel`.

    Returns:
        The output; 0 for a query that has no positive coordinate in common with any key it sees.

    Raises:
        ValueError: for arguments that do not fit together; the message names the argument.
    """
    return linear_attention(
        focused_kernel(query, power),
        focused_kernel(key, power),
        value,
        attn_mask=attn_mask,
        is_causal=is_causal,
        enable_gqa=enable_gqa,
    )
