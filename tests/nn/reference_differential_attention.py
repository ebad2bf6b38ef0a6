"""(Grouped) differential attention as it is defined, in loops over heads, float64."""

import torch
from torch import Tensor


def differential_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    noise_weight: float | Tensor,
    ratio: int,
    visible: Tensor | None = None,
) -> Tensor:
    """Query [batch, heads, queries, dim] in groups of `ratio` signal heads and a noise head.

    `visible`: [batch, queries, keys]. A row that sees nothing has the output 0.
    """
    query, key, value = query.double(), key.double(), value.double()
    batch, heads, queries = query.shape[:3]
    noise_heads, pairs = heads // (ratio + 1), key.shape[1] // 2
    signal_heads = noise_heads * ratio
    if visible is None:
        visible = torch.ones(batch, queries, key.shape[2], dtype=torch.bool)
    weight = torch.as_tensor(noise_weight, dtype=torch.float64).expand(batch, signal_heads, queries)
    outputs = []
    for signal in range(signal_heads):
        noise = signal // ratio
        pair = signal // (signal_heads // pairs)
        assert pair == noise // (noise_heads // pairs)
        place = noise * (ratio + 1)
        first = softmax_map(query[:, place + signal % ratio], key[:, 2 * pair], visible)
        second = softmax_map(query[:, place + ratio], key[:, 2 * pair + 1], visible)
        difference = first - weight[:, signal, :, None] * second
        outputs.append(difference @ value[:, pair])
    return torch.stack(outputs, 1)


def softmax_map(query: Tensor, key: Tensor, visible: Tensor) -> Tensor:
    """Of one head, [batch, queries, keys]; rows that see nothing are 0."""
    scores = (query @ key.transpose(1, 2)) * query.shape[-1] ** -0.5
    scores = scores.masked_fill(~visible, -torch.inf)
    exponentials = (scores - scores.amax(-1, keepdim=True).clamp_min(-1e300)).exp()
    exponentials = torch.where(visible, exponentials, 0.0)
    return exponentials / exponentials.sum(-1, keepdim=True).clamp_min(1e-300)
