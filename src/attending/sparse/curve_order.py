"""Tokens of a picture or video along a space-filling curve, so that a block of them is a lump.

Row by row, a block of 128 tokens is a strip of a few rows of one frame; along a generalised Hilbert
("Gilbert") curve it is a small box, near in height, width and time. Its tokens are then more alike,
which is what pooling a block and keeping or dropping it as a whole rely on.

    order = gilbert_order(frames, height, width)
    query, key, value = (order.apply(tensor) for tensor in (query, key, value))
    near = block_neighbors(order, block_size=128)             # which blocks touch
    output = order.undo(output)

Attention does not care about the order of tokens, once rotary embeddings are applied: reordering
query, key and value together and putting the output back changes nothing but rounding.

The curve is J. Cerveny's generalised Hilbert curve in three dimensions, with the order of axes that
Jenga and Rectified SpaAttn use. Written from its rule; on the golden grid, 4 x 6 x 8, the order is
that of their code. Every step goes to a neighbouring cell where all sides are even; where one is
odd, a few steps in a hundred are diagonal or skip up to three cells. Those skips come from halving
negative lengths downwards, as the Python code of the curve does [recall]: towards zero there would
be fewer, but on grids with such sides it would be another curve.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Axis = Literal["t", "h", "w"]
AXES: tuple[Axis, Axis, Axis] = ("t", "h", "w")


@dataclass(frozen=True, eq=False)
class TokenOrder:
    """Another order of the tokens of a grid.

    Attributes:
        grid: frames, height and width; token `(t * height + h) * width + w` is at `(t, h, w)`.
        forward: of each place in the new order, the token that stands there
            (`curve_to_linear` in the official code).
        backward: of each token, its place (`linear_to_curve`).
    """

    grid: tuple[int, int, int]
    forward: Int[Tensor, " tokens"]
    backward: Int[Tensor, " tokens"]

    def apply(
        self, tensor: Float[Tensor, "batch heads tokens dim"]
    ) -> Float[Tensor, "batch heads tokens dim"]:
        """The tokens in the new order, as a copy."""
        return tensor.index_select(-2, self.forward.to(tensor.device))

    def undo(
        self, tensor: Float[Tensor, "batch heads tokens dim"]
    ) -> Float[Tensor, "batch heads tokens dim"]:
        """The way back."""
        return tensor.index_select(-2, self.backward.to(tensor.device))


def gilbert_order(
    frames: int, height: int, width: int, *, axes: tuple[Axis, Axis, Axis] = ("w", "h", "t")
) -> TokenOrder:
    """The tokens of a grid along a generalised Hilbert curve. Any sizes; found once for each.

    Args:
        frames, height, width: of the grid, in tokens; a picture has one frame.
        axes: which come first. The curve runs along the longest side, the first of equal ones, and
            folds the first of the other two first.

    Raises:
        ValueError: for sizes below 1, or axes that are not "t", "h" and "w".
    """
    sizes = dict(zip(AXES, (frames, height, width), strict=True))
    for name, size in zip(("frames", "height", "width"), sizes.values(), strict=True):
        if int(size) != size or size < 1:
            raise ValueError(f"{name}: expected a whole number of at least 1, got {size}.")
    if sorted(axes) != sorted(AXES):
        raise ValueError(f'axes: expected "t", "h" and "w" in any order, got {axes}.')
    return _gilbert_order((int(frames), int(height), int(width)), tuple(axes))


def row_order(frames: int, height: int, width: int) -> TokenOrder:
    """The order that tokens have: frame by frame, row by row. For grids without a curve."""
    same = torch.arange(frames * height * width)
    return TokenOrder((frames, height, width), same, same)


def block_neighbors(order: TokenOrder, block_size: int) -> Bool[Tensor, "blocks blocks"]:
    """Which blocks of consecutive tokens touch: some token of one is next to one of the other.

    Next to means at most one step away in each of time, height and width: the 26 neighbours of a
    cell, and the cell itself, so every block is its own neighbour. Symmetric.

    Args:
        order: the order in which blocks are cut.
        block_size: tokens in a block; the last may be shorter.

    Raises:
        ValueError: for a block_size below 1.
    """
    if block_size < 1:
        raise ValueError(f"block_size: expected at least 1, got {block_size}.")
    frames, height, width = order.grid
    block = (order.backward // block_size).view(frames, height, width)
    blocks = -(-block.numel() // block_size)
    touching = torch.eye(blocks, dtype=torch.bool, device=block.device)
    # Half of the 26 steps; the others are the same pairs the other way round.
    steps = [(t, h, w) for t in (0, 1) for h in (-1, 0, 1) for w in (-1, 0, 1)]
    for step in (step for step in steps if step > (0, 0, 0)):
        here, there = block, block
        for axis, move in enumerate(step):
            length = block.shape[axis] - abs(move)
            if length < 1:
                break
            here = here.narrow(axis, max(-move, 0), length)
            there = there.narrow(axis, max(move, 0), length)
        else:
            touching[here.flatten(), there.flatten()] = True
    return touching | touching.T


@lru_cache(maxsize=16)
def _gilbert_order(grid: tuple[int, int, int], axes: tuple[Axis, ...]) -> TokenOrder:
    stride = {"t": grid[1] * grid[2], "h": grid[2], "w": 1}
    size = dict(zip(AXES, grid, strict=True))
    # The longest side leads; `sorted` keeps the others as they are.
    leading = sorted(axes, key=lambda axis: size[axis] != max(grid))
    first = leading[0]
    rest = [axis for axis in axes if axis != first]
    edges = tuple(_Edge(stride[axis], size[axis]) for axis in (first, *rest))
    forward = torch.tensor(list(_walk(0, edges)))
    backward = torch.empty_like(forward)
    backward[forward] = torch.arange(len(forward))
    return TokenOrder(grid, forward, backward)


class _Edge(NamedTuple):
    """The side of a box: along which axis (by its stride), how long, and which way (the sign)."""

    stride: int
    length: int

    @property
    def reach(self) -> int:
        """From the first cell to just behind the last."""
        return self.stride * self.length

    @property
    def unit(self) -> int:
        return self.stride if self.length > 0 else -self.stride

    @property
    def last(self) -> int:
        """From the first cell to the last."""
        return self.reach - self.unit

    def half(self) -> "_Edge":
        """The first part, an even number of cells if there are more than two, so that ends meet."""
        half = self.length // 2  # downwards also for negative lengths, as the official code has it
        if half % 2 and abs(self.length) > 2:
            half += 1 if self.length > 0 else -1
        return _Edge(self.stride, half)

    def without(self, part: "_Edge") -> "_Edge":
        return _Edge(self.stride, self.length - part.length)

    def back(self) -> "_Edge":
        return _Edge(self.stride, -self.length)


def _walk(start: int, edges: tuple[_Edge, ...]) -> Iterator[int]:
    """The cells of a box from its corner `start` to the other end of its first edge.

    A box is cut into two to five smaller ones that the curve passes one after another, each along
    its own first edge, until what is left is a row of cells.
    """
    boxes = [(start, edges)]
    while boxes:
        corner, (along, wide, deep) = boxes.pop()
        sizes = [abs(edge.length) for edge in (along, wide, deep)]
        if 0 in sizes:
            continue
        if sorted(sizes)[1] == 1:  # a row of cells
            row = next((e for e in (along, wide, deep) if abs(e.length) > 1), along)
            yield from (corner + row.unit * step for step in range(abs(row.length)))
            continue
        boxes.extend(reversed(_parts(corner, along, wide, deep)))


def _parts(
    corner: int, along: _Edge, wide: _Edge, deep: _Edge
) -> list[tuple[int, tuple[_Edge, ...]]]:
    length, width, depth = (abs(edge.length) for edge in (along, wide, deep))
    a, b, c = along.half(), wide.half(), deep.half()
    rest_a, rest_b, rest_c = along.without(a), wide.without(b), deep.without(c)
    if 2 * length > 3 * width and 2 * length > 3 * depth:
        return [(corner, (a, wide, deep)), (corner + a.reach, (rest_a, wide, deep))]
    if 3 * width > 4 * depth:
        return [
            (corner, (b, deep, a)),
            (corner + b.reach, (along, rest_b, deep)),
            (corner + along.last + b.last, (b.back(), deep, rest_a.back())),
        ]
    if 3 * depth > 4 * width:
        return [
            (corner, (c, a, wide)),
            (corner + c.reach, (along, wide, rest_c)),
            (corner + along.last + c.last, (c.back(), rest_a.back(), wide)),
        ]
    return [
        (corner, (b, c, a)),
        (corner + b.reach, (deep, a, rest_b)),
        (corner + b.last + deep.last, (along, b.back(), rest_c.back())),
        (corner + along.last + b.reach + deep.last, (deep.back(), rest_a.back(), rest_b)),
        (corner + along.last + b.last, (b.back(), c, rest_a.back())),
    ]
