"""Which image tokens to keep inside the language model: FastV and SparseVLM, as pure functions.

These look at the attention of the language model itself, which knows the question, so the first
layers run on all tokens. Here are their rankings, schedules and the merging of what is dropped; the
running model is changed by `attending.interventions.visual_token_pruning`.

- FastV: after `layer` layers keep the image tokens that the last token of the prompt attends to
  most. [code]
- SparseVLM: at several layers keep those that the relevant tokens of the text attend to most, and
  merge part of the others into a few. [code]; the choice of the text tokens and the clustering are
  [recall].

Sources: FastV (Chen et al. 2024), SparseVLM (Zhang et al.), as read for the project's card.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attending.core.precision import full_precision
from attending.core.statistics import column_mass
from attending.sparse._tokens import check_keep

# Tokens kept after layers 2, 6 and 15 of 32, of 576, without the merged ones, by budget. The first
# two lines are the code's; their means over the layers are the budgets.
SCHEDULES: Mapping[int, tuple[int, int, int]] = {64: (66, 30, 17), 128: (303, 110, 36)}
DEPTHS = (2 / 32, 6 / 32, 15 / 32)
RECYCLED = 0.3  # of the dropped tokens, those with the most attention
CLUSTERED = 10  # recycled tokens for each merged one
NEIGHBOURS = 5


@dataclass(frozen=True, eq=False)
class Recycled:
    """What one step of SparseVLM leaves of the image tokens.

    Attributes:
        index: the tokens that stay, rising: those kept, and those in whose place a merged one is.
        tokens: their hidden states, merged where they are merged.
        merged: which are.
    """

    index: Int[Tensor, "batch kept"]
    tokens: Float[Tensor, "batch kept dim"]
    merged: Bool[Tensor, "batch kept"]


@full_precision
def attention_from(
    query: Float[Tensor, "batch heads queries dim"],
    key: Float[Tensor, "batch kv_heads keys dim"],
    query_weights: Float[Tensor, "batch queries"],
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Float[Tensor, "batch keys"]:
    """The attention that each key gets from chosen queries, mean over heads, without the map.

    Args:
        query: of one layer.
        key: of the same layer.
        query_weights: what each query counts: 1 for the last token of the prompt and else 0 gives
            FastV's ranking, 1 / count for some text tokens their mean.
        attn_mask: as in `scaled_dot_product_attention`.
        is_causal: as in `scaled_dot_product_attention`.
        scale: as in `scaled_dot_product_attention`.
        enable_gqa: as in `scaled_dot_product_attention`.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    if attn_mask is not None and attn_mask.is_floating_point():
        attn_mask = attn_mask.to(dtype)
    mass = column_mass(
        query.to(dtype),
        key.to(dtype),
        query_weights.to(dtype)[:, None],
        attn_mask=attn_mask,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=enable_gqa,
    )
    return mass.mean(1)


@full_precision
def relevant_text(
    visual: Float[Tensor, "batch visual dim"],
    text: Float[Tensor, "batch text dim"],
    text_mask: Bool[Tensor, "batch text"] | None = None,
) -> Bool[Tensor, "batch text"]:
    """SparseVLM's raters: the text tokens that the image is like, more than the mean.

        r_j = mean_i softmax_j(<v_i, t_j>),     token j rates if r_j >= mean_j r_j

    Args:
        visual: embeddings of the image tokens, as the language model gets them.
        text: embeddings of the text tokens.
        text_mask: which of them are text and no padding; all by default. Each item needs one.

    Returns:
        Which text tokens rate; at least one of each item. [recall]
    """
    if text_mask is None:
        text_mask = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device)
    if not bool(text_mask.any(-1).all()):
        raise ValueError("text_mask: expected at least one text token in each item, got none.")
    dtype = torch.promote_types(text.dtype, torch.float32)
    scores = visual.to(dtype) @ text.to(dtype).transpose(1, 2)
    share = scores.masked_fill(~text_mask[:, None], -torch.inf).softmax(-1).mean(1)
    mean = share.sum(-1, keepdim=True) / text_mask.sum(-1, keepdim=True)
    best = torch.zeros_like(text_mask).scatter(1, share.argmax(-1, keepdim=True), True)
    return text_mask & (share >= mean) | best


