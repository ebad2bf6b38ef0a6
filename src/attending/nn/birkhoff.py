"""Doubly stochastic maps that are exact: squares of an orthogonal matrix, and the nearest map.

Both are normalisers (`attending.nn.normalizers`) for as many queries as keys. Unlike Sinkhorn's
map after few steps, their rows and columns sum to one up to rounding.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attending.nn.normalizers import check_scores, padding_of

_PAPER_NOISE = 1e-7**0.5


def orthostochastic(
    scores: Float[Tensor, "*batch tokens tokens"],
    visible: Bool[Tensor, "*#batch tokens tokens"] | None = None,
    *,
    noise: float = _PAPER_NOISE,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "*batch tokens tokens"]:
    """The squares of Q in `scores = Q R`: rows and columns of an orthogonal matrix have length 1.

    From "Quantum Doubly Stochastic Transformers" (2504.16275). The signs of Q, which a QR leaves
    open, do not matter. The map is that of any positive multiple of the scores, and its rows follow
    a permutation of the queries; but **the order of the keys matters**: the columns are made
    orthogonal from left to right, so column 1 is the squared and normalised first column of the
    scores, and the last one has what is left. O(tokens^3), in LAPACK.

    The gradient holds the inverse of R. It exists where the scores have full rank, and is large
    near to where they have not. **Scores `query key^T` of more tokens than head_dim never have
    full rank.** To those matrices that lack it (and only to them) Gaussian noise is added first, as
    in the paper; their map is then partly random.

    Args:
        scores: finite; half precision is computed, and returned, in float32.
        visible: all by default; it may leave out tokens (padding) and nothing else.
        noise: the standard deviation. The paper says "N(0, 1e-7)" without saying whether that is
            the variance, as is assumed here. 0 adds none: then the map of a matrix of lower rank
            depends on rounding, and its gradient is not finite.
        generator: where the noise comes from, one matrix for the whole batch. By default from a
            seed of its own that is the same in every call, so that equal matrices have equal maps,
            whatever else is in the batch, and torch's generator is left alone.

    Raises:
        ValueError: for scores that are not square, a mask that is more than padding, or noise
            below 0.
    """
    scores = check_scores(scores, visible)
    _check_square(scores, "the QR map")
    if not 0 <= noise < float("inf"):
        raise ValueError(f"noise: expected a standard deviation of at least 0, got {noise}.")
    if scores.numel() == 0:
        return scores.clone()
    if visible is not None:
        # Padding becomes a block of its own, the identity: the columns of the tokens keep away
        # from it, and it from them, so Q has that block too.
        tokens = padding_of(visible, "the QR map")
        scores = torch.where(visible, scores, torch.diag_embed((~tokens).to(scores.dtype)))
    noisy = scores if noise == 0 else scores + _noise_where_rank_lacks(scores, noise, generator)
    squares: Tensor = torch.linalg.qr(noisy).Q.square()
    return squares if visible is None else squares.masked_fill(~visible, 0.0)


def _noise_where_rank_lacks(
    scores: Tensor, noise: float, generator: torch.Generator | None
) -> Tensor:
    if generator is None:
        generator = torch.Generator(scores.device).manual_seed(0)
    size = scores.shape[-1]
    with torch.no_grad():
        diagonal = torch.linalg.qr(scores, mode="r").R.diagonal(dim1=-2, dim2=-1).abs()
        threshold = size * torch.finfo(scores.dtype).eps * torch.linalg.matrix_norm(scores)
        lacks = diagonal.amin(-1) <= threshold
        random = torch.randn(
            size, size, dtype=scores.dtype, device=generator.device, generator=generator
        ).to(scores.device)
        added: Tensor = noise * random * lacks[..., None, None]
        return added


def birkhoff_projection(
    scores: Float[Tensor, "*batch tokens tokens"],
    visible: Bool[Tensor, "*#batch tokens tokens"] | None = None,
    *,
    tolerance: float = 1e-10,
    max_iterations: int = 500,
) -> Float[Tensor, "*batch tokens tokens"]:
    """The doubly stochastic matrix nearest to the scores, in the Frobenius norm.

        map = argmin_X |X - scores|^2,  X >= 0,  rows and columns of X sum to 1
            = max(0, scores[i, j] + a[i] + b[j])

    Sparse: most entries are exactly 0, more so for larger scores. Idempotent, and 1-Lipschitz. The
    paper (2504.16275) solves the quadratic program with OSQP and does not train through it. Here a
    and b are found in float64 (rows and columns solved exactly in turn, by sorting, and Newton
    steps on both), and **the gradient is exact**: where the set Z of zeros does not change, the
    projection is linear, the orthogonal projection on {X : X = 0 on Z, rows and columns sum to 0}.

    Args:
        scores: finite; half precision is computed, and returned, in float32.
        visible: all by default; it may leave out tokens (padding) and nothing else.
        tolerance: the largest error of a row's or column's sum, times the largest score where that
            exceeds 1.
        max_iterations: Newton steps. Tens are usual.

    Raises:
        ValueError: for scores that are not square, not finite, or not solved after
            `max_iterations`; and for a mask that is more than padding.
    """
    scores = check_scores(scores, visible)
    _check_square(scores, "the projection")
    if not tolerance > 0 or max_iterations < 1:
        raise ValueError(
            "tolerance, max_iterations: expected a positive number and at least 1, got "
            f"{tolerance} and {max_iterations}."
        )
    if scores.numel() == 0:
        return scores.clone()
    if not bool(scores.isfinite().all()):
        raise ValueError("scores: expected finite numbers, got inf or nan.")
    size = scores.shape[-1]
    if visible is None:
        tokens = scores.new_ones(scores.shape[:-1], dtype=torch.bool)
    else:
        tokens = padding_of(visible, "the projection").expand(scores.shape[:-1])
    found: Tensor = _Projection.apply(  # type: ignore[no-untyped-call]
        scores.reshape(-1, size, size), tokens.reshape(-1, size), tolerance, max_iterations
    )
    return found.view(scores.shape)


def birkhoff_distance(
    attention_map: Float[Tensor, "*batch tokens tokens"],
) -> Float[Tensor, "*batch"]:
    """How far a map is from being doubly stochastic: the Frobenius distance to the nearest one."""
    distance: Tensor = torch.linalg.matrix_norm(attention_map - birkhoff_projection(attention_map))
    return distance


class _Projection(torch.autograd.Function):
    """The projection of matrices [batch, n, n] with sums of 1 at the tokens and 0 elsewhere."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        scores: Tensor,
        tokens: Tensor,
        tolerance: float,
        max_iterations: int,
    ) -> Tensor:
        wide = scores.double()
        pairs = tokens[:, :, None] & tokens[:, None, :]
        allowed = tolerance * wide.abs().amax((-2, -1)).clamp_min(1.0)
        found = _solve(wide.masked_fill(~pairs, -torch.inf), tokens, allowed, max_iterations)
        ctx.save_for_backward(found > 0)
        return found.to(scores.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        (support,) = ctx.saved_tensors
        free = grad.double() * support
        sums = torch.cat([free.sum(-1), free.sum(-2)], -1)
        a, b = _solve_sums(support.double(), sums).split(grad.shape[-1], -1)
        tangent = (free - a[:, :, None] - b[:, None, :]) * support
        return tangent.to(grad.dtype), None, None, None


def _solve(scores: Tensor, tokens: Tensor, allowed: Tensor, max_iterations: int) -> Tensor:
    """max(0, scores + a + b) with the right sums. The dual function of (a, b) never goes up."""
    size = scores.shape[-1]
    target = tokens.to(scores.dtype)
    a, b = torch.zeros_like(target), torch.zeros_like(target)
    for _ in range(max_iterations):
        # Each row onto the simplex, given b; then each column, given a.
        a = _simplex_shift(scores + b[:, None, :]).masked_fill(~tokens, 0.0)
        b = _simplex_shift((scores + a[:, :, None]).transpose(-1, -2)).masked_fill(~tokens, 0.0)
        found = (scores + a[:, :, None] + b[:, None, :]).clamp_min(0.0)
        wrong = torch.cat([target - found.sum(-1), target - found.sum(-2)], -1)
        if bool((wrong.abs().amax(-1) <= allowed).all()):
            return found
        step_a, step_b = _solve_sums((found > 0).double(), wrong).split(size, -1)
        value = _dual(found, a, b, target)
        # Where the support falls apart, steps along its parts are very long: hence so many trials.
        length = torch.ones_like(value)
        for _ in range(24):
            new_a, new_b = a + length[:, None] * step_a, b + length[:, None] * step_b
            found = (scores + new_a[:, :, None] + new_b[:, None, :]).clamp_min(0.0)
            lower = _dual(found, new_a, new_b, target) < value
            if bool(lower.all()):
                break
            length = torch.where(lower, length, length / 4)
        better = lower[:, None]
        a, b = torch.where(better, new_a, a), torch.where(better, new_b, b)
    raise ValueError(
        f"scores: the projection is not within tolerance after {max_iterations} iterations; the "
        f"sums are wrong by up to {float(wrong.abs().max()):.1e}. Raise max_iterations or "
        "tolerance, or scale the scores down: the largest is "
        f"{float(scores[scores > -torch.inf].abs().max()):.1e}."
    )


def _dual(found: Tensor, a: Tensor, b: Tensor, target: Tensor) -> Tensor:
    return found.square().sum((-2, -1)) / 2 - ((a + b) * target).sum(-1)


def _simplex_shift(rows: Tensor) -> Tensor:
    """The number per row that makes `max(0, row + number)` sum to 1."""
    ordered = rows.sort(-1, descending=True).values
    count = torch.arange(1, rows.shape[-1] + 1, device=rows.device, dtype=rows.dtype)
    shifts = (1.0 - ordered.cumsum(-1)) / count
    last = (ordered + shifts > 0).sum(-1, keepdim=True).clamp_min(1)
    return shifts.gather(-1, last - 1).squeeze(-1)


def _solve_sums(support: Tensor, sums: Tensor) -> Tensor:
    """(a, b) with `sum of (a[i] + b[j]) over the support` as asked for in each row and column.

    The matrix is the Laplacian (without signs) of the bipartite graph of the support. It is
    singular along (1, -1) on each connected part, where any solution will do; a little on the
    diagonal picks one.
    """
    rows, columns = support.sum(-1), support.sum(-2)
    upper = torch.cat([torch.diag_embed(rows), support], -1)
    lower = torch.cat([support.transpose(-1, -2), torch.diag_embed(columns)], -1)
    matrix = torch.cat([upper, lower], -2)
    ridge = 1e-12 * matrix.shape[-1]
    matrix = matrix + ridge * torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    first = torch.linalg.solve(matrix, sums)
    rest = sums - (matrix @ first[..., None]).squeeze(-1)
    solution: Tensor = first + torch.linalg.solve(matrix, rest)
    return solution


def _check_square(scores: Tensor, what: str) -> None:
    if scores.shape[-1] != scores.shape[-2]:
        raise ValueError(
            f"scores: expected as many queries as keys, since {what} is defined for square "
            f'matrices only, got {list(scores.shape)}. Use normalizer="sinkhorn", which is not.'
        )
