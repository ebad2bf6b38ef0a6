"""Frozen-QK attention by its definition, in float64, one product of numbers at a time."""

import torch
from torch import Tensor


def features(
    query: Tensor,
    key: Tensor,
    qk_weight: Tensor,
    attn_mask: Tensor | None = None,
    value_bias: bool = True,
) -> Tensor:
    one = torch.ones(1, dtype=torch.float64)
    sets = []
    for row in range(len(query)):
        first = torch.cat([query[row].double(), one])
        heads = []
        for weight in qk_weight.double():
            total = torch.zeros(len(first) if value_bias else len(first) - 1, dtype=torch.float64)
            count = 0
            for place in range(key.shape[1]):
                if attn_mask is not None and not attn_mask[row, place]:
                    continue
                count += 1
                other = torch.cat([key[row, place].double(), one])
                score = torch.dot(first, torch.mv(weight, other))
                if score > 0:
                    total = total + score * other[: len(total)]
            heads.append(total / max(count, 1))
        sets.append(torch.stack(heads))
    return torch.stack(sets)


def ridge(features: Tensor, targets: Tensor, strength: float) -> Tensor:
    """As least squares with rows of `sqrt(strength n) I` added: no normal equations."""
    samples, width = features.shape
    extra = (strength * samples) ** 0.5 * torch.eye(width, dtype=features.dtype)
    rows = torch.cat([features, extra])
    right = torch.cat([targets, targets.new_zeros(width)])
    return torch.linalg.lstsq(rows, right[:, None], driver="gelsd").solution[:, 0]
