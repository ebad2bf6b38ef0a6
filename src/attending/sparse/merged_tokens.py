"""Fewer image tokens in which the others live on: VisionZip and PruMerge, as pure functions.

Both keep the tokens that the class token attends to, and instead of dropping the rest they add it
to tokens of the same kind, as told by the keys of the vision tower. They merge the features of the
tower, before the projector, so that the projector gets the merged tokens. [code]

    merged = vision_zip(features, attention, key, keep=64)
    projector(merged.tokens)                                     # [images, 64, dim]

Which attention and which keys differs between the two; each function says it.

Sources: VisionZip (Yang et al.), PruMerge (Shang et al.), official codes read for the project's
card; numbers that are marked [recall] are from memory.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attending.core.precision import full_precision
from attending.sparse._tokens import (
    Attention,
    Features,
    Index,
    check_keep,
    check_tokens,
    most_attended,
    take,
    unit_vectors,
)

CONTEXTUAL = 10 / 64  # of VisionZip's tokens; 20 of 128 and 30 of 192 are the same share
NEIGHBOURS = 32


@dataclass(frozen=True, eq=False)
class MergedTokens:
    """Tokens in which others are merged.

    Attributes:
        tokens: what the projector gets, in the dtype of the features.
        index: the token that each one grew from, -1 for one that grew from all.
        count: how many there are of each image; those behind are zeros.
    """

    tokens: Float[Tensor, "images kept dim"]
    index: Int[Tensor, "images kept"]
    count: Int[Tensor, "images"]


@full_precision
def vision_zip(
    features: Features,
    attention: Attention,
    key: Float[Tensor, "images tokens key_dim"],
    keep: int,
    *,
    contextual: int | None = None,
) -> MergedTokens:
    """VisionZip: dominant tokens as they are, and contextual ones in which the rest is merged.

    Dominant are the `keep - contextual` most attended. Of the rest every k-th is a target; each
    other token belongs to the target whose key is most like its own, and a target becomes itself
    plus the mean of its group.

    Args:
        features: of the tower's layer -2.
        attention: of its class token in that layer, summed (or averaged) over the heads.
        key: in that layer, averaged over the heads. For a tower without a class token the paper
            takes the attention received.
        keep: how many tokens, dominant and contextual together.
        contextual: how many of these are contextual; by default 10 of 64, as the paper's.

    Returns:
        The dominant tokens in the order of the image, then the contextual ones. The official code
        keeps the class token in addition; this does not, so that budgets can be compared.

    Raises:
        ValueError: for shapes that do not fit, a `keep` below 1 or a `contextual` not below it.
    """
    check_tokens(features, attention)
    _check_key(key, features)
    images, tokens, _ = features.shape
    if check_keep(keep) >= tokens:
        return _everything(features)
    if contextual is None:
        contextual = min(max(round(CONTEXTUAL * keep), 1), keep - 1)
    if not 0 <= contextual < keep:
        raise ValueError(
            f"contextual: expected a number from 0 to {keep - 1}, below keep, got {contextual}."
        )
    order = most_attended(attention, tokens)
    dominant = order[:, : keep - contextual].sort(-1).values
    if contextual == 0:
        return MergedTokens(take(features, dominant), dominant, _full(images, keep, features))
    rest = order[:, keep - contextual :].sort(-1).values
    places = torch.arange(rest.shape[1], device=features.device)
    step = max(1, rest.shape[1] // contextual)
    is_target = (places % step == 0) & (places < step * contextual)
    target, other = rest[:, is_target], rest[:, ~is_target]
    unit = unit_vectors(key)
    group = (take(unit, other) @ take(unit, target).transpose(1, 2)).argmax(-1)
    member = torch.nn.functional.one_hot(group, contextual).transpose(1, 2).to(unit.dtype)
    size = member.sum(-1, keepdim=True).clamp_min(1)
    wide = features.to(unit.dtype)
    merged = take(wide, target) + (member @ take(wide, other)) / size
    return MergedTokens(
        tokens=torch.cat([take(features, dominant), merged.to(features.dtype)], 1),
        index=torch.cat([dominant, target], 1),
        count=_full(images, keep, features),
    )


@full_precision
def pru_merge(
    features: Features,
    attention: Attention,
    key: Float[Tensor, "images tokens key_dim"],
    keep: int | None = None,
    *,
    plus: bool = True,
    neighbours: int = NEIGHBOURS,
) -> MergedTokens:
    """PruMerge and PruMerge+: outliers of attention, evenly spaced tokens, each with its like.

    Kept are the outliers of `attention_outliers`, and with `plus` evenly spaced tokens that are
    not among them. To each is added the sum of its most similar tokens, weighted by attention; a
    last token is the sum of all that are not kept, weighted by attention.

        token_i = f_i + sum_{j near i} a_j f_j,       last = sum_{j not kept} a_j f_j

    Args:
        features: of the tower's layer -2.
        attention: of the class token in the tower's last layer, query and key not split into
            heads (`reduce="merged"` of `probes.cls_attention`); a softmax over all tokens, its
            values count.
        key: in the last layer, all heads side by side.
        keep: how many tokens, the last one included. None lets each image have as many as it has
            outliers (with `plus` about 4 times as many), as the paper does. Given, `plus` fills up
            with evenly spaced ones of those not yet chosen, and without `plus` the most attended
            are kept. [inferred: the official code has no fixed number]
        plus: PruMerge+ or PruMerge.
        neighbours: how many similar tokens are added to each; 32 in the code.

    Returns:
        The kept tokens in the order of the image, then the last one.

    Raises:
        ValueError: for shapes that do not fit, a `keep` below 1, or `neighbours` below 0.
    """
    check_tokens(features, attention)
    _check_key(key, features)
    if neighbours < 0:
        raise ValueError(f"neighbours: expected a number of tokens, got {neighbours}.")
    if keep is not None and check_keep(keep) >= features.shape[1]:
        return _everything(features)
    wide = features.to(torch.promote_types(features.dtype, torch.float32))
    attention = attention.to(wide.dtype)
    unit = unit_vectors(key)
    weighted = attention[..., None] * wide
    tokens, indices = [], []
    for image, outlier in enumerate(attention_outliers(attention)):
        index = _kept(attention[image], outlier, keep, plus)
        likeness = unit[image, index] @ unit[image].T
        likeness[torch.arange(len(index), device=index.device), index] = -torch.inf
        near = likeness.topk(min(neighbours, features.shape[1] - 1), dim=-1).indices
        rest = torch.ones_like(outlier)
        rest[index] = False
        last = weighted[image, rest].sum(0, keepdim=True)
        tokens.append(torch.cat([wide[image, index] + weighted[image, near].sum(1), last]))
        indices.append(torch.cat([index, index.new_tensor([-1])]))
    pad = torch.nn.utils.rnn.pad_sequence
    return MergedTokens(
        tokens=pad(tokens, batch_first=True).to(features.dtype),
        index=pad(indices, batch_first=True, padding_value=-1),
        count=torch.tensor([len(index) for index in indices], device=features.device),
    )


@full_precision
def attention_outliers(attention: Attention) -> Bool[Tensor, "images tokens"]:
    """Tokens with more attention than `Q3 + 1.5 (Q3 - Q1)`; at least the most attended one."""
    attention = attention.to(torch.promote_types(attention.dtype, torch.float32))
    first, third = (attention.quantile(part, -1, keepdim=True) for part in (0.25, 0.75))
    outlier = attention > third + 1.5 * (third - first)
    return outlier.scatter(1, most_attended(attention, 1), True)


def _kept(attention: Tensor, outlier: Tensor, keep: int | None, plus: bool) -> Tensor:
    """The tokens of one image that PruMerge keeps, without the last one, in rising order."""
    tokens, count = len(attention), int(outlier.sum())
    if keep is None:
        kept = outlier.clone()
        if plus:
            kept[:: max(1, tokens // count // 3)] = True  # about three for each outlier [recall]
        return kept.nonzero()[:, 0]
    count = min(count, keep - 1) if plus else keep - 1
    kept = torch.zeros_like(outlier)
    kept[most_attended(attention[None], tokens)[0, :count]] = True
    free = (~kept).nonzero()[:, 0]
    more = keep - 1 - count
    kept[free[torch.arange(more, device=free.device) * len(free) // max(more, 1)]] = True
    return kept.nonzero()[:, 0]


def _everything(features: Tensor) -> MergedTokens:
    images, tokens, _ = features.shape
    index: Index = torch.arange(tokens, device=features.device).repeat(images, 1)
    return MergedTokens(features, index, _full(images, tokens, features))


def _full(images: int, count: int, features: Tensor) -> Tensor:
    return torch.full((images,), count, device=features.device)


def _check_key(key: Tensor, features: Tensor) -> None:
    if key.dim() != 3 or key.shape[:2] != features.shape[:2] or not key.is_floating_point():
        raise ValueError(
            f"key: expected a float tensor {[*features.shape[:2]]} + [key_dim], a key for each "
            f"token of features, got {key.dtype} {list(key.shape)}. Leave out the class token's."
        )
