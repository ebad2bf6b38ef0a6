"""Which blocks of a map to keep for good: those with the most probability, and some in any case.

    always = always_kept(tokens, block_size, text_tokens=226)
    mask = static_block_mask(block_probabilities(query, key, block_size), 0.3, always=always)

For methods that choose blocks once, from a calibration run, and not again at run time
(PAROAttention, arXiv 2506.16054).
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def static_block_mask(
    block_sums: Float[Tensor, "*batch query_blocks key_blocks"],
    density: float,
    *,
    always: Bool[Tensor, "query_blocks key_blocks"] | None = None,
) -> Bool[Tensor, "*batch query_blocks key_blocks"]:
    """The blocks that hold the most probability, so many of each map that the density is met.

    Of `round(density * blocks)` blocks, those of `always` come first and count, and the largest
    sums fill the rest; of equal sums the earlier block. If `always` has more than that, they are
    the mask. The rule that a threshold is set for each head to meet a density is [inferred].

    Args:
        block_sums: probability in each block, see `block_scores.block_probabilities`.
        density: share of all blocks of a map, over 0, at most 1.
        always: kept whatever they hold, such as those of text tokens (see `always_kept`).

    Raises:
        ValueError: for a density out of its range.
    """
    if not 0 < density <= 1:
        raise ValueError(f"density: expected a share of the blocks, over 0 to 1, got {density}.")
    sums = block_sums if always is None else block_sums.masked_fill(always, torch.inf)
    cells = sums.shape[-1] * sums.shape[-2]
    count = round(density * cells)
    if always is not None:
        count = max(count, int(always.sum()))
    order = sums.flatten(-2).argsort(dim=-1, descending=True, stable=True)
    mask = torch.zeros_like(order, dtype=torch.bool).scatter(-1, order[..., :count], True)
    return mask.view(sums.shape)


def always_kept(
    tokens: int,
    block_size: int,
    *,
    text_tokens: int = 0,
    text_first: bool = True,
    keep_last: bool = True,
    device: torch.device | str | None = None,
) -> Bool[Tensor, "blocks blocks"]:
    """Rows and columns of blocks that are kept in any case: with text in them, and the last.

    The authors' plans keep the text's (226 text tokens and 30 of the image are 4 blocks of 64) and
    the last, which is a part of a block in their model.

    Args:
        tokens: text and grid together.
        block_size: tokens along each side of a block.
        text_tokens, text_first: see `axis_order.token_index`.
        keep_last: also the last row and column.
        device: of the mask.
    """
    blocks = -(-tokens // block_size)
    kept = torch.zeros(blocks, dtype=torch.bool, device=device)
    first, last = blocks_without_text(tokens, block_size, text_tokens, text_first)
    kept[:first] = True
    kept[last:] = True
    if keep_last:
        kept[-1:] = True
    return kept[:, None] | kept


def blocks_without_text(
    tokens: int, block_size: int, text_tokens: int, text_first: bool
) -> tuple[int, int]:
    """The first block that holds no text, and the one after the last that holds none."""
    blocks = -(-tokens // block_size)
    if text_first:
        return min(-(-text_tokens // block_size), blocks), blocks
    return 0, blocks if text_tokens == 0 else (tokens - text_tokens) // block_size
