"""What a mask says: padding, causality, or something that only the mask itself can say.

Models hand over one mask for everything. Fused kernels, and operators that know causality and
padding only, want to be told which it is.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor


class MaskParts(NamedTuple):
    """A mask taken apart into padding and the rest.

    Attributes:
        key_visible: which keys are no padding; None where there is none.
        is_causal: whether the rest may be the causal mask, query i sees keys 0..i of its sequence.
        is_full: whether the rest may be no mask at all. Both are true where one cannot tell, as
            for sequences of one token; neither, where the mask is of another kind.
    """

    key_visible: Bool[Tensor, "batch keys"] | None
    is_causal: bool
    is_full: bool


def visible_entries(mask: Tensor) -> Bool[Tensor, "*mask"]:
    """What a mask lets be seen; transformers hides with the lowest float as well as with -inf."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def hiding_bias(bias: Tensor | None) -> Tensor | None:
    """A bias that only hides, with -inf where it does.

    For operators whose weights are not exponentials of the scores, to which one cannot add.

    Raises:
        ValueError: for one that adds something else.
    """
    if bias is None:
        return None
    visible = visible_entries(bias)
    if not bool((bias[visible] == 0).all()):
        raise ValueError(
            "attn_mask: expected a mask that only hides, boolean or of 0 and -inf, since this "
            "operator has no logits to which a bias could be added; got other numbers."
        )
    return bias.masked_fill(~visible, -math.inf)


def seen_keys(mask: Tensor, batch: int, keys: int) -> Bool[Tensor, "batch keys"]:
    """Which keys some query of their sequence sees; the others are padding."""
    return visible_entries(mask).flatten(1, 2).any(1).expand(batch, keys)


def key_counts(
    mask: Tensor | None,
    is_causal: bool,
    queries: int,
    keys: int,
    device: torch.device | str | None = None,
) -> Int[Tensor, "#batch #heads queries"]:
    """How many keys each query sees, with dimensions of size 1 where all are alike.

    Args:
        mask: boolean or float, of 4 dimensions that broadcast to `[batch, heads, queries, keys]`.
        is_causal: query i sees keys 0..i of those, as in `scaled_dot_product_attention`.
        queries, keys: the size of the map.
        device: of the result where there is no mask.
    """
    if mask is None:
        rows = torch.arange(1, queries + 1, device=device).clamp_max(keys)
        return (rows if is_causal else torch.full_like(rows, keys))[None, None]
    visible = visible_entries(mask).expand(*mask.shape[:3], keys)
    if is_causal:
        visible = visible.expand(*mask.shape[:2], queries, keys).tril()
    counts = visible.sum(-1)
    return counts.expand(*counts.shape[:2], queries)


def simplest_mask(mask: Tensor, queries: int, keys: int) -> tuple[Tensor | None, bool]:
    """`(attn_mask, is_causal)` that mean the same and that kernels like better.

    Args:
        mask: boolean or float, of 4 dimensions that broadcast to `[batch, heads, queries, keys]`.
        queries, keys: the size of the map.

    Returns:
        No mask where all is visible, `is_causal` where the mask is just that, a boolean mask where
        the float one only hides, and otherwise a float one that hides with -inf.
    """
    visible = visible_entries(mask)
    if mask.dtype != torch.bool:
        if not bool((mask[visible] == 0).all()):
            return mask.masked_fill(~visible, -math.inf), False
        mask = visible
    if bool(visible.all()):
        return None, False
    if queries == keys and mask.shape[2] == queries and mask.shape[3] == keys:
        causal = torch.ones(queries, keys, dtype=torch.bool, device=mask.device).tril()
        if bool((visible == causal).all()):
            return None, True
    return mask, False


def mask_parts(mask: Tensor, batch: int, queries: int, keys: int) -> MaskParts:
    """Take a mask apart into padding and causality.

    In a map as wide as high, a query at the place of a hidden key is padding itself: what it sees
    does not count, since nobody reads its output. (Some models let such rows see everything, so
    that no row is empty.) In others the queries are the last ones of the causal mask, as they are
    when a model decodes with a cache.

    Args:
        mask: boolean or float, of 4 dimensions that broadcast to `[batch, heads, queries, keys]`.
        batch, queries, keys: the size of the map.

    Returns:
        The parts. A float mask that does more than hide is neither causal nor full.
    """
    visible = visible_entries(mask)
    if mask.dtype != torch.bool and not bool((mask[visible] == 0).all()):
        return MaskParts(None, False, False)
    seen = seen_keys(mask, batch, keys)
    columns = seen[:, None, None, :]
    wrong = visible != columns
    past = torch.ones(queries, keys, dtype=torch.bool, device=mask.device).tril(keys - queries)
    wrong_if_causal = visible != (columns & past)
    if queries == keys:
        asking = seen[:, None, :, None]
        wrong, wrong_if_causal = wrong & asking, wrong_if_causal & asking
    return MaskParts(
        None if bool(seen.all()) else seen,
        not bool(wrong_if_causal.any()),
        not bool(wrong.any()),
    )
