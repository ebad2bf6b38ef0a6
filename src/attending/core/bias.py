"""Additive biases as features of query and key, so that every fused kernel can apply them.

A score is `scale * q . k`. Whatever bias is a sum of r products of a number of the query and a
number of the key can be had by r more columns of both:

    scale * [q, left] . [k, right / scale] = scale * q . k + left . right

A bias per key has r = 1 with left = 1, a bias per query has right = 1, causal ALiBi has r = 2.
This is how a key mask, log weights or ALiBi go together with `is_causal` on kernels that take
either a mask or the flag, and how a bias gets its gradient from kernels that have none for masks.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

# In place of -inf in a feature, since 0 * -inf is NaN in the products of a backward pass. Next to
# it every finite score of a float32 vanishes, and lse tells a row that saw nothing else.
HIDDEN = -1e30


class BiasedPair(NamedTuple):
    """Query and key with their extra columns, and the scale that goes with them."""

    query: Float[Tensor, "batch heads queries features"]
    key: Float[Tensor, "batch kv_heads keys features"]
    scale: float


def add_low_rank_bias(
    query: Float[Tensor, "batch heads queries dim"],
    key: Float[Tensor, "batch kv_heads keys dim"],
    left: Float[Tensor, "#batch #heads #queries rank"],
    right: Float[Tensor, "#batch #kv_heads #keys rank"],
    scale: float | None = None,
) -> BiasedPair:
    """Columns that add `left[i] . right[j]` to the score of query i and key j.

    Half precision is widened to float32, because a rounded bias is a wrong probability. An entry
    of `right` that is -inf hides its key; the -inf becomes -1e30, so that no product is NaN.

    Args:
        query, key: as in `scaled_dot_product_attention`.
        left, right: the factors of the bias, in units of the (scaled) scores. Dimensions of size 1
            broadcast.
        scale: the scale of the scores; `dim ** -0.5` by default.

    Returns:
        query and key with `dim + rank` columns, padded with zeros to a multiple of 8, and the
        scale to pass on (no longer the default one, which depends on the number of columns).
    """
    if left.shape[-1] != right.shape[-1]:
        raise ValueError(
            "right: expected the rank (last dimension) of left, "
            f"{left.shape[-1]}, got {list(right.shape)}."
        )
    if scale is None:
        scale = query.shape[-1] ** -0.5
    elif not math.isfinite(scale):
        raise ValueError(f"scale: expected a finite number, got {scale}.")
    dtype = torch.promote_types(query.dtype, torch.float32)
    query, key = query.to(dtype), key.to(dtype)
    left, right = left.to(dtype), right.to(dtype)
    if scale == 0.0:
        query, scale = query * 0.0, 1.0
    right = (right / scale).masked_fill(right == -math.inf, HIDDEN / scale)
    columns = query.shape[-1] + left.shape[-1]
    padding = (0, -columns % 8)

    def widen(tensor: Tensor, extra: Tensor) -> Tensor:
        extra = extra.expand(*tensor.shape[:3], extra.shape[-1])
        return torch.nn.functional.pad(torch.cat([tensor, extra], -1), padding)

    return BiasedPair(widen(query, left), widen(key, right), float(scale))


def add_key_bias(
    query: Float[Tensor, "batch heads queries dim"],
    key: Float[Tensor, "batch kv_heads keys dim"],
    bias: Float[Tensor, "#batch #kv_heads keys"],
    scale: float | None = None,
) -> BiasedPair:
    """One column that adds `bias[j]` to every score of key j: log weights, or -inf to hide it."""
    left = query.new_ones(1, 1, 1, 1, dtype=torch.promote_types(query.dtype, torch.float32))
    return add_low_rank_bias(query, key, left, bias[..., None], scale)


def add_query_bias(
    query: Float[Tensor, "batch heads queries dim"],
    key: Float[Tensor, "batch kv_heads keys dim"],
    bias: Float[Tensor, "#batch #heads queries"],
    scale: float | None = None,
) -> BiasedPair:
    """One column that adds `bias[i]` to every score of query i.

    Softmax does not see it; lse does. It matters where the roles are exchanged.
    """
    right = key.new_ones(1, 1, 1, 1, dtype=torch.promote_types(key.dtype, torch.float32))
    return add_low_rank_bias(query, key, bias[..., None], right, scale)


def key_mask_bias(visible: Bool[Tensor, "*batch keys"]) -> Float[Tensor, "*batch keys"]:
    """The bias per key of a mask: 0 where True, -inf where False."""
    return torch.zeros(visible.shape, device=visible.device).masked_fill(~visible, -math.inf)


def alibi_slopes(num_heads: int) -> Float[Tensor, " heads"]:
    """The slopes of ALiBi (Press et al. 2022): `2 ** (-8 h / H)` for h = 1..H.

    For head counts that are not a power of two the paper's rule is followed: the slopes of the
    power of two below, then every other slope of the power of two above.
    """
    if num_heads < 1:
        raise ValueError(f"num_heads: expected at least 1, got {num_heads}.")
    below = 2 ** int(math.log2(num_heads))
    slopes = [2 ** (-8 * h / below) for h in range(1, below + 1)]
    above = [2 ** (-4 * h / below) for h in range(1, 2 * below + 1, 2)]
    return torch.tensor((slopes + above)[:num_heads])


def alibi_factors(
    slopes: Float[Tensor, " heads"], query_length: int, key_length: int
) -> tuple[Float[Tensor, "1 heads queries 2"], Float[Tensor, "1 1 keys 2"]]:
    """`(left, right)` with `left[h, i] . right[j] = slope[h] * (j - i - offset)`.

    The offset is `key_length - query_length`: the queries are the last ones of the keys, as in
    decoding with a cache. That is ALiBi for causal attention, where no j is beyond the query. Pass
    the pair to `add_low_rank_bias` (for GQA repeat the keys first: slopes are of query heads).
    """
    position = torch.arange(query_length) + key_length - query_length
    left = torch.stack([torch.ones(query_length), -position.float()], -1)
    right = torch.stack([torch.arange(key_length).float(), torch.ones(key_length)], -1)
    return (slopes[:, None, None] * left.to(slopes)).unsqueeze(0), right.to(slopes)[None, None]
