"""How alike the rows of an attention map are, without the map: the mean cosine over its rows.

Oversmoothed attention gives every query nearly the same mean over the keys. The measure is the mean
cosine similarity between the weights of different queries, `(|sum_i u_i|^2 - n) / (n (n - 1))`
with `u_i` row i of the map at length 1: 1 where all rows are the same, about 0 where each query
looks at keys of its own. Unlike an entropy it is defined for weights that are negative, and it
does not change when rows are scaled, so it compares softmax with linear attention.

- **linear attention**: row i is `q_i K^T`, and `row_i . row_j = q_i (K^T K) q_j`: one Gram matrix
  of `dim * dim` numbers;
- **softmax attention**: `|row_i|^2` is the second moment of the row, and `sum_i u_i` is the
  attention that each key receives from queries with the weights `1 / |row_i|`.

Both take time linear in what the attention itself takes, and memory linear in the tokens. (For
hidden states there is `attending.core.statistics.token_similarity`.)
"""

import torch
from jaxtyping import Float
from torch import Tensor

from attending.core.check import check_arguments
from attending.core.statistics import column_mass, participation_ratio


def linear_row_similarity(
    query: Float[Tensor, "batch heads queries dim"],
    key: Float[Tensor, "batch kv_heads keys dim"],
    enable_gqa: bool = False,
) -> Float[Tensor, "batch heads"]:
    """Mean cosine between the rows of the map `query key^T` of linear attention.

    Args:
        query, key: features, after the kernel (and the difference, in DyDiLA).
        enable_gqa: let key have fewer heads.

    Returns:
        In float64, for each head; rows without any weight are left out, and 0 where fewer than two
        are left.
    """
    check_arguments(query, key, enable_gqa=enable_gqa)
    query, key = query.double(), key.double()
    gram = (key.transpose(-1, -2) @ key).repeat_interleave(query.shape[1] // key.shape[1], 1)
    squares = ((query @ gram) * query).sum(-1)
    there = squares > 0
    unit = query / squares.where(there, torch.ones_like(squares)).sqrt()[..., None]
    total = unit.masked_fill(~there[..., None], 0.0).sum(-2)
    together = ((total[..., None, :] @ gram)[..., 0, :] * total).sum(-1)
    return _mean_cosine(together, there.sum(-1))


def softmax_row_similarity(
    query: Float[Tensor, "batch heads queries dim"],
    key: Float[Tensor, "batch kv_heads keys dim"],
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Float[Tensor, "batch heads"]:
    """Mean cosine between the rows of a softmax map.

    Args:
        query, key, attn_mask, is_causal, scale, enable_gqa: as in
            `scaled_dot_product_attention`.

    Returns:
        For each head; empty rows are left out, and 0 where fewer than two are left.
    """
    call = {
        "attn_mask": attn_mask,
        "is_causal": is_causal,
        "scale": scale,
        "enable_gqa": enable_gqa,
    }
    ratio = participation_ratio(query, key, **call)  # type: ignore[arg-type]
    received = column_mass(query, key, ratio.sqrt(), **call)  # type: ignore[arg-type]
    return _mean_cosine(received.double().square().sum(-1), (ratio > 0).sum(-1))


def _mean_cosine(together: Tensor, rows: Tensor) -> Tensor:
    return (together - rows) / (rows * (rows - 1)).clamp(min=1)
