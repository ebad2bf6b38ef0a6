"""The state, its backends and its algebra against the float64 reference."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import attending as at
from attending.core import kernels, reference
from attending.core.state import AttentionState
from tests.core.problems import Problem, assert_close, problems

REFERENCE = reference.attention_state


def reference_state(problem: Problem, query=None, key=None, value=None):
    return REFERENCE(
        problem.query if query is None else query,
        problem.key if key is None else key,
        problem.value if value is None else value,
        **problem.call,
    )


@given(problems())
def test_state_is_the_reference(problem: Problem) -> None:
    state = at.attention_state(problem.query, problem.key, problem.value, **problem.call)
    output, lse = reference_state(problem)
    assert_close(state.output, output, problem.query.dtype)
    assert_close(state.lse, lse, problem.query.dtype)
    assert state.output.dtype == problem.query.dtype


@given(problems(dtypes=(torch.bfloat16, torch.float16), spreads=(0.01, 1.0)))
def test_state_in_half_precision(problem: Problem) -> None:
    state = at.attention_state(problem.query, problem.key, problem.value, **problem.call)
    output, lse = reference_state(problem)
    assert state.output.dtype == problem.query.dtype
    assert state.lse.dtype == torch.float32
    assert_close(state.output, output, problem.query.dtype)
    assert_close(state.lse, lse, problem.query.dtype)


@given(problems(), st.booleans())
def test_chunked_is_the_reference(problem: Problem, tiny_blocks: bool) -> None:
    before = kernels.CHUNK_BYTES
    kernels.CHUNK_BYTES = 1 if tiny_blocks else before
    try:
        arguments = at.core.check.check_arguments(problem.query, problem.key, **problem.call)
        output, lse = kernels.chunked_attention(
            problem.query,
            problem.key,
            problem.value,
            arguments.bias,
            problem.is_causal,
            arguments.scale,
        )
    finally:
        kernels.CHUNK_BYTES = before
    expected_output, expected_lse = reference_state(problem)
    assert_close(output, expected_output, problem.query.dtype)
    assert_close(lse, expected_lse, problem.query.dtype)


@given(problems(dtypes=(torch.float64,), max_tokens=40), st.sampled_from(("both", "output", "lse")))
def test_gradients_of_output_and_lse(problem: Problem, through: str) -> None:
    tensors = [t.clone().requires_grad_() for t in (problem.query, problem.key, problem.value)]
    generator = torch.Generator().manual_seed(0)

    def loss(output, lse):
        weights = torch.randn(output.shape, generator=generator.manual_seed(0), dtype=output.dtype)
        row_weights = torch.randn(lse.shape, generator=generator, dtype=lse.dtype)
        finite = lse.masked_fill(lse == -math.inf, 0.0)
        of_output = (output * weights).sum() if through != "lse" else 0.0
        return of_output + ((finite * row_weights).sum() if through != "output" else 0.0)

    ours = torch.autograd.grad(
        loss(*at.attention_state(*tensors, **problem.call)), tensors, allow_unused=True
    )
    theirs = torch.autograd.grad(
        loss(*reference_state(problem, *tensors)), tensors, allow_unused=True
    )
    for got, expected in zip(ours, theirs, strict=True):
        if expected is None:
            assert got is None or not got.any()
        else:
            assert_close(got, expected, torch.float64)


def test_gradient_through_lse_in_bfloat16() -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, 33, 16) for _ in range(3))
    exact = [t.double().requires_grad_() for t in (query, key, value)]
    half = [t.bfloat16().requires_grad_() for t in (query, key, value)]
    for tensors in (exact, half):
        output, lse = at.attention_state(*tensors, is_causal=True)
        (output.float().sum() + 3 * lse.sum()).backward()
    for got, expected in zip(half, exact, strict=True):
        assert got.grad.dtype == torch.bfloat16
        torch.testing.assert_close(got.grad.double(), expected.grad, rtol=0.05, atol=0.05)


def test_a_learned_bias_gets_its_gradient() -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 3, 9, 4, dtype=torch.float64) for _ in range(3))
    bias = torch.randn(3, 9, 9, dtype=torch.float64, requires_grad=True)
    ours, theirs = [
        torch.autograd.grad((f(query, key, value, bias)[0] ** 2).sum(), bias)[0]
        for f in (at.attention_state, REFERENCE)
    ]
    assert_close(ours, theirs, torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_huge_logits_stay_finite(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    query, key = torch.randn(1, 2, 50, 8).to(dtype) * 100, torch.randn(1, 2, 50, 8).to(dtype) * 100
    mask = torch.randn(50, 50) * 1e4
    mask[3] = -math.inf
    for call in ({"attn_mask": mask}, {"is_causal": True}, {"attn_mask": mask * 1e30}):
        state = at.attention_state(query, key, key, **call)
        assert not state.output.isnan().any()
        assert not state.lse.isnan().any()
    assert (state.lse[:, :, 3] == -math.inf).all()
    assert not state.output[:, :, 3].any()


def test_a_row_that_is_all_zero_but_visible_is_not_empty() -> None:
    # The CPU kernel reports lse 0 for empty rows; a score of exactly 0 gives that honestly.
    zeros = torch.zeros(1, 1, 2, 4)
    mask = torch.tensor([[True, False], [False, False]])
    state = at.attention_state(zeros, zeros, zeros, mask)
    assert state.lse.tolist() == [[[0.0, -math.inf]]]


def test_no_keys_and_no_queries() -> None:
    query, key, value = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 0, 4), torch.randn(1, 2, 0, 5)
    state = at.attention_state(query, key, value)
    assert state.output.shape == (1, 2, 3, 5)
    assert not state.output.any()
    assert (state.lse == -math.inf).all()
    assert at.attention_state(query[:, :, :0], query, query).output.shape == (1, 2, 0, 4)


@given(problems(max_tokens=40), st.integers(2, 4))
def test_merge_over_parts_is_the_whole(problem: Problem, parts: int) -> None:
    keys = problem.key.shape[2]
    pieces = [torch.arange(keys)[i::parts] for i in range(parts)]
    call = dict(problem.call)
    mask = call.pop("attn_mask")
    causal = call.pop("is_causal")
    if causal:
        mask = torch.ones(problem.query.shape[2], keys, dtype=torch.bool).tril()
    if mask is not None:
        mask = mask.expand(*mask.shape[:-1], keys)
    states = [
        at.attention_state(
            problem.query,
            problem.key[:, :, piece],
            problem.value[:, :, piece],
            None if mask is None else mask[..., piece],
            **call,
        )
        for piece in pieces
    ]
    output, lse = reference_state(problem)
    for order in itertools.islice(itertools.permutations(states), 3):
        merged = at.merge(*order)
        assert_close(merged.output, output, problem.query.dtype)
        assert_close(merged.lse, lse, problem.query.dtype)
    left = at.merge(at.merge(*states[:-1]), states[-1])
    right = at.merge(states[0], at.merge(*states[1:]))
    assert_close(left.output, right.output, problem.query.dtype)
    assert_close(left.lse, right.lse, problem.query.dtype)
    expected_output, expected_lse = reference.merge(*states)
    assert_close(left.output, expected_output, problem.query.dtype)
    assert_close(left.lse, expected_lse, problem.query.dtype)


def test_the_empty_state_is_neutral() -> None:
    torch.manual_seed(0)
    state = AttentionState(torch.randn(2, 3, 5, 4), torch.randn(2, 3, 5))
    nothing = AttentionState(torch.zeros(2, 3, 5, 4), torch.full((2, 3, 5), -math.inf))
    for merged in (at.merge(state, nothing), at.merge(nothing, state)):
        torch.testing.assert_close(merged, state)
    both = at.merge(nothing, nothing)
    assert (both.lse == -math.inf).all()
    assert not both.output.any()


def test_merge_of_states_far_apart() -> None:
    near = AttentionState(torch.ones(1, 1, 1, 2), torch.tensor([[[3e4]]]))
    far = AttentionState(torch.zeros(1, 1, 1, 2), torch.tensor([[[-3e4]]]))
    torch.testing.assert_close(at.merge(near, far), near)


def test_merge_is_differentiable_with_empty_rows() -> None:
    torch.manual_seed(0)
    output = torch.randn(1, 1, 2, 3, dtype=torch.float64, requires_grad=True)
    lse = torch.tensor([[[0.3, -math.inf]]], dtype=torch.float64, requires_grad=True)
    other = AttentionState(torch.randn_like(output), torch.tensor([[[0.1, -math.inf]]]).double())
    merged = at.merge(AttentionState(output, lse), other)
    (merged.output.sum() + merged.lse[..., 0].sum()).backward()
    assert output.grad.isfinite().all()
    assert lse.grad.isfinite().all()


def test_reweigh_counts_keys_several_times() -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, 6, 4, dtype=torch.float64) for _ in range(3))
    a = at.attention_state(query, key[:, :, :2], value[:, :, :2])
    b = at.attention_state(query, key[:, :, 2:], value[:, :, 2:])
    thrice = at.merge(at.reweigh(a, math.log(3)), b)
    repeated = torch.tensor([0, 0, 0, 1, 1, 1, 2, 3, 4, 5])
    expected = at.attention_state(query, key[:, :, repeated], value[:, :, repeated])
    torch.testing.assert_close(thrice, expected)
    dropped = at.reweigh(a, -math.inf)
    assert not dropped.output.any()
    torch.testing.assert_close(at.merge(dropped, b), b)


@given(problems(dtypes=(torch.float64,), max_tokens=30), st.integers(0, 2**31))
def test_permutation_of_the_keys_changes_nothing(problem: Problem, seed: int) -> None:
    if problem.is_causal:
        return
    order = torch.randperm(problem.key.shape[2], generator=torch.Generator().manual_seed(seed))
    call = dict(problem.call)
    if call["attn_mask"] is not None:
        call["attn_mask"] = call["attn_mask"][..., order]
    ours = at.attention_state(
        problem.query, problem.key[:, :, order], problem.value[:, :, order], **call
    )
    same = at.attention_state(problem.query, problem.key, problem.value, **problem.call)
    assert_close(ours.output, same.output, torch.float64)
    assert_close(ours.lse, same.lse, torch.float64)


@pytest.mark.parametrize("kind", ["none", "causal", "bool", "float_keys"])
def test_compiled_gives_the_same_numbers(kind: str) -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 4, 21, 8, requires_grad=True) for _ in range(3))
    call: dict = {"is_causal": kind == "causal"}
    if kind == "bool":
        call["attn_mask"] = torch.rand(2, 1, 21, 21) > 0.4
    if kind == "float_keys":
        call["attn_mask"] = torch.randn(2, 4, 1, 21)

    def loss(query, key, value):
        state = at.attention_state(query, key, value, **call)
        finite = state.lse.masked_fill(state.lse == -math.inf, 0.0)
        return state.output.square().sum() + finite.sum(), state.output, state.lse

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    eager, fused = loss(query, key, value), compiled(query, key, value)
    torch.testing.assert_close(fused, eager)
    for got, expected in zip(
        torch.autograd.grad(fused[0], (query, key, value)),
        torch.autograd.grad(eager[0], (query, key, value)),
        strict=True,
    ):
        torch.testing.assert_close(got, expected)


QUERY = torch.zeros(2, 4, 5, 8)
BAD_CALLS = {
    "query: expected a floating": {"query": QUERY.long()},
    "query: expected 4 dimensions": {"query": QUERY[0]},
    "query: expected a torch.Tensor": {"query": [1.0]},
    "key: expected 4 dimensions": {"key": QUERY[0]},
    "key: expected torch.float32": {"key": QUERY.double()},
    "key: expected batch size 2": {"key": QUERY[:1]},
    "key: expected 4 heads": {"key": QUERY[:, :2], "value": QUERY[:, :2]},
    "multiple of the heads of key": {
        "key": QUERY[:, :3],
        "value": QUERY[:, :3],
        "enable_gqa": True,
    },
    "key: expected the last dimension": {"key": QUERY[..., :3]},
    "key: expected a tensor on cpu": {"key": QUERY.to("meta")},
    "value: expected the batch, heads and length": {"value": QUERY[:, :, :3]},
    "value: expected a floating": {"value": QUERY.bool()},
    "scale: expected a finite": {"scale": math.nan},
    "attn_mask: expected None when is_causal": {
        "attn_mask": torch.ones(5, 5, dtype=torch.bool),
        "is_causal": True,
    },
    "attn_mask: expected a shape": {"attn_mask": torch.ones(5, 4, dtype=torch.bool)},
    "attn_mask: expected a boolean": {"attn_mask": torch.ones(5, 5, dtype=torch.long)},
    "attn_mask: expected a tensor on cpu": {"attn_mask": torch.ones(5, 5, device="meta")},
}


@pytest.mark.parametrize("message", BAD_CALLS)
def test_bad_input_says_what_was_expected(message: str) -> None:
    arguments = {"query": QUERY, "key": QUERY, "value": QUERY} | BAD_CALLS[message]
    with pytest.raises(ValueError, match=message):
        at.attention_state(**arguments)
    if "value" not in message:
        arguments.pop("value")
        with pytest.raises(ValueError, match=message):
            at.statistics.entropy(**arguments)
