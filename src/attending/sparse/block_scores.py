"""How much probability each block of an attention map holds: what planners choose blocks by.

    masses = block_probabilities(query, key, 128)  # [batch, heads, query blocks, key blocks]
    plan = BlockPlan.from_scores(masses, top_k=8, block_size=128, query_length=n, key_length=n)

The map is made a few rows of blocks at a time and never held as a whole, so memory grows with
`block_size x keys`; time is that of the scores of dense attention. `core.blocks.block_statistics`
does the same inside the blocks of a given plan, from a known lse.
"""

import math
from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from attending.core.block_plan import BlockSize
from attending.core.check import check_arguments
from attending.core.precision import full_precision

SLAB_SCORES = 2**20  # scores held at a time, unless one row of blocks has more


@torch.no_grad()
def block_probabilities(
    query: Float[Tensor, "batch heads queries dim"],
    key: Float[Tensor, "batch kv_heads keys dim"],
    block_size: BlockSize,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Float[Tensor, "batch heads query_blocks key_blocks"]:
    """The probability in each block of `softmax(scale * query @ key.T)`, summed over its cells.

    `masses[..., I, J] = sum over queries i of block I and keys j of block J of p[i, j]`. A row of
    blocks sums to its number of queries that see any key: divide by that for shares. The mean over
    a full cell, as SparseD and PARO pool it, is `masses / (block * block)`, also for blocks at the
    end that are shorter. In float32, float64 for float64 tensors; no gradient.

    Args:
        query: what asks.
        key: what is asked; query heads may share key heads.
        block_size: tokens in a block, of both, or of queries and of keys.
        attn_mask: boolean (True = visible) or float bias that broadcasts to
            `[batch, heads, queries, keys]`. Queries that see nothing count as zero.
        is_causal: queries see no later keys; the last query sees all, as in `BlockPlan`.
        scale: of the scores; `dim ** -0.5` by default.

    Raises:
        ValueError: for arguments that do not fit together; the message names the argument.
    """
    height, _ = block_sides(block_size)
    slabs = block_lse_slabs(
        query, key, block_size, attn_mask=attn_mask, is_causal=is_causal, scale=scale
    )
    return torch.cat([sum_rows(block_shares(lse), height) for lse in slabs], dim=2)


def block_lse_slabs(
    query: Float[Tensor, "batch heads queries dim"],
    key: Float[Tensor, "batch kv_heads keys dim"],
    block_size: BlockSize,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Iterator[Float[Tensor, "batch heads slab key_blocks"]]:
    """For each query the log of the sum of `exp(score)` within each block of keys, slab by slab.

    From these follow the shares of blocks under any softmax that runs over whole blocks, without
    the scores: `block_shares(lse)` over all keys, `block_shares(lse[..., first:])` over the later
    ones only. Underflow of the part that is left out does not matter. No gradient.

    Args:
        query, key, block_size, attn_mask, is_causal, scale: as in `block_probabilities`.

    Yields:
        Slabs of whole rows of blocks, in order, the last one with what is left; -inf for a block
        in which a query sees nothing.
    """
    height, width = block_sides(block_size)
    query, key = query.detach(), key.detach()
    arguments = check_arguments(query, key, None, attn_mask, is_causal, scale, True)
    batch, heads, queries, _ = query.shape
    keys, dtype = key.shape[2], torch.promote_types(query.dtype, torch.float32)
    columns = key.to(dtype).mT
    fitting = SLAB_SCORES // max(1, batch * heads * height * keys)
    step = height * max(1, fitting)
    for start in range(0, max(queries, 1), step):
        rows = query[:, :, start : start + step].to(dtype)
        bias = None if arguments.bias is None else arguments.bias.detach()
        if bias is not None and bias.shape[2] > 1:
            bias = bias[:, :, start : start + step]
        if is_causal:
            bias = _future(rows, keys, keys - queries + start)
        yield _block_lse(rows, columns, width, arguments.scale, bias)


def block_shares(
    lse: Float[Tensor, "batch heads rows key_blocks"],
) -> Float[Tensor, "batch heads rows key_blocks"]:
    """The share of each block in each row's softmax over these blocks; 0 where nothing is seen."""
    total = lse.logsumexp(-1, keepdim=True)
    return torch.exp(lse - total.masked_fill(total == -math.inf, math.inf))


def sum_rows(
    rows: Float[Tensor, "batch heads rows columns"], block_size: int
) -> Float[Tensor, "batch heads row_blocks columns"]:
    """Sums over blocks of rows; the last block may be shorter."""
    filled = pad(rows, (0, 0, 0, -rows.shape[2] % block_size))
    blocks = filled.shape[2] // block_size
    summed: Tensor = filled.unflatten(2, (blocks, block_size)).sum(3)
    return summed


def block_sums(
    weights: Float[Tensor, "batch heads queries keys"], block_size: BlockSize
) -> Float[Tensor, "batch heads query_blocks key_blocks"]:
    """Sums over the blocks of a map that is at hand; the last blocks may be shorter."""
    height, width = block_sides(block_size)
    return sum_rows(sum_rows(weights, height).mT, width).mT


def block_sides(block_size: BlockSize) -> tuple[int, int]:
    """Queries and keys in a block.

    Raises:
        ValueError: for sizes below 1.
    """
    sides = (block_size, block_size) if isinstance(block_size, int) else tuple(block_size)
    if len(sides) != 2 or any(side < 1 for side in sides):
        raise ValueError(
            f"block_size: expected a number of tokens of at least 1, or a pair of them, got "
            f"{block_size}."
        )
    return sides


@full_precision
def _block_lse(
    rows: Tensor, columns: Tensor, width: int, scale: float, bias: Tensor | None
) -> Tensor:
    batch, heads, count, dim = rows.shape
    kv_heads, keys = columns.shape[1], columns.shape[3]
    # Heads that share keys are rows of one product: the keys are not copied for each.
    shared = rows.reshape(batch, kv_heads, heads // max(kv_heads, 1) * count, dim) * scale
    scores = (shared @ columns).view(batch, heads, count, keys)
    if bias is not None:
        scores = scores + bias
    scores = pad(scores, (0, -keys % width), value=-math.inf)
    lse: Tensor = scores.unflatten(-1, (-(-keys // width), width)).logsumexp(-1)
    return lse


def _future(rows: Tensor, keys: int, offset: int) -> Tensor:
    """A bias that hides from row i the keys after i + offset."""
    row = torch.arange(rows.shape[2], device=rows.device)[:, None] + offset
    hidden = torch.arange(keys, device=rows.device) > row
    return torch.zeros_like(hidden, dtype=rows.dtype).masked_fill(hidden, -math.inf)
