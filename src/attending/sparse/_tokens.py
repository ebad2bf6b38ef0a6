"""What all selectors of visual tokens share: checks, unit vectors, cosine distances."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

Features = Float[Tensor, "images tokens dim"]
Attention = Float[Tensor, "images tokens"]
Index = Int[Tensor, "images keep"]


def cosine_distance(features: Features) -> Float[Tensor, "images tokens tokens"]:
    """`1 - cos`, never below 0, so that equal tokens are no less than 0 apart; zeros are at 1."""
    unit = unit_vectors(features)
    cosine = unit @ unit.transpose(-1, -2)
    # Two tokens are often each other's nearest. Rounding shall not decide between them.
    return (1 - (cosine + cosine.transpose(-1, -2)) / 2).clamp_min(0)


def check_tokens(features: Tensor, attention: Tensor | None = None) -> None:
    """Raise a `ValueError` unless the features and the attention of some images fit together."""
    if features.dim() != 3 or not features.is_floating_point() or 0 in features.shape:
        raise ValueError(
            "features: expected a float tensor [images, tokens, dim] with at least one of each, "
            f"got {features.dtype} {list(features.shape)}. For one image use unsqueeze(0)."
        )
    for name, values in (("features", features), ("attention", attention)):
        if values is not None and not bool(torch.isfinite(values).all()):
            raise ValueError(f"{name}: expected finite numbers, got some that are not.")
    if attention is not None and attention.shape != features.shape[:2]:
        raise ValueError(
            f"attention: expected {list(features.shape[:2])}, a number for each token of features, "
            f"got {list(attention.shape)}. Of several heads take the mean; of a map, the row of "
            "the class token without its own column."
        )


def check_keep(keep: int) -> int:
    """The number of tokens to keep, if it is one."""
    if isinstance(keep, bool) or not isinstance(keep, int) or keep < 1:
        raise ValueError(f"keep: expected a whole number of tokens, at least 1, got {keep!r}.")
    return keep


def most_attended(attention: Attention, keep: int) -> Index:
    """The tokens with the most attention, most attended first; of equal ones the earlier first."""
    order = attention.sort(dim=-1, descending=True, stable=True).indices
    return order[:, : check_keep(keep)]


def take(features: Features, index: Index) -> Float[Tensor, "images keep dim"]:
    """The features of the chosen tokens."""
    return features.gather(1, index[..., None].expand(-1, -1, features.shape[-1]))


def unit_vectors(features: Features) -> Features:
    """Features of length 1, at least in float32; zeros stay zeros."""
    features = features.to(torch.promote_types(features.dtype, torch.float32))
    norm: Tensor = torch.linalg.vector_norm(features, dim=-1, keepdim=True)
    return features / (norm + 1e-8)


def in_range(name: str, number: float, low: float, high: float) -> float:
    """The number, if it is in the range that it must be in."""
    if not low <= number <= high:
        raise ValueError(f"{name}: expected a number from {low:g} to {high:g}, got {number}.")
    return number
