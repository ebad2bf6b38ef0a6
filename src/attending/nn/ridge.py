"""Ridge regression on features: the closed form for models that are linear in what is learned."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from attending.core.precision import full_precision


@torch.no_grad()
@full_precision
def ridge_solution(
    features: Float[Tensor, "samples features"],
    targets: Float[Tensor, "samples outputs"],
    ridge: Sequence[float],
) -> Float[Tensor, "strengths features outputs"]:
    """The weights that minimise `mean((targets - features w)^2) + ridge |w|^2`, for each ridge.

    With `Phi` the features and n the samples, `w = (Phi^T Phi + ridge n)^-1 Phi^T targets`, or,
    where there are fewer samples than features, the same weights in dual form,
    `w = Phi^T (Phi Phi^T + ridge n)^-1 targets`. The smaller of the two matrices is decomposed
    once, `O(min(samples, features)^3)`, so many strengths and outputs cost about as much as one.

    There is no intercept. No gradient flows through the solution.

    Args:
        features: any floating dtype; the solution is computed in float64, since random features
            are strongly correlated (condition numbers above 1e8 are common).
        targets: for each sample one number or more; each output has a solution of its own.
        ridge: strengths, each at least 0. With 0 the solution is that of least length among those
            of least squares; directions whose eigenvalue is below rounding count as absent.

    Returns:
        In float64: for each strength, the weights of each output.

    Raises:
        ValueError: no samples, features and targets of different lengths, numbers that are not
            finite, no strength or one below 0.
    """
    if features.dim() != 2 or targets.dim() != 2 or len(features) != len(targets):
        raise ValueError(
            "features, targets: expected [samples, features] and [samples, outputs], got "
            f"{list(features.shape)} and {list(targets.shape)}."
        )
    if features.numel() == 0:
        raise ValueError(
            f"features: expected at least one sample and feature, got {list(features.shape)}."
        )
    strengths = [float(one) for one in ridge]
    if not strengths or not all(0 <= one < float("inf") for one in strengths):
        raise ValueError(f"ridge: expected finite strengths of at least 0, got {strengths}.")
    phi, y = features.double(), targets.double()
    if not bool(phi.isfinite().all()) or not bool(y.isfinite().all()):
        raise ValueError("features, targets: expected finite numbers, got inf or nan.")
    samples, width = phi.shape
    dual = samples < width
    gram = phi @ phi.T if dual else phi.T @ phi
    values, vectors = torch.linalg.eigh(gram)
    rounding = torch.finfo(torch.float64).eps * max(samples, width) * float(values[-1])
    projected = vectors.T @ (y if dual else phi.T @ y)
    solutions = []
    for strength in strengths:
        shifted = values.clamp_min(0.0) + strength * samples
        there = shifted > rounding
        inverse = torch.where(there, 1.0 / shifted.where(there, torch.ones_like(shifted)), 0.0)
        found = vectors @ (inverse[:, None] * projected)
        solutions.append(phi.T @ found if dual else found)
    return torch.stack(solutions)
