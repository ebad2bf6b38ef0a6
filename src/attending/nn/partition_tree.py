"""A tree over tokens, and statistics of the tokens below each of its nodes.

Text comes in sentences and paragraphs, an image in quarters of quarters, a page holds several of
both. `PartitionTree` says so: its leaves are the tokens of a sequence, each inner node stands for
the tokens below it, and the children of a node divide its tokens among themselves. Hierarchical
self-attention treats a distant branch as one token, Combiner attends to summaries of regions; both
pool queries, keys and values over the nodes, with `PartitionTree.pool`.

    PartitionTree.windows(1024, (4, 4, 4))               # windows of 4, of 16, of 64 tokens
    PartitionTree.from_nested([["A", "cat"], ["It", "sat", "down"]])
    PartitionTree.from_labels(sentence_of_token, paragraph_of_token)
    PartitionTree.grid(14, 14)                           # quad-tree over the patches of an image
    PartitionTree.join(image_tree, title_tree, text_tree)   # several signals under one root

Nodes are numbered from below: the leaves are 0, 1, ... in the order of the sequence, and each inner
node comes after its children. Nodes of one height are stored together, so that a pass over the tree
is a few batched operations and not a loop over nodes.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attending.nn._tree_families import Layout, lay_out, renumber

Pooling = Literal["mean", "max"]


class PartitionTree:
    """A rooted tree, or several, whose leaves are tokens.

    Args:
        parent: the parent of each node, -1 for a root. Nodes without children are the leaves; they
            come first, in the order of the tokens. Inner nodes may come in any order, and are
            numbered anew (`parent` afterwards shows how).

    Attributes:
        parent: the parent of each node, -1 for a root, in the numbering of the tree.
        num_leaves: how many tokens there are.
        num_nodes: leaves and inner nodes together.

    Raises:
        ValueError: if leaves do not come first, a parent does not exist, or there is a circle.
    """

    def __init__(self, parent: Sequence[int]) -> None:
        self.parent, self.num_leaves, table = renumber([int(node) for node in parent])
        self.num_nodes = len(self.parent)
        self._layouts = {torch.device("cpu"): lay_out(self.parent, table)}

    def __repr__(self) -> str:
        """In short: the sizes."""
        return (
            f"PartitionTree({self.num_leaves} leaves, {self.num_nodes} nodes, {len(self.roots)} "
            f"roots, height {self.height})"
        )

    @classmethod
    def windows(cls, num_leaves: int, sizes: Sequence[int]) -> "PartitionTree":
        """Nested windows over a sequence.

        Args:
            num_leaves: tokens of the sequence; need not divide.
            sizes: how many nodes make one of the next level, from below: `(4, 8)` makes windows of
                4 tokens and of 8 such windows. What is left at the top are the children of the
                root, so `()` is a flat tree, for which hierarchical attention is softmax attention.
        """
        if num_leaves < 1:
            raise ValueError(f"num_leaves: expected at least 1, got {num_leaves}.")
        parent = [-1] * num_leaves
        level = list(range(num_leaves))
        for size in [*_check_sizes(sizes), num_leaves]:
            if len(level) == 1:
                break
            above = []
            for start in range(0, len(level), size):
                above.append(len(parent))
                parent.append(-1)
                for node in level[start : start + size]:
                    parent[node] = above[-1]
            level = above
        return cls(parent)

    @classmethod
    def from_nested(cls, nested: Sequence[object]) -> "PartitionTree":
        """From lists in lists: a list or tuple is a node, anything else in it is a token.

        Tokens count in the order of reading. `[["A", "cat"], ["It", "sat"]]` has 4 leaves, in two
        families of two. Without tokens in it, a list is refused.
        """
        leaves = 0
        inner: list[int | None] = []  # parents of inner nodes, as an index among inner nodes
        leaf_parent: list[int] = []

        def walk(part: Sequence[object], above: int | None) -> None:
            nonlocal leaves
            if len(part) == 0:
                raise ValueError("nested: expected no empty list, as a node stands for its tokens.")
            here = len(inner)
            inner.append(above)
            for item in part:
                if isinstance(item, list | tuple):
                    walk(item, here)
                else:
                    leaf_parent.append(here)
                    leaves += 1

        if not isinstance(nested, list | tuple):
            raise ValueError(f"nested: expected a list of lists, got {type(nested).__name__}.")
        walk(nested, None)
        return cls(
            [leaves + node for node in leaf_parent]
            + [-1 if node is None else leaves + node for node in inner]
        )

    @classmethod
    def from_labels(cls, *levels: Sequence[int] | Tensor) -> "PartitionTree":
        """From the number of the part that each token is in, finest parts first.

            PartitionTree.from_labels(sentence_of_token, paragraph_of_token)

        Tokens of a part need not be neighbours, so clusters will do as well. All parts of the
        coarsest level are children of one root.

        Raises:
            ValueError: if levels have different lengths, or a part is spread over two coarser ones.
        """
        if not levels:
            raise ValueError("levels: expected at least one sequence of labels, got none.")
        labels = [[int(label) for label in level] for level in levels]
        tokens = len(labels[0])
        if any(len(level) != tokens for level in labels):
            raise ValueError(
                "levels: expected a label for each token in each level, got "
                f"{[len(level) for level in labels]} labels."
            )
        if tokens == 0:
            raise ValueError("levels: expected at least one token, got none.")
        parent = [-1] * tokens
        below: list[int] = list(range(tokens))  # the highest node so far of each token
        for depth, level in enumerate(labels):
            nodes: dict[int, int] = {}
            for token, label in enumerate(level):
                if label not in nodes:
                    nodes[label] = len(parent)
                    parent.append(-1)
                node, child = nodes[label], below[token]
                if parent[child] not in (-1, node):
                    raise ValueError(
                        f"levels[{depth}]: expected parts that hold whole parts of the level "
                        f"before, but token {token} with label {label} is in a part of that "
                        "level which other tokens share under another label."
                    )
                parent[child] = node
            below = [nodes[label] for label in level]
        if parent.count(-1) > 1:
            root = len(parent)
            parent = [root if node == -1 else node for node in parent] + [-1]
        return cls(parent)

    @classmethod
    def grid(
        cls, rows: int, columns: int, block: int = 2, levels: int | None = None
    ) -> "PartitionTree":
        """A quad-tree over a grid whose cells are numbered row by row, such as image patches.

        Args:
            rows, columns: size of the grid; need not divide.
            block: a node stands for `block` x `block` nodes of the level below.
            levels: how many times to join blocks before what is left goes under the root; as
                often as there is more than one by default.
        """
        if rows < 1 or columns < 1:
            raise ValueError(f"rows, columns: expected at least 1, got {rows} and {columns}.")
        if block < 2:
            raise ValueError(f"block: expected at least 2, got {block}.")
        cells = [(index // columns, index % columns) for index in range(rows * columns)]
        labels: list[list[int]] = []
        size = block
        while max(rows, columns) > size // block and levels != len(labels):
            labels.append([row // size * columns + column // size for row, column in cells])
            size *= block
        return cls.from_labels(*labels) if labels else cls.windows(len(cells), ())

    @classmethod
    def join(cls, *trees: "PartitionTree", root: bool = True) -> "PartitionTree":
        """Several trees side by side: their tokens follow one another.

        Args:
            trees: one for each signal, or for each sequence of a batch.
            root: put them under one root, for an image beside texts. False keeps them apart: then
                no token of one attends to another.
        """
        if not trees:
            raise ValueError("trees: expected at least one PartitionTree, got none.")
        leaves = sum(tree.num_leaves for tree in trees)
        leaf_part: list[int] = []
        inner_part: list[int] = []
        for tree in trees:
            shift = leaves + len(inner_part) - tree.num_leaves
            moved = [-1 if node == -1 else node + shift for node in tree.parent]
            leaf_part += moved[: tree.num_leaves]
            inner_part += moved[tree.num_leaves :]
        parent = leaf_part + inner_part
        if root and parent.count(-1) > 1:
            top = len(parent)
            parent = [top if node == -1 else node for node in parent] + [-1]
        return cls(parent)

    @property
    def roots(self) -> tuple[int, ...]:
        """The nodes without a parent."""
        return tuple(node for node, above in enumerate(self.parent) if above == -1)

    @property
    def height(self) -> int:
        """Edges from the highest root to its deepest leaf."""
        depth = [0] * self.num_nodes
        for node in reversed(range(self.num_nodes)):
            if self.parent[node] != -1:
                depth[node] = depth[self.parent[node]] + 1
        return max(depth)

    @property
    def num_sibling_pairs(self) -> int:
        """Ordered pairs of siblings: dot products, and mixed values, of one hierarchical pass.

        `4 * dim * num_sibling_pairs` is its FLOPs for scores and values, where softmax attention
        has `4 * dim * num_leaves ** 2`.
        """
        children = [0] * self.num_nodes
        for above in self.parent:
            if above != -1:
                children[above] += 1
        return sum(count * (count - 1) for count in children)

    def layout(self, device: torch.device | str = "cpu") -> Layout:
        """The sets of siblings, batched by height from below, with their indices on a device."""
        device = torch.device(device)
        if device not in self._layouts:
            self._layouts[device] = self._layouts[torch.device("cpu")].to(device)
        return self._layouts[device]

    def pool(
        self,
        features: Float[Tensor, "*batch leaves dim"],
        weights: Float[Tensor, "*#batch leaves"] | Bool[Tensor, "*#batch leaves"] | None = None,
        how: Pooling = "mean",
    ) -> Float[Tensor, "*batch nodes dim"]:
        """The mean or the largest of each feature over the leaves of every node; differentiable.

        Args:
            features: of the leaves.
            weights: of the leaves in a mean, 0 or more; for the maximum, 0 hides a leaf. 1 by
                default.
            how: `"mean"` or `"max"`.

        Returns:
            A row for every node, first those of the leaves themselves. 0 for nodes whose leaves
            all have weight 0.

        Raises:
            ValueError: if features are not those of as many leaves, or `how` is another word.
        """
        return torch.cat(self.pool_tables(features, weights, how), -2)

    def pool_tables(
        self, features: Tensor, weights: Tensor | None = None, how: Pooling = "mean"
    ) -> list[Tensor]:
        """`pool` in parts: the leaves, then the parents of each of `layout().families`."""
        if features.shape[-2] != self.num_leaves:
            raise ValueError(
                f"features: expected {self.num_leaves} tokens in dimension -2, the leaves of the "
                f"tree, got {list(features.shape)}."
            )
        if how not in ("mean", "max"):
            raise ValueError(f'how: expected "mean" or "max", got {how!r}.')
        counts = features.new_ones(self.num_leaves, 1) if weights is None else weights[..., None]
        totals = self._sums(counts.to(features.dtype))
        if how == "mean":
            sums = self._sums(features if weights is None else features * totals[0])
            return [
                part / total.masked_fill(total == 0, 1.0)
                for part, total in zip(sums, totals, strict=True)
            ]
        hidden = None if weights is None else [total == 0 for total in totals]
        tables = [features if hidden is None else features.masked_fill(hidden[0], -torch.inf)]
        for family in self.layout(features.device).families:
            tables.append(family.take(tables, -torch.inf).amax(-2))
        if hidden is None:
            return tables
        return [part.masked_fill(none, 0.0) for part, none in zip(tables, hidden, strict=True)]

    def weight_tables(self, weights: Tensor) -> list[Tensor]:
        """The sum of the weights of the leaves below every node, in parts as `pool_tables`."""
        return [table.squeeze(-1) for table in self._sums(weights.unsqueeze(-1))]

    def _sums(self, leaves: Tensor) -> list[Tensor]:
        tables = [leaves]
        for family in self.layout(leaves.device).families:
            tables.append(family.take(tables, 0.0).sum(-2))
        return tables


@lru_cache(maxsize=64)
def windows_tree(num_leaves: int, sizes: tuple[int, ...]) -> PartitionTree:
    """`PartitionTree.windows`, made once for each length."""
    return PartitionTree.windows(num_leaves, sizes)


def _check_sizes(sizes: Sequence[int]) -> list[int]:
    for size in sizes:
        if int(size) != size or size < 2:
            raise ValueError(f"sizes: expected whole numbers of at least 2, got {tuple(sizes)}.")
    return [int(size) for size in sizes]
