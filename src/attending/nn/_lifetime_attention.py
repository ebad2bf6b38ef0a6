"""Attention in which an interval of rows sees each key: gathered keys, and no map.

Rows go in blocks. A block needs the keys that its first row sees and those that come within it, so
at most window + rows of them: they are gathered, and products of matrices do the rest. Most of them
are seen by every row of the block; a mask is made for the few that come or go within it alone.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

ROWS = 64  # queries in a block: fewer gather more, more see more keys than they keep
FEWEST = 32  # rows in a block, where each has the queries of a group of heads
BLOCKS = 16  # whose keys are found at a time
CACHE_BYTES = 2**21  # of scores at a time on a CPU, where they should stay in the cache
CHUNK_BYTES = 2**27  # elsewhere


class _Cells(NamedTuple):
    """Blocks of rows of all heads of key and value, `[cells, ...]`, a few at a time."""

    query: Tensor  # [cells, rows of all query heads of the group, dim], scaled
    where: Tensor  # [cells, rows]: of the queries, counted through batch, heads and rows
    keys: Tensor  # [cells, kept]: counted through batch, kv heads and keys
    bias: Tensor  # [cells, kept]: -inf where a place is not used
    hidden: Tensor  # [cells, rows, changing]: of the last places, those that come or go
    empty: Tensor | None  # [cells, rows]: rows that see no key, where there may be such


class LifetimeAttention(torch.autograd.Function):
    """`apply(query, key, value, bias, ends, first_row, scale) -> output`.

    Query i is row `i + first_row` and sees key j if `j <= row < ends[j]`, with `bias[j]` added to
    its score. Gradients of the first four; the backward pass gathers again and keeps no map.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor,
        ends: Tensor,
        first_row: int,
        scale: float,
    ) -> Tensor:
        output = query.new_zeros(*query.shape[:3], value.shape[-1])
        flat = output.view(-1, output.shape[-1])
        keys, values = key.flatten(0, 2), value.flatten(0, 2)
        for cells in _cells(query, key, bias, ends, first_row, scale):
            shares = _shares(cells, _gather(keys, cells))
            flat[cells.where.flatten()] = (
                (shares @ _gather(values, cells)).flatten(0, 1).to(output.dtype)
            )
        ctx.save_for_backward(query, key, value, bias, ends)
        ctx.first_row, ctx.scale = first_row, scale
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output):  # type: ignore[no-untyped-def]
        query, key, value, bias, ends = ctx.saved_tensors
        keys, values = key.flatten(0, 2), value.flatten(0, 2)
        exact = torch.promote_types(query.dtype, torch.float32)
        grads = grad_output.reshape(-1, grad_output.shape[-1])
        of_query = query.new_zeros(query.shape).flatten(0, 2)
        of_key, of_value = (
            torch.zeros_like(keys, dtype=exact),
            torch.zeros_like(values, dtype=exact),
        )
        of_bias = torch.zeros_like(bias).flatten()
        for cells in _cells(query, key, bias, ends, ctx.first_row, ctx.scale):
            some_keys, index, where = _gather(keys, cells), cells.keys.flatten(), cells.where
            shares = _shares(cells, some_keys)
            grad = grads[where.flatten()].view(*where.shape, -1).to(exact)
            of_value.index_add_(0, index, (shares.mT @ grad).flatten(0, 1))
            of_shares = grad @ _gather(values, cells).mT
            of_scores = torch.ops.aten._softmax_backward_data(of_shares, shares, -1, exact)
            of_query[where.flatten()] = (
                (of_scores @ some_keys * ctx.scale).flatten(0, 1).to(of_query.dtype)
            )
            of_key.index_add_(0, index, (of_scores.mT @ cells.query).flatten(0, 1))
            of_bias.index_add_(0, index, of_scores.sum(-2).flatten().to(of_bias.dtype))
        return (
            of_query.view_as(query),
            of_key.view_as(key).to(key.dtype),
            of_value.view_as(value).to(value.dtype),
            of_bias.view_as(bias),
            None,
            None,
            None,
        )


def _gather(tensor: Tensor, cells: _Cells) -> Tensor:
    found = tensor.index_select(0, cells.keys.flatten()).view(*cells.keys.shape, -1)
    return found.to(cells.query.dtype)


def _shares(cells: _Cells, keys: Tensor) -> Tensor:
    """The probabilities, `[cells, rows, kept]`."""
    scores = (cells.query @ keys.mT).add_(cells.bias[:, None])
    changing = cells.hidden.shape[-1]
    if changing:
        groups = scores.shape[1] // cells.hidden.shape[1]
        last = scores.unflatten(1, (groups, -1))[..., -changing:]
        last.masked_fill_(cells.hidden[:, None], -math.inf)
    shares = scores.softmax(-1)
    return shares if cells.empty is None else shares.masked_fill_(cells.empty[..., None], 0.0)


