"""SparseD's choice of blocks: prompt and answer apart, by the mean probability in each block.

SparseD (Wang, Fang, Ma, Yang, Wang, 2025, arXiv 2509.24014) speeds up masked diffusion language
models, whose every step attends over prompt and answer in both directions. The blocks of each head
are chosen once, with `sparsed_plan`, and used for the steps that follow; the loop around that is
`attending.interventions.sparsed.SparseD`.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attending.core.block_plan import BlockPlan
from attending.core.check import check_arguments
from attending.sparse.block_scores import block_lse_slabs, block_shares, sum_rows


def sparsed_plan(
    query: Float[Tensor, "batch heads tokens dim"],
    key: Float[Tensor, "batch kv_heads tokens dim"],
    new_tokens: int | None = None,
    *,
    select: float = 0.3,
    block_size: int = 32,
    isolated: bool = False,
    count_real: bool = False,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> BlockPlan:
    """The blocks that `sparsed_mask` keeps, as a plan for `block_sparse_attention`.

    Args:
        query, key, new_tokens, select, block_size, isolated, count_real, attn_mask, scale: as in
            `sparsed_mask`.
    """
    mask = sparsed_mask(
        query,
        key,
        new_tokens,
        select=select,
        block_size=block_size,
        isolated=isolated,
        count_real=count_real,
        attn_mask=attn_mask,
        scale=scale,
    )
    return BlockPlan(mask, (block_size, block_size), query.shape[2], key.shape[2])


@torch.no_grad()
def sparsed_mask(
    query: Float[Tensor, "batch heads tokens dim"],
    key: Float[Tensor, "batch kv_heads tokens dim"],
    new_tokens: int | None = None,
    *,
    select: float = 0.3,
    block_size: int = 32,
    isolated: bool = False,
    count_real: bool = False,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> Bool[Tensor, "batch heads blocks blocks"]:
    """Which blocks of keys each block of queries keeps, for each head.

    Of `n` blocks it keeps `kept_blocks(n, select)`, about a share `select`, those whose mean
    probability over the block is highest. That is done twice, and the results are joined:

    1. With the softmax over all keys, among all blocks; of these, blocks of the prompt are kept.
    2. With the softmax over the answer's keys only, among the answer's blocks.

    So an answer that the prompt outshines still sees itself. In step 1 blocks of the answer take
    places from the prompt, as in the official code; `isolated` mends that. Queries of prompt and
    answer are treated alike. Values play no part. Computed in float32 (float64 for float64), a
    few rows of blocks at a time: memory grows with `block_size x tokens`, time is that of one pass
    of dense attention without its values.

    Args:
        query: what asks, rotated and normalised as attention uses it.
        key: what is asked; query heads may share key heads. As many tokens as the query.
        new_tokens: how many tokens of the end are the answer. The block that holds its beginning
            counts as prompt, unless it begins with it; the last block is always the answer's.
            None: all of them, there is no prompt (a video). Then one softmax ranks all blocks.
        select: share of the blocks, from 0 (one block) to 1 (all). The paper's: 0.3 for long
            contexts, 0.5 for short ones.
        block_size: tokens in a block. The paper's: 128 for long contexts, 32 for short ones.
        isolated: rank the prompt's blocks by a softmax over the prompt alone, among themselves,
            as step 2 does for the answer, and keep `kept_blocks` of theirs. This is the paper's
            idea as we understand it [inferred], not the official code.
        count_real: take the mean of the last block over the tokens that it has. The official code
            divides by the full block, so a short last block is ranked too low.
        attn_mask: boolean or float, as in `scaled_dot_product_attention`. Keys that no query sees
            are padding: their own queries do not count, and blocks of nothing else are neither
            kept nor counted. The official code ignores masks.
        scale: of the scores; `dim ** -0.5` by default. The official code for LLaDA divides by the
            root of the number of heads here, by mistake: `scale=heads ** -0.5` gives its masks.

    Returns:
        True = kept.

    Raises:
        ValueError: for arguments that do not fit together; the message names the argument.
    """
    arguments = check_arguments(query, key, None, attn_mask, False, scale, True)
    tokens, blocks = query.shape[2], -(-query.shape[2] // block_size) if block_size > 0 else 0
    _check(query, key, new_tokens, select, block_size)
    first = 0 if new_tokens is None else first_new_block(tokens, block_size, new_tokens)
    real = _real_tokens(arguments.bias, query)

    prompt, answer = [], []
    start = 0
    for lse in block_lse_slabs(query, key, block_size, attn_mask=attn_mask, scale=arguments.scale):
        counted = real[:, None, start : start + lse.shape[2], None]
        ranked = lse[..., :first] if isolated else lse
        if first:
            prompt.append(sum_rows(block_shares(ranked) * counted, block_size))
        answer.append(sum_rows(block_shares(lse[..., first:]) * counted, block_size))
        start += lse.shape[2]

    occupied = sum_rows(real[:, None, :, None].float(), block_size).squeeze(3) > 0
    short = tokens % block_size / block_size if count_real and tokens % block_size else 1.0
    kept = _highest(torch.cat(answer, 2), occupied[..., first:], select, short)
    if first:
        masses, able = torch.cat(prompt, 2), occupied[..., : prompt[0].shape[-1]]
        own = _highest(masses, able, select, short if masses.shape[-1] == blocks else 1.0)
        kept = torch.cat([own[..., :first], kept], dim=-1)
    return kept & occupied[..., None]


def first_new_block(tokens: int, block_size: int, new_tokens: int) -> int:
    """The first block that holds nothing but the answer; if none does, the last block."""
    prompt = max(tokens - new_tokens, 0)
    return max(min(-(-prompt // block_size), -(-tokens // block_size) - 1), 0)


def kept_blocks(blocks: int, select: float) -> int:
    """How many of some blocks are kept: `int(blocks * select) + 1`, at most all of them.

    The official code does not clamp and fails at `select=1`.
    """
    return min(blocks, int(blocks * select) + 1)


def _highest(
    masses: Float[Tensor, "batch heads rows blocks"],
    occupied: Bool[Tensor, "batch 1 blocks"],
    select: float,
    short: float,
) -> Bool[Tensor, "batch heads rows blocks"]:
    """The kept blocks of each row: of equal ones the first, and none that holds only padding."""
    masses = masses.clone()
    masses[..., -1:] /= short
    masses = masses.masked_fill(~occupied[..., None, :], -torch.inf)
    counts = [kept_blocks(count, select) for count in occupied.sum(-1).flatten().tolist()]
    room = torch.tensor(counts, device=masses.device).view(-1, 1, 1, 1)
    order = masses.argsort(dim=-1, descending=True, stable=True)
    chosen = torch.arange(masses.shape[-1], device=masses.device) < room
    return torch.zeros_like(masses, dtype=torch.bool).scatter(-1, order, chosen.expand_as(order))


def _real_tokens(bias: Tensor | None, query: Tensor) -> Bool[Tensor, "batch tokens"]:
    """Which tokens are seen by any query; the others are padding."""
    batch, _, tokens, _ = query.shape
    if bias is None:
        return torch.ones(batch, tokens, dtype=torch.bool, device=query.device)
    return (bias > -torch.inf).any(2).any(1).expand(batch, tokens)


def _check(
    query: Tensor, key: Tensor, new_tokens: int | None, select: float, block_size: int
) -> None:
    if query.shape[2] != key.shape[2]:
        raise ValueError(
            f"key: expected the {query.shape[2]} tokens of query, got {key.shape[2]}. SparseD "
            "chooses blocks of self-attention over the whole sequence; a KV cache hides a part of "
            "it from the queries."
        )
    if new_tokens is not None and new_tokens < 0:
        raise ValueError(
            f"new_tokens: expected the length of the answer, or None for a sequence without a "
            f"prompt, got {new_tokens}."
        )
    check_select(select)
    if block_size < 1:
        raise ValueError(f"block_size: expected at least 1 token, got {block_size}.")


def check_select(select: float) -> None:
    """Raise unless `select` is a share."""
    if not 0 <= select <= 1:
        raise ValueError(
            f"select: expected a share of the blocks, from 0 (one block) to 1 (all), got {select}."
        )
