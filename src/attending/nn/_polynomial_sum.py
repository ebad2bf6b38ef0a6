"""Sums of values weighted by a polynomial of the scores, in blocks of rows, with its gradient.

What softmax attention has in the fused kernels: the map is never held as a whole, forward or
backward, and above the diagonal of a causal map nothing is computed but the rest of a block.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

BLOCK_BYTES = 2**22  # of one block of the map; a few of them at a time


@dataclass(frozen=True)
class Polynomial:
    """`weight = constant + linear s + square s^2` of the scores `s = scale * query . key`."""

    constant: float
    linear: float
    square: float


def polynomial_sum(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    is_causal: bool,
    scale: float,
    polynomial: Polynomial,
) -> Tensor:
    """`sum_j weight(s[i, j]) value[j]` over the visible keys, `[batch, heads, queries, value_dim]`.

    Args:
        query, key, value: of one dtype, float32 or float64; key and value may have fewer heads.
        bias: of 0 and -inf, four dimensions that broadcast.
        is_causal, scale: as in `scaled_dot_product_attention`.
        polynomial: the weight of a score.
    """
    grouped = query.unflatten(1, (key.shape[1], -1))
    if bias is not None:
        bias = bias.unflatten(1, (key.shape[1], -1) if bias.shape[1] > 1 else (1, 1))
    output: Tensor = _PolynomialSum.apply(  # type: ignore[no-untyped-call]
        grouped, key, value, bias, is_causal, scale, polynomial
    )
    return output.flatten(1, 2)


class _PolynomialSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None,
        is_causal: bool,
        scale: float,
        polynomial: Polynomial,
    ) -> Tensor:
        ctx.save_for_backward(query, key, value, bias)
        ctx.arguments = (is_causal, scale, polynomial)
        output = query.new_empty(*query.shape[:4], value.shape[-1])
        for rows, columns in _blocks(query, key, is_causal):
            scores = _scores(query, key, rows, columns, scale)
            weights = _weights(scores, polynomial)
            _hide(weights, bias, rows, columns, is_causal)
            found = weights.flatten(2, 3) @ value[:, :, columns]
            output[:, :, :, rows] = found.unflatten(2, (query.shape[2], -1))
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, bias = ctx.saved_tensors
        is_causal, scale, polynomial = ctx.arguments
        grad_query = torch.empty_like(query)
        grad_key, grad_value = torch.zeros_like(key), torch.zeros_like(value)
        for rows, columns in _blocks(query, key, is_causal):
            scores = _scores(query, key, rows, columns, scale)
            weights = _weights(scores, polynomial)
            _hide(weights, bias, rows, columns, is_causal)
            part = grad[:, :, :, rows].flatten(2, 3)
            grad_value[:, :, columns] += weights.flatten(2, 3).transpose(-1, -2) @ part
            slope = part @ value[:, :, columns].transpose(-1, -2)
            slope = slope.unflatten(2, scores.shape[2:4])
            slope *= scores.mul_(2 * polynomial.square * scale).add_(polynomial.linear * scale)
            _hide(slope, bias, rows, columns, is_causal)
            slope = slope.flatten(2, 3)
            grad_query[:, :, :, rows] = (slope @ key[:, :, columns]).unflatten(2, scores.shape[2:4])
            grad_key[:, :, columns] += slope.transpose(-1, -2) @ query[:, :, :, rows].flatten(2, 3)
        return grad_query, grad_key, grad_value, None, None, None, None


def _blocks(query: Tensor, key: Tensor, is_causal: bool) -> Iterator[tuple[slice, slice]]:
    """Rows of the map, and the columns that they can see."""
    queries, keys = query.shape[3], key.shape[2]
    across = query.shape[:3].numel() * keys * query.element_size()
    step = max(1, min(queries, BLOCK_BYTES // max(across, 1)))
    for start in range(0, queries, step):
        stop = min(start + step, queries)
        yield slice(start, stop), slice(0, min(stop, keys) if is_causal else keys)


def _scores(query: Tensor, key: Tensor, rows: slice, columns: slice, scale: float) -> Tensor:
    part = query[:, :, :, rows]
    scores = part.flatten(2, 3) @ key[:, :, columns].transpose(-1, -2)
    scaled: Tensor = scores.mul_(scale).unflatten(2, part.shape[2:4])
    return scaled


def _weights(scores: Tensor, polynomial: Polynomial) -> Tensor:
    weights = scores * polynomial.square
    return weights.add_(polynomial.linear).mul_(scores).add_(polynomial.constant)


def _hide(
    tensor: Tensor, bias: Tensor | None, rows: slice, columns: slice, is_causal: bool
) -> None:
    """Write 0 where a query does not see a key."""
    if is_causal and rows.start < columns.stop:
        edge = tensor[..., rows.start : columns.stop]
        future = torch.ones(edge.shape[-2:], dtype=torch.bool, device=tensor.device).triu_(1)
        edge.masked_fill_(future, 0.0)
    if bias is not None:
        here = bias if bias.shape[3] == 1 else bias[:, :, :, rows]
        here = here if here.shape[4] == 1 else here[..., columns]
        tensor.masked_fill_(here == -math.inf, 0.0)
