"""Equations 1 to 4 of VAR by plain loops over numbers, in float64, on maps that are there."""

import math

import torch
from torch import Tensor


def sink_values(hidden: Tensor, dimensions: list[int], eps: float = 1e-6) -> Tensor:
    """phi of each token of `[batch, tokens, dim]`."""
    result = torch.zeros(hidden.shape[:2], dtype=torch.float64)
    for item, tokens in enumerate(hidden.double().tolist()):
        for place, state in enumerate(tokens):
            rms = math.sqrt(sum(x * x for x in state) / len(state) + eps)
            result[item, place] = max(abs(state[d]) / rms for d in dimensions)
    return result


def selected_heads(
    attention: Tensor,
    image: Tensor,
    sinks: Tensor,
    queries: Tensor,
    min_image_mass: float,
    min_non_sink_ratio: float,
    require_visual_sink: bool = True,
) -> Tensor:
    """Which heads look at the image, for each query: `[batch, heads, queries]`."""
    batch, heads, length, keys = attention.shape
    result = torch.zeros(batch, heads, length, dtype=torch.bool)
    for b in range(batch):
        for h in range(heads):
            for i in range(length):
                row = attention[b, h, i].double().tolist()
                looked = sum(row[j] for j in range(keys) if image[b, j])
                inside = sum(row[j] for j in range(keys) if image[b, j] and not sinks[b, j])
                has_sink = any(bool(image[b, j]) and bool(sinks[b, j]) for j in range(keys))
                result[b, h, i] = (
                    bool(queries[b, i])
                    and (has_sink or not require_visual_sink)
                    and looked >= min_image_mass
                    and looked > 0
                    and inside > 0
                    and inside / looked >= min_non_sink_ratio
                )
    return result


def redistributed(
    attention: Tensor, image: Tensor, sinks: Tensor, selected: Tensor, move_fraction: float
) -> Tensor:
    """The map after eq. 4."""
    result = attention.double().clone()
    batch, heads, length, keys = attention.shape
    for b in range(batch):
        receives = [j for j in range(keys) if image[b, j] and not sinks[b, j]]
        gives = [j for j in range(keys) if sinks[b, j]]
        for h in range(heads):
            for i in range(length):
                if not selected[b, h, i]:
                    continue
                row = attention[b, h, i].double().tolist()
                moved = move_fraction * sum(row[j] for j in gives)
                total = sum(row[j] for j in receives)
                for j in gives:
                    result[b, h, i, j] = (1 - move_fraction) * row[j]
                for j in receives:
                    result[b, h, i, j] = row[j] + moved * row[j] / total
    return result
