"""How a tree is laid out in memory: siblings of one height side by side, in few tensors.

Values of nodes are kept in *tables*: table 0 has a row for each leaf, table i + 1 one for each
parent of families i. Going up, `Families.take` collects the rows of the children; going down,
`Layout.rows` puts what the children got back into the order of their table. For regular trees
both are views.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True, eq=False)
class Families:
    """Sets of siblings whose parents are in one table.

    Attributes:
        nodes: the numbers of the children; 0 where `real` is False.
        real: False where a family has fewer children than the largest.
        table: the table that all children are in, -1 if there are several.
        rows: the children as rows of that table, or of all tables one after another.
        first: if the children follow one another in the table and only the end is not real, the
            row of the first, else -1.
        full: whether all are real.
    """

    nodes: Int[Tensor, "families children"]
    real: Bool[Tensor, "families children"]
    table: int
    rows: Int[Tensor, "families children"]
    first: int
    full: bool

    def to(self, device: torch.device) -> "Families":
        """The same on another device."""
        return replace(
            self,
            nodes=self.nodes.to(device),
            real=self.real.to(device),
            rows=self.rows.to(device),
        )

    def take(self, tables: Sequence[Tensor], fill: float) -> Tensor:
        """The children's rows, `[..., families, children, dim]`; `fill` where there is no child."""
        source = tables[self.table] if self.table >= 0 else torch.cat(list(tables), -2)
        if self.first >= 0:
            count = min(self.real.numel(), source.shape[-2] - self.first)
            taken = source.narrow(-2, self.first, count)
            if count < self.real.numel():
                taken = pad(taken, (0, 0, 0, self.real.numel() - count))
        else:
            taken = source.index_select(-2, self.rows.flatten())
        found: Tensor = taken.unflatten(-2, self.real.shape)
        return found if self.full else found.masked_fill(~self.real[..., None], fill)


@dataclass(frozen=True, eq=False)
class Layout:
    """The families of a tree, and where the rows of each table are among their children.

    Attributes:
        families: from below, so that children come before their parents.
        sources: for each table, the families whose children are in it.
        places: for each table, its rows among the children of these families, one after another,
            and a root's row behind them; None where they are the rows as they come.
        sizes: rows of each table.
    """

    families: tuple[Families, ...]
    sources: tuple[tuple[int, ...], ...]
    places: tuple[Tensor | None, ...]
    sizes: tuple[int, ...]

    def to(self, device: torch.device) -> "Layout":
        """The same on another device."""
        return replace(
            self,
            families=tuple(family.to(device) for family in self.families),
            places=tuple(None if place is None else place.to(device) for place in self.places),
        )

    def rows(self, results: Sequence[Tensor | None], table: int, root: Tensor) -> Tensor:
        """The rows of one table, from what the children of each of the families got.

        Args:
            results: for each of the families `[..., families, children, dim]`; only those that
                `sources` names are looked at.
            table: which one.
            root: what a root has, `[..., 1, dim]`.
        """
        parts = []
        for source in self.sources[table]:
            part = results[source]
            assert part is not None  # parents are visited before their children
            parts.append(part.flatten(-3, -2))
        place = self.places[table]
        if place is None:
            return parts[0].narrow(-2, 0, self.sizes[table])
        return torch.cat([*parts, root], -2).index_select(-2, place)


def renumber(parent: Sequence[int]) -> tuple[tuple[int, ...], int, tuple[int, ...]]:
    """Number inner nodes by height, and within a height by their first leaf.

    Returns:
        The parents in the new numbering, the number of leaves, and the height of each node.
    """
    nodes = len(parent)
    children: list[list[int]] = [[] for _ in range(nodes)]
    for node, above in enumerate(parent):
        if not -1 <= above < nodes:
            raise ValueError(
                f"parent: expected -1 or a node from 0 to {nodes - 1}, got {above} for node {node}."
            )
        if above >= 0:
            children[above].append(node)
    leaves = next((node for node in range(nodes) if children[node]), nodes)
    late = [node for node in range(leaves, nodes) if not children[node]]
    if leaves == 0 or late:
        raise ValueError(
            "parent: expected the leaves, the nodes without children, to come first, got "
            f"{'no node' if nodes == 0 else f'leaf {late[0]}' if late else 'inner node 0'} "
            "out of place."
        )
    height = [0] * nodes
    first = [*range(leaves), *[leaves] * (nodes - leaves)]  # leaf below a node
    waiting = [len(found) for found in children]
    ready = list(range(leaves))
    done = 0
    while ready:
        node = ready.pop()
        done += 1
        above = parent[node]
        if above < 0:
            continue
        height[above] = max(height[above], height[node] + 1)
        first[above] = min(first[above], first[node])
        waiting[above] -= 1
        if waiting[above] == 0:
            ready.append(above)
    if done < nodes:
        raise ValueError("parent: expected a tree, got nodes that are their own ancestors.")
    return _by_height(parent, leaves, height, first, children)