def _cells(
    query: Tensor, key: Tensor, bias: Tensor, ends: Tensor, first_row: int, scale: float
) -> Iterator[_Cells]:
    """Every block of every head, as many at a time as the device likes."""
    batch, heads, queries, _ = query.shape
    kv_heads, keys = key.shape[1], key.shape[2]
    groups, device = heads // kv_heads, query.device
    exact = torch.promote_types(query.dtype, torch.float32)
    flat_query = query.flatten(0, 2)
    home = torch.arange(batch * kv_heads, device=device)[:, None, None]
    # A place that is not used holds the key after the last one, which no row sees.
    bias = pad(bias.flatten(0, 1).to(exact), (0, 1), value=-math.inf)
    ends = pad(ends.flatten(0, 1), (0, 1))
    seen = (bias > -math.inf).cumsum(-1) > 0
    has_empty = not bool(seen[:, first_row].all())
    past = torch.arange(first_row, device=device).expand(len(ends), -1)
    alive = _packed(past, ends[:, :first_row] > first_row, keys)
    for start, stop, rows in _spans(queries, max(FEWEST, ROWS // groups)):
        first = torch.arange(start, stop, rows, device=device) + first_row
        row = first[:, None] + torch.arange(rows, device=device)  # [blocks, rows]
        candidates = torch.cat([alive, row.flatten().expand(len(ends), -1)], -1)
        last = ends.gather(-1, candidates)
        index, changing = _block_keys(candidates, last, row, keys)
        alive = _packed(candidates, last > stop + first_row, keys)
        known = index.flatten(1)
        some_bias = bias.gather(-1, known).view(index.shape)
        late = index[..., index.shape[-1] - changing :, None].mT
        final = ends.gather(-1, late.flatten(1)).view(late.shape)
        hidden = (late > row[..., None]) | (final <= row[..., None])
        asked = row - first_row + home * (groups * queries)
        asked = asked[:, :, None] + torch.arange(groups, device=device)[:, None] * queries
        where = asked.flatten(0, 1).flatten(1)
        where_keys = (index.clamp_max(keys - 1) + home * keys).flatten(0, 1)
        empty = ~seen[:, row].flatten(0, 1).repeat(1, groups) if has_empty else None
        limit = CACHE_BYTES if device.type == "cpu" else CHUNK_BYTES
        step = max(1, limit // (where.shape[1] * where_keys.shape[1] * exact.itemsize))
        some_bias, hidden = some_bias.flatten(0, 1), hidden.flatten(0, 1)
        for begin in range(0, len(where), step):
            part = slice(begin, begin + step)
            asks = flat_query.index_select(0, where[part].flatten()).to(exact) * scale
            yield _Cells(
                asks.view(*where[part].shape, -1),
                where[part],
                where_keys[part],
                some_bias[part],
                hidden[part],
                None if empty is None else empty[part],
            )


def _spans(queries: int, rows: int) -> Iterator[tuple[int, int, int]]:
    """Stretches of rows and how many of them make a block; what is left over is one block."""
    whole = queries - queries % rows
    for start in range(0, whole, rows * BLOCKS):
        yield start, min(start + rows * BLOCKS, whole), rows
    if whole < queries:
        yield whole, queries, queries - whole


def _block_keys(candidates: Tensor, last: Tensor, row: Tensor, unused: int) -> tuple[Tensor, int]:
    """The keys of each block, `[heads, blocks, kept]`, and how many at the end come or go in it."""
    start, stop = row[:, :1], row[:, -1:] + 1
    old = (candidates[:, None] < start) & (last[:, None] > start)
    staying = last[:, None] >= stop
    every = candidates[:, None].expand(old.shape)
    leaving = _packed(every, old & ~staying, unused)
    new = row.expand(len(candidates), -1, -1)
    index = torch.cat([_packed(every, old & staying, unused), leaving, new], -1)
    return index, leaving.shape[-1] + new.shape[-1]


def _packed(keys: Tensor, chosen: Tensor, unused: int) -> Tensor:
    """The chosen keys of each row at its front, in their order; `unused` behind them."""
    most = int(chosen.sum(-1).max()) if chosen.numel() else 0
    place = torch.where(chosen, chosen.cumsum(-1) - 1, most)
    packed = keys.new_full((*chosen.shape[:-1], most + 1), unused)
    return packed.scatter_(-1, place, keys)[..., :most]
