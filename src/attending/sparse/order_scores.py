"""How blocky an attention map is in each order of its tokens.

    found = order_statistics(query, key, grid=(8, 16, 16), block_size=64)
    sparsity, quantisation = found.sparsity(0.9), found.quantisation()     # [batch, heads, orders]
    order = combined_score(sparsity, quantisation).argmin(-1)              # one for each head

For each order of the grid the map is made again, a few rows of blocks at a time, and only numbers
of its blocks are kept: the N x N map is never there as a whole. Time is that of the scores of dense
attention and of four passes over them, for each order.

Source: PAROAttention (Zhao et al., arXiv 2506.16054), calibration. That step is not in the authors'
code; the formulas come from detailed accounts of the paper's source [3rd]. Blocks b x b of the map
P after reordering, k of them along each side:

    M_sparse = mean over blocks of [share of cells with P < eps is at least sigma]
    M_quant  = mean over blocks of max(P) / mean(P)

Large M_sparse and small M_quant are said to be good. Beware of M_sparse: a head that looks at one
token in each frame has a large entry in one row and column of many blocks, and each of those blocks
is still 98 % under eps. With sigma = 0.9 all blocks are then empty in a bad order, and fewer are in
a good one. Sigma has to be near 1 for maps as thin as that. `kept_mass`, which is ours, asks
directly what share of the attention the best blocks hold.

Decided here, as nothing is known of it: blocks at the
end that are shorter count with the cells that they have; blocks that hold text tokens are not
scored, as no order moves those; a block of nothing but zeros has max / mean = 1, like every other
constant block.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from attending.core.check import check_arguments, check_mask
from attending.core.precision import full_precision
from attending.sparse.axis_order import (
    axis_orders,
    head_token_index,
    permute_key_bias,
    permute_tokens,
)
from attending.sparse.block_scores import SLAB_SCORES
from attending.sparse.static_mask import blocks_without_text, static_block_mask

Rows = Callable[[int, int], Tensor]
"""Rows of a map from the first number to the one before the second."""


class OrderStatistics(NamedTuple):
    """What the blocks of a map hold, in each order of the grid. Blocks with text are left out.

    Attributes:
        below: how many cells of each block are under eps.
        maximum: the largest probability of each block.
        total: the sum of each block.
        cells: how many cells each block has.
    """

    below: Float[Tensor, "batch heads orders query_blocks key_blocks"]
    maximum: Float[Tensor, "batch heads orders query_blocks key_blocks"]
    total: Float[Tensor, "batch heads orders query_blocks key_blocks"]
    cells: Float[Tensor, "query_blocks key_blocks"]

    def sparsity(self, sigma: float = 0.9) -> Float[Tensor, "batch heads orders"]:
        """M_sparse: the share of blocks of which at least `sigma` is under eps; large is good."""
        if not 0 < sigma <= 1:
            raise ValueError(f"sigma: expected a share of a block, 0 < sigma <= 1, got {sigma}.")
        return (self.below >= sigma * self.cells).to(self.below.dtype).mean((-1, -2))

    def quantisation(self) -> Float[Tensor, "batch heads orders"]:
        """M_quant: max over mean of a block, averaged over blocks; at least 1, small is good."""
        peak = self.maximum * self.cells / self.total
        return torch.where(self.total > 0, peak, torch.ones_like(peak)).mean((-1, -2))

    def kept_mass(self, density: float) -> Float[Tensor, "batch heads orders"]:
        """The share of probability in the fullest blocks, so many that the density is met.

        What a static mask is made for, so the most direct score of an order; large is good. It is
        ours, not the paper's.
        """
        mask = static_block_mask(self.total, density)
        whole = self.total.sum((-1, -2))
        return (self.total * mask).sum((-1, -2)) / whole.clamp_min(torch.finfo(whole.dtype).tiny)


@torch.no_grad()
@full_precision
def order_statistics(
    query: Float[Tensor, "batch heads tokens dim"],
    key: Float[Tensor, "batch kv_heads tokens dim"],
    grid: Sequence[int],
    *,
    block_size: int = 64,
    eps: float = 1e-3,
    text_tokens: int = 0,
    text_first: bool = True,
    bias: Tensor | None = None,
    scale: float | None = None,
) -> OrderStatistics:
    """Statistics of `softmax(scale * query @ key.T)`, from query and key, in every order.

    Args:
        query, key: with positions in them (after rotary embeddings), in the order of the model;
            query heads may share key heads.
        grid: tokens along each axis, as (frames, height, width) or (height, width).
        block_size: tokens along each side of a block.
        eps: probabilities under it count as nothing. It does not know N: in a map of N keys the
            mean is 1 / N, so lower it for long sequences.
        text_tokens, text_first: tokens outside the grid, see `axis_order.token_index`. They take
            part in the softmax.
        bias: of keys, boolean (True = visible) or float, `[batch, heads, 1, tokens]`: padding.
        scale: of the scores; `dim ** -0.5` by default.

    Raises:
        ValueError: for arguments that do not fit together; the message names the argument.
    """
    arguments = check_arguments(query, key, None, None, False, scale, True)
    groups = query.shape[1] // key.shape[1]
    dtype = torch.promote_types(query.dtype, torch.float32)
    query, key = query.to(dtype) * arguments.scale, key.to(dtype)
    bias = None if bias is None else check_mask(bias, query, key)[0]

    def ordered(index: Tensor) -> Rows:
        asked = permute_tokens(query, index)
        columns = permute_tokens(key, index).repeat_interleave(groups, 1).mT
        hiding = None if bias is None else permute_key_bias(bias, index)

        def rows(start: int, stop: int) -> Tensor:
            scores = asked[:, :, start:stop] @ columns
            if hiding is None:
                return torch.softmax(scores, -1)
            return torch.softmax(scores + hiding, -1).nan_to_num(0.0)  # queries that see nothing

        return rows

    size = query.shape[0] * query.shape[1]
    return _statistics(
        ordered, query.shape[2], size, grid, block_size, eps, text_tokens, text_first, query.device
    )


@torch.no_grad()
def order_statistics_of_map(
    attention: Float[Tensor, "batch heads tokens tokens"],
    grid: Sequence[int],
    *,
    block_size: int = 64,
    eps: float = 1e-3,
    text_tokens: int = 0,
    text_first: bool = True,
) -> OrderStatistics:
    """The same of a map that is at hand, in the order of the model.

    Args:
        attention: probabilities after the softmax.
        grid, block_size, eps, text_tokens, text_first: as in `order_statistics`.

    Raises:
        ValueError: for arguments that do not fit together; the message names the argument.
    """
    if attention.dim() != 4 or attention.shape[2] != attention.shape[3]:
        raise ValueError(
            f"attention: expected maps [batch, heads, tokens, tokens], got {list(attention.shape)}."
        )

    def ordered(index: Tensor) -> Rows:
        return lambda start, stop: attention[:, :, index[0, start:stop]][..., index[0]]

    size = attention.shape[0] * attention.shape[1]
    return _statistics(
        ordered,
        attention.shape[2],
        size,
        grid,
        block_size,
        eps,
        text_tokens,
        text_first,
        attention.device,
    )


def combined_score(
    sparsity: Float[Tensor, "*batch orders"],
    quantisation: Float[Tensor, "*batch orders"],
    *,
    alpha: float = 0.5,
    literal: bool = False,
) -> Float[Tensor, "*batch orders"]:
    """One number for each order; the smallest is the one to take.

        score = alpha * (1 - sparsity) / sum(1 - sparsity)
                + (1 - alpha) * quantisation / sum(quantisation)

    with sums over the orders. The paper writes `sparsity` where this has `1 - sparsity`, and says
    to take the minimum: taken literally that prefers the order with the fewest empty blocks, and at
    alpha = 1 it takes the worst. So the default is corrected [inferred].

    Args:
        sparsity: M_sparse, from `OrderStatistics.sparsity`.
        quantisation: M_quant, from `OrderStatistics.quantisation`.
        alpha: weight of sparsity, 0 to 1; the paper does not give its own.
        literal: the paper's formula as it is written.

    Raises:
        ValueError: for an alpha outside of 0 to 1.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha: expected a weight from 0 to 1, got {alpha}.")
    first = _shares(sparsity if literal else 1 - sparsity)
    return alpha * first + (1 - alpha) * _shares(quantisation)


