"""The tree over tokens: how it is built, what it refuses, and pooling over its nodes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attending.nn.partition_tree import PartitionTree
from tests.nn.reference_hierarchical_attention import leaves_below


@st.composite
def parents(draw: st.DrawFn, most: int = 12) -> list[int]:
    """A random tree: nodes without a parent are joined until one is left, or several stay."""
    leaves = draw(st.integers(1, most))
    parent = [-1] * leaves
    open_nodes = list(range(leaves))
    for _ in range(draw(st.integers(0, 6))):
        size = draw(st.integers(1, len(open_nodes)))
        chosen = draw(st.permutations(open_nodes))[:size]
        parent.append(-1)
        for node in chosen:
            parent[node] = len(parent) - 1
        open_nodes = [node for node in open_nodes if node not in chosen] + [len(parent) - 1]
    if len(open_nodes) > 1 and draw(st.booleans()):
        parent.append(-1)
        for node in open_nodes:
            parent[node] = len(parent) - 1
    return parent


def parts(tree: PartitionTree) -> set[tuple[int, ...]]:
    parent = list(tree.parent)
    return {tuple(leaves_below(parent, node)) for node in range(tree.num_nodes)}


@given(parents())
def test_any_tree_keeps_its_parts(parent: list[int]) -> None:
    tree = PartitionTree(parent)
    assert tree.num_nodes == len(parent)
    expected = sorted(leaves_below(parent, node) for node in range(len(parent)))
    assert sorted(leaves_below(list(tree.parent), node) for node in range(len(parent))) == expected
    assert all(above == -1 or above > node for node, above in enumerate(tree.parent))
    assert len(tree.roots) == parent.count(-1)


@given(parents(), st.sampled_from(["mean", "max"]), st.randoms())
def test_pooling_is_that_of_the_leaves_below(parent: list[int], how: str, random) -> None:
    tree = PartitionTree(parent)
    features = torch.randn(2, 3, tree.num_leaves, 4, dtype=torch.float64)
    visible = torch.tensor([random.random() < 0.7 for _ in range(tree.num_leaves)])
    for weights in (None, visible):
        pooled = tree.pool(features, weights, how)
        assert pooled.shape == (2, 3, tree.num_nodes, 4)
        for node in range(tree.num_nodes):
            leaves = leaves_below(list(tree.parent), node)
            if weights is not None:
                leaves = [leaf for leaf in leaves if visible[leaf]]
            below = features[:, :, leaves]
            if not leaves:
                expected = torch.zeros(2, 3, 4, dtype=torch.float64)
            else:
                expected = below.mean(2) if how == "mean" else below.amax(2)
            torch.testing.assert_close(pooled[:, :, node], expected)


def test_windows_of_a_length_that_does_not_divide() -> None:
    tree = PartitionTree.windows(11, (4, 2))
    assert parts(tree) == {(i,) for i in range(11)} | {
        (0, 1, 2, 3),
        (4, 5, 6, 7),
        (8, 9, 10),
        tuple(range(8)),
        tuple(range(11)),
    }
    assert tree.roots == (tree.num_nodes - 1,)
    assert [PartitionTree.windows(1, sizes).num_nodes for sizes in ((), (4,), (4, 4))] == [1, 1, 1]
    assert PartitionTree.windows(5, ()).num_nodes == 6


def test_a_regular_tree_has_as_many_pairs_as_the_paper_counts() -> None:
    for branching, levels in ((2, 5), (4, 3), (3, 3)):
        leaves = branching**levels
        tree = PartitionTree.windows(leaves, (branching,) * (levels - 1))
        assert tree.height == levels
        assert tree.num_sibling_pairs == (leaves - 1) * branching


def test_nested_lists_and_labels_agree() -> None:
    nested = PartitionTree.from_nested([[["A", "cat"], ["It", "sat", "down"]], [["So", "?"]]])
    sentences, paragraphs = [0, 0, 1, 1, 1, 2, 2], [5, 5, 5, 5, 5, 9, 9]
    labels = PartitionTree.from_labels(torch.tensor(sentences), paragraphs)
    assert nested.parent == labels.parent
    assert parts(PartitionTree.from_labels([1, 0, 1])) == {(0,), (1,), (2,), (0, 2), (0, 1, 2)}
    assert PartitionTree.from_labels([3, 3]).num_nodes == 3


def test_grid_is_a_quad_tree() -> None:
    tree = PartitionTree.grid(4, 4)
    assert tree.height == 2
    assert (0, 1, 4, 5) in parts(tree)
    assert (10, 11, 14, 15) in parts(tree)
    odd = PartitionTree.grid(3, 5)
    assert {(14,), (12, 13), (0, 1, 5, 6), tuple(range(15))} <= parts(odd)
    assert PartitionTree.grid(1, 1).num_nodes == 1
    assert PartitionTree.grid(6, 6, levels=1).height == 2
    assert PartitionTree.grid(9, 9, block=3).num_nodes == 81 + 9 + 1


def test_signals_side_by_side() -> None:
    image, text = PartitionTree.grid(2, 2), PartitionTree.from_nested([["a", "b"], ["c"]])
    one = PartitionTree.windows(1, ())
    both = PartitionTree.join(one, image, text)
    assert both.num_leaves == 8
    assert {(1, 2, 3, 4), (5, 6), (5, 6, 7), (0,), tuple(range(8))} <= parts(both)
    assert len(both.roots) == 1
    apart = PartitionTree.join(one, image, text, root=False)
    assert len(apart.roots) == 3
    assert apart.num_nodes == both.num_nodes - 1


def test_families_of_very_different_size_do_not_make_each_other_wide() -> None:
    tree = PartitionTree.from_labels([0] * 100 + [i for i in range(1, 101) for _ in range(2)])
    room = sum(family.real.numel() * family.real.shape[1] for family in tree.layout().families)
    assert room < 2.5 * (tree.num_sibling_pairs + tree.num_nodes)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: PartitionTree([]), "parent: expected the leaves.*got no node"),
        (lambda: PartitionTree([3, 3, -1]), "parent: expected -1 or a node from 0 to 2, got 3"),
        (lambda: PartitionTree([2, -1, -1, 2]), "parent: expected the leaves.*leaf 3"),
        (lambda: PartitionTree([-1, 0]), "parent: expected the leaves.*leaf 1"),
        (lambda: PartitionTree([1, 2, 1]), "parent: expected a tree.*their own ancestors"),
        (lambda: PartitionTree.windows(0, (4,)), "num_leaves: expected at least 1, got 0"),
        (lambda: PartitionTree.windows(4, (1,)), "sizes: expected whole numbers of at least 2"),
        (lambda: PartitionTree.from_nested([["a"], []]), "nested: expected no empty list"),
        (lambda: PartitionTree.from_nested("abc"), "nested: expected a list of lists, got str"),
        (lambda: PartitionTree.from_labels(), "levels: expected at least one"),
        (lambda: PartitionTree.from_labels([]), "levels: expected at least one token"),
        (lambda: PartitionTree.from_labels([0, 0], [1]), r"levels: expected a label.*\[2, 1\]"),
        (lambda: PartitionTree.from_labels([0, 0, 1], [0, 1, 1]), r"levels\[1\]: expected parts"),
        (lambda: PartitionTree.grid(0, 3), "rows, columns: expected at least 1, got 0 and 3"),
        (lambda: PartitionTree.grid(2, 3, block=1), "block: expected at least 2, got 1"),
        (lambda: PartitionTree.join(), "trees: expected at least one"),
        (lambda: PartitionTree([1, -1]).pool(torch.ones(2, 3)), "features: expected 1 tokens"),
        (lambda: PartitionTree([1, -1]).pool(torch.ones(1, 3), how="sum"), 'how: expected "mean"'),
    ],
)
def test_refusals(build, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