def _by_height(
    parent: Sequence[int],
    leaves: int,
    height: Sequence[int],
    first: Sequence[int],
    children: Sequence[Sequence[int]],
) -> tuple[tuple[int, ...], int, tuple[int, ...]]:
    order = list(range(leaves))
    table = [0] * leaves
    inner: dict[int, list[int]] = {}
    for node in range(leaves, len(parent)):
        inner.setdefault(height[node], []).append(node)
    tables = 0
    for level in sorted(inner):
        for bucket in _buckets(inner[level], [len(found) for found in children]):
            tables += 1
            order += sorted(bucket, key=lambda node: first[node])
            table += [tables] * len(bucket)
    new = {old: number for number, old in enumerate(order)}
    renumbered = tuple(-1 if parent[old] < 0 else new[parent[old]] for old in order)
    return renumbered, leaves, tuple(table)


def _buckets(nodes: Sequence[int], sizes: Sequence[int]) -> list[list[int]]:
    """Put families of different size together only if that at most doubles the work."""
    largest = max(sizes[node] for node in nodes)
    if len(nodes) * largest**2 <= 2 * sum(sizes[node] ** 2 for node in nodes):
        return [list(nodes)]
    buckets: dict[int, list[int]] = {}
    for node in nodes:
        buckets.setdefault((sizes[node] - 1).bit_length(), []).append(node)
    return [buckets[key] for key in sorted(buckets)]


def lay_out(parent: Sequence[int], table: Sequence[int]) -> Layout:
    """The layout of a tree numbered by `renumber`, given the table of each node."""
    sizes = [0] * (max(table) + 1)
    for number in table:
        sizes[number] += 1
    offsets = [sum(sizes[:number]) for number in range(len(sizes))]
    children: list[list[int]] = [[] for _ in parent]
    for node, above in enumerate(parent):
        if above >= 0:
            children[above].append(node)
    families = []
    for number in range(1, len(sizes)):
        parents = range(offsets[number], offsets[number] + sizes[number])
        families.append(_families([children[node] for node in parents], table, offsets))
    sources: list[tuple[int, ...]] = []
    places: list[Tensor | None] = []
    for number, size in enumerate(sizes):
        found = _find(families, offsets[number], size)
        sources.append(found[0])
        places.append(found[1])
    return Layout(tuple(families), tuple(sources), tuple(places), tuple(sizes))


def _families(
    groups: Sequence[Sequence[int]], table: Sequence[int], offsets: Sequence[int]
) -> Families:
    width = max(len(group) for group in groups)
    nodes = torch.tensor([[*group, *[0] * (width - len(group))] for group in groups])
    counts = torch.tensor([len(group) for group in groups])
    real = torch.arange(width) < counts[:, None]
    found = {table[node] for group in groups for node in group}
    source = found.pop() if len(found) == 1 else -1
    rows = nodes - (offsets[source] if source >= 0 else 0)
    rows = rows.masked_fill(~real, 0)
    total = int(counts.sum())
    start = int(rows[0, 0])
    in_order = rows.flatten()[:total] == torch.arange(start, start + total)
    simple = source >= 0 and bool(real.flatten()[:total].all()) and bool(in_order.all())
    return Families(nodes, real, source, rows, start if simple else -1, bool(real.all()))


def _find(
    families: Sequence[Families], offset: int, size: int
) -> tuple[tuple[int, ...], Tensor | None]:
    """Which families have the nodes of a table as children, and where."""
    sources: list[int] = []
    slots = 0
    where = torch.full((size,), -1)
    for number, family in enumerate(families):
        node = family.nodes.flatten() - offset
        mine = family.real.flatten() & (node >= 0) & (node < size)
        if not bool(mine.any()):
            continue
        if family.first == 0 and int(mine.sum()) == size:
            return (number,), None
        sources.append(number)
        where[node[mine]] = slots + mine.nonzero().squeeze(1)
        slots += family.real.numel()
    return tuple(sources), where.masked_fill(where < 0, slots)
