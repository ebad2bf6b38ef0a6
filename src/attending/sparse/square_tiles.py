"""Image tokens tile by tile, and the round window on them as a plan of blocks.

Row by row, as tokens usually lie, a circle touches many blocks and fills few. In square tiles it
touches about as many as its area asks for. `circular_window_attention` does better still, as it
needs no mask for the blocks at the rim; the plan is for what works on blocks: `BlockSparse`,
unions with other plans, pictures, and the window of whole tiles that a circle is compared with.
"""

import math

import torch
from jaxtyping import Int
from torch import Tensor

from attending.core.block_plan import BlockPlan
from attending.sparse._grid_window import Grid, check_tile, window_shape
from attending.sparse.circular_window import TILE


def circular_window_plan(
    grid: Grid,
    radius: float,
    *,
    frame_radius: int | None = None,
    tile: int = TILE,
    device: torch.device | str | None = None,
) -> BlockPlan:
    """The blocks that the window touches, for image tokens in the order of `square_tile_order`.

        order = square_tile_order(grid, tile)
        plan = circular_window_plan(grid, radius, tile=tile)
        mask = circular_window_mask(grid, radius)[order][:, order]
        state = block_sparse_attention(*(one[:, :, order] for one in (q, k, v)), plan, bias=mask)
        output = state.output[:, :, order.argsort()]

    With the mask as `bias` that is exactly the window, at the cost of a mask of the size of the
    map; without it, a window of whole tiles, a little larger. Row by row, as tokens usually lie, a
    circle touches many more blocks of the same size.

    Args:
        grid, radius, frame_radius: as in `circular_window_attention`.
        tile: rows and columns of a tile; a block is a tile, so it has to divide height and width.
        device: of the plan.

    Raises:
        ValueError: for tiles that do not fill the grid.
    """
    shape, window = window_shape(grid, radius, frame_radius)
    check_tile(shape, tile)
    frames, rows, columns = shape[0], shape[1] // tile, shape[2] // tile
    number = torch.arange(frames * rows * columns, device=device)
    place = (number // (rows * columns), number // columns % rows, number % columns)
    apart = [(one[:, None] - one).abs() for one in place]
    # The nearest tokens of two tiles are one tile less apart, and one token.
    gaps = [(one * tile - (tile - 1)).clamp_min(0) for one in apart[1:]]
    return BlockPlan.from_block_mask(
        window.sees(apart[0], *gaps),
        block_size=tile**2,
        query_length=math.prod(shape),
        key_length=math.prod(shape),
    )


def square_tile_order(grid: Grid, tile: int = TILE) -> Int[Tensor, " tokens"]:
    """The numbers of the tokens of a grid, tile after tile, so that neighbours come together.

    `tensor[:, :, order]` goes there, `tensor[:, :, order.argsort()]` back. Tiles lie row by row
    within a frame, and so do the tokens within a tile.

    Args:
        grid: as in `circular_window_attention`.
        tile: rows and columns of a tile. It has to divide height and width.
    """
    shape, _ = window_shape(grid, 1.0, None)
    check_tile(shape, tile)
    frames, height, width = shape
    tokens = torch.arange(frames * height * width)
    cut = tokens.view(frames, height // tile, tile, width // tile, tile)
    return cut.transpose(2, 3).flatten()
