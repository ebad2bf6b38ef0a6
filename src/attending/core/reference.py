"""The specification: every quantity of `attending.core`, by its definition, dense and in float64.

Nothing here is fast and nothing here is clever. Each function builds the whole map of
probabilities `p[i, j]` (query i, key j) and evaluates the definition on it, so that a reader can
check it against a textbook, and so that every fast function can be held to it in the tests.

Conventions, used all through the library:

- shapes are `[batch, heads, queries, dim]`, as in `scaled_dot_product_attention`;
- logarithms are natural, entropies are in nats, and `0 log 0 = 0`;
- a row without a visible key is *empty*: its output and all its statistics are 0, its lse is -inf;
- `is_causal` is PyTorch's: query i sees the keys 0..i (aligned to the top left);
- `enable_gqa` repeats each key and value head over its group of query heads.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor


class Map(NamedTuple):
    """A dense attention map: scaled scores with their bias, the visible keys, probabilities."""

    scores: Float64[Tensor, "batch heads queries keys"]
    visible: Bool[Tensor, "batch heads queries keys"]
    probabilities: Float64[Tensor, "batch heads queries keys"]
    lse: Float64[Tensor, "batch heads queries"]


def attention_map(
    query: Float[Tensor, "batch heads queries dim"],
    key: Float[Tensor, "batch kv_heads keys dim"],
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Map:
    """`p[i, j] = exp(s[i, j] - lse[i])` with `s = scale * query @ key^T + bias`."""
    query, key = query.double(), key.double()
    if enable_gqa:
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = scale * query @ key.transpose(-1, -2)
    visible = torch.ones_like(scores, dtype=torch.bool)
    if is_causal:
        visible = visible.tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        visible = visible & attn_mask
    elif attn_mask is not None:
        scores = scores + attn_mask.double()
    scores = scores.masked_fill(~visible, -math.inf)
    visible = scores > -math.inf
    highest = scores.amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float64).min)
    weights = torch.exp(scores - highest)
    total = weights.sum(-1, keepdim=True)
    empty = total == 0
    total = total.masked_fill(empty, 1.0)
    probabilities = weights / total
    lse = (highest + total.log()).masked_fill(empty, -math.inf).squeeze(-1)
    return Map(scores, visible, probabilities, lse)


def attention_state(
    query: Float[Tensor, "batch heads queries dim"],
    key: Float[Tensor, "batch kv_heads keys dim"],
    value: Float[Tensor, "batch kv_heads keys value_dim"],
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[
    Float64[Tensor, "batch heads queries value_dim"], Float64[Tensor, "batch heads queries"]
]:
    """The output `sum_j p[i, j] value[j]` and the log normaliser `log sum_j exp s[i, j]`."""
    dense = attention_map(query, key, attn_mask, is_causal, scale, enable_gqa)
    value = value.double()
    if enable_gqa:
        value = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
    return dense.probabilities @ value, dense.lse


def merge(
    *states: tuple[Float[Tensor, "*rows dim"], Float[Tensor, "*rows"]],
) -> tuple[Float64[Tensor, "*rows dim"], Float64[Tensor, "*rows"]]:
    """The state over the union of disjoint sets of keys: outputs weighted by `exp(lse)`."""
    weights = torch.stack([lse.double().exp() for _, lse in states])
    total = weights.sum(0)
    shares = weights / total.where(total > 0, torch.ones_like(total))
    output = sum(
        share[..., None] * output.double()
        for share, (output, _) in zip(shares, states, strict=True)
    )
    assert isinstance(output, Tensor)
    return output, total.log()


# Of each row of the map.


def entropy(dense: Map) -> Float64[Tensor, "batch heads queries"]:
    """Shannon entropy `-sum_j p log p`."""
    p = dense.probabilities
    return -(p * p.where(p > 0, torch.ones_like(p)).log()).sum(-1)


def normalized_entropy(dense: Map) -> Float64[Tensor, "batch heads queries"]:
    """Entropy over its largest possible value, the log of the number of visible keys (0 if one)."""
    count = dense.visible.sum(-1).double()
    return torch.where(count > 1, entropy(dense) / count.clamp_min(2).log(), 0.0)


def renyi_entropy(dense: Map, order: float) -> Float64[Tensor, "batch heads queries"]:
    """`log(sum_j p^order) / (1 - order)`; Shannon entropy at order 1, `-log max p` at infinity."""
    if order == 1:
        return entropy(dense)
    empty = ~dense.visible.any(-1)
    if math.isinf(order):
        return (-dense.probabilities.amax(-1).log()).masked_fill(empty, 0.0)
    powers = torch.where(dense.visible, dense.probabilities**order, 0.0)
    return (powers.sum(-1).log() / (1 - order)).masked_fill(empty, 0.0)


def second_moment(dense: Map) -> Float64[Tensor, "batch heads queries"]:
    """`sum_j p^2`, the chance that two draws from the row are the same key."""
    return dense.probabilities.square().sum(-1)


def participation_ratio(dense: Map) -> Float64[Tensor, "batch heads queries"]:
    """`1 / sum_j p^2`: how many keys the row looks at, were they all looked at equally."""
    moment = second_moment(dense)
    return torch.where(moment > 0, 1 / moment, 0.0)


def max_probability(dense: Map) -> Float64[Tensor, "batch heads queries"]:
    """`max_j p`."""
    return dense.probabilities.amax(-1)


def varentropy(dense: Map) -> Float64[Tensor, "batch heads queries"]:
    """The variance of `-log p` under p."""
    p = dense.probabilities
    surprise = -torch.where(p > 0, p, torch.ones_like(p)).log()
    return (p * (surprise - entropy(dense)[..., None]).square()).sum(-1)


def expected_features(
    dense: Map,
    features: Float[Tensor, "*feature_batch keys features"]
    | Int[Tensor, "*feature_batch keys features"],
) -> Float64[Tensor, "batch heads queries features"]:
    """`sum_j p[i, j] features[j]`."""
    return dense.probabilities @ features.double()


def mean_distance(dense: Map, query_offset: int = 0) -> Float64[Tensor, "batch heads queries"]:
    """`sum_j p[i, j] |i + query_offset - j|`."""
    queries, keys = dense.probabilities.shape[-2:]
    position = torch.arange(queries, dtype=torch.float64)[:, None] + query_offset
    distance = (position - torch.arange(keys, dtype=torch.float64)).abs()
    return (dense.probabilities * distance).sum(-1)


def key_set_mass(
    dense: Map, key_indices: Int[Tensor, " members"]
) -> Float64[Tensor, "batch heads queries"]:
    """`sum_{j in set} p[i, j]`."""
    return dense.probabilities[..., key_indices].sum(-1)


def centred_logit_norm(dense: Map) -> Float64[Tensor, "batch heads queries"]:
    """The norm of the row's scores over the visible keys, less their mean; 0 for an empty row."""
    scores = dense.scores.masked_fill(~dense.visible, 0.0)
    count = dense.visible.sum(-1, keepdim=True).clamp_min(1)
    centred = (scores - scores.sum(-1, keepdim=True) / count).masked_fill(~dense.visible, 0.0)
    norm: Tensor = torch.linalg.vector_norm(centred, dim=-1)
    return norm


