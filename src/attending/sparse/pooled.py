"""Blocks of tokens as one token each: means, how far from them the tokens are, and what they weigh.

    pools = pool_blocks(key, 128)
    pools.mean        # [batch, heads, blocks, dim]
    pools.sizes       # [blocks]: tokens in each; the last block may have fewer

A pooled key stands for as many keys as its block has, so in a softmax beside others its score gets
the log of that.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import pad

from attending.core.kernels import fused_attention
from attending.core.precision import full_precision
from attending.core.state import AttentionState


class BlockPools(NamedTuple):
    """Tokens in blocks, each block as one, in float32 at least.

    Attributes:
        mean: of the tokens of each block.
        sizes: how many tokens each mean stands for.
    """

    mean: Float[Tensor, "batch heads blocks dim"]
    sizes: Float[Tensor, " blocks"]


@full_precision
def pool_blocks(
    tokens: Float[Tensor, "batch heads tokens dim"], block_size: int, *, zero_padded: bool = False
) -> BlockPools:
    """The mean of every `block_size` tokens.

    Args:
        tokens: queries, keys or values.
        block_size: tokens in a block; the last may be shorter.
        zero_padded: fill the last block up with zeros and count those too, as the official code of
            Rectified SpaAttn does: its mean is then nearer to zero than its tokens are.

    Raises:
        ValueError: for a block_size below 1.
    """
    if block_size < 1:
        raise ValueError(f"block_size: expected at least 1, got {block_size}.")
    length = tokens.shape[2]
    dtype = torch.promote_types(tokens.dtype, torch.float32)
    blocks = _in_blocks(tokens, block_size)
    sizes = torch.full((blocks.shape[2],), block_size, dtype=dtype, device=tokens.device)
    if not zero_padded and length % block_size:
        sizes[-1] = length % block_size
    return BlockPools(blocks.sum(3, dtype=dtype) / sizes[:, None], sizes)


@full_precision
def mean_deviation(
    tokens: Float[Tensor, "batch heads tokens dim"],
    pools: BlockPools,
    block_size: int,
    *,
    zero_padded: bool = False,
) -> Float[Tensor, "batch heads blocks dim"]:
    """The mean of `|token - mean of its block|` in each dimension: how far a block is spread.

    Args:
        tokens, block_size, zero_padded: as in `pool_blocks`; padding deviates by `|mean|`.
        pools: what it returned for them.
    """
    distance = (_in_blocks(tokens, block_size) - pools.mean[:, :, :, None]).abs()
    missing = -tokens.shape[2] % block_size
    if missing and not zero_padded:
        distance = distance * _real(tokens, block_size)
    return distance.sum(3) / pools.sizes[:, None]


@full_precision
def attend_pools(
    query: Float[Tensor, "batch heads queries dim"],
    key: BlockPools,
    value: BlockPools,
    chosen: Bool[Tensor, "#batch #heads query_blocks key_blocks"],
    block_size: int,
    *,
    scale: float,
) -> AttentionState:
    """Each query over whole blocks as one key and value each: the state of the chosen blocks.

        score[u, j] = scale query[u] . key.mean[j] + log key.sizes[j]     for chosen blocks j

    The blocks are chosen for a block of queries at a time. The cost is that of dense attention over
    the block size. In float32 at least. Differentiable in query, key and value.

    Args:
        query: what asks.
        key, value: blocks of keys, and their values; query heads may share key heads.
        chosen: which of them each block of queries sees.
        block_size: queries in a block.
        scale: of the scores.
    """
    batch, heads, length, dim = query.shape
    # A block of queries is a head of its own, so that the mask has one row for each block.
    blocks = _in_blocks(query.to(key.mean.dtype), block_size)
    rows = blocks.shape[2]
    bias = key.sizes.log().masked_fill(~chosen, -torch.inf).expand(batch, heads, rows, -1)
    output, lse = fused_attention(
        blocks.flatten(1, 2).reshape(batch, heads * rows, block_size, dim),
        key.mean,
        value.mean,
        bias.reshape(batch, heads * rows, 1, -1),
        False,
        scale,
    )
    return AttentionState(
        output.reshape(batch, heads, rows * block_size, -1)[:, :, :length],
        lse.reshape(batch, heads, rows * block_size)[:, :, :length],
    )


def _in_blocks(tokens: Tensor, block_size: int) -> Tensor:
    """`[batch, heads, blocks, block_size, dim]`, filled up with zeros."""
    missing = -tokens.shape[2] % block_size
    filled: Tensor = pad(tokens, (0, 0, 0, missing)) if missing else tokens
    blocks: Tensor = filled.unflatten(2, (filled.shape[2] // block_size, block_size))
    return blocks


def _real(tokens: Tensor, block_size: int) -> Tensor:
    """`[blocks, block_size, 1]`: 1 for tokens, 0 for what the last block was filled up with."""
    place = torch.arange(-(-tokens.shape[2] // block_size) * block_size, device=tokens.device)
    return (place < tokens.shape[2]).to(tokens.dtype).view(-1, block_size, 1)
