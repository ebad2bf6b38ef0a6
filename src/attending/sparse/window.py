"""The simplest plan: blocks near the diagonal. What every other planner has to beat."""

import torch

from attending.core.block_plan import BlockPlan, BlockSize


def window_plan(
    query_length: int,
    key_length: int,
    *,
    block_size: BlockSize,
    width: int,
    sinks: int = 0,
    is_causal: bool = False,
    device: torch.device | str | None = None,
) -> BlockPlan:
    """For each row of blocks the `width` blocks nearest to the diagonal, and the first `sinks`.

    At the ends the window moves inwards, so every row keeps equally many blocks and the density is
    known: `width / key blocks`, without sinks. With `is_causal` it ends at the diagonal instead,
    and the first rows keep what there is.

    Args:
        query_length, key_length: tokens; rectangular maps have a slanted diagonal.
        block_size: of both, or of queries and of keys.
        width: blocks in the window; more than there are is all of them.
        sinks: blocks at the start that all see as well (StreamingLLM, Xiao et al. 2024).
        is_causal: also hide later keys, as in `BlockPlan.from_block_mask`.
        device: of the plan.

    Raises:
        ValueError: for a width below 1 or negative sinks.
    """
    if width < 1 or sinks < 0:
        raise ValueError(
            f"width, sinks: expected at least 1 and at least 0 blocks, got {width} and {sinks}."
        )
    height, wide = (block_size, block_size) if isinstance(block_size, int) else block_size
    queries, keys = -(-query_length // height), -(-key_length // wide)
    row, column = torch.arange(queries, device=device)[:, None], torch.arange(keys, device=device)
    if is_causal:
        last = ((row + 1) * height).clamp_max(query_length) - 1 + key_length - query_length
        first = last.div(wide, rounding_mode="floor") - width + 1
    else:
        middle = (2 * row + 1) * keys // (2 * max(queries, 1))
        first = (middle - (width - 1) // 2).clamp(max=max(keys - width, 0)).clamp_min(0)
    mask = (column >= first) & (column < first + width) | (column < sinks)
    return BlockPlan.from_block_mask(
        mask,
        block_size=(height, wide),
        query_length=query_length,
        key_length=key_length,
        is_causal=is_causal,
    )
