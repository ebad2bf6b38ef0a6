"""The entropy bound against the row that attains it, and its norms against the dense map."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import attending as at
from attending.core import reference
from tests.core.problems import Problem, problems

GOLDEN = Path(__file__).parent.parent / "golden" / "sigma-reparam"
statistics = at.statistics


def dense_map(problem: Problem) -> reference.Map:
    return reference.attention_map(problem.query, problem.key, **problem.call)


@given(num_keys=st.integers(0, 3000), norm=st.floats(0, 300))
def test_bound_is_the_entropy_of_the_worst_row(num_keys: int, norm: float) -> None:
    expected = reference.entropy_lower_bound(num_keys, norm)
    bound = statistics.entropy_lower_bound(num_keys, norm)
    assert bound.dtype == torch.float64
    assert bound.item() == pytest.approx(expected, rel=1e-9, abs=1e-12)
    single = statistics.entropy_lower_bound(num_keys, torch.tensor(norm))
    assert single.dtype == torch.float32
    assert single.item() == pytest.approx(expected, rel=1e-3, abs=1e-5)


@given(num_keys=st.integers(2, 40), spread=st.floats(1e-3, 50), seed=st.integers(0, 2**31))
def test_no_row_is_below_the_bound(num_keys: int, spread: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = spread * torch.randn(200, num_keys, generator=generator, dtype=torch.float64)
    scores[100:] = scores[100:].clamp_min(0)  # rows with equal scores, as the worst one has
    p = scores.softmax(-1)
    entropy = -torch.xlogy(p, p).sum(-1)
    norm = (scores - scores.mean(-1, keepdim=True)).norm(dim=-1)
    assert (statistics.entropy_lower_bound(num_keys, norm) <= entropy + 1e-12).all()
    assert (statistics.entropy_lower_bound(num_keys, scores.norm(dim=-1)) <= entropy + 1e-12).all()


@pytest.mark.parametrize("num_keys", [2, 3, 16])
def test_descent_finds_nothing_below_the_bound_and_arrives_there(num_keys: int) -> None:
    norm = 3.0
    scores = torch.randn(20, num_keys, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([scores], lr=0.02)

    def entropy():
        rows = norm * scores / scores.norm(dim=-1, keepdim=True)
        return -(rows.softmax(-1) * rows.log_softmax(-1)).sum(-1)

    for _ in range(600):
        optimizer.zero_grad()
        entropy().sum().backward()
        optimizer.step()
    bound = statistics.entropy_lower_bound(num_keys, norm)
    found = entropy().detach()
    assert (found >= bound - 1e-12).all()
    assert found.min().item() == pytest.approx(bound.item(), abs=1e-6)


def test_bound_at_the_ends() -> None:
    counts = torch.tensor([0, 1, 2, 10])
    torch.testing.assert_close(
        statistics.entropy_lower_bound(counts, 0.0),
        torch.tensor([0.0, 0.0, math.log(2), math.log(10)], dtype=torch.float64),
    )
    for dtype in (torch.float32, torch.float64):
        for norm in (1e4, 1e30, math.inf):
            far = statistics.entropy_lower_bound(counts, torch.tensor(norm, dtype=dtype))
            assert far.tolist() == [0, 0, 0, 0]
    half = statistics.entropy_lower_bound(10, torch.tensor(2.0, dtype=torch.bfloat16))
    assert half.dtype == torch.float32
    # Omega(T s exp(-s)), from below by the second term of the formula alone.
    tail = statistics.entropy_lower_bound(1000, 40.0).item()
    assert tail == pytest.approx(1000 * 41 * math.exp(-40.02), rel=0.01)


def test_gradient_of_the_bound() -> None:
    norm = torch.tensor([0.0, 0.3, 2.0, 30.0, 1e5], dtype=torch.float64, requires_grad=True)
    for num_keys in (1, 2, 9, torch.tensor([1, 2, 3, 4, 5])):
        (grad,) = torch.autograd.grad(statistics.entropy_lower_bound(num_keys, norm).sum(), norm)
        assert grad.isfinite().all()
        assert (grad <= 1e-12).all()
        assert grad[0].item() == pytest.approx(0, abs=1e-15)
    inner = norm.detach()[1:4].requires_grad_()
    assert torch.autograd.gradcheck(lambda s: statistics.entropy_lower_bound(7, s), inner)


@given(problem=problems(max_tokens=300, spreads=(0.01, 1.0, 8.0)))
def test_centred_norm_is_that_of_the_map(problem: Problem) -> None:
    norm = statistics.centred_logit_norm(problem.query, problem.key, **problem.call)
    assert norm.dtype == problem.query.dtype
    dense = dense_map(problem)
    expected = reference.centred_logit_norm(dense)
    tight = 1e-9 if problem.query.dtype == torch.float64 else 1e-5
    torch.testing.assert_close(norm.double(), expected, rtol=tight, atol=tight)
    visible = dense.visible.sum(-1)
    assert (norm[visible < 1] == 0).all()
    entropy = reference.entropy(dense)
    assert (statistics.entropy_lower_bound(visible, norm) <= entropy + 1e-4).all()


@given(problem=problems(dtypes=(torch.bfloat16,), spreads=(0.01, 1.0)))
def test_centred_norm_of_half_precision(problem: Problem) -> None:
    norm = statistics.centred_logit_norm(problem.query, problem.key, **problem.call)
    assert norm.dtype == torch.float32
    expected = reference.centred_logit_norm(dense_map(problem))
    torch.testing.assert_close(norm.double(), expected, rtol=1e-5, atol=1e-5)


def test_centred_norm_survives_a_large_common_key() -> None:
    query, key = torch.randn(1, 2, 300, 32), torch.randn(1, 2, 300, 32)
    for is_causal in (False, True):
        plain = statistics.centred_logit_norm(query, key, is_causal=is_causal)
        shifted = statistics.centred_logit_norm(query, key + 300, is_causal=is_causal)
        torch.testing.assert_close(plain, shifted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["none", "causal", "float", "float_keys"])
def test_gradients_of_the_centred_norm(kind: str) -> None:
    query = torch.randn(2, 4, 150, 5, dtype=torch.float64, requires_grad=True)
    key = torch.randn(2, 2, 150, 5, dtype=torch.float64, requires_grad=True)
    mask = {"float": torch.randn(150, 150), "float_keys": torch.randn(1, 1, 150)}.get(kind)
    mask = None if mask is None else mask.double()
    problem = Problem(query, key, key, mask, kind == "causal", None, True)
    ours = statistics.centred_logit_norm(query, key, **problem.call)
    theirs = reference.centred_logit_norm(dense_map(problem))
    if kind == "causal":  # one key: the norm is 0, where the dense definition has no gradient
        ours, theirs = ours[:, :, 1:], theirs[:, :, 1:]
    weights = torch.randn_like(ours)
    torch.testing.assert_close(
        torch.autograd.grad((ours * weights).sum(), (query, key)),
        torch.autograd.grad((theirs * weights).sum(), (query, key)),
        rtol=1e-7,
        atol=1e-8,
    )


def test_one_visible_key_has_a_finite_gradient() -> None:
    query = torch.randn(1, 1, 3, 4, requires_grad=True)
    key = torch.randn(1, 1, 3, 4)
    norm = statistics.centred_logit_norm(query, key, is_causal=True)
    (grad,) = torch.autograd.grad(norm.sum(), query)
    assert norm[0, 0, 0] == 0
    assert grad.isfinite().all()
    assert (grad[0, 0, 0] == 0).all()


@pytest.mark.parametrize("dim", [3, 8, 12])
def test_global_norm_bounds_every_row(dim: int) -> None:
    hidden = torch.randn(2, 1, 11, 8, dtype=torch.float64)
    query_weight = torch.randn(3, dim, 8, dtype=torch.float64)
    key_weight = torch.randn(3, dim, 8, dtype=torch.float64)
    bound = statistics.global_logit_norm(query_weight, key_weight, hidden, scale=0.1)
    assert bound.shape == (2, 3)
    product = torch.linalg.matrix_norm(key_weight.mT @ query_weight, 2)
    gram = torch.linalg.matrix_norm(hidden @ hidden.mT, 2)
    torch.testing.assert_close(bound, 0.1 * product * gram)
    query, key = hidden @ query_weight.mT, hidden @ key_weight.mT
    scores = 0.1 * query @ key.mT
    assert (scores.norm(dim=-1) <= bound[..., None] + 1e-9).all()
    assert (statistics.centred_logit_norm(query, key, scale=0.1) <= bound[..., None] + 1e-9).all()


def test_golden() -> None:
    golden = {
        name: torch.from_numpy(np.asarray(value))
        for name, value in np.load(GOLDEN / "entropy_bound_case1.npz").items()
    }
    scale, causal = float(golden["scale"]), bool(golden["causal"])
    x, w_q, w_k = golden["x"], golden["w_q"], golden["w_k"]
    total = statistics.global_logit_norm(w_q.T, w_k.T, x, scale)
    tokens = x.shape[0]
    visible = torch.arange(1, tokens + 1) if causal else torch.full((tokens,), tokens)
    query, key = (x @ w_q)[None, None], (x @ w_k)[None, None]
    norm = statistics.centred_logit_norm(query, key, is_causal=causal, scale=scale)
    entropy = statistics.entropy(query, key, is_causal=causal, scale=scale)
    for name, actual in {
        "sigma_total": total,
        "bound_global": statistics.entropy_lower_bound(visible, total),
        "bound_row": statistics.entropy_lower_bound(visible, norm[0, 0]),
        "row_entropy": entropy[0, 0],
    }.items():
        torch.testing.assert_close(actual, golden[name], rtol=0, atol=1e-9, msg=name)


BAD = {
    "num_keys": lambda: statistics.entropy_lower_bound(-1, 1.0),
    "logit_norm: expected norms": lambda: statistics.entropy_lower_bound(3, -1.0),
    "logit_norm: expected a float": lambda: statistics.entropy_lower_bound(3, torch.tensor(1)),
    "query_weight": lambda: statistics.global_logit_norm(
        torch.ones(3), torch.ones(3, 4), torch.ones(5, 4)
    ),
    "key_weight": lambda: statistics.global_logit_norm(
        torch.ones(3, 4), torch.ones(2, 4), torch.ones(5, 4)
    ),
    "hidden": lambda: statistics.global_logit_norm(
        torch.ones(3, 4), torch.ones(3, 4), torch.ones(5, 3)
    ),
    "query": lambda: statistics.centred_logit_norm(torch.ones(3), torch.ones(3)),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BAD[message]()


def test_compiled_bound_is_the_same() -> None:
    query, key = torch.randn(1, 4, 200, 8), torch.randn(1, 2, 200, 8)

    def both(query, key):
        norm = statistics.centred_logit_norm(query, key, is_causal=True, enable_gqa=True)
        return statistics.entropy_lower_bound(torch.arange(1, 201), norm)

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(query, key), both(query, key))