def _shares(numbers: Tensor) -> Tensor:
    total = numbers.sum(-1, keepdim=True)
    return torch.where(total > 0, numbers / total, torch.zeros_like(numbers))


def _statistics(
    ordered: Callable[[Tensor], Rows],
    tokens: int,
    maps: int,
    grid: Sequence[int],
    block_size: int,
    eps: float,
    text_tokens: int,
    text_first: bool,
    device: torch.device,
) -> OrderStatistics:
    """Each order in turn, in slabs of whole rows of blocks."""
    if block_size < 1:
        raise ValueError(f"block_size: expected at least 1 token, got {block_size}.")
    first, last = blocks_without_text(tokens, block_size, text_tokens, text_first)
    if first >= last:
        raise ValueError(
            f"block_size: expected blocks of which at least one holds no text, got {block_size} "
            f"for {tokens} tokens of which {text_tokens} are text. Take smaller blocks."
        )
    found: list[list[Tensor]] = []
    for order in axis_orders(grid):
        index = head_token_index(
            grid, [order], text_tokens=text_tokens, text_first=text_first, device=device
        )
        if index.shape[1] != tokens:
            raise ValueError(
                f"grid: expected one of {tokens - text_tokens} tokens, since there are {tokens} of "
                f"which {text_tokens} are text, got {tuple(grid)}."
            )
        start, stop = first * block_size, min(last * block_size, tokens)
        step = block_size * max(1, SLAB_SCORES // max(1, maps * block_size * tokens))
        slabs, rows = [], ordered(index)
        for row in range(start, stop, step):
            slab = rows(row, min(row + step, stop))[..., start:stop]
            slabs.append(tuple(_of_blocks(slab, block_size, eps)))
        found.append([torch.cat(part, -2) for part in zip(*slabs, strict=True)])
    sides = _cells(stop - start, block_size, found[0][0])
    below, maximum, total = (torch.stack(part, 2) for part in zip(*found, strict=True))
    return OrderStatistics(below, maximum, total, sides[:, None] * sides)


def _of_blocks(slab: Tensor, size: int, eps: float) -> Iterator[Tensor]:
    """Of each block of some rows how many cells are below eps, the maximum and the sum."""
    height, width = slab.shape[-2:]
    room = (0, -width % size, 0, -height % size)
    small = (slab < eps).to(slab.dtype)
    if any(room):  # probabilities: a zero changes neither sum nor maximum
        slab, small = pad(slab, room), pad(small, room)
    # One side after the other: many times as fast as both at once where blocks are small.
    yield small.unflatten(-2, (-1, size)).sum(-2).unflatten(-1, (-1, size)).sum(-1)
    yield slab.unflatten(-2, (-1, size)).amax(-2).unflatten(-1, (-1, size)).amax(-1)
    yield slab.unflatten(-2, (-1, size)).sum(-2).unflatten(-1, (-1, size)).sum(-1)


def _cells(length: int, size: int, like: Tensor) -> Tensor:
    """How many tokens each block along a side has."""
    ends = torch.arange(size, length + size, size, device=like.device).clamp_max(length)
    return torch.diff(ends, prepend=ends.new_zeros(1)).to(like.dtype)
