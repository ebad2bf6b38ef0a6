"""Which image tokens a vision-language model should keep: selectors as pure, batched functions.

An image of LLaVA-1.5 is 576 tokens, mostly of walls and sky. A selector gets the tokens' features
and the attention that the vision tower pays to them, and returns the indices of those to keep.

    index = select_tokens(features, attention, keep=64)                       # [images, 64]
    kept = features.gather(1, index[..., None].expand(-1, -1, features.shape[-1]))

To prune a model of transformers, see `attending.interventions.visual_token_pruning`.

| method | keeps | needs |
| --- | --- | --- |
| `agile` | most attended first, each clearing around it; wider, the richer the image | both |
| `static` | the same, equally wide in all images | both |
| `fastervlm` | the most attended | attention |
| `vispruner` | half the most attended, half what is left after dropping the most alike | both |
| `divprune` | greedily the farthest from all kept, starting with the loneliest | features |
| `fps` | the same, starting with the most attended | both |
| `random` | any, evenly | neither |

Distances are cosine distances `1 - <f_i, f_j> / (|f_i| |f_j|)` of the features that the language
model gets, and attention is that of the vision tower's class token (see
`attending.probes.cls_attention`). All functions treat each image on its own, break ties by the
earlier token, and compute at least in float32.

Sources: AgilePruner (Baek et al., arXiv 2603.01236), whose code is preserved in a fork
[code]; FasterVLM and VisPruner (Zhang et al.) [code]; DivPrune (Alvar et al. 2025), written from
the formula, as its licence does not allow to copy; farthest point sampling [3rd]. The official
codes handle one image at a time; on each image these give the same indices.
"""

from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from attending.core.precision import full_precision
from attending.core.statistics import effective_rank
from attending.sparse._tokens import (
    Attention,
    Features,
    Index,
    check_keep,
    check_tokens,
    cosine_distance,
    in_range,
    most_attended,
    take,
    unit_vectors,
)

Method = Literal["agile", "static", "fastervlm", "vispruner", "divprune", "fps", "random"]
METHODS: tuple[Method, ...] = get_args(Method)

STEP = 0.01  # of the threshold from one rank to the next, in an image of average effective rank


def select_tokens(
    features: Features,
    attention: Attention,
    keep: int,
    method: Method = "agile",
    *,
    erank_avg: float = 90.0,
    tau_max: float = 0.25,
    tau: float = 0.1,
    attention_share: float = 0.5,
    generator: torch.Generator | None = None,
) -> Index:
    """The tokens to keep of each image, in the order in which they lie in the image.

    Args:
        features: what the language model would get, `[images, tokens, dim]`.
        attention: of the vision tower to each token, mean over heads; only its order matters.
        keep: how many of the tokens; all if there are no more than that.
        method: see the module.
        erank_avg: for `agile`, as in `adaptive_threshold`.
        tau_max: for `agile`, as in `adaptive_threshold`.
        tau: for `static`, the distance below which a token is too like a kept one.
        attention_share: for `vispruner`, the share of `keep` that is chosen by attention.
        generator: for `random`; the global one by default.

    Returns:
        Rising indices, `[images, min(keep, tokens)]`.

    Raises:
        ValueError: for shapes that do not fit, a `keep` below 1, values that are not finite, an
            unknown method, or a parameter out of its range.
    """
    check_tokens(features, attention)
    check_keep(keep)
    images, tokens = attention.shape
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}; got {method!r}.")
    if keep >= tokens:
        return torch.arange(tokens, device=features.device).repeat(images, 1)
    if method == "agile":
        index = agile(features, attention, keep, erank_avg=erank_avg, tau_max=tau_max)
    elif method == "static":
        thresholds = torch.full_like(attention, in_range("tau", tau, 0.0, 2.0))
        index = attention_cover(features, attention, thresholds, keep)
    elif method == "fastervlm":
        index = most_attended(attention, keep)
    elif method == "vispruner":
        index = vis_pruner(features, attention, keep, attention_share=attention_share)
    elif method == "divprune":
        index = div_prune(features, keep)
    elif method == "fps":
        index = farthest_points(features, keep, most_attended(attention, 1)[:, 0])
    else:
        device = features.device if generator is None else generator.device
        lots = torch.rand(images, tokens, generator=generator, device=device)
        index = most_attended(lots, keep).to(features.device)
    return index.sort(-1).values


@full_precision
def agile(
    features: Features,
    attention: Attention,
    keep: int,
    *,
    erank_avg: float = 90.0,
    tau_max: float = 0.25,
) -> Index:
    """AgilePruner: by attention in simple images, by diversity in complex ones.

    `attention_cover` with the thresholds of `adaptive_threshold`, from the centred effective rank
    of each image's features.

    Returns:
        Indices in the order of choice, `[images, keep]`.
    """
    check_tokens(features, attention)
    rank = effective_rank(features, center=True)
    thresholds = adaptive_threshold(rank, features.shape[1], erank_avg=erank_avg, tau_max=tau_max)
    return attention_cover(features, attention, thresholds, keep)


