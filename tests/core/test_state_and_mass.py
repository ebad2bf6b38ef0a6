"""Attention and received attention from one pass, against the reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attending.core import reference, statistics
from attending.core.statistics import state_and_mass
from tests.core.problems import Problem, assert_close, problems


def check(problem: Problem, weighted: bool) -> None:
    weights = torch.rand(problem.query.shape[2]) if weighted else None
    found = statistics.state_and_column_mass(
        problem.query, problem.key, problem.value, weights, **problem.call
    )
    output, lse = reference.attention_state(
        problem.query, problem.key, problem.value, **problem.call
    )
    p = reference.attention_map(problem.query, problem.key, **problem.call).probabilities
    mass = p.sum(2) if weights is None else (p * weights.double()[:, None]).sum(2)
    dtype = problem.query.dtype
    assert found.state.output.dtype == dtype
    assert_close(found.state.output, output, dtype)
    assert_close(found.state.lse, lse, dtype)
    size = max(1, problem.query.shape[2])  # rounding adds up over the queries
    assert_close(found.mass / size, mass / size, torch.promote_types(dtype, torch.float32))


@settings(max_examples=60)
@given(problems(), st.booleans())
def test_both_are_the_reference(problem: Problem, weighted: bool) -> None:
    with torch.no_grad():
        check(problem, weighted)


@settings(max_examples=25)
@given(problems(dtypes=(torch.bfloat16, torch.float16), spreads=(0.01, 1.0)), st.booleans())
def test_half_precision(problem: Problem, weighted: bool) -> None:
    check(problem, weighted)


@settings(max_examples=25)
@given(problems(max_tokens=20))
def test_where_a_gradient_is_asked_for(problem: Problem) -> None:
    problem.query.requires_grad_()
    found = statistics.state_and_column_mass(
        problem.query, problem.key, problem.value, **problem.call
    )
    assert found.mass.requires_grad
    with torch.no_grad():
        problem.query.requires_grad_(False)
        check(problem, False)


@pytest.mark.parametrize("rows", [1, 7, 128])
def test_blocks_of_any_size(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    monkeypatch.setattr(state_and_mass, "ROWS", rows)
    query, key, value = (torch.randn(1, 2, 30, 5) for _ in range(3))
    check(Problem(query, key, value, None, True, None, False), False)


def test_rows_that_do_not_look_at_themselves() -> None:
    """The normaliser is known by the row's own key, whose probability may be 0 here."""
    query, key, value = (torch.randn(1, 1, 9, 4) for _ in range(3))
    key[:, :, 0] = 40 * query.mean(2)
    query = query + 40 * query.mean(2, keepdim=True)
    key[:, :, 5] = -40 * query[:, :, 5]
    problem = Problem(query, key, value, None, True, None, False)
    p = reference.attention_map(query, key, is_causal=True).probabilities
    assert p[0, 0, 5, 5] < 1e-30
    check(problem, False)


def test_bad_input_is_named() -> None:
    query = torch.randn(1, 1, 3, 4)
    with pytest.raises(ValueError, match="query_weights: expected"):
        statistics.state_and_column_mass(query, query, query, torch.ones(2))
    with pytest.raises(ValueError, match="value: expected"):
        statistics.state_and_column_mass(query, query, query[:, :, :2])
