"""The selectors one token at a time, in float64, as the papers and codes say it."""

import math

import torch
from torch import Tensor


def distances(features: Tensor) -> Tensor:
    features = features.double()
    norm = features.norm(dim=-1) + 1e-8
    distance = (1 - features @ features.T / (norm[:, None] * norm)).clamp_min(0)
    return (distance + distance.T) / 2


def erank(features: Tensor) -> float:
    features = features.double()
    values = torch.linalg.svdvals(features - features.mean(0))
    share = values / values.sum()
    return math.exp(-sum(float(q) * math.log(float(q)) for q in share if q > 0))


def by_attention(attention: Tensor) -> list[int]:
    return sorted(range(len(attention)), key=lambda i: (-float(attention[i]), i))


def cover(
    features: Tensor, attention: Tensor, thresholds: list[float], keep: int
) -> tuple[list[int], int]:
    """The tokens in the order of choice, and how many came from the walk."""
    distance, order = distances(features), by_attention(attention)
    kept: list[int] = []
    removed: set[int] = set()
    for rank, token in enumerate(order):
        if token in removed or len(kept) == keep:
            continue
        kept.append(token)
        for other in order[rank + 1 :]:
            if float(distance[token, other]) < thresholds[rank]:
                removed.add(other)
    walked = len(kept)
    kept += [token for token in order if token not in kept][: keep - walked]
    return kept, walked


def agile(
    features: Tensor, attention: Tensor, keep: int, erank_avg: float, tau_max: float
) -> tuple[list[int], int]:
    rank = erank(features)
    thresholds = [min(tau_max, (i + 1) * rank / erank_avg * 0.01) for i in range(len(attention))]
    return cover(features, attention, thresholds, keep)


def div_prune(features: Tensor, keep: int) -> list[int]:
    distance = distances(features)
    tokens = range(len(features))
    nearest = [min(float(distance[i, j]) for j in tokens if j != i) for i in tokens]
    kept = [max(tokens, key=lambda i: nearest[i])]
    while len(kept) < keep:
        rest = [i for i in tokens if i not in kept]
        kept.append(max(rest, key=lambda i: min(float(distance[i, j]) for j in kept)))
    return kept


def vision_zip(
    features: Tensor, attention: Tensor, key: Tensor, keep: int, contextual: int
) -> Tensor:
    order = by_attention(attention)
    dominant = sorted(order[: keep - contextual])
    rest = [i for i in range(len(features)) if i not in dominant]
    targets = [rest[n * (len(rest) // contextual)] for n in range(contextual)]
    cosine = 1 - distances(key)
    groups: dict[int, list[int]] = {target: [] for target in targets}
    for token in rest:
        if token not in targets:
            groups[max(targets, key=lambda t: float(cosine[token, t]))].append(token)
    merged = [
        features[t] + (features[members].mean(0) if members else 0) for t, members in groups.items()
    ]
    return torch.stack([*features[dominant], *merged])


def pru_merge(
    features: Tensor, attention: Tensor, key: Tensor, kept: list[int], neighbours: int
) -> Tensor:
    cosine = 1 - distances(key)
    tokens = []
    for i in kept:
        others = [j for j in range(len(features)) if j != i]
        near = sorted(others, key=lambda j: -float(cosine[i, j]))[:neighbours]
        tokens.append(features[i] + sum(attention[j] * features[j] for j in near))
    rest = [j for j in range(len(features)) if j not in kept]
    tokens.append(sum((attention[j] * features[j] for j in rest), torch.zeros_like(features[0])))
    return torch.stack(tokens)
