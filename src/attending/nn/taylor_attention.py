"""Attention with the second-order Taylor polynomial of exp in place of exp.

`exp(s)` is about `1 + s + s^2 / 2`, a polynomial in query and key: a kernel with finitely many
features, and so a linear attention with a state of constant size (`taylor_features`).

Two forms go by this name. Arora et al. ("Based", 2402.18668) normalise the polynomial as a whole,
which is a proper mean, since `1 + s + s^2 / 2 >= 1/2`. Xue et al. ("Deconstructing Attention",
2510.11602, appendix I) print a recurrence in which each order is normalised for itself and the
second keeps the squares of single channels only. Their code is not public; which of the two they
trained is not known. The first is the default here.
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from attending.core.check import check_arguments
from attending.core.masks import hiding_bias
from attending.nn._causal_sum import full_precision
from attending.nn._polynomial_sum import Polynomial, polynomial_sum


def taylor_attention(
    query: Float[Tensor, "batch heads queries dim"],
    key: Float[Tensor, "batch kv_heads keys dim"],
    value: Float[Tensor, "batch kv_heads keys value_dim"],
    *,
    normalization: Literal["joint", "per_order"] = "joint",
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Float[Tensor, "batch heads queries value_dim"]:
    """Softmax attention with `exp(s)` approximated by `1 + s + s^2 / 2`.

        "joint":      w[i, j] = 1 + s + s^2 / 2,  s = scale * query[i] . key[j]
                      output[i] = sum_j w[i, j] value[j] / sum_j w[i, j]
        "per_order":  the same for w = 1, w = s and w = sum_c query[i, c]^2 key[j, c]^2, each with
                      its own sum, and the three outputs added

    "joint" is close to softmax for small scores and never negative. **"per_order" is ill
    conditioned**: its first order divides by `query[i] . sum_j key[j]`, which crosses zero, so that
    outputs reach tens on normal inputs; its rows sum to 3. It wants positive queries and keys.

    Computed in blocks of rows, without the whole map, in time that is quadratic in the tokens.
    Beyond about `dim^2` of them, and for decoding with a state of constant size, the same function
    takes less work as a linear attention over features:

        q, k = taylor_features(query, scale), taylor_features(key, scale)
        output, state = causal_linear_attention(q, k, value)       # attending.nn.linear_attention

    Args:
        query, key, value, is_causal, scale, enable_gqa: as in `scaled_dot_product_attention`.
        attn_mask: one that only hides keys, boolean or of 0 and -inf; any shape that broadcasts.
        normalization: "joint" or "per_order".

    Returns:
        The output, in query's dtype; 0 for a query that sees no key.

    Raises:
        ValueError: for arguments that do not fit together, or a mask that adds to the scores.
    """
    if normalization not in ("joint", "per_order"):
        raise ValueError(f'normalization: expected "joint" or "per_order", got {normalization!r}.')
    arguments = check_arguments(query, key, value, attn_mask, is_causal, scale, enable_gqa)
    bias = hiding_bias(arguments.bias)
    if key.shape[2] == 0 or query.numel() == 0 or value.shape[-1] == 0:
        return query.new_zeros(*query.shape[:3], value.shape[-1])
    dtype = torch.promote_types(query.dtype, torch.float32)
    q, k = query.to(dtype), key.to(dtype)
    # One more column of ones, for the sum of the weights.
    ones = torch.nn.functional.pad(value.to(dtype), (0, 1), value=1.0)
    with full_precision(query):

        def means(query: Tensor, key: Tensor, weight: Polynomial) -> Tensor:
            sums = polynomial_sum(query, key, ones, bias, is_causal, arguments.scale, weight)
            total = sums[..., -1:]
            return sums[..., :-1] / total.masked_fill(total == 0, 1.0)

        if normalization == "joint":
            return means(q, k, Polynomial(1.0, 1.0, 0.5)).to(query.dtype)
        first, second = Polynomial(1.0, 0.0, 0.0), Polynomial(0.0, 1.0, 0.0)
        orders = means(q, k, first) + means(q, k, second) + means(q.square(), k.square(), second)
        return orders.to(query.dtype)


def taylor_features(
    tensor: Float[Tensor, "*batch tokens dim"], scale: float | None = None
) -> Float[Tensor, "*batch tokens features"]:
    """Features whose inner product is `1 + s + s^2 / 2`, `s = scale * query . key`.

        [1,  sqrt(scale) x_c,  scale x_c^2 / sqrt(2),  scale x_c x_d for c < d]

    Args:
        tensor: queries or keys.
        scale: positive; `dim ** -0.5` by default.

    Returns:
        `1 + dim + dim (dim + 1) / 2` features, at least in float32.

    Raises:
        ValueError: for a scale that is not positive, or no channels.
    """
    dim = tensor.shape[-1]
    if dim == 0:
        raise ValueError(f"tensor: expected at least one channel, got {list(tensor.shape)}.")
    scale = dim**-0.5 if scale is None else scale
    if not 0 < scale < float("inf"):
        raise ValueError(f"scale: expected a positive number, got {scale}.")
    scaled = tensor.to(torch.promote_types(tensor.dtype, torch.float32)) * scale**0.5
    first, second = torch.triu_indices(dim, dim, 1, device=tensor.device)
    return torch.cat(
        [
            torch.ones_like(scaled[..., :1]),
            scaled,
            scaled.square() * 0.5**0.5,
            scaled[..., first] * scaled[..., second],
        ],
        -1,
    )