def sparse_vlm_schedule(num_layers: int, keep: int, tokens: int) -> dict[int, int]:
    """After how many layers SparseVLM keeps how many image tokens, merged ones not counted.

    For 32 layers, 576 tokens and budgets of 64 and 128 it is the code's: after 2, 6 and 15 layers
    66, 30 and 17 tokens, or 303, 110 and 36. Others are ours [inferred]: the same depths in
    proportion, at least one layer apart, and counts on straight lines through these two tables, of
    budgets and counts as shares of all tokens. In a short model the mean over the layers is above
    the budget, because the first layers run on everything.

    Args:
        num_layers: of the language model.
        keep: the budget.
        tokens: image tokens before.

    Returns:
        `{layer: count}`: before that layer (from 0) runs, so many tokens are kept. Fewer than three
        entries in a model with fewer than four layers, none if all are kept.
    """
    check_keep(keep)
    if num_layers < 2:
        raise ValueError(
            f"num_layers: expected at least 2, so one can be pruned, got {num_layers}."
        )
    if keep >= tokens:
        return {}
    schedule: dict[int, int] = {}
    last = 0
    for depth, points in zip(DEPTHS, zip(*SCHEDULES.values(), strict=True), strict=True):
        last = max(round(depth * num_layers), last + 1)
        if last < num_layers:
            count = _interpolated(keep * 576 / tokens, points) * tokens / 576
            schedule[last] = min(max(round(count), 1), tokens - 1)
    return schedule


def _interpolated(budget: float, counts: tuple[int, ...]) -> float:
    """On the line from (0, 0) through the known budgets to (576, 576)."""
    points = [(0, 0), *zip(SCHEDULES, counts, strict=True), (576, 576)]
    (left, low), (right, high) = next(
        (one, other) for one, other in pairwise(points) if budget <= other[0]
    )
    return low + (high - low) * (budget - left) / (right - left)


@full_precision
def recycle(
    hidden: Float[Tensor, "batch tokens dim"],
    scores: Float[Tensor, "batch tokens"],
    keep: int,
    *,
    share: float = RECYCLED,
) -> Recycled:
    """One step of SparseVLM: keep the best, merge the best of the rest, drop the others.

    Of the dropped tokens the share with the largest scores goes into `n // 10 + 1` clusters; each
    becomes the mean of its members, in the place of its centre. The place is ours [inferred].

    Args:
        hidden: states of the image tokens.
        scores: their ranking, as by `attention_from`.
        keep: how many stay as they are; all if there are no more.
        share: of the dropped ones that are merged; 0 for none.

    Returns:
        What stays, in the order of the image.
    """
    tokens = hidden.shape[1]
    keep = min(check_keep(keep), tokens)
    if not 0 <= share <= 1:
        raise ValueError(f"share: expected a number from 0 to 1, got {share}.")
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    again = order[:, keep : keep + int(share * (tokens - keep))].sort(-1).values
    index, states = order[:, :keep], hidden
    if again.shape[1]:
        expanded = again[..., None].expand(-1, -1, hidden.shape[-1])
        inside = hidden.gather(1, expanded)
        centres, cluster = density_clusters(inside, again.shape[1] // CLUSTERED + 1)
        count = centres.shape[1]
        member = torch.nn.functional.one_hot(cluster, count).transpose(1, 2).to(hidden.dtype)
        means = (member @ inside) / member.sum(-1, keepdim=True)
        place = again.gather(1, centres)
        states = hidden.scatter(1, place[..., None].expand_as(means), means)
        index = torch.cat([index, place], 1)
    index, by = index.sort(-1)
    return Recycled(
        index=index,
        tokens=states.gather(1, index[..., None].expand(-1, -1, hidden.shape[-1])),
        merged=by >= keep,
    )


@full_precision
def density_clusters(
    points: Float[Tensor, "batch points dim"], count: int, *, neighbours: int = NEIGHBOURS
) -> tuple[Int[Tensor, "batch count"], Int[Tensor, "batch points"]]:
    """Clusters around density peaks (Rodriguez and Laio 2014, by nearest neighbours). [recall]

    A point's density is `exp(-mean squared distance to its neighbours)`, distances over
    `sqrt(dim)`; centres are the points with the largest product of density and distance to the
    nearest denser point. Every other point goes to the nearest centre. Ties go to the earlier one,
    where the official code breaks them by noise.

    Returns:
        The centres, and the cluster of each point (from 0 to `count - 1`).
    """
    points = points.to(torch.promote_types(points.dtype, torch.float32))
    size = points.shape[1]
    count = min(check_keep(count), size)
    distance = torch.cdist(points, points) / points.shape[-1] ** 0.5
    near = distance.topk(min(neighbours, size), dim=-1, largest=False).values
    log_density = -near.square().mean(-1)  # the density itself is 0 among large states
    rank = log_density.sort(dim=-1, descending=True, stable=True).indices.argsort(-1)
    denser = rank[:, None, :] < rank[:, :, None]
    furthest = distance.flatten(1).amax(-1)[:, None, None].expand_as(distance)
    gap = torch.where(denser, distance, furthest).amin(-1)
    peak = log_density + gap.log()
    centres = peak.sort(dim=-1, descending=True, stable=True).indices[:, :count]
    to_centre = distance.gather(2, centres[:, None].expand(-1, size, -1))
    cluster = to_centre.argmin(-1).scatter(
        1, centres, torch.arange(count, device=points.device).expand_as(centres)
    )
    return centres, cluster
