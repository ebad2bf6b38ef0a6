"""The kernel and the difference of DyDiLA by their formulas, token by token, in float64."""

import torch
from torch import Tensor


def focused_kernel(vector: Tensor, power: float) -> Tensor:
    """One vector."""
    positive = vector.double().clamp(min=0)
    raised = positive**power
    if float(raised.norm()) == 0:
        return torch.zeros_like(positive)
    return positive.norm() * raised / raised.norm()


def differential_map(
    query: Tensor, key: Tensor, other_query: Tensor, other_key: Tensor, asked: Tensor, held: Tensor
) -> Tensor:
    """The map of one head as the four maps that it expands to: [queries, keys]."""
    query, key, other_query, other_key = (
        tensor.double() for tensor in (query, key, other_query, other_key)
    )
    return (
        query @ key.T
        - asked[:, None] * (other_query @ key.T)
        - held * (query @ other_key.T)
        + asked[:, None] * held * (other_query @ other_key.T)
    )
