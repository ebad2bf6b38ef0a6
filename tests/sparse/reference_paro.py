"""PAROAttention by its definitions: the whole map, loops over blocks, float64."""

import itertools
import math

import torch
from torch import Tensor

ORDERS = ("FHW", "FWH", "HWF", "HFW", "WHF", "WFH")


def token_index(grid: tuple[int, ...], order: str) -> list[int]:
    """Walk the grid with the last letter fastest, and say which token stands there."""
    axes = "FHW"[-len(grid) :]
    sizes = dict(zip(axes, grid, strict=True))
    index = []
    for places in itertools.product(*(range(sizes[axis]) for axis in order)):
        at = dict(zip(order, places, strict=True))
        number = 0
        for axis in axes:
            number = number * sizes[axis] + at[axis]
        index.append(number)
    return index


def attention_map(query: Tensor, key: Tensor, scale: float | None = None) -> Tensor:
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return (query.double() @ key.double().mT * scale).softmax(-1)


def block_scores(attention: Tensor, block: int, eps: float, sigma: float) -> tuple[float, float]:
    """M_sparse and M_quant of one map, which may end within a block."""
    empty, peaks = [], []
    for rows in attention.split(block, 0):
        for cell in rows.split(block, 1):
            share = float((cell < eps).sum()) / cell.numel()
            empty.append(1.0 if share >= sigma else 0.0)
            mean = float(cell.mean())
            peaks.append(float(cell.max()) / mean if mean > 0 else 1.0)
    return sum(empty) / len(empty), sum(peaks) / len(peaks)


def codes(values: Tensor, bits: int) -> tuple[Tensor, float]:
    """One group as whole numbers, and its scale."""
    levels = 2 ** (bits - 1) - 1
    scale = max(float(values.abs().max()), 1e-7) / levels
    return torch.round(values / scale), scale


def quantise(values: Tensor, bits: int) -> Tensor:
    """One group there and back."""
    whole, scale = codes(values, bits)
    return whole * scale


def quantised_attention(
    query: Tensor, key: Tensor, value: Tensor, bits: int, groups: str, block: int, visible: Tensor
) -> Tensor:
    """One head; the fixed groups run the online softmax block by block, as a kernel does."""
    # Whole numbers are multiplied, so that equal scores are equal to the last bit.
    slabs = []
    for part in query.split(32):
        q, scale = codes(part, bits)
        across = [(codes(other, bits)) for other in key.split(64)]
        slabs.append(torch.cat([q @ k.T * scale * other for k, other in across], 1))
    v = torch.cat([quantise(part, bits) for part in value.split(block)])
    scores = torch.cat(slabs) * query.shape[-1] ** -0.5
    scores = scores.masked_fill(~visible, -math.inf)
    levels = 2 ** (bits - 1) - 1
    if groups == "fixed":
        rows = []
        for row in scores:
            top, total, output = -math.inf, 0.0, torch.zeros_like(value[0])
            for part, values in zip(row.split(block), v.split(block), strict=True):
                new = max(top, float(part.max()))
                if new == -math.inf:
                    continue
                shrink = math.exp(top - new)
                weights = torch.exp(part - new)
                output = output * shrink + torch.trunc(weights * levels) / levels @ values
                total, top = total * shrink + float(weights.sum()), new
            rows.append(output / total if total else output)
        return torch.stack(rows)
    p = scores.softmax(-1).nan_to_num(0.0)
    if groups == "row":
        p = torch.stack([quantise(row, bits) for row in p])
    else:
        p = torch.cat(
            [
                torch.cat([quantise(cell, bits) for cell in rows.split(block, 1)], 1)
                for rows in p.split(block, 0)
            ]
        )
    return p @ v
