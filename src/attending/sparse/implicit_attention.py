"""The small map between block means: how much each block would get, and which to keep by it.

Rectified SpaAttn (Liu et al., arXiv 2511.19835) calls it implicit full attention. Where tokens of a
block are alike, it is the true mass of blocks; it costs a map of blocks instead of tokens. Checked
against the official code, see `attending.sparse.rectified`.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attending.core.precision import full_precision
from attending.sparse.pooled import BlockPools, mean_deviation


@full_precision
def implicit_full_attention(
    query: BlockPools,
    key: BlockPools,
    text: Float[Tensor, "batch kv_heads text dim"] | None = None,
    *,
    text_mask: Bool[Tensor, "#batch text"] | None = None,
    scale: float,
) -> Float[Tensor, "batch heads query_blocks columns"]:
    """A: the share of each key block for the mean query of each block, and of all text (IPAR).

        A[i, j]    = exp(scale query.mean[i] . key.mean[j] + log key.sizes[j]) / Z[i]
        A[i, text] = sum_m exp(scale query.mean[i] . text[m]) / Z[i]

    with Z such that a row sums to 1. A pooled key counts as many times as it has tokens; text keys
    are not pooled, so each counts once. The official code weighs with the block size after the
    softmax, which is the same number and can underflow where this does not.

    Args:
        query, key: pooled; query heads may share key heads.
        text: keys of text, a last column for all of them together. None adds no column.
        text_mask: True for text that is there.
        scale: of the scores.
    """
    groups = query.mean.shape[1] // key.mean.shape[1]
    scores = scale * query.mean @ key.mean.repeat_interleave(groups, 1).mT + key.sizes.log()
    if text is not None:
        text = text.to(query.mean.dtype).repeat_interleave(groups, 1)
        on_text = scale * query.mean @ text.mT
        if text_mask is not None:
            on_text = on_text.masked_fill(~text_mask[:, None, None, :], -torch.inf)
        scores = torch.cat([scores, on_text.logsumexp(-1, keepdim=True)], -1)
    return scores.softmax(-1)


def critical_blocks(
    shares: Float[Tensor, "batch heads query_blocks columns"],
    blocks: int,
    *,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Bool[Tensor, "batch heads query_blocks blocks"]:
    """M: for each row the columns with the largest shares.

    So many that they are one more than have at most `top_p` together, and at least `top_k`. With a
    share that is exactly `top_p` that is one more than needed, as in the official code.

    Args:
        shares: as `implicit_full_attention` gives them; the column of text is ranked too.
        blocks: how many of the columns are blocks and come back.
        top_k: at least so many; more than there are is all.
        top_p: 0 to 1; at 1 all are kept. None is 0.

    Raises:
        ValueError: if neither is given, or one is out of range.
    """
    if top_k is None and top_p is None:
        raise ValueError("top_k, top_p: expected at least one of them, got neither.")
    if top_k is not None and (int(top_k) != top_k or top_k < 1):
        raise ValueError(f"top_k: expected a whole number of at least 1, got {top_k}.")
    if top_p is not None and not 0 <= top_p <= 1:
        raise ValueError(f"top_p: expected a share, 0 <= top_p <= 1, got {top_p}.")
    if top_p == 1:  # the sum of all may come out above 1 by rounding
        return torch.ones_like(shares[..., :blocks], dtype=torch.bool)
    with torch.no_grad():
        ordered, order = shares.sort(dim=-1, descending=True, stable=True)
        wanted = torch.full_like(order[..., :1], top_k or 1)
        if top_p is not None:
            within = (ordered.cumsum(-1) <= top_p).sum(-1, keepdim=True) + 1
            wanted = torch.maximum(wanted, within)
        rank = torch.arange(shares.shape[-1], device=shares.device)
        mask = torch.zeros_like(shares, dtype=torch.bool).scatter(-1, order, rank < wanted)
        return mask[..., :blocks]


@torch.no_grad()
@full_precision
def pooling_gains(
    query: Float[Tensor, "batch heads queries dim"],
    key: Float[Tensor, "batch kv_heads keys dim"],
    query_pools: BlockPools,
    key_pools: BlockPools,
    block_size: int,
    *,
    zero_padded: bool = False,
) -> Bool[Tensor, "batch heads query_blocks key_blocks"]:
    """G: where a pooled block should do more good than harm, by the paper's gate (GAPR).

        gain[i, j]  = |qm_i . km_j|
        error[i, j] = |qd_i . km_j| + |qm_i . kd_j|         G = gain > error

    with the means qm, km of a block and the mean absolute deviations qd, kd from them, in each
    dimension. Not scaled. It compares logits, so unlike attention it changes when one vector is
    added to all keys, and the errors of dimensions may cancel: the paper's choice, kept as it is.

    Args:
        query, key: the tokens.
        query_pools, key_pools: of them, by `pool_blocks`.
        block_size, zero_padded: as there.
    """
    groups = query.shape[1] // key.shape[1]
    spread_of_query, spread_of_key = (
        mean_deviation(tokens, pools, block_size, zero_padded=zero_padded)
        for tokens, pools in ((query, query_pools), (key, key_pools))
    )
    key_mean, key_spread = (
        one.repeat_interleave(groups, 1).mT for one in (key_pools.mean, spread_of_key)
    )
    gain = (query_pools.mean @ key_mean).abs()
    error = (spread_of_query @ key_mean).abs() + (query_pools.mean @ key_spread).abs()
    return gain > error
