"""Rectified SpaAttn by its definition, block by block in float64, for tests."""

import math

import torch
from torch import Tensor


def rectified_by_definition(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kept: Tensor,
    *,
    block_size: int,
    text_length: int = 0,
    text_mask: Tensor | None = None,
    rectify: str = "ipar+gapr",
    scale: float | None = None,
) -> Tensor:
    """The output for given kept blocks `[batch, heads, blocks, blocks]`; blocks have true means."""
    batch, heads, tokens, dim = query.shape
    groups = heads // key.shape[1]
    scale = dim**-0.5 if scale is None else scale
    visual = tokens - text_length
    spans = [slice(at, min(at + block_size, visual)) for at in range(0, visual, block_size)]
    if text_mask is None:
        text_mask = torch.ones(batch, text_length, dtype=torch.bool)
    output = query.new_zeros(batch, heads, tokens, value.shape[-1])
    for item in range(batch):
        there = [visual + int(place) for place in text_mask.expand(batch, -1)[item].nonzero()]
        for head in range(heads):
            q, k, v = query[item, head], key[item, head // groups], value[item, head // groups]
            for i, rows in enumerate(spans):
                in_block = _block(q, k, v, spans, i, there, kept[item, head, i], rectify, scale)
                output[item, head, rows] = in_block
            seen = [*range(visual), *there]
            for row in range(visual, tokens):
                output[item, head, row] = (scale * q[row] @ k[seen].T).softmax(-1) @ v[seen]
    return output


def _block(q, k, v, spans, i, text, kept, rectify, scale) -> Tensor:
    mean_q = q[spans[i]].mean(0)
    spread_q = (q[spans[i]] - mean_q).abs().mean(0)
    mean_k = [k[span].mean(0) for span in spans]
    mean_v = [v[span].mean(0) for span in spans]
    sizes = [span.stop - span.start for span in spans]
    weight = [
        size * torch.exp(scale * mean_q @ mean) for size, mean in zip(sizes, mean_k, strict=True)
    ]
    total = sum(weight) + sum(torch.exp(scale * mean_q @ k[m]) for m in text)
    share = [one / total for one in weight]
    dropped = [j for j in range(len(spans)) if not kept[j]]
    seen = [w for j in range(len(spans)) if kept[j] for w in range(*spans[j].indices(len(k)))]
    seen += text
    if rectify == "row":
        outputs = []
        for row in q[spans[i]]:
            scores = [scale * row @ k[w] for w in seen]
            scores += [scale * row @ mean_k[j] + math.log(sizes[j]) for j in dropped]
            values = torch.stack([*v[seen], *(mean_v[j] for j in dropped)])
            outputs.append(torch.stack(scores).softmax(-1) @ values)
        return torch.stack(outputs)
    pooled, factor = [], 1.0
    if rectify == "ipar":
        factor = 1.0 - sum(share[j] for j in dropped)
    if rectify == "all":
        pooled = dropped
    if rectify == "ipar+gapr":
        for j in dropped:
            spread_k = (k[spans[j]] - mean_k[j]).abs().mean(0)
            error = abs(spread_q @ mean_k[j]) + abs(mean_q @ spread_k)
            if abs(mean_q @ mean_k[j]) > error:
                pooled.append(j)
    factor = factor - sum(share[j] for j in pooled)
    output = factor * ((scale * q[spans[i]] @ k[seen].T).softmax(-1) @ v[seen])
    for j in pooled:
        output = output + share[j] * mean_v[j]
    return output
