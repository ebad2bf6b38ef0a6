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

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attending.nn._causal_sum import accumulation_dtype
from attending.nn.linear_attention import linear_attention


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
    positive = features.to(dtype).relu()
    present = positive > 0
    top = positive.amax(-1, keepdim=True)
    # The kernel does not change with the scale before the power, so the top may count as constant.
    relative = positive / torch.where(top > 0, top, torch.ones_like(top)).detach()
    raised = torch.where(present, relative, torch.ones_like(relative)) ** power.to(dtype)[..., None]
    raised = raised.masked_fill(~present, 0.0)
    direction: Tensor = torch.nn.functional.normalize(raised, dim=-1, eps=torch.finfo(dtype).tiny)
    length: Tensor = torch.linalg.vector_norm(positive, dim=-1, keepdim=True)
    return (length * direction).to(features.dtype)


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