def adaptive_threshold(
    erank: Float[Tensor, "images"],
    tokens: int,
    *,
    erank_avg: float = 90.0,
    tau_max: float = 0.25,
) -> Float[Tensor, "images tokens"]:
    """`tau_r = min(tau_max, 0.01 r erank / erank_avg)` for the token of rank r in attention.

    Ranks count from 1. The less a token is attended to, and the more directions the image has, the
    more it clears around it (equation 6).

    Args:
        erank: the effective rank of each image's features, centred (`statistics.effective_rank`).
        tokens: how many ranks.
        erank_avg: the mean effective rank over images. It belongs to the model; 90 is that of
            LLaVA-1.5-7B. `VisualTokenPruning.calibrate` measures it.
        tau_max: reached at rank `100 tau_max erank_avg / erank`.

    Returns:
        A threshold for each rank, most attended first.
    """
    if not erank_avg > 0:
        raise ValueError(f"erank_avg: expected a number above 0, got {erank_avg}.")
    in_range("tau_max", tau_max, 0.0, 2.0)
    ranks = torch.arange(1, tokens + 1, dtype=erank.dtype, device=erank.device)
    return (ranks * (erank / erank_avg * STEP)[:, None]).clamp_max(tau_max)


@full_precision
def attention_cover(
    features: Features,
    attention: Attention,
    thresholds: Float[Tensor, "images tokens"],
    keep: int,
) -> Index:
    """Walk the tokens from the most attended on; a kept token removes those too like it.

    Where nothing is left before `keep` are found, the most attended of the removed ones fill up.
    So thresholds that are too large bring near-duplicates back. Thresholds of 0 give
    `most_attended`. Before the filling, every removed token is closer to a kept one than the kept
    one's threshold.

    Args:
        features: `[images, tokens, dim]`.
        attention: its order decides.
        thresholds: cosine distances below which a token is removed, by rank: the first belongs to
            the most attended token.
        keep: how many.

    Returns:
        Indices in the order of choice, `[images, min(keep, tokens)]`.
    """
    check_tokens(features, attention)
    order = most_attended(attention, attention.shape[1])
    distance = cosine_distance(take(features, order))  # by rank from here on
    images, tokens = order.shape
    image = torch.arange(images, device=order.device)
    alive = torch.ones_like(order, dtype=torch.bool)
    free = alive.clone()
    places = torch.arange(tokens, device=order.device)
    chosen = []
    for _ in range(min(check_keep(keep), tokens)):
        left = torch.where(alive.any(-1, keepdim=True), alive, free)
        place = torch.where(left, places, tokens).argmin(-1)
        chosen.append(place)
        close = distance[image, place] < thresholds[image, place][:, None]
        alive &= ~close
        alive[image, place] = False
        free[image, place] = False
    return order.gather(1, torch.stack(chosen, 1))


@full_precision
def div_prune(features: Features, keep: int) -> Index:
    """DivPrune: keep tokens that are far from each other, `argmax_j min_{i kept} d_ij` at a time.

    The first is the token whose nearest neighbour is farthest. Greedy choice comes within a factor
    of 2 of the best smallest chord `sqrt(2 d)`, within 4 of the best smallest cosine distance.

    Returns:
        Indices in the order of choice, `[images, min(keep, tokens)]`.
    """
    check_tokens(features)
    distance = cosine_distance(features)
    itself = torch.eye(features.shape[1], dtype=torch.bool, device=features.device)
    first = distance.masked_fill(itself, torch.inf).amin(-1).argmax(-1)
    return _farthest(distance, keep, first)


@full_precision
def farthest_points(features: Features, keep: int, first: Int[Tensor, "images"]) -> Index:
    """Farthest point sampling: as `div_prune`, but starting with a given token.

    The paper's comparison names it without its start; `select_tokens` starts with the most
    attended token. [inferred]
    """
    check_tokens(features)
    return _farthest(cosine_distance(features), keep, first)


@full_precision
def vis_pruner(
    features: Features, attention: Attention, keep: int, *, attention_share: float = 0.5
) -> Index:
    """VisPruner: important tokens by attention, diverse ones by dropping what has a double.

    `int(attention_share keep)` tokens are the most attended. The rest stands in a list, most
    attended first. Again and again the list is split into its even and odd places, and the 8 even
    ones with the largest cosine to any odd one are dropped, until as many are left as are wanted;
    the even ones that stay, most alike first, then go before the odd ones.

    Returns:
        Indices, the important ones first, `[images, min(keep, tokens)]`. Differs from the official
        code where that fails: with lists of odd length, and where 8 are more than the even half.
    """
    check_tokens(features, attention)
    tokens = attention.shape[1]
    keep = min(check_keep(keep), tokens)
    important = int(in_range("attention_share", attention_share, 0.0, 1.0) * keep)
    order = most_attended(attention, tokens)
    if keep == important:
        return order[:, :keep]
    rest = order[:, important:]
    unit = unit_vectors(features)
    cosine = (unit @ unit.transpose(1, 2)).flatten(1)
    while rest.shape[1] > keep - important:
        even, odd = rest[:, ::2], rest[:, 1::2]
        drop = min(8, rest.shape[1] - (keep - important), even.shape[1])
        pairs = even[:, :, None] * tokens + odd[:, None, :]
        likeness = cosine.gather(1, pairs.flatten(1)).view(pairs.shape).amax(-1)
        stay = most_attended(likeness, even.shape[1])[:, drop:]
        rest = torch.cat([even.gather(1, stay), odd], 1)
    return torch.cat([order[:, :important], rest], 1)


def _farthest(distance: Tensor, keep: int, first: Tensor) -> Index:
    images, tokens, _ = distance.shape
    image = torch.arange(images, device=distance.device)
    chosen = [first]
    nearest = distance[image, first].index_put((image, first), distance.new_tensor(-1.0))
    for _ in range(min(check_keep(keep), tokens) - 1):
        place = nearest.argmax(-1)
        chosen.append(place)
        nearest = torch.minimum(nearest, distance[image, place])
        nearest[image, place] = -1.0  # below every distance: never twice, also among duplicates
    return torch.stack(chosen, 1)