def entropy_lower_bound(num_keys: int, logit_norm: float) -> float:
    """The entropy of the worst row of this centred norm: one high score, the others equally low."""
    if num_keys < 2:
        return 0.0
    row = torch.full((num_keys,), -1.0, dtype=torch.float64)
    row[0] = num_keys - 1
    row *= logit_norm / math.sqrt(num_keys * (num_keys - 1))
    p = row.softmax(0)
    return -float(torch.xlogy(p, p).sum())


# Of each key, and of the map as a whole.


def column_mass(
    dense: Map, query_weights: Float[Tensor, "*weight_batch queries"] | None = None
) -> Float64[Tensor, "batch heads keys"]:
    """`sum_i w[i] p[i, j]`: the attention that each key receives."""
    if query_weights is None:
        return dense.probabilities.sum(-2)
    return (query_weights.double()[..., None] * dense.probabilities).sum(-2)


def column_importance(dense: Map) -> Float64[Tensor, "batch heads keys"]:
    """Received attention averaged over the queries that can see the key (0 if none can)."""
    seen_by = dense.visible.sum(-2)
    return torch.where(seen_by > 0, column_mass(dense) / seen_by.clamp_min(1), 0.0)


def pooled_map(dense: Map, size: int) -> Float64[Tensor, "batch heads size size"]:
    """The map in `size x size` buckets: mean over a bucket's queries of its keys' mass.

    Token t of n belongs to bucket `floor(t * size / n)`. Rows that are empty are left out of the
    mean; a bucket with no row holds 0.
    """
    queries, keys = dense.probabilities.shape[-2:]
    nonempty = dense.visible.any(-1).double()
    pooled = torch.zeros(*dense.probabilities.shape[:2], size, size, dtype=torch.float64)
    count = torch.zeros(*dense.probabilities.shape[:2], size, dtype=torch.float64)
    for i in range(queries):
        row = i * size // queries
        count[..., row] += nonempty[..., i]
        for j in range(keys):
            pooled[..., row, j * size // keys] += dense.probabilities[..., i, j]
    return pooled / count.clamp_min(1)[..., None]


# Of hidden states and of the outputs of heads.


def effective_rank(matrix: Float[Tensor, "*batch rows columns"]) -> Float64[Tensor, "*batch"]:
    """`exp(-sum_k q_k log q_k)` with q the singular values over their sum (Roy, Vetterli 2007)."""
    singular = torch.linalg.svdvals(matrix.double())
    total = singular.sum(-1, keepdim=True)
    share = singular / total.where(total > 0, torch.ones_like(total))
    return torch.where(total[..., 0] > 0, (-torch.xlogy(share, share).sum(-1)).exp(), 0.0)


def token_similarity(hidden: Float[Tensor, "*batch tokens dim"]) -> Float64[Tensor, "*batch"]:
    """Mean cosine similarity over pairs of different tokens (0 when there are fewer than two)."""
    tokens = hidden.shape[-2]
    unit = torch.nn.functional.normalize(hidden.double(), dim=-1)
    cosines = unit @ unit.transpose(-1, -2)
    off_diagonal = cosines.sum((-1, -2)) - cosines.diagonal(dim1=-2, dim2=-1).sum(-1)
    return off_diagonal / max(tokens * (tokens - 1), 1)


def head_similarity(
    outputs: Float[Tensor, "heads samples dim"],
) -> Float64[Tensor, "heads heads"]:
    """Linear CKA of every pair of heads, by Gram matrices over samples (Kornblith et al. 2019)."""
    centred = outputs.double() - outputs.double().mean(1, keepdim=True)
    grams = centred @ centred.transpose(-1, -2)
    inner = torch.einsum("aij,bij->ab", grams, grams)
    norm = inner.diagonal().sqrt()
    scale = norm[:, None] * norm
    return torch.where(scale > 0, inner / scale.where(scale > 0, torch.ones_like(scale)), 0.0)


def attention_rollout(
    maps: list[Float[Tensor, "batch heads tokens tokens"]],
) -> Float64[Tensor, "batch tokens tokens"]:
    """`A'_L ... A'_1` with `A'_l = (mean over heads of A_l + I) / 2` (Abnar and Zuidema 2020)."""
    rollout = torch.eye(maps[0].shape[-1], dtype=torch.float64)
    for dense in maps:
        fused = (dense.double().mean(1) + torch.eye(dense.shape[-1], dtype=torch.float64)) / 2
        rollout = (fused / fused.sum(-1, keepdim=True)) @ rollout
    return rollout
