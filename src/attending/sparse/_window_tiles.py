"""Attention of grid tokens within a window around each of them, tile by tile, as a state.

The queries are cut into square tiles. The keys that some query of a tile sees lie at the same
places relative to the tile wherever it is, but for the edges of the grid. So tiles are sorted into
kinds, few of them, and all tiles of a kind share one small mask `[tile, keys]`, which stays in the
cache: no mask of the size of the map is ever made. The backward pass gathers again and keeps
nothing but output and lse.
"""

import itertools
import math
from collections import defaultdict
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attending.core._block_cells import GATHER_BYTES
from attending.core.kernels import fused_attention
from attending.core.partial_gradients import partial_gradients
from attending.core.precision import full_precision
from attending.core.state import AttentionState
from attending.sparse._grid_window import Shape, Window


class Kind(NamedTuple):
    """Tiles with equal surroundings.

    Attributes:
        starts: number of the first query of each tile.
        key_starts: number of the token to which `keys` are relative, for each tile.
        queries, keys: numbers of the tokens of a tile, and of those around it, relative to these.
        visible: which of them sees which; None if all.
    """

    starts: Tensor  # [tiles]
    key_starts: Tensor  # [tiles]
    queries: Tensor  # [tile]
    keys: Tensor  # [keys]
    visible: Tensor | None  # [tile, keys]

    @property
    def entries(self) -> int:
        """Pairs of query and key that are computed, all its tiles together."""
        return len(self.starts) * len(self.queries) * len(self.keys)


@lru_cache(maxsize=16)
def tile_kinds(
    grid: Shape, window: Window, tile: Shape, key_grid: Shape, lead: Shape
) -> tuple[Kind, ...]:
    """`find_kinds`, remembered for some grids: it is a pure function of numbers."""
    return find_kinds(grid, window, tile, key_grid, lead)


def find_kinds(
    grid: Shape, window: Window, tile: Shape, key_grid: Shape, lead: Shape
) -> tuple[Kind, ...]:
    """The tiles of a grid of queries, sorted.

    Args:
        grid: of the queries, which lie frame by frame and row by row.
        window: what each sees.
        tile: frames, rows and columns of a tile.
        key_grid: of the keys; that of the queries and more around it.
        lead: where in the grid of keys the first query lies.
    """
    reach = window.reach(key_grid)
    axes = [_spans(*of_axis) for of_axis in zip(grid, tile, key_grid, lead, reach, strict=True)]
    found: dict[tuple[tuple[int, int, int], ...], list[tuple[int, int]]] = defaultdict(list)
    for spans in itertools.product(*axes):
        signature = tuple((size, begin - lead, length) for _, size, lead, begin, length in spans)
        start = _number([span[0] for span in spans], grid)
        key_start = _number([span[3] for span in spans], key_grid)
        found[signature].append((start, key_start))
    kinds = []
    for signature, starts in found.items():
        tile_here = tuple(size for size, _, _ in signature)
        around = tuple(length for _, _, length in signature)
        asked, seen = _coordinates(tile_here), _coordinates(around)
        shift = [begin for _, begin, _ in signature]
        offsets = [
            seen[axis] + shift[axis] - asked[axis][:, None] for axis in range(3)
        ]  # [tile, keys]
        visible = window.sees(*offsets)
        some = visible.any(0)
        visible = visible[:, some]
        first, key_first = torch.tensor(starts).unbind(1)
        kinds.append(
            Kind(
                first,
                key_first,
                _number(list(asked), grid),
                _number(list(seen), key_grid)[some],
                None if bool(visible.all()) else visible,
            )
        )
    return tuple(kinds)


def _spans(
    length: int, tile: int, keys: int, lead: int, reach: int
) -> list[tuple[int, int, int, int, int]]:
    """Along an axis, of each tile: start, size, place among the keys; and keys: start, size."""
    spans = []
    for start in range(0, length, tile):
        size = min(tile, length - start)
        place = lead + start
        begin, end = max(0, place - reach), min(keys, place + size + reach)
        spans.append((start, size, place, begin, end - begin))
    return spans


def _coordinates(shape: tuple[int, ...]) -> tuple[Tensor, ...]:
    axes = torch.meshgrid(*(torch.arange(size) for size in shape), indexing="ij")
    return tuple(axis.flatten() for axis in axes)


def _number(place: Any, grid: Shape) -> Any:
    return (place[0] * grid[1] + place[1]) * grid[2] + place[2]


@full_precision
def window_state(
    query: Tensor, key: Tensor, value: Tensor, kinds: tuple[Kind, ...], scale: float
) -> AttentionState:
    """The state of each query of the grid over the keys in its window. Nothing is checked."""
    return AttentionState(*_Tiled.apply(query, key, value, kinds, scale))  # type: ignore[no-untyped-call]


class _Part(NamedTuple):
    """One call of the kernel: numbers of queries `[rows, tile]` and of keys `[rows, keys]`."""

    asked: Tensor
    keys: Tensor  # [rows, 1, keys, dim]
    values: Tensor
    seen: Tensor
    bias: Tensor | None


