"""Hierarchical attention against golden vectors, plain recursion and a constrained optimiser."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import layer_norm, scaled_dot_product_attention

from attending.nn.hierarchical_attention import (
    hierarchical_attention,
    hierarchical_gap,
    hierarchical_map,
)
from attending.nn.partition_tree import PartitionTree
from tests.nn.reference_hierarchical_attention import blocks, tied_map
from tests.nn.test_partition_tree import parents

GOLDEN = Path(__file__).parents[1] / "golden" / "hierarchical-self-attention"


def golden(
    name: str, dtype: torch.dtype = torch.float64
) -> tuple[dict[str, Tensor], PartitionTree]:
    vectors = {key: torch.tensor(found) for key, found in np.load(GOLDEN / name).items()}
    tree = PartitionTree(vectors.pop("parent").tolist())
    return {key: tensor.to(dtype) for key, tensor in vectors.items()}, tree


def inputs(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(*shape, dtype=dtype, generator=generator) for _ in range(3))


@pytest.mark.parametrize("leaf", ["self", "noself"])
@pytest.mark.parametrize("energy", ["dot", "sqdist"])
@pytest.mark.parametrize("name", ["ragged_tree.npz", "two_level_3x4.npz"])
def test_golden(name: str, energy: str, leaf: str) -> None:
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        vectors, tree = golden(name, dtype)
        how = {"tree": tree, "include_self": leaf == "self", "energy": energy}
        query, key, value = (vectors[letter] for letter in "qkv")
        output = hierarchical_attention(query, key, value, **how)
        close = {"atol": tolerance, "rtol": 0.0}
        torch.testing.assert_close(output, vectors[f"out_{energy}_{leaf}"], **close)
        found = hierarchical_map(query, key, **how)
        torch.testing.assert_close(found, vectors[f"theta_{energy}_{leaf}"], **close)


@pytest.mark.parametrize("name", ["ragged_tree.npz", "two_level_3x4.npz"])
def test_golden_gap(name: str) -> None:
    vectors, tree = golden(name)
    gap = hierarchical_gap(vectors["q"], vectors["k"], tree=tree)
    torch.testing.assert_close(gap, vectors["total_kl_dot_self"], atol=1e-10, rtol=0.0)


@settings(max_examples=40)
@given(parents(), st.booleans(), st.integers(0, 99))
def test_any_tree_is_the_plain_recursion(parent: list[int], include_self: bool, seed: int) -> None:
    tree = PartitionTree(parent)
    query, key, _ = inputs(1, 1, tree.num_leaves, 4, seed=seed)
    found = hierarchical_map(query, key, tree=tree, include_self=include_self)[0, 0]
    scores = query[0, 0] @ key[0, 0].T / 2
    expected, phi = tied_map(scores, list(tree.parent), include_self)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-9)
    if include_self:
        torch.testing.assert_close(found.sum(-1), torch.ones(len(found), dtype=torch.float64))
        if len(tree.roots) == 1:
            gap = float(hierarchical_gap(query, key, tree=tree))
            ratio = found.log() - scores.log_softmax(-1)
            assert gap == pytest.approx(float((found * ratio).sum()), abs=1e-9)
            assert gap == pytest.approx(float(scores.logsumexp(-1).sum()) + len(found) * phi)
            assert gap > -1e-9


@pytest.mark.parametrize(
    "nested", [[[0, 1, 2], [3, 4]], [[0, [1, 2]], [3], 4], [[[0, 1], [2, 3]], [[4], [5, 6]]]]
)
def test_no_tied_map_is_nearer_to_softmax(nested: list) -> None:
    """A general optimiser finds the same map: over one weight for each block of siblings."""
    from scipy.optimize import minimize

    tree = PartitionTree.from_nested(nested)
    tokens = tree.num_leaves
    query, key, _ = inputs(1, 1, tokens, 4, seed=5)
    log_softmax = (query[0, 0] @ key[0, 0].T / 2).log_softmax(-1).numpy()
    members = []
    for rows, columns in blocks(list(tree.parent)):
        member = np.zeros((tokens, tokens))
        member[np.ix_(rows, columns)] = 1
        members.append(member)
    basis = np.stack(members)

    def divergence(weights: np.ndarray) -> tuple[float, np.ndarray]:
        tied = np.einsum("b,bij->ij", weights, basis)
        ratio = np.log(tied) - log_softmax
        return float((tied * ratio).sum()), np.einsum("bij,ij->b", basis, ratio + 1)

    start = np.full(len(basis), 1 / tokens)  # the uniform map is tied along any tree
    rows_sum = {
        "type": "eq",
        "fun": lambda weights: np.einsum("b,bij->i", weights, basis) - 1,
        "jac": lambda weights: np.einsum("bij->ib", basis),
    }
    best = minimize(
        divergence,
        start,
        jac=True,
        method="SLSQP",
        bounds=[(1e-9, 1)] * len(basis),
        constraints=[rows_sum],
        options={"ftol": 1e-14, "maxiter": 1000},
    )
    assert best.success, best.message
    ours = hierarchical_map(query, key, tree=tree)[0, 0].numpy()
    np.testing.assert_allclose(np.einsum("b,bij->ij", best.x, basis), ours, atol=1e-6)
    gap = float(hierarchical_gap(query, key, tree=tree))
    assert gap == pytest.approx(best.fun, abs=1e-8)
    assert gap > 0.01
    assert divergence(start)[0] > gap + 0.01


def test_flattening_a_node_lowers_the_gap_down_to_zero() -> None:
    query, key, value = inputs(2, 3, 12, 8)
    trees = [PartitionTree.windows(12, sizes) for sizes in ((2, 3), (2,), ())]
    gaps = [hierarchical_gap(query, key, tree=tree) for tree in trees]
    assert bool((gaps[0] > gaps[1] + 0.01).all())
    assert bool((gaps[1] > 0.01).all())
    torch.testing.assert_close(gaps[2], torch.zeros(2, 3, dtype=torch.float64), atol=1e-10, rtol=0)
    flat = hierarchical_attention(query, key, value, tree=trees[2])
    torch.testing.assert_close(flat, scaled_dot_product_attention(query, key, value))


def test_the_weights_are_the_gradient_of_the_energy() -> None:
    query, key, _ = inputs(1, 1, 10, 4)
    tree = PartitionTree.from_nested([[[0, 1, 2], [3, 4]], [5, 6], [7, [8, 9]]])
    query.requires_grad_()
    flat = (query @ key.transpose(-1, -2) / 2).logsumexp(-1).sum()
    minus_phi = (flat - hierarchical_gap(query, key, tree=tree).sum()) / 10
    (gradient,) = torch.autograd.grad(minus_phi, query)
    taken = hierarchical_attention(query, key, key, tree=tree)
    torch.testing.assert_close(10 * 2 * gradient, taken)


def test_gradients() -> None:
    query, key, value = (t.requires_grad_() for t in inputs(1, 2, 7, 3))
    tree = PartitionTree.from_nested([[0, 1, 2], [[3, 4], 5], 6])
    embedding = torch.randn(tree.num_nodes, 2, dtype=torch.float64, requires_grad=True)
    for include_self in (True, False):
        for energy in ("dot", "sqdist"):

            def attend(*args: Tensor, include_self=include_self, energy=energy) -> Tensor:
                return hierarchical_attention(
                    *args[:3],
                    tree=tree,
                    include_self=include_self,
                    energy=energy,
                    node_embedding=args[3],
                )

            assert torch.autograd.gradcheck(attend, (query, key, value, embedding))


def test_gradients_where_a_token_is_alone_and_does_not_see_itself() -> None:
    tree = PartitionTree.from_nested([[0], [1, 2], [[3]]])
    tensors = [t.requires_grad_() for t in inputs(1, 1, 4, 3)]
    mask = torch.tensor([True, True, False, True])[None, None, None]

    def attend(*args: Tensor) -> Tensor:
        return hierarchical_attention(*args, mask, tree=tree, include_self=False)

    assert torch.autograd.gradcheck(attend, tensors)
    lonely = hierarchical_attention(*inputs(1, 1, 1, 3), tree=(), include_self=False)
    assert not bool(lonely.any())


def test_node_embeddings_add_to_the_scores_of_siblings() -> None:
    query, key, value = inputs(1, 2, 6, 4)
    tree = PartitionTree.windows(6, ())
    embedding = torch.randn(7, 3, dtype=torch.float64)
    found = hierarchical_attention(query, key, value, tree=tree, node_embedding=embedding)
    bias = embedding[:6] @ embedding[:6].T
    expected = scaled_dot_product_attention(query, key, value, attn_mask=bias)
    torch.testing.assert_close(found, expected)
    deep = PartitionTree.windows(6, (2,))
    embedding = torch.zeros(deep.num_nodes, 1, dtype=torch.float64)
    embedding[6:8] = 3.0  # two pairs of tokens that look at one another
    plain = hierarchical_map(query, key, tree=deep)
    near = hierarchical_map(query, key, tree=deep, node_embedding=embedding)
    assert bool((near[..., :2, 2:4] > plain[..., :2, 2:4]).all())
    assert bool((near[..., :2, 4:] < plain[..., :2, 4:]).all())


def test_squared_distance_is_the_dot_product_after_a_layer_norm() -> None:
    query, key, value = inputs(1, 2, 9, 8)
    query, key = layer_norm(query, (8,)), layer_norm(key, (8,))
    tree = PartitionTree.windows(9, (3,))
    dot, distance = (
        hierarchical_attention(query, key, value, tree=tree, energy=energy)
        for energy in ("dot", "sqdist")
    )
    torch.testing.assert_close(dot, distance, atol=1e-4, rtol=0)  # the norm has an epsilon


def test_order_within_a_family_does_not_matter() -> None:
    query, key, value = inputs(1, 1, 8, 4)
    tree = PartitionTree.windows(8, (4,))
    order = torch.tensor([2, 0, 3, 1, 4, 5, 6, 7])
    output = hierarchical_attention(query, key, value, tree=tree)
    moved = hierarchical_attention(
        query[:, :, order], key[:, :, order], value[:, :, order], tree=tree
    )
    torch.testing.assert_close(moved, output[:, :, order])


@given(
    st.lists(st.lists(st.booleans(), min_size=7, max_size=7), min_size=2, max_size=2),
    st.booleans(),
)
@settings(max_examples=30)
def test_hidden_tokens_leave_windows_and_trees(visible: list[list[bool]], windows: bool) -> None:
    query, key, value = inputs(2, 2, 7, 4)
    mask = torch.tensor(visible)
    labels = [0, 0, 1, 1, 1, 2, 2]
    tree = (2, 2) if windows else PartitionTree.from_labels(labels)
    found = hierarchical_attention(query, key, value, mask[:, None, None], tree=tree)
    for row, seen in enumerate(mask):
        assert not bool(found[row, :, ~seen].any())
        if not bool(seen.any()):
            continue
        kept = [label for label, here in zip(labels, seen.tolist(), strict=True) if here]
        alone = hierarchical_attention(
            *(tensor[row : row + 1, :, seen] for tensor in (query, key, value)),
            tree=(2, 2) if windows else PartitionTree.from_labels(kept),
        )
        torch.testing.assert_close(found[row : row + 1, :, seen], alone)


def test_a_tree_for_each_sequence() -> None:
    query, key, value = inputs(2, 3, 6, 4)
    trees = [PartitionTree.from_labels([0, 0, 0, 1, 1, 2]), PartitionTree.windows(6, (2,))]
    mask = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])[:, None, None]
    found = hierarchical_attention(query, key, value, mask, tree=trees)
    for row, tree in enumerate(trees):
        here = slice(row, row + 1)
        alone = hierarchical_attention(query[here], key[here], value[here], mask[here], tree=tree)
        torch.testing.assert_close(found[here], alone)


def test_grouped_heads_scale_and_half_precision() -> None:
    query = inputs(2, 6, 10, 4)[0]
    key, value = inputs(2, 2, 10, 4, seed=1)[:2]
    found = hierarchical_attention(query, key, value, scale=0.3, enable_gqa=True, tree=(3,))
    repeated = (t.repeat_interleave(3, 1) for t in (key, value))
    torch.testing.assert_close(found, hierarchical_attention(query * 0.6, *repeated, tree=(3,)))
    half = [tensor.bfloat16() for tensor in (query, key, value)]
    low = hierarchical_attention(*half, enable_gqa=True, tree=(3,))
    exact = hierarchical_attention(*(t.double() for t in half), enable_gqa=True, tree=(3,))
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.double(), exact, atol=1e-2, rtol=1e-2)


def test_large_scores_stay_finite() -> None:
    query, key, value = (t.float() for t in inputs(1, 1, 8, 4))
    query = (300 * query).requires_grad_()
    output = hierarchical_attention(query, key, value, tree=(2, 2))
    output.sum().backward()
    assert bool(output.isfinite().all())
    assert bool(query.grad.isfinite().all())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"is_causal": True}, "is_causal: expected False.*no causal form.*leak"),
        ({"tree": (2, "a")}, "tree: expected a PartitionTree"),
        ({"tree": PartitionTree.windows(5, (2,))}, "tree: expected 6 leaves, the tokens of query"),
        ({"tree": [PartitionTree.windows(6, ())]}, "for each of the 2 sequences, got 1 trees"),
        ({"tree": (1,)}, "sizes: expected whole numbers of at least 2"),
        ({"attn_mask": torch.ones(6, 6, dtype=torch.bool)}, r"attn_mask: .*\[2, 1, 1, 6\]"),
        ({"attn_mask": torch.zeros(2, 1, 1, 6)}, "attn_mask: expected a boolean mask.*float32"),
        ({"energy": "cosine"}, 'energy: expected "dot" or "sqdist"'),
        ({"node_embedding": torch.zeros(3, 2)}, r"node_embedding: .*\[3, 2\]"),
        (
            {"key": torch.zeros(2, 1, 5, 4), "value": torch.zeros(2, 1, 5, 4)},
            "key: expected as many",
        ),
    ],
)
def test_refusals(change: dict, message: str) -> None:
    call = {name: torch.zeros(2, 1, 6, 4) for name in ("query", "key", "value")}
    with pytest.raises(ValueError, match=message):
        hierarchical_attention(**{**call, "tree": (2,), **change})


def test_a_gap_needs_one_root() -> None:
    tree = PartitionTree.join(*[PartitionTree.windows(3, ())] * 2, root=False)
    with pytest.raises(ValueError, match="tree: expected one root"):
        hierarchical_gap(torch.zeros(1, 1, 6, 2), torch.zeros(1, 1, 6, 2), tree=tree)
