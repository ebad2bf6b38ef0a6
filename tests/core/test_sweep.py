"""Rows and columns at once, by the sweep and by fused passes, against one reference."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import attending as at
from attending.core import reference
from attending.core.statistics import _sweep
from tests.core.problems import Problem, assert_close, problems
from tests.core.test_statistics import assert_near, dense_map

statistics = at.statistics


@pytest.fixture(params=["sweep", "fused"])
def way(request, monkeypatch) -> str:
    """Both ways to the same numbers; the fused one is what a GPU or a gradient gets."""
    if request.param == "fused":
        for module in ("rows", "columns", "map"):
            monkeypatch.setattr(
                f"attending.core.statistics.{module}.can_sweep", lambda *tensors: False
            )
    return request.param


# The fixture is the same for all examples of a parameter.
both_ways = settings(suppress_health_check=["function_scoped_fixture"], max_examples=60)


@both_ways
@given(
    problem=problems(spreads=(0.01, 1.0, 8.0), max_tokens=90),
    weighted=st.booleans(),
    size=st.sampled_from((None, 1, 7, 40)),
    small_blocks=st.booleans(),
)
def test_map_summary(way, problem: Problem, weighted: bool, size, small_blocks: bool) -> None:
    dense, dtype = dense_map(problem), problem.query.dtype
    queries, keys = problem.query.shape[2], problem.key.shape[2]
    weights = None
    if weighted:
        weights = torch.rand(problem.query.shape[0], 1, queries).to(dtype)
        weights[..., ::3] = 0
    features = torch.randn(keys, 3, dtype=torch.float64).to(dtype)
    with pytest.MonkeyPatch.context() as patch:
        if small_blocks:  # so that there is more than one
            patch.setattr(_sweep, "BLOCK_BYTES", 4 * 7 * keys)
            patch.setattr(_sweep, "LEAST_ROWS", 3)
        found = statistics.map_summary(
            problem.query,
            problem.key,
            features,
            weights,
            size,
            with_max_probability=True,
            with_participation_ratio=True,
            **problem.call,
        )
    assert_close(found.lse, dense.lse, dtype)
    assert_near(found.entropy, reference.entropy(dense), dtype)
    assert_near(found.max_probability, reference.max_probability(dense), dtype)
    assert_near(found.participation_ratio, reference.participation_ratio(dense), dtype, scale=keys)
    assert_near(found.features, reference.expected_features(dense, features), dtype, scale=4)
    assert_near(found.mass, reference.column_mass(dense, weights), dtype, scale=queries)
    if size is None:
        assert found.pooled is None
    elif weights is None:
        assert_near(found.pooled, reference.pooled_map(dense, size), dtype)
    else:
        bucket = torch.arange(queries) * size // queries
        by_key = torch.arange(keys) * size // keys
        for row in range(size):
            inside = (bucket == row).double() * weights.double()
            total = (inside * dense.visible.any(-1)).sum(-1, keepdim=True)
            mass = reference.column_mass(dense, inside) / total.where(total > 0, 1.0)
            expected = torch.zeros(*mass.shape[:2], size, dtype=torch.float64)
            expected.index_add_(2, by_key, mass)
            assert_near(found.pooled[:, :, row], expected, dtype)


@both_ways
@given(
    problem=problems(spreads=(0.01, 1.0, 8.0), max_tokens=70),
    columns=st.integers(1, 30),
    with_lse=st.booleans(),
)
def test_received_features(way, problem: Problem, columns: int, with_lse: bool) -> None:
    dense, dtype = dense_map(problem), problem.query.dtype
    batch, heads, queries = problem.query.shape[:3]
    features = torch.randn(batch, 1, queries, columns, dtype=torch.float64).to(dtype)
    lse = None
    if with_lse:
        lse = at.attention_state(problem.query, problem.key, problem.key, **problem.call).lse
    found = statistics.received_features(
        problem.query, problem.key, features, **problem.call, lse=lse
    )
    expected = dense.probabilities.transpose(-1, -2) @ features.double()
    assert found.shape == (batch, heads, problem.key.shape[2], columns)
    assert_near(found, expected, dtype, scale=queries)


def test_columns_follow_a_given_lse(way) -> None:
    # With a larger normaliser, such as one that counts a learned sink, the keys receive less.
    query, key = torch.randn(2, 1, 2, 50, 8, dtype=torch.float64).unbind(0)
    lse = at.attention_state(query, key, key, is_causal=True).lse
    mass = statistics.column_mass(query, key, is_causal=True)
    half = statistics.column_mass(query, key, is_causal=True, lse=lse + math.log(2))
    torch.testing.assert_close(half, mass / 2)
    lse[..., :49] = -math.inf  # and a row whose lse is that of an empty one gives nothing
    last = statistics.column_mass(query, key, is_causal=True, lse=lse)
    torch.testing.assert_close(last.sum(-1), torch.ones(1, 2, dtype=torch.float64))


@pytest.mark.parametrize("name", ["map_summary", "received_features"])
def test_gradients_take_the_fused_way(name: str) -> None:
    query = torch.randn(1, 4, 9, 5, dtype=torch.float64, requires_grad=True)
    key = torch.randn(1, 2, 9, 5, dtype=torch.float64, requires_grad=True)
    features = torch.randn(9, 2, dtype=torch.float64)
    dense = reference.attention_map(query, key, is_causal=True, enable_gqa=True)
    call = {"is_causal": True, "enable_gqa": True}
    if name == "map_summary":
        found = statistics.map_summary(query, key, features, size=3, **call)
        ours = [found.entropy, found.features, found.mass, found.pooled]
        theirs = [
            reference.entropy(dense),
            reference.expected_features(dense, features),
            reference.column_mass(dense),
            reference.pooled_map(dense, 3),
        ]
    else:
        ours = [statistics.received_features(query, key, features, **call)]
        theirs = [dense.probabilities.transpose(-1, -2) @ features]
    for mine, yours in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, yours, rtol=1e-9, atol=1e-9)
        weights = torch.randn_like(mine)
        torch.testing.assert_close(
            torch.autograd.grad((mine * weights).sum(), (query, key), retain_graph=True),
            torch.autograd.grad((yours * weights).sum(), (query, key), retain_graph=True),
            rtol=1e-7,
            atol=1e-8,
        )


@given(problem=problems(dtypes=(torch.bfloat16,), spreads=(0.01, 1.0), max_tokens=60))
def test_half_precision_is_swept_in_float32(problem: Problem) -> None:
    found = statistics.map_summary(problem.query, problem.key, size=4, **problem.call)
    assert {part.dtype for part in found if part is not None} == {torch.float32}
    assert_near(found.pooled, reference.pooled_map(dense_map(problem), 4), torch.float32)


def test_no_keys_and_no_queries() -> None:
    query, key = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 0, 4)
    found = statistics.map_summary(query, key, size=2)
    assert found.mass.shape == (1, 2, 0)
    assert (found.lse == -math.inf).all()
    assert (found.entropy == 0).all()
    assert (found.pooled == 0).all()
    none = statistics.map_summary(key, query, size=2)
    assert none.entropy.shape == (1, 2, 0)
    assert (none.mass == 0).all()


BAD = {
    "size": lambda q: statistics.map_summary(q, q, size=0),
    "query_weights": lambda q: statistics.map_summary(q, q, query_weights=torch.ones(4)),
    "features": lambda q: statistics.map_summary(q, q, torch.ones(4, 2)),
    "query_features": lambda q: statistics.received_features(q, q, torch.ones(4, 2)),
    "lse": lambda q: statistics.received_features(q, q, torch.ones(5, 2), lse=torch.ones(2)),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named(name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        BAD[name](torch.randn(1, 2, 5, 4))
