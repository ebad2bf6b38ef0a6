"""The tied map of a tree by plain recursion over nodes, in float64, with loops over tokens."""

import math

import torch
from torch import Tensor


def leaves_below(parent: list[int], node: int) -> list[int]:
    children = [child for child, above in enumerate(parent) if above == node]
    if not children:
        return [node]
    return sorted(leaf for child in children for leaf in leaves_below(parent, child))


def tied_map(scores: Tensor, parent: list[int], include_self: bool = True) -> tuple[Tensor, float]:
    """The map of one head, and phi of the root; `parent` numbers leaves first, in any order."""
    tokens = len(scores)
    below = [leaves_below(parent, node) for node in range(len(parent))]
    children = [[c for c, above in enumerate(parent) if above == n] for n in range(len(parent))]

    def minus_psi(b: int, c: int) -> float:
        return float(scores[below[b]][:, below[c]].mean())

    def z(node: int) -> float:
        terms = [-phi(node)]
        for other in children[parent[node]]:
            if other != node:
                terms.append(math.log(len(below[other])) + minus_psi(node, other))
        return float(torch.tensor(terms, dtype=torch.float64).logsumexp(0))

    def phi(node: int) -> float:
        if not children[node]:
            return -float(scores[node, node]) if include_self else math.inf
        return -sum(len(below[c]) / len(below[node]) * z(c) for c in children[node])

    result = torch.zeros(tokens, tokens, dtype=torch.float64)

    def descend(node: int, mass: float) -> None:
        if not children[node]:
            result[node, node] = mass if include_self else 0.0
        for child in children[node]:
            own = z(child)
            for other in children[node]:
                if other != child:
                    weight = mass * math.exp(minus_psi(child, other) - own)
                    result[torch.tensor(below[child])[:, None], torch.tensor(below[other])] = weight
            descend(child, 0.0 if own == -math.inf else mass * math.exp(-phi(child) - own))

    for root in (node for node, above in enumerate(parent) if above == -1):
        descend(root, 1.0)
    return result, phi(parent.index(-1))


def blocks(parent: list[int]) -> list[tuple[list[int], list[int]]]:
    """The pairs of siblings as blocks of the map, and each diagonal entry as one."""
    tokens = len([node for node in range(len(parent)) if node not in parent])
    found = [([leaf], [leaf]) for leaf in range(tokens)]
    for b, above in enumerate(parent):
        for c, other in enumerate(parent):
            if b != c and above == other != -1:
                found.append((leaves_below(parent, b), leaves_below(parent, c)))
    return found
