"""Trees of dependency masks, against the golden vectors, networkx and all trees there are."""

import itertools
from pathlib import Path

import networkx
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attending.probes.dependency_tree import (
    accumulated_dependency,
    dependency_tree,
    pruned_tree,
    to_networkx,
    tree_segments,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "dependency-vit"


def score(mask: Tensor, parents: Tensor) -> float:
    edges = [(parent, child) for child, parent in enumerate(parents.tolist()) if parent >= 0]
    return float(sum(mask[edge].log() for edge in edges))


def is_tree(parents: Tensor) -> bool:
    return networkx.is_arborescence(to_networkx(parents)) if len(parents) > 1 else True


def test_golden() -> None:
    with np.load(GOLDEN / "max_arborescence.npz") as file:
        data = {name: torch.from_numpy(file[name]) for name in file.files}
    masks = data["dependency"]
    assert torch.equal(dependency_tree(masks), data["parent"])
    assert torch.equal(dependency_tree(masks, root=0), data["parent_root0"])
    for mask, parents, want in zip(masks, data["parent"], data["score_sum_log"], strict=True):
        assert score(mask, parents) == pytest.approx(float(want), abs=1e-10)


@st.composite
def dependencies(draw: st.DrawFn, most: int) -> Tensor:
    tokens = draw(st.integers(1, most))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9999)))
    mask = torch.rand(tokens, tokens, generator=generator, dtype=torch.float64) + 1e-3
    # Some with a clear favourite and many ties, which make long and nested cycles.
    return mask if draw(st.booleans()) else (mask * 4).ceil()


@given(dependencies(5), st.booleans())
@settings(max_examples=40)
def test_no_tree_is_better(mask: Tensor, fixed: bool) -> None:
    tokens = len(mask)
    root = tokens - 1 if fixed else None
    parents = dependency_tree(mask, root)
    assert is_tree(parents)
    assert (parents < 0).sum() == 1
    best = -float("inf")
    for choice in itertools.product(range(-1, tokens), repeat=tokens):
        if choice.count(-1) != 1 or (fixed and choice[root] != -1):
            continue
        if any(parent == child for child, parent in enumerate(choice)):
            continue
        other = torch.tensor(choice)
        if is_tree(other):
            best = max(best, score(mask, other))
    assert score(mask, parents) == pytest.approx(best, abs=1e-9)


@given(dependencies(14), st.booleans())
@settings(max_examples=40)
def test_networkx_agrees(mask: Tensor, fixed: bool) -> None:
    tokens = len(mask)
    graph = networkx.DiGraph()
    graph.add_nodes_from(range(tokens))
    for parent, child in itertools.permutations(range(tokens), 2):
        if not (fixed and child == 0):
            graph.add_edge(parent, child, weight=float(mask[parent, child].log()))
    parents = dependency_tree(mask, 0 if fixed else None)
    assert is_tree(parents)
    best = networkx.maximum_spanning_arborescence(graph)
    want = sum(data["weight"] for _, _, data in best.edges(data=True))
    assert score(mask, parents) == pytest.approx(want, abs=1e-9)


def test_where_nothing_is_sent_there_is_a_tree_all_the_same() -> None:
    for root in (None, 2, "received"):
        assert is_tree(dependency_tree(torch.zeros(2, 6, 6), root)[0])


def test_the_root_that_receives_most() -> None:
    mask = torch.full((5, 5), 0.1)
    mask[3], mask[2, 2] = 0.2, 9.0  # what a token sends to itself does not count
    parents = dependency_tree(mask, "received")
    assert parents.tolist() == [3, 3, 3, -1, 3]


def test_favourites_may_have_cycles() -> None:
    mask = torch.tensor([[0.0, 0.9, 0.1], [0.9, 0.0, 0.1], [0.2, 0.1, 0.0]])
    parents = dependency_tree(mask, root=2, method="argmax")
    assert parents.tolist() == [1, 0, -1]
    with pytest.raises(ValueError, match="cycle"):
        tree_segments(parents)
    assert dependency_tree(mask, root=2).tolist() == [2, 0, -1]


def test_segments() -> None:
    # 0 is the root, 1 and 2 below it, 3 and 4 below 1, 5 below 4.
    parents = torch.tensor([-1, 0, 0, 1, 1, 4])
    assert tree_segments(parents).tolist() == [0, 1, 2, 1, 1, 1]
    assert tree_segments(parents, 2).tolist() == [0, 1, 2, 3, 4, 4]
    both = tree_segments(torch.stack([parents, torch.tensor([1, 2, 3, 4, 5, -1])]))
    assert both[1].tolist() == [4, 4, 4, 4, 4, 5]
    assert tree_segments(torch.tensor([-1])).tolist() == [0]


@given(st.integers(1, 6), st.integers(1, 4), st.floats(0.0, 0.9))
def test_accumulated_columns_sum_to_one(tokens: int, layers: int, residual: float) -> None:
    masks = [torch.rand(2, tokens, tokens, dtype=torch.float64) / tokens for _ in range(layers)]
    found = accumulated_dependency(masks, residual)
    torch.testing.assert_close(found.sum(1), torch.ones(2, tokens, dtype=torch.float64))
    assert (found >= 0).all()


def test_accumulated_follows_messages() -> None:
    """0 sends to 1 in the first layer, 1 to 2 in the second: all of 0's message is at 2."""
    first, second = torch.zeros(2, 1, 3, 3).unbind(0)
    first[0, 1, 0] = second[0, 2, 1] = 1.0
    found = accumulated_dependency([first, second])
    assert found[0, :, 0].tolist() == [0, 0, 1]
    assert found[0, :, 2].tolist() == [0, 0, 1]


def test_pruned_tokens_are_leaves() -> None:
    first = torch.full((4, 4), 0.1)
    first[2, 0] = 0.9  # to a token that is pruned too, which cannot be a parent then
    first[3, 0] = 0.5
    first[1, 2] = 0.6
    last = torch.tensor([[0.0, 0.7], [0.2, 0.0]])
    parents = pruned_tree([first, last], [torch.arange(4), torch.tensor([1, 3])])
    assert parents.tolist() == [3, -1, 1, 1]
    assert is_tree(parents)


def test_to_networkx() -> None:
    graph = to_networkx(torch.tensor([1, -1, 1]), torch.arange(9.0).view(3, 3))
    assert dict(graph.edges) == {(1, 0): {"dependency": 3.0}, (1, 2): {"dependency": 5.0}}


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"dependency": torch.ones(2, 3)}, "dependency"),
        ({"dependency": -torch.ones(2, 2)}, "dependency"),
        ({"dependency": torch.full((2, 2), float("nan"))}, "dependency"),
        ({"root": 2}, "root"),
        ({"method": "prim"}, "method"),
    ],
)
def test_refusals(arguments: dict[str, object], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        dependency_tree(**({"dependency": torch.ones(2, 2)} | arguments))
    with pytest.raises(ValueError, match="depth"):
        tree_segments(torch.tensor([-1]), 0)
    with pytest.raises(ValueError, match="masks"):
        accumulated_dependency([])
    with pytest.raises(ValueError, match="residual"):
        accumulated_dependency([torch.ones(1, 1, 1)], 1.0)
    with pytest.raises(ValueError, match="indices"):
        pruned_tree([torch.ones(2, 2)], [])
