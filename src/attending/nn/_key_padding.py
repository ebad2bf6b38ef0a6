"""Sequences with padding, for operators whose tokens have places: padding is cut out."""

import torch
from jaxtyping import Bool, Int
from torch import Tensor


def key_padding(attn_mask: Tensor | None, query: Tensor) -> Bool[Tensor, "batch tokens"] | None:
    """Which tokens are visible, from a mask that is the same for all queries and heads.

    Returns:
        None where all are, or there is no mask.

    Raises:
        ValueError: for a mask of another kind; the message says what is expected.
    """
    if attn_mask is None:
        return None
    batch, tokens = query.shape[0], query.shape[2]
    got = type(attn_mask).__name__
    if isinstance(attn_mask, Tensor):
        got = f"{list(attn_mask.shape)} of {attn_mask.dtype} on {attn_mask.device}"
    fits = (
        isinstance(attn_mask, Tensor)
        and attn_mask.dtype == torch.bool
        and attn_mask.device == query.device
        and attn_mask.dim() == 4
        and attn_mask.shape[0] in (1, batch)
        and attn_mask.shape[1:3] == (1, 1)
        and attn_mask.shape[3] == tokens
    )
    if not fits:
        raise ValueError(
            f"attn_mask: expected a boolean mask of keys on {query.device}, True = visible, "
            f"[batch, 1, 1, tokens] = {[batch, 1, 1, tokens]}, got {got}. Summaries of "
            "many keys are made once for all queries, so a mask cannot differ between them; pass "
            "is_causal for causality, where the operator has that form."
        )
    visible = attn_mask[:, 0, 0].expand(batch, tokens)
    return None if bool(visible.all()) else visible


def compact(
    tensors: tuple[Tensor, ...], visible: Bool[Tensor, "batch tokens"]
) -> tuple[tuple[Tensor, ...], Bool[Tensor, "batch tokens"], Int[Tensor, "batch tokens"]]:
    """Move the visible tokens of each sequence to its front, in their order.

    Returns:
        The tensors `[batch, heads, tokens, dim]`, what is visible in them, and the order, for
        `restore`.
    """
    order = (~visible).to(torch.uint8).argsort(dim=1, stable=True)
    moved = tuple(_gather(tensor, order) for tensor in tensors)
    return moved, visible.gather(1, order), order


def restore(tensor: Tensor, order: Int[Tensor, "batch tokens"]) -> Tensor:
    """Move the tokens back to where `compact` found them."""
    return _gather(tensor, order.argsort(1))


def _gather(tensor: Tensor, order: Tensor) -> Tensor:
    return tensor.gather(
        2, order[:, None, :, None].expand(-1, *tensor.shape[1:2], -1, tensor.shape[3])
    )
