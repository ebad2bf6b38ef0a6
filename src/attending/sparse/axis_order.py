"""Orders of the tokens of a video or an image: which axis runs fastest, for each head.

A video of F frames of H x W tokens reaches attention as one sequence, frame after frame, row after
row. A head that looks along time has its attention scattered in diagonals then; with the tokens
ordered so that time runs fastest, the same attention lies in blocks. There are six orders of three
axes and two of two:

    index = head_token_index((8, 16, 16), [0, 4, 5])      # a head each: FHW, WHF, WFH
    mixed = permute_tokens(query, index)                   # [batch, heads, tokens, dim]
    permute_tokens(mixed, inverse_index(index))            # back again, bit for bit

Attention does not care about the order of its tokens: permute query, key and value, attend, and
permute the output back, and nothing has changed. A bias by position (rotary embeddings) has to be
in query and key before they are permuted, as it is where a tap sees them. Text tokens before or
after the grid are never moved.

Source: PAROAttention (Zhao et al., arXiv 2506.16054); the numbers of the six orders are those of
the authors' code. That images have the two orders HW and WH is our reading.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

VIDEO_ORDERS = ("FHW", "FWH", "HWF", "HFW", "WHF", "WFH")
"""Axes from the slowest to the fastest; number 0 is the order that models have."""

IMAGE_ORDERS = ("HW", "WH")

Grid = tuple[int, ...]
"""Tokens along each axis: (frames, height, width) or (height, width)."""


def axis_orders(grid: Sequence[int]) -> tuple[str, ...]:
    """The orders that a grid has: `VIDEO_ORDERS` for three axes, `IMAGE_ORDERS` for two.

    Raises:
        ValueError: for other numbers of axes, and axes without tokens.
    """
    sizes = tuple(grid)
    if len(sizes) not in (2, 3) or any(isinstance(n, bool) or int(n) != n or n < 1 for n in sizes):
        raise ValueError(
            "grid: expected the tokens of a video as (frames, height, width) or of an image as "
            f"(height, width), each at least 1, got {grid!r}. Count tokens, not pixels: after the "
            "autoencoder and the patches."
        )
    return VIDEO_ORDERS if len(sizes) == 3 else IMAGE_ORDERS


def token_index(
    grid: Sequence[int],
    order: int | str,
    *,
    text_tokens: int = 0,
    text_first: bool = True,
    device: torch.device | str | None = None,
) -> Int[Tensor, " tokens"]:
    """Which token stands at each place: `ordered = tokens[token_index(grid, "WHF")]`.

    Args:
        grid: tokens along each axis, as (frames, height, width) or (height, width).
        order: its letters, from the slowest axis to the fastest, or its number in
            `axis_orders(grid)`.
        text_tokens: tokens that stay where they are.
        text_first: whether those come before the grid (CogVideoX, Flux) or after it
            (HunyuanVideo).
        device: of the index.

    Raises:
        ValueError: for an order that the grid does not have, or fewer than no text tokens.
    """
    names = axis_orders(grid)
    known = order in names if isinstance(order, str) else 0 <= int(order) < len(names)
    if not known:
        numbered = ", ".join(f"{number} {name}" for number, name in enumerate(names))
        raise ValueError(f"order: expected one of {numbered} for grid {grid!r}, got {order!r}.")
    if text_tokens < 0:
        raise ValueError(f"text_tokens: expected at least 0, got {text_tokens}.")
    name = order if isinstance(order, str) else names[int(order)]
    places = torch.arange(math.prod(grid), device=device).reshape(tuple(grid))
    moved = places.permute([names[0].index(axis) for axis in name]).reshape(-1)
    text = torch.arange(text_tokens, device=device)
    if text_first:
        return torch.cat([text, moved + text_tokens])
    return torch.cat([moved, text + len(moved)])


def head_token_index(
    grid: Sequence[int],
    orders: Sequence[int | str],
    *,
    text_tokens: int = 0,
    text_first: bool = True,
    device: torch.device | str | None = None,
) -> Int[Tensor, "heads tokens"]:
    """`token_index` of every head.

    Args:
        grid, text_tokens, text_first, device: as in `token_index`.
        orders: that of each head, by number or by letters.
    """
    rows = {
        order: token_index(
            grid, order, text_tokens=text_tokens, text_first=text_first, device=device
        )
        for order in set(orders)
    }
    if not rows:
        raise ValueError("orders: expected one for each head, got none.")
    return torch.stack([rows[order] for order in orders])


def inverse_index(index: Int[Tensor, "heads tokens"]) -> Int[Tensor, "heads tokens"]:
    """The index that undoes one, for each head.

    Needed for the way back: as an index no order but FHW undoes itself, unless its axes happen to
    have as many tokens (then HWF and WFH undo each other, and the others themselves).
    """
    places = torch.arange(index.shape[-1], device=index.device).expand_as(index)
    return torch.empty_like(index).scatter_(-1, index, places)


def permute_tokens(
    tokens: Shaped[Tensor, "batch heads tokens *features"],
    index: Int[Tensor, "index_heads tokens"],
) -> Shaped[Tensor, "batch heads tokens *features"]:
    """The tokens of each head in the order of its index; differentiable.

    Args:
        tokens: query, key, value or output of attention, or anything that there is per token.
        index: from `head_token_index` or `inverse_index`; of one head for all, or of every head.

    Raises:
        ValueError: if the index is for other heads or tokens.
    """
    heads, length = tokens.shape[1:3]
    if index.dim() != 2 or index.shape[0] not in (1, heads) or index.shape[1] != length:
        raise ValueError(
            f"index: expected [{heads}, {length}] or [1, {length}] for the heads and tokens of "
            f"{list(tokens.shape)}, got {list(index.shape)}. Are grid and text_tokens those of "
            "this model and size?"
        )
    if index.shape[0] == 1:
        return tokens.index_select(2, index[0])
    # Whole rows of the flattened heads: several times as fast as gathering element by element.
    rows = index + length * torch.arange(heads, device=index.device)[:, None]
    moved = tokens.flatten(1, 2).index_select(1, rows.flatten())
    found: Tensor = moved.unflatten(1, (heads, length))
    return found


def permute_key_bias(
    bias: Shaped[Tensor, "#batch #heads 1 tokens"], index: Int[Tensor, "index_heads tokens"]
) -> Shaped[Tensor, "#batch #heads 1 tokens"]:
    """What is added to, or hidden from, the scores of each key, in the order of the keys."""
    if bias.dim() != 4 or bias.shape[2] != 1:
        raise ValueError(
            "bias: expected one of keys, [batch, heads, 1, tokens] with batch and heads of 1 where "
            f"they do not differ, got {list(bias.shape)}. What differs between queries cannot be "
            "permuted without the whole map."
        )
    heads = index.shape[0] if bias.shape[1] == 1 else bias.shape[1]
    return permute_tokens(bias.expand(-1, heads, -1, -1).mT, index).mT
