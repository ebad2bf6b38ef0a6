"""Masks that all queries share; and padding cut out, for operators whose tokens have places."""

import torch
from jaxtyping import Bool, Int
from torch import Tensor


def visible_keys(
    attn_mask: Tensor | None, key: Tensor, name: str = "attn_mask"
) -> Bool[Tensor, "#batch #heads keys"] | None:
    """The mask that all queries share, without its dimension of queries; None if there is none.

    Raises:
        ValueError: for a mask that is not boolean, does not fit, or differs between queries, which
            an attention that never makes its map cannot apply.
    """
    if attn_mask is None:
        return None
    if not isinstance(attn_mask, Tensor) or attn_mask.dtype != torch.bool:
        found = attn_mask.dtype if isinstance(attn_mask, Tensor) else type(attn_mask).__name__
        raise ValueError(f"{name}: expected a boolean mask, True = visible, got {found}.")
    if attn_mask.device != key.device:
        raise ValueError(f"{name}: expected a mask on {key.device}, got one on {attn_mask.device}.")
    mask = attn_mask.reshape((1,) * (4 - attn_mask.dim()) + tuple(attn_mask.shape))
    batch, heads, keys = key.shape[:3]
    fits = mask.dim() == 4 and mask.shape[3] in (1, keys)
    if not fits or mask.shape[0] not in (1, batch) or mask.shape[1] not in (1, heads):
        raise ValueError(
            f"{name}: expected a shape that broadcasts to [batch, kv_heads, 1, keys] = "
            f"{[batch, heads, 1, keys]}, got {list(attn_mask.shape)}."
        )
    if mask.shape[2] != 1:
        raise ValueError(
            f"{name}: expected one mask for all queries, {[batch, 1, 1, keys]}, got "
            f"{list(attn_mask.shape)}. This attention never makes the map to which a mask for each "
            "pair could be applied; causality is is_causal=True, where there is such a form."
        )
    return mask[:, :, 0].expand(-1, -1, keys)


def key_padding(attn_mask: Tensor | None, query: Tensor) -> Bool[Tensor, "batch tokens"] | None:
    """Which tokens are visible, from a mask that is the same for all queries and heads.

    Returns:
        None where all are, or there is no mask.

    Raises:
        ValueError: for a mask of another kind; the message says what is expected.
    """
    visible = visible_keys(attn_mask, query)
    if visible is None:
        return None
    if visible.shape[1] != 1:
        raise ValueError(
            "attn_mask: expected one mask for all heads, [batch, 1, 1, tokens], got "
            f"{visible.shape[1]} of them. Padding is cut out of all heads at once."
        )
    visible = visible[:, 0].expand(query.shape[0], -1)
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
