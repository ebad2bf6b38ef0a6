"""Statistics of hidden states and of the outputs of heads: rank, oversmoothing, duplicates.

None of them is about a map, and none needs a matrix of tokens by tokens.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from attending.core.precision import full_precision


@full_precision
def effective_rank(
    matrix: Float[Tensor, "*batch rows columns"], *, center: bool = False
) -> Float[Tensor, "*batch"]:
    """`exp(-sum_k q_k log q_k)` with q the singular values over their sum (Roy and Vetterli 2007).

    How many directions a matrix uses, in [1, min(rows, columns)]; 0 for a matrix of zeros. Of
    hidden states `[tokens, dim]` it falls towards 1 as tokens become alike. Computed at least in
    float32; differentiable where the singular values are distinct. The matrix is not written to.

    Args:
        matrix: rows are tokens.
        center: first subtract the mean of each column, so that what all tokens share does not
            count. AgilePruner's code does, its equations do not.
    """
    _check_matrix("matrix", matrix)
    matrix = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    if center:
        matrix = matrix - matrix.mean(-2, keepdim=True)
    singular = torch.linalg.svdvals(matrix)
    total = singular.sum(-1, keepdim=True)
    zero = total == 0
    share = singular / total.masked_fill(zero, 1.0)
    rank = (-torch.xlogy(share, share).sum(-1)).exp()
    return rank.masked_fill(zero.squeeze(-1), 0.0)


@full_precision
def token_similarity(hidden: Float[Tensor, "*batch tokens dim"]) -> Float[Tensor, "*batch"]:
    """Mean cosine similarity over pairs of different tokens: 1 when all point the same way.

        (|sum_i u_i|^2 - sum_i |u_i|^2) / (n (n - 1)),  u_i = hidden_i / |hidden_i|

    The measure of oversmoothing. O(tokens * dim). The mean that includes each token's similarity to
    itself, which some papers use, is larger by about 1 / tokens. 0 for fewer than two tokens.
    """
    _check_matrix("hidden", hidden)
    tokens = hidden.shape[-2]
    hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    unit = torch.nn.functional.normalize(hidden, dim=-1)
    together = unit.sum(-2).square().sum(-1)
    alone = unit.square().sum((-1, -2))
    return (together - alone) / max(tokens * (tokens - 1), 1)


@full_precision
def head_similarity(
    outputs: Float[Tensor, "heads samples dim"],
) -> Float[Tensor, "heads heads"]:
    """Linear CKA between the outputs of every two heads (Kornblith et al. 2019): 1 = duplicates.

        |X^T Y|^2 / (|X^T X| |Y^T Y|)    (Frobenius norms, columns centred over the samples)

    Invariant to rotation and scale of a head's output. One Gram matrix of `heads * dim` columns;
    samples are tokens, of one sequence or many. A head with a constant output is similar to none.
    """
    if outputs.dim() != 3 or not outputs.is_floating_point():
        raise ValueError(
            "outputs: expected a float tensor [heads, samples, dim], got "
            f"{outputs.dtype} {list(outputs.shape)}. Fold batch and tokens into samples."
        )
    heads, samples, dim = outputs.shape
    outputs = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
    centred = outputs - outputs.mean(1, keepdim=True)
    columns = centred.transpose(0, 1).reshape(samples, heads * dim)
    gram = (columns.transpose(0, 1) @ columns).view(heads, dim, heads, dim)
    inner = gram.square().sum((1, 3))
    norm = inner.diagonal().sqrt()
    product = norm[:, None] * norm
    zero = product == 0
    return (inner / product.masked_fill(zero, 1.0)).masked_fill(zero, 0.0)


def _check_matrix(name: str, matrix: Tensor) -> None:
    if matrix.dim() < 2 or not matrix.is_floating_point():
        raise ValueError(
            f"{name}: expected a float tensor with at least 2 dimensions, got "
            f"{matrix.dtype} {list(matrix.shape)}."
        )