class _Rows:
    """Tensors `[batch, heads, tokens, dim]` as rows of tokens, heads of one group side by side."""

    def __init__(self, tensor: Tensor, kv_heads: int) -> None:
        self.batch, self.heads, self.tokens = tensor.shape[:3]
        self.kv_heads = kv_heads
        grouped = tensor.unflatten(1, (kv_heads, -1)).transpose(2, 3)
        self.rows = grouped.reshape(self.batch * kv_heads * self.tokens, *grouped.shape[3:])

    def take(self, index: Tensor, room: Tensor | None = None) -> Tensor:
        """`[rows, group, some tokens, dim]`, in the room if there is any."""
        flat = index.flatten()
        into = None if room is None else room[: len(flat)]
        some: Tensor = torch.index_select(self.rows, 0, flat, out=into)
        return some.view(*index.shape, *some.shape[1:]).transpose(1, 2)

    def put(self, index: Tensor, tensor: Tensor, add: bool = False) -> None:
        """The way back of `take`; where a token comes several times, `add` is meant."""
        flat = tensor.transpose(1, 2).flatten(0, 1).to(self.rows.dtype)
        if add:
            self.rows.index_add_(0, index.flatten(), flat)
        else:
            self.rows[index.flatten()] = flat

    def whole(self) -> Tensor:
        """`[batch, heads, tokens, dim]`."""
        grouped = self.rows.view(self.batch, self.kv_heads, self.tokens, -1, self.rows.shape[-1])
        whole: Tensor = grouped.transpose(2, 3).flatten(1, 2)
        return whole


def _parts(query: Tensor, key: Tensor, value: Tensor, kinds: tuple[Kind, ...]) -> Iterator[_Part]:
    """What the kernel is called on; keys and values of a part are gone when the next is asked."""
    sequences = torch.arange(key.shape[0] * key.shape[1], device=key.device)[:, None]
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    rows = [_Rows(one, key.shape[1]) for one in (key, value)]
    # One place for all gatherings, which stays in the cache and is paged in once.
    steps = [_step(len(kind.keys), key, value) for kind in kinds]
    most = max(
        min(step, len(kind.starts) * len(sequences)) * len(kind.keys)
        for step, kind in zip(steps, kinds, strict=True)
    )
    rooms = [one.new_empty(most, 1, one.shape[-1]) for one in (key, value)]
    for kind, step in zip(kinds, steps, strict=True):
        starts, key_starts, queries, keys = (one.to(key.device) for one in kind[:4])
        bias = None
        if kind.visible is not None:
            bias = torch.zeros(kind.visible.shape, dtype=dtype, device=key.device)
            bias = bias.masked_fill(~kind.visible.to(key.device), -math.inf)[None, None]
        first = (sequences * query.shape[2] + starts).flatten()
        key_first = (sequences * key.shape[2] + key_starts).flatten()
        for some, key_some in zip(first.split(step), key_first.split(step), strict=True):
            seen = key_some[:, None] + keys
            taken = [one.take(seen, room) for one, room in zip(rows, rooms, strict=True)]
            yield _Part(some[:, None] + queries, taken[0], taken[1], seen, bias)


def _step(keys: int, key: Tensor, value: Tensor) -> int:
    row_bytes = keys * (key.shape[-1] + value.shape[-1]) * key.element_size()
    return max(1, GATHER_BYTES // row_bytes)


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kinds: tuple[Kind, ...],
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        kv_heads = key.shape[1]
        asked = _Rows(query, kv_heads)
        dtype = torch.promote_types(query.dtype, torch.float32)
        output = _Rows(query.new_zeros(*query.shape[:3], value.shape[-1]), kv_heads)
        lse = _Rows(query.new_zeros(*query.shape[:3], 1, dtype=dtype), kv_heads)
        for part in _parts(query, key, value, kinds):
            found, level = fused_attention(
                asked.take(part.asked), part.keys, part.values, part.bias, False, scale
            )
            output.put(part.asked, found)
            lse.put(part.asked, level[..., None])
        result, levels = output.whole(), lse.whole().squeeze(-1)
        ctx.save_for_backward(query, key, value, result, levels)
        ctx.kinds, ctx.scale = kinds, scale
        ctx.set_materialize_grads(False)
        return result, levels

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output, grad_lse):  # type: ignore[no-untyped-def]
        query, key, value, output, lse = ctx.saved_tensors
        kv_heads = key.shape[1]
        if grad_output is None:
            grad_output = torch.zeros_like(output)
        asked, outputs, grads = (_Rows(one, kv_heads) for one in (query, output, grad_output))
        lses = _Rows(lse[..., None], kv_heads)
        grad_lses = None if grad_lse is None else _Rows(grad_lse[..., None], kv_heads)
        sums = [
            _Rows(torch.zeros_like(one, dtype=lse.dtype), kv_heads) for one in (query, key, value)
        ]
        for part in _parts(query, key, value, ctx.kinds):
            found = partial_gradients(
                asked.take(part.asked),
                part.keys,
                part.values,
                part.bias,
                False,
                ctx.scale,
                outputs.take(part.asked),
                lses.take(part.asked).squeeze(-1),
                grads.take(part.asked),
                None if grad_lses is None else grad_lses.take(part.asked).squeeze(-1),
            )
            sums[0].put(part.asked, found[0])
            for total, grad in zip(sums[1:], found[1:], strict=True):
                total.put(part.seen, grad, add=True)
        query_grad, key_grad, value_grad = (total.whole() for total in sums)
        return (
            query_grad.to(query.dtype),
            key_grad.to(key.dtype),
            value_grad.to(value.dtype),
            None,
            None,
        )
