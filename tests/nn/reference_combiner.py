"""Combiner's map row by row, in float64: a query's partition of the keys, then equations 7 to 9."""

import torch
from torch import Tensor

from attending.nn.combiner_plans import AxialPlan, FixedPlan, LogsparsePlan, Plan, RoutingPlan

Parts = tuple[list[int], list[list[int]]]


def partition(plan: Plan, i: int, tokens: int, is_causal: bool) -> Parts:
    """Direct keys and regions of query i; for the joint mixture regions overlap."""
    everything = range(tokens)
    if isinstance(plan, FixedPlan):
        size = plan.segment_length
        direct = [j for j in everything if j // size == i // size and (j <= i or not is_causal)]
        others = [s for s in range(-(-tokens // size)) if s != i // size]
        regions = [
            [j for j in everything if j // size == s]
            for s in others
            if s < i // size or not is_causal
        ]
        return direct, regions
    if isinstance(plan, LogsparsePlan):
        regions = prefix_blocks(i)
        if not is_causal:
            regions += [[tokens - 1 - j for j in block] for block in prefix_blocks(tokens - 1 - i)]
        return [i], regions
    if isinstance(plan, RoutingPlan):
        cluster = plan.assign.tolist()
        seen = [j for j in everything if j <= i or not is_causal]
        direct = [j for j in seen if cluster[j] == cluster[i]]
        others = [c for c in range(max(cluster) + 1) if c != cluster[i]]
        return direct, [[j for j in seen if cluster[j] == c] for c in others]
    m = plan.columns
    r, c = i // m, i % m
    row, column = (lambda j: j // m), (lambda j: j % m)
    if plan.kind == "rowmajor":
        raise ValueError("its summaries depend on the column; see rowmajor_map")
    direct = [
        j
        for j in everything
        if (row(j) == r and (column(j) <= c or not is_causal))
        or (column(j) == c and (row(j) < r or not is_causal))
    ]
    vertical, horizontal = [], []
    for u in range(m):
        if u != c:
            vertical.append([j for j in everything if column(j) == u and row(j) < r])
            if not is_causal:
                vertical.append([j for j in everything if column(j) == u and row(j) > r])
    for t in range(-(-tokens // m)):
        if t == r or (t > r and is_causal):
            continue
        if plan.split:
            horizontal.append([j for j in everything if row(j) == t and column(j) < c])
            horizontal.append([j for j in everything if row(j) == t and column(j) > c])
        else:
            horizontal.append([j for j in everything if row(j) == t and column(j) != c])
    if plan.kind == "vertical":
        return direct, vertical
    return direct, horizontal if plan.kind == "horizontal" else vertical + horizontal


def prefix_blocks(i: int) -> list[list[int]]:
    """0..i-1 in blocks, one for each bit that is set in i."""
    blocks = []
    for bit in range(i.bit_length()):
        if i >> bit & 1:
            blocks.append(list(range(((i >> bit) - 1) << bit, (i >> bit) << bit)))
    return blocks


def combiner_map(
    query: Tensor,
    key: Tensor,
    plan: Plan,
    is_causal: bool,
    visible: list[bool] | None = None,
    pool: str = "max",
) -> Tensor:
    """The map of one head, `[tokens, tokens]`, from query and key `[tokens, dim]`."""
    tokens, dim = query.shape
    scale = dim**-0.5
    seen = [True] * tokens if visible is None else visible
    if visible is not None and isinstance(plan, FixedPlan | LogsparsePlan):
        place = [j for j in range(tokens) if visible[j]]
        found = query.new_zeros(tokens, tokens)
        if place:
            at = torch.tensor(place)
            found[at[:, None], at] = combiner_map(query[at], key[at], plan, is_causal, None, pool)
        return found
    if isinstance(plan, AxialPlan) and plan.kind == "mixture" and plan.mixture == "average":
        kinds = (AxialPlan(plan.columns, kind, plan.split) for kind in ("vertical", "horizontal"))
        return sum(combiner_map(query, key, k, is_causal, visible, pool) for k in kinds) / 2
    if isinstance(plan, AxialPlan) and plan.kind == "rowmajor":
        return rowmajor_map(query, key, plan, is_causal, seen)

    def pooled(x: Tensor, members: list[int]) -> Tensor:
        return x[members].mean(0) if pool == "mean" else x[members].amax(0)

    result = query.new_zeros(tokens, tokens)
    for i in range(tokens):
        if not seen[i]:
            continue
        direct, regions = partition(plan, i, tokens, is_causal)
        total = query.new_zeros(())
        for j in direct:
            if seen[j]:
                weight = (scale * query[i] @ key[j]).exp()
                result[i, j] += weight
                total = total + weight
        for region in regions:
            members = [j for j in region if seen[j]]
            if members:
                weight = (scale * query[i] @ pooled(key, members)).exp()
                inside = (scale * key[members] @ pooled(query, members)).softmax(0)
                result[i, members] += weight * inside
                total = total + weight
        result[i] = result[i] / total
    return result


def rowmajor_map(
    query: Tensor, key: Tensor, plan: AxialPlan, is_causal: bool, seen: list[bool]
) -> Tensor:
    tokens, dim = query.shape
    scale, m = dim**-0.5, plan.columns
    result = query.new_zeros(tokens, tokens)
    for i in range(tokens):
        if not seen[i]:
            continue
        r, c = i // m, i % m
        total = query.new_zeros(())
        for j in range(tokens):
            if seen[j] and j // m == r and (j <= i or not is_causal):
                weight = (scale * query[i] @ key[j]).exp()
                result[i, j] += weight
                total = total + weight
        for t in range(-(-tokens // m)):
            cell = t * m + c
            if t == r or (t > r and is_causal) or cell >= tokens or not seen[cell]:
                continue
            members = [j for j in range(t * m, min(t * m + m, tokens)) if seen[j]]
            inside = (scale * key[members] @ query[cell]).softmax(0)
            row_key = inside @ key[members] if plan.row_key == "wsum" else key[cell]
            weight = (scale * query[i] @ row_key).exp()
            result[i, members] += weight * inside
            total = total + weight
        result[i] = result[i] / total
    return result
