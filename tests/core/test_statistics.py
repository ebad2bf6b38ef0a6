"""Every statistic against its dense definition, its invariants, gradients and golden vectors."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import attending as at
from attending.core import reference
from tests.core.problems import Problem, assert_close, problems

GOLDEN = Path(__file__).parent.parent / "golden" / "attention-statistics"
statistics = at.statistics

ROWS = {
    "entropy": (statistics.entropy, reference.entropy),
    "normalized_entropy": (statistics.normalized_entropy, reference.normalized_entropy),
    "participation_ratio": (statistics.participation_ratio, reference.participation_ratio),
    "second_moment": (statistics.second_moment, reference.second_moment),
    "max_probability": (statistics.max_probability, reference.max_probability),
    "varentropy": (statistics.varentropy, reference.varentropy),
}


def dense_map(problem: Problem, query=None, key=None) -> reference.Map:
    query = problem.query if query is None else query
    key = problem.key if key is None else key
    return reference.attention_map(query, key, **problem.call)


def assert_near(actual, expected, dtype, scale: float = 1.0) -> None:
    """As `assert_close`, with an absolute tolerance that grows with the size of the statistic."""
    base = 1e-9 if dtype == torch.float64 else 2e-4
    torch.testing.assert_close(
        actual.double(), expected.double(), rtol=base * 5, atol=base * max(scale, 1.0)
    )


@pytest.mark.parametrize("name", ROWS)
@given(problem=problems(spreads=(0.01, 1.0, 8.0)))
def test_rows(name: str, problem: Problem) -> None:
    ours, theirs = ROWS[name]
    expected = theirs(dense_map(problem))
    assert_near(ours(problem.query, problem.key, **problem.call), expected, problem.query.dtype)


@given(problem=problems(spreads=(0.01, 1.0)), order=st.sampled_from((0, 0.5, 1, 1.5, 3, math.inf)))
def test_renyi_entropy(problem: Problem, order: float) -> None:
    expected = reference.renyi_entropy(dense_map(problem), order)
    actual = statistics.renyi_entropy(problem.query, problem.key, order, **problem.call)
    assert_near(actual, expected, problem.query.dtype)
    lse = at.attention_state(problem.query, problem.key, problem.key, **problem.call).lse
    known = statistics.renyi_entropy(problem.query, problem.key, order, **problem.call, lse=lse)
    assert_near(known, expected, problem.query.dtype)


@given(problem=problems(spreads=(0.01, 1.0, 8.0)), offset=st.sampled_from((None, 0, 3, -2)))
def test_mean_distance(problem: Problem, offset: int | None) -> None:
    queries, keys = problem.query.shape[2], problem.key.shape[2]
    position = (0 if problem.is_causal else keys - queries) if offset is None else offset
    expected = reference.mean_distance(dense_map(problem), position)
    actual = statistics.mean_distance(
        problem.query, problem.key, **problem.call, query_offset=offset
    )
    assert_near(actual, expected, problem.query.dtype, scale=keys)


@given(problem=problems(spreads=(0.01, 1.0, 8.0)), data=st.data())
def test_features_classes_and_sets(problem: Problem, data: st.DataObject) -> None:
    keys, dtype = problem.key.shape[2], problem.query.dtype
    dense = dense_map(problem)
    members = torch.tensor(
        data.draw(st.lists(st.integers(0, keys - 1), unique=True, max_size=keys)), dtype=torch.long
    )
    expected = reference.key_set_mass(dense, members)
    mass = statistics.key_set_mass(problem.query, problem.key, members, **problem.call)
    assert_near(mass, expected, dtype)
    lse = at.attention_state(problem.query, problem.key, problem.key, **problem.call).lse
    mass = statistics.key_set_mass(problem.query, problem.key, members, **problem.call, lse=lse)
    assert_near(mass, expected, dtype)

    classes = torch.arange(keys) % 3
    by_class = statistics.class_mass(problem.query, problem.key, classes, 3, **problem.call)
    one_hot = torch.nn.functional.one_hot(classes, 3)
    assert_near(by_class, reference.expected_features(dense, one_hot), dtype)
    visible = dense.visible.any(-1).double()
    assert_near(by_class.sum(-1), visible, dtype)
    per_batch = classes.expand(problem.query.shape[0], keys)
    again = statistics.class_mass(problem.query, problem.key, per_batch, 3, **problem.call)
    torch.testing.assert_close(again, by_class)

    features = torch.randn(keys, 5).to(dtype)
    summary = statistics.row_summary(problem.query, problem.key, features, **problem.call)
    assert_near(summary.features, reference.expected_features(dense, features), dtype)
    assert_near(summary.entropy, reference.entropy(dense), dtype)
    assert_close(summary.lse, dense.lse, dtype)


@given(problem=problems(spreads=(0.01, 1.0, 8.0)), weighted=st.booleans(), with_lse=st.booleans())
def test_columns(problem: Problem, weighted: bool, with_lse: bool) -> None:
    dense, dtype = dense_map(problem), problem.query.dtype
    weights = None
    if weighted:
        weights = torch.rand(problem.query.shape[0], 1, problem.query.shape[2]).to(dtype)
        weights[..., ::3] = 0
    lse = None
    if with_lse:
        lse = at.attention_state(problem.query, problem.key, problem.key, **problem.call).lse
    mass = statistics.column_mass(problem.query, problem.key, weights, **problem.call, lse=lse)
    assert_near(mass, reference.column_mass(dense, weights), dtype, scale=mass.shape[-1])
    mean = statistics.column_importance(problem.query, problem.key, **problem.call, lse=lse)
    assert_near(mean, reference.column_importance(dense), dtype)


@given(problem=problems(max_tokens=50, spreads=(0.01, 1.0, 8.0)), size=st.integers(1, 40))
def test_pooled_map(problem: Problem, size: int) -> None:
    dense = dense_map(problem)
    expected = reference.pooled_map(dense, size)
    pooled = statistics.pooled_map(problem.query, problem.key, size, **problem.call)
    assert_near(pooled, expected, problem.query.dtype)
    if problem.key.shape[2] % size == 0 and dense.visible.any(-1).all():
        mean = statistics.pooled_map(
            problem.query, problem.key, size, **problem.call, reduction="mean"
        )
        by_torch = torch.nn.functional.adaptive_avg_pool2d(dense.probabilities, size)
        if problem.query.shape[2] % size == 0:
            assert_near(mean, by_torch, problem.query.dtype)


@given(
    problem=problems(
        max_tokens=60,
        masks=("none", "causal", "bool", "keys", "padded"),
        spreads=(0.01, 1.0, 8.0),
    ),
    weighted=st.booleans(),
)
def test_one_exchanged_pass_knows_the_entropy_of_a_head(problem: Problem, weighted: bool) -> None:
    dense, dtype = dense_map(problem), problem.query.dtype
    lse = at.attention_state(problem.query, problem.key, problem.key, **problem.call).lse
    weights = torch.ones(problem.query.shape[2], dtype=dtype)
    if weighted:
        weights[::2] = 0
    summary = statistics.column_summary(
        problem.query, problem.key, lse, weights if weighted else None, 4, **problem.call
    )
    tokens = problem.query.shape[2]
    assert_near(summary.mass, reference.column_mass(dense, weights), dtype, scale=tokens)
    total = (reference.entropy(dense) * weights).sum(-1)
    assert_near(summary.entropy, total, dtype, scale=tokens)
    if not weighted:
        assert_near(summary.pooled, reference.pooled_map(dense, 4), dtype)


@given(problem=problems(spreads=(0.01, 1.0, 8.0)), size=st.sampled_from((None, 1, 5)))
def test_the_exchanged_pass_without_entropy_takes_any_mask(
    problem: Problem, size: int | None
) -> None:
    dense, dtype = dense_map(problem), problem.query.dtype
    lse = at.attention_state(problem.query, problem.key, problem.key, **problem.call).lse
    summary = statistics.column_summary(
        problem.query, problem.key, lse, None, size, **problem.call, with_entropy=False
    )
    mass = reference.column_mass(dense)
    assert_near(summary.mass, mass, dtype, scale=problem.query.shape[2])
    assert summary.entropy is None
    if size is None:
        assert summary.pooled is None
    else:
        assert_near(summary.pooled, reference.pooled_map(dense, size), dtype)


DIFFERENTIABLE = {
    "entropy": lambda q, k, p: statistics.entropy(q, k, **p.call),
    "normalized_entropy": lambda q, k, p: statistics.normalized_entropy(q, k, **p.call),
    "renyi_entropy": lambda q, k, p: statistics.renyi_entropy(q, k, 1.7, **p.call),
    "participation_ratio": lambda q, k, p: statistics.participation_ratio(q, k, **p.call),
    "mean_distance": lambda q, k, p: statistics.mean_distance(q, k, **p.call),
    "column_mass": lambda q, k, p: statistics.column_mass(q, k, **p.call),
    "pooled_map": lambda q, k, p: statistics.pooled_map(q, k, 3, **p.call),
    "varentropy": lambda q, k, p: statistics.varentropy(q, k, **p.call),
    "key_set_mass": lambda q, k, p: statistics.key_set_mass(q, k, torch.tensor([0]), **p.call),
}
DENSE = {
    "entropy": lambda d, p: reference.entropy(d),
    "normalized_entropy": lambda d, p: reference.normalized_entropy(d),
    "renyi_entropy": lambda d, p: reference.renyi_entropy(d, 1.7),
    "participation_ratio": lambda d, p: reference.participation_ratio(d),
    "mean_distance": lambda d, p: reference.mean_distance(
        d, 0 if p.is_causal else p.key.shape[2] - p.query.shape[2]
    ),
    "column_mass": lambda d, p: reference.column_mass(d),
    "pooled_map": lambda d, p: reference.pooled_map(d, 3),
    "varentropy": lambda d, p: reference.varentropy(d),
    "key_set_mass": lambda d, p: reference.key_set_mass(d, torch.tensor([0])),
}


@pytest.mark.parametrize("name", DIFFERENTIABLE)
@pytest.mark.parametrize("kind", ["none", "causal", "float", "float_keys"])
def test_gradients(name: str, kind: str) -> None:
    torch.manual_seed(0)
    query = torch.randn(2, 4, 9, 5, dtype=torch.float64, requires_grad=True)
    key = torch.randn(2, 2, 9, 5, dtype=torch.float64, requires_grad=True)
    mask = {"float": torch.randn(9, 9), "float_keys": torch.randn(4, 1, 9)}.get(kind)
    mask = None if mask is None else mask.double()
    problem = Problem(query, key, key, mask, kind == "causal", None, True)
    actual = DIFFERENTIABLE[name](query, key, problem)
    expected = DENSE[name](dense_map(problem), problem)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
    weights = torch.randn_like(actual)
    ours = torch.autograd.grad((actual * weights).sum(), (query, key))
    theirs = torch.autograd.grad((expected * weights).sum(), (query, key))
    torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-8)


def test_gradient_of_the_entropy_is_that_of_the_card() -> None:
    # Card attention-statistics, section E: dH_i/ds_ij = -p_ij (s_ij - lse_i + H_i); rows sum to 0.
    torch.manual_seed(0)
    query = torch.randn(1, 1, 7, 7, dtype=torch.float64)
    key = torch.eye(7, dtype=torch.float64)[None, None]
    query.requires_grad_()
    statistics.entropy(query, key, scale=1.0).sum().backward()
    dense = reference.attention_map(query.detach(), key, scale=1.0)
    p = dense.probabilities
    expected = -p * (dense.scores - dense.lse[..., None] + reference.entropy(dense)[..., None])
    torch.testing.assert_close(query.grad, expected)
    torch.testing.assert_close(query.grad.sum(-1), torch.zeros(1, 1, 7, dtype=torch.float64))


@given(problem=problems(dtypes=(torch.bfloat16,), spreads=(0.01, 1.0)))
def test_half_precision_is_computed_in_float32(problem: Problem) -> None:
    dense = dense_map(problem)
    rows = statistics.entropy(problem.query, problem.key, **problem.call)
    assert rows.dtype == torch.float32
    assert_near(rows, reference.entropy(dense), torch.float32)
    mass = statistics.column_mass(problem.query, problem.key, **problem.call)
    assert_near(mass, reference.column_mass(dense), torch.float32, scale=mass.shape[-1])


def test_entropy_survives_a_large_common_key() -> None:
    # A direction that all keys share moves every score of a row alike; float32 must not feel it.
    torch.manual_seed(0)
    query, key = torch.randn(1, 2, 64, 32) + 1, torch.randn(1, 2, 64, 32)
    shifted = key + 300
    expected = reference.entropy(reference.attention_map(query, shifted))
    torch.testing.assert_close(
        statistics.entropy(query, shifted).double(), expected, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("case", ["stats_case1", "stats_case2"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_golden(case: str, dtype: torch.dtype) -> None:
    golden = {
        k: torch.from_numpy(np.asarray(v)) for k, v in np.load(GOLDEN / f"{case}.npz").items()
    }
    query, key = golden["q"].to(dtype), golden["k"].to(dtype)
    call = {"attn_mask": golden["mask"], "scale": float(golden["scale"])}
    tight = {"rtol": 0, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 0, "atol": 1e-5}

    def check(name: str, actual) -> None:
        torch.testing.assert_close(actual.double(), golden[name].double(), **tight, msg=name)

    check("row_lse", at.attention_state(query, key, key, **call).lse)
    check("row_entropy", statistics.entropy(query, key, **call))
    check("row_max_prob", statistics.max_probability(query, key, **call))
    check("row_second_moment", statistics.second_moment(query, key, **call))
    check("row_varentropy", statistics.varentropy(query, key, **call))
    check("row_mean_distance", statistics.mean_distance(query, key, **call))
    check("row_sink_mass", statistics.key_set_mass(query, key, torch.tensor([0]), **call))
    check("normalized_entropy", statistics.normalized_entropy(query, key, **call))
    check("received", statistics.column_mass(query, key, **call))
    importance = statistics.column_importance(query, key, **call)
    check("avg_received", importance)
    check("sink_rate_eps03", (importance[..., 0] > 0.3).double().mean())
    check("mean_pairwise_cosine", statistics.token_similarity(golden["hidden"].to(dtype)))
    if "erank" in golden:
        dense = reference.attention_map(query, key, **call)
        check("erank", statistics.effective_rank(dense.probabilities.to(dtype)))
        maps = [dense.probabilities, dense.probabilities]
        check("rollout_two_equal_layers", reference.attention_rollout(maps))


def test_hand_computed_map() -> None:
    """Two keys with scores 0 and log 3: probabilities 1/4 and 3/4, checked on paper."""
    query = torch.tensor([[[[1.0]]]], dtype=torch.float64)
    key = torch.tensor([[[[0.0], [math.log(3)]]]], dtype=torch.float64)
    dense = reference.attention_map(query, key, scale=1.0)
    entropy = 2 * math.log(2) - 0.75 * math.log(3)
    hand = {
        "lse": (dense.lse, math.log(4)),
        "entropy": (reference.entropy(dense), entropy),
        "normalized": (reference.normalized_entropy(dense), entropy / math.log(2)),
        "second moment": (reference.second_moment(dense), 10 / 16),
        "participation": (reference.participation_ratio(dense), 1.6),
        "renyi 2": (reference.renyi_entropy(dense, 2), math.log(1.6)),
        "max": (reference.max_probability(dense), 0.75),
        "varentropy": (reference.varentropy(dense), 0.25 * 0.75 * math.log(3) ** 2),
        "distance": (reference.mean_distance(dense, 1), 0.25),
        "set": (reference.key_set_mass(dense, torch.tensor([1])), 0.75),
    }
    for name, (actual, expected) in hand.items():
        assert actual.item() == pytest.approx(expected, abs=1e-12), name
    assert reference.column_mass(dense)[0, 0].tolist() == pytest.approx([0.25, 0.75])
    assert reference.pooled_map(dense, 1).item() == pytest.approx(1.0)
    merged = reference.merge(
        (torch.tensor([1.0]), torch.tensor(0.0)), (torch.tensor([5.0]), torch.tensor(math.log(3)))
    )
    assert merged[0].item() == pytest.approx(4.0)
    assert merged[1].item() == pytest.approx(math.log(4))


def test_hidden_statistics() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(3, 17, 8)
    torch.testing.assert_close(
        statistics.token_similarity(hidden).double(), reference.token_similarity(hidden)
    )
    torch.testing.assert_close(
        statistics.effective_rank(hidden).double(),
        reference.effective_rank(hidden),
        rtol=1e-5,
        atol=1e-5,
    )
    shifted, before = hidden + 3, hidden + 3
    torch.testing.assert_close(
        statistics.effective_rank(shifted, center=True).double(),
        reference.effective_rank(hidden - hidden.mean(-2, keepdim=True)),
        rtol=1e-4,
        atol=1e-4,
    )
    assert torch.equal(shifted, before)
    assert statistics.effective_rank(torch.ones(4, 3), center=True).item() == 0
    assert statistics.effective_rank(torch.eye(5)).item() == pytest.approx(5)
    assert statistics.effective_rank(torch.full((6, 6), 1 / 6)).item() == pytest.approx(1, abs=1e-3)
    assert statistics.effective_rank(torch.zeros(4, 4)).item() == 0
    assert statistics.token_similarity(torch.ones(9, 3)).item() == pytest.approx(1)
    assert statistics.token_similarity(torch.ones(1, 3)).item() == 0


@given(heads=st.integers(1, 5), samples=st.integers(2, 40), dim=st.integers(1, 9))
def test_head_similarity(heads: int, samples: int, dim: int) -> None:
    outputs = torch.randn(heads, samples, dim, generator=torch.Generator().manual_seed(0))
    similarity = statistics.head_similarity(outputs)
    torch.testing.assert_close(
        similarity.double(), reference.head_similarity(outputs), rtol=1e-3, atol=1e-4
    )
    torch.testing.assert_close(similarity.diagonal(), torch.ones(heads), rtol=1e-3, atol=1e-3)
    turned = outputs.double() @ torch.linalg.qr(torch.randn(dim, dim).double()).Q * 7 + 3
    torch.testing.assert_close(
        statistics.head_similarity(turned), similarity.double(), rtol=1e-3, atol=1e-4
    )


BAD = {
    "order": lambda q: statistics.renyi_entropy(q, q, -1.0),
    "relative_to": lambda q: statistics.normalized_entropy(q, q, relative_to="none"),
    "features": lambda q: statistics.expected_features(q, q, torch.ones(3, 2)),
    "key_classes": lambda q: statistics.class_mass(q, q, torch.ones(5)),
    "key_indices": lambda q: statistics.key_set_mass(q, q, torch.ones(2, 2, dtype=torch.long)),
    "query_weights: expected weights": lambda q: statistics.column_mass(q, q, -torch.ones(5)),
    r"query_weights: expected \[queries\]": lambda q: statistics.column_mass(q, q, torch.ones(4)),
    "size": lambda q: statistics.pooled_map(q, q, 0),
    "reduction": lambda q: statistics.pooled_map(q, q, 2, reduction="sum"),
    "lse": lambda q: statistics.column_mass(q, q, lse=torch.ones(2, 2)),
    "float bias": lambda q: statistics.column_summary(
        q, q, torch.ones(1, 2, 5), attn_mask=torch.ones(5, 5)
    ),
    "hidden": lambda q: statistics.token_similarity(torch.ones(3)),
    "matrix": lambda q: statistics.effective_rank(torch.ones(3, 3, dtype=torch.long)),
    "outputs": lambda q: statistics.head_similarity(torch.ones(3, 3)),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BAD[message](torch.zeros(1, 2, 5, 4))


def test_compiled_statistics_are_the_same() -> None:
    torch.manual_seed(0)
    query, key = torch.randn(1, 4, 21, 8), torch.randn(1, 2, 21, 8)

    def all_three(query, key):
        summary = statistics.row_summary(query, key, is_causal=True, enable_gqa=True)
        mass = statistics.column_mass(query, key, is_causal=True, enable_gqa=True, lse=summary.lse)
        return summary.entropy, mass, statistics.pooled_map(query, key, 4, enable_gqa=True)

    compiled = torch.compile(all_three, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(query, key), all_three(query, key))
