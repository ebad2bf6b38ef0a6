"""Rectified block-sparse attention: what was dropped is estimated from pooled blocks.

Plain block-sparse attention errs twice. The kept keys get too much weight, as softmax is normalised
over them alone, and the dropped ones get none. Both are corrected from a small map between block
means, which block selection has anyway, so at the same density the output is closer to dense.

    output = rectified_block_sparse_attention(query, key, value, block_size=128, top_k=16)

For a visual query in block i, with M the kept blocks, Z the dropped blocks that are pooled and
`A_ij` the share of block j in the map of means:

    R_i    = 1 - sum over j in Z of A_ij
    output = R_i * (attention over the keys of M) + sum over j in Z of A_ij * mean value of j

| `rectify` | Z | |
| --- | --- | --- |
| `"none"` | nothing | plain block-sparse attention |
| `"ipar"` | nothing, and R_i is the share of M | dropped keys still get nothing |
| `"ipar+gapr"` | dropped blocks that pass the gate | the paper's method |
| `"all"` | all dropped blocks | ours: no gate |
| `"row"` | all dropped blocks, seen by each query on its own | ours: merged by lse; A is not used |

On synthetic tokens all of them are closer to dense attention than `"none"`, and `"row"` is closest
where the tokens of a block are alike; that the gate is better than pooling everything did not hold
there. See the page of evidence, `attending reproduce rectified-spaattn`.

Source: Rectified SpaAttn (Liu et al., arXiv 2511.19835) and its official code, whose outputs are
the golden vectors. Differences: the last block is pooled over the tokens it has and not over the
zeros it was filled up with (`zero_padded=True` brings those back); text may be hidden for each
sequence of a batch on its own; nothing is written into the caller's tensors; key heads may be
shared. The choice of blocks and the gate have no gradient; everything else has.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attending.core.block_plan import BlockPlan
from attending.core.blocks import block_sparse_attention
from attending.core.check import check_arguments
from attending.core.precision import full_precision
from attending.core.state import attend, merge
from attending.sparse.implicit_attention import (
    critical_blocks,
    implicit_full_attention,
    pooling_gains,
)
from attending.sparse.pooled import BlockPools, attend_pools, pool_blocks

Rectify = Literal["none", "ipar", "ipar+gapr", "all", "row"]
RECTIFY: tuple[Rectify, ...] = get_args(Rectify)


@dataclass(frozen=True, eq=False)
class Rectification:
    """What is kept of an attention map, and what stands for the rest.

    Attributes:
        plan: the kept blocks of visual queries and keys. Text is always kept, and not in it.
        shares: A, the share of each key block for each query block; with text one more column, the
            share of all text.
        pooled: Z, the dropped blocks that their means stand for.
        factor: R, what the output over the kept keys is multiplied by.
        remainder: what is added to it for each query block. None for `"row"`, where factor is not
            used either.
        key, value: the pooled keys and values.
    """

    plan: BlockPlan
    shares: Float[Tensor, "batch heads blocks columns"]
    pooled: Bool[Tensor, "batch heads blocks blocks"]
    factor: Float[Tensor, "batch heads blocks"]
    remainder: Float[Tensor, "batch heads blocks value_dim"] | None
    key: BlockPools
    value: BlockPools


def rectified_block_sparse_attention(
    query: Float[Tensor, "batch heads tokens dim"],
    key: Float[Tensor, "batch kv_heads tokens dim"],
    value: Float[Tensor, "batch kv_heads tokens value_dim"],
    *,
    text_length: int = 0,
    text_mask: Bool[Tensor, "#batch text"] | None = None,
    block_size: int = 128,
    top_k: int | None = None,
    top_p: float | None = 0.3,
    keep: Bool[Tensor, "*batch_heads blocks blocks"] | None = None,
    neighbors: Bool[Tensor, "*batch_heads blocks blocks"] | None = None,
    rectify: Rectify = "ipar+gapr",
    zero_padded: bool = False,
    scale: float | None = None,
) -> Float[Tensor, "batch heads tokens value_dim"]:
    """Self-attention over a few blocks of visual tokens, with the rest estimated.

    Visual tokens come first, text last. Text keys are seen by all and never pooled; text queries
    see everything, densely. Order visual tokens so that blocks are alike (`gilbert_order`).

    Blocks are kept by their share A in the map of means: those with the largest shares, one more
    than have at most `top_p` together, and at least `top_k`. The column of all text takes part in
    this ranking, as in the official code, though it is kept anyway; so with text there may be
    `top_k - 1` visual blocks.

    Args:
        query, key, value: of one sequence each; query heads may share key heads.
        text_length: how many of the last tokens are text.
        text_mask: True for text that is there, False for padding.
        block_size: tokens in a block; the last may be shorter.
        top_k: blocks to keep at least. The official scripts use
            `int((1 - drop) * blocks)` with a drop of 0.75 to 0.9.
        top_p: share to keep, 0 to 1; None to go by top_k alone.
        keep: the kept blocks themselves. Then nothing is ranked, and top_k, top_p and neighbors
            are not used.
        neighbors: blocks that are kept as well (`block_neighbors`).
        rectify: what stands for dropped blocks; see the module.
        zero_padded: pool a shorter last block as the official code does.
        scale: of the scores; `dim ** -0.5` by default. The gate uses scores without it.

    Returns:
        The output, in the dtype of query. With everything kept it is that of dense attention.

    Raises:
        ValueError: for arguments that do not fit together; the message names the argument.
    """
    found = rectification(
        query,
        key,
        value,
        text_length=text_length,
        text_mask=text_mask,
        block_size=block_size,
        top_k=top_k,
        top_p=top_p,
        keep=keep,
        neighbors=neighbors,
        rectify=rectify,
        zero_padded=zero_padded,
        scale=scale,
    )
    return apply_rectification(query, key, value, found, text_mask=text_mask, scale=scale)


@full_precision
def rectification(
    query: Float[Tensor, "batch heads tokens dim"],
    key: Float[Tensor, "batch kv_heads tokens dim"],
    value: Float[Tensor, "batch kv_heads tokens value_dim"],
    *,
    text_length: int = 0,
    text_mask: Bool[Tensor, "#batch text"] | None = None,
    block_size: int = 128,
    top_k: int | None = None,
    top_p: float | None = 0.3,
    keep: Bool[Tensor, "*batch_heads blocks blocks"] | None = None,
    neighbors: Bool[Tensor, "*batch_heads blocks blocks"] | None = None,
    rectify: Rectify = "ipar+gapr",
    zero_padded: bool = False,
    scale: float | None = None,
) -> Rectification:
    """The first half of `rectified_block_sparse_attention`, which has the arguments: the plan.

    For looking at what is kept and pooled, before or instead of computing it.
    """
    scale = check_arguments(query, key, value, None, False, scale, True).scale
    length = _check_text(query, key, text_length, text_mask)
    if rectify not in RECTIFY:
        raise ValueError(f"rectify: expected one of {', '.join(RECTIFY)}, got {rectify!r}.")
    visual = tuple(tensor[:, :, :length] for tensor in (query, key, value))
    pools = [pool_blocks(tensor, block_size, zero_padded=zero_padded) for tensor in visual]
    text = key[:, :, length:] if text_length else None
    shares = implicit_full_attention(pools[0], pools[1], text, text_mask=text_mask, scale=scale)
    blocks, batch_heads = pools[0].mean.shape[2], query.shape[:2]
    if keep is None:
        kept = critical_blocks(shares, blocks, top_k=top_k, top_p=top_p)
        if neighbors is not None:
            kept = kept | _check_mask("neighbors", neighbors, blocks, batch_heads)
    else:
        kept = _check_mask("keep", keep, blocks, batch_heads)
        if not text_length and not bool(kept.any(-1).all()):
            raise ValueError(
                "keep: expected at least one block for each block of queries, got a row without; "
                "add the diagonal, for example."
            )
        kept = kept.expand(*batch_heads, blocks, blocks)
    pooled = torch.zeros_like(kept) if rectify in ("none", "ipar") else ~kept
    if rectify == "ipar+gapr":
        pooled = pooled & pooling_gains(
            visual[0], visual[1], pools[0], pools[1], block_size, zero_padded=zero_padded
        )
    visual_shares = shares[..., :blocks]
    weights = visual_shares * (~kept if rectify == "ipar" else pooled)
    remainder = None
    if rectify != "row":
        repeated = pools[2].mean.repeat_interleave(query.shape[1] // value.shape[1], 1)
        remainder = (visual_shares * pooled) @ repeated
    plan = BlockPlan.from_block_mask(
        kept, block_size=block_size, query_length=length, key_length=length
    )
    return Rectification(plan, shares, pooled, 1 - weights.sum(-1), remainder, pools[1], pools[2])


@full_precision
def apply_rectification(
    query: Float[Tensor, "batch heads tokens dim"],
    key: Float[Tensor, "batch kv_heads tokens dim"],
    value: Float[Tensor, "batch kv_heads tokens value_dim"],
    found: Rectification,
    *,
    text_mask: Bool[Tensor, "#batch text"] | None = None,
    scale: float | None = None,
) -> Float[Tensor, "batch heads tokens value_dim"]:
    """The second half of `rectified_block_sparse_attention`: attention over what is kept, mended.

    Args:
        query, key, value, text_mask, scale: those that `found` was found for.
        found: what `rectification` returned.
    """
    scale = check_arguments(query, key, value, None, False, scale, True).scale
    length = found.plan.query_length
    asked, size = query[:, :, :length], found.plan.block_size[0]
    hidden = None
    if text_mask is not None:
        hidden = torch.zeros(text_mask.shape, dtype=torch.float32, device=query.device)
        hidden = hidden.masked_fill(~text_mask, -torch.inf)[:, None, None, :]
    parts = [
        block_sparse_attention(
            asked, key[:, :, :length], value[:, :, :length], found.plan, scale=scale
        )
    ]
    if length < key.shape[2]:
        on_text = attend(asked, key[:, :, length:], value[:, :, length:], bias=hidden, scale=scale)
        parts.append(on_text)
    if found.remainder is None:
        rest = attend_pools(asked, found.key, found.value, found.pooled, size, scale=scale)
        parts.append(rest)
    kept = merge(*parts).output
    if found.remainder is not None:
        factor, remainder = (
            one.repeat_interleave(size, 2)[:, :, :length]
            for one in (found.factor[..., None], found.remainder)
        )
        kept = (factor * kept + remainder).to(query.dtype)
    if length == query.shape[2]:
        return kept
    if hidden is not None:
        hidden = torch.nn.functional.pad(hidden, (length, 0))
    dense = attend(query[:, :, length:], key, value, bias=hidden, scale=scale)
    return torch.cat([kept, dense.output], 2)


def _check_text(query: Tensor, key: Tensor, text_length: int, text_mask: Tensor | None) -> int:
    """How many tokens are visual."""
    tokens = query.shape[2]
    if key.shape[2] != tokens:
        raise ValueError(
            f"key: expected as many tokens as query has, {tokens}, as in self-attention, got "
            f"{key.shape[2]}."
        )
    if not 0 <= text_length < tokens:
        raise ValueError(
            f"text_length: expected 0 to {tokens - 1}, as some of the {tokens} tokens are visual, "
            f"got {text_length}."
        )
    shapes = ((1, text_length), (query.shape[0], text_length))
    if text_mask is not None and (
        text_mask.dtype != torch.bool or tuple(text_mask.shape) not in shapes
    ):
        raise ValueError(
            f"text_mask: expected booleans [batch, text] = {list(shapes[1])}, True for text that "
            f"is there, got {text_mask.dtype} {list(text_mask.shape)}."
        )
    return tokens - text_length


def _check_mask(name: str, mask: Tensor, blocks: int, batch_heads: torch.Size) -> Tensor:
    is_mask = mask.dtype == torch.bool and 2 <= mask.dim() <= 4
    front = (1,) * (4 - mask.dim()) + tuple(mask.shape)
    fits = front[2:] == (blocks, blocks) and all(
        size in (1, full) for size, full in zip(front[:2], batch_heads, strict=True)
    )
    if not (is_mask and fits):
        raise ValueError(
            f"{name}: expected booleans [blocks, blocks] = [{blocks}, {blocks}], batch and heads "
            f"before them if they differ, got {mask.dtype} {list(mask.shape)}."
        )
    return mask.reshape(front)
