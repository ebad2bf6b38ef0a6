"""A cache for dynamic mask attention: tokens with their scores, and only those that still count.

Scores do not depend on the query, so a token that `window` better ones have pushed out is out for
good. The cache forgets it, and what the layer computes is the same as with a cache of all tokens.
"""

from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool
from torch import Tensor

from attending.core.masks import mask_parts, visible_entries
from attending.nn.dynamic_mask import chosen_keys
from attending.nn.key_selection import check_window


@runtime_checkable
class ScoreCache(Protocol):
    """A cache that keeps the scores of the tokens beside their keys and values."""

    keeps_scores: bool

    def update(
        self, key: Tensor, value: Tensor, layer_idx: int, *, delta: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Append; return keys, values and scores of all tokens that may be attended to."""
        ...


class DynamicMaskCache:
    """Keys, values and scores of the tokens that later queries can still choose, in order.

        cache = DynamicMaskCache(layer.keep_window)
        for chunk in hidden.split(64, dim=1):
            output = layer(chunk, is_causal=True, cache=cache)

    Holds at most `window` tokens for each head of key and value, each head its own. What comes out
    of the layer is the same as with a cache of all tokens.

    Args:
        window: that of the layers.
    """

    keeps_scores = True

    def __init__(self, window: int) -> None:
        check_window(window)
        self.window = window
        self.layers: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def update(
        self, key: Tensor, value: Tensor, layer_idx: int, *, delta: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Append the new tokens, forget the worst; returns those before and the new ones.

        Args:
            key, value: `[batch, kv_heads, tokens, dim]`.
            layer_idx: of the layer.
            delta: `[batch, kv_heads, tokens]`; -inf where a token is padding.
        """
        new = (key, value, delta)
        before = self.layers.get(layer_idx)
        if before is not None:
            new = tuple(torch.cat(pair, 2) for pair in zip(before, new, strict=True))  # type: ignore[assignment]
        self.layers[layer_idx] = chosen_keys(*new, self.window)
        return new


def new_tokens(attn_mask: Tensor, batch: int, tokens: int) -> Bool[Tensor, "batch tokens"]:
    """Which of the last tokens of a mask are no padding.

    Args:
        attn_mask: of the new tokens, or of all with the new ones last.
        batch, tokens: how many sequences and new tokens there are.

    Raises:
        ValueError: for a mask that is more than padding and causality.
    """
    mask = attn_mask.reshape((1,) * (4 - attn_mask.dim()) + tuple(attn_mask.shape))
    keys = mask.shape[3]
    if keys < tokens:
        raise ValueError(f"attn_mask: expected {tokens} keys or more, got {list(mask.shape)}.")
    if mask.shape[1] == mask.shape[2] == 1:
        visible = visible_entries(mask)[:, 0, 0].expand(batch, -1)
    else:
        parts = mask_parts(mask, batch, tokens, keys)
        if not parts.is_causal:
            raise ValueError(
                "attn_mask: expected padding and causality alone with a cache that forgets "
                "tokens, since it no longer knows which token a column is; got another mask."
            )
        seen = parts.key_visible
        visible = mask.new_ones(batch, keys, dtype=torch.bool) if seen is None else seen
    return visible[:, keys - tokens :]
