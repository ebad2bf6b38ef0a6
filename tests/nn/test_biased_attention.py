"""The variants of attention against dense definitions in float64."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from attending.core.state import attention_state
from attending.nn.biased_attention import attention_with_bias, sigmoid_attention
from attending.nn.softmax_with_sink import softmax_with_sink
from tests.core.problems import Problem, assert_close, problems
from tests.nn.test_softmax_with_sink import dense_scores, dense_sink


def dense_bias(problem: Problem, key_bias: Tensor, value_bias: Tensor, mode: str) -> Tensor:
    heads = problem.query.shape[1]
    key_bias = key_bias.double().repeat_interleave(heads // key_bias.shape[0], 0)
    value_bias = value_bias.double().repeat_interleave(heads // value_bias.shape[0], 0)
    scale = problem.query.shape[-1] ** -0.5 if problem.scale is None else problem.scale
    logit = (problem.query.double() * key_bias[:, None]).sum(-1) * scale
    scores = dense_scores(problem)
    output, _, share = dense_sink(scores, problem.value, logit, value_bias[:, None])
    if mode == "concat":
        return output
    empty = (scores == -math.inf).all(-1, keepdim=True)
    value = problem.value.double().repeat_interleave(heads // problem.value.shape[1], 1)
    plain = scores.masked_fill(empty, 0.0).softmax(-1) @ value
    return plain.masked_fill(empty, 0.0) + share[..., None] * value_bias[:, None]


def dense_sigmoid(problem: Problem, length: int) -> Tensor:
    scores = dense_scores(problem)
    value = problem.value.double().repeat_interleave(scores.shape[1] // problem.value.shape[1], 1)
    return torch.sigmoid(scores - math.log(length)) @ value


def biases(problem: Problem, per_key_head: bool) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    heads = problem.key.shape[1] if per_key_head else problem.query.shape[1]
    dtype = problem.query.dtype
    return (
        torch.randn(heads, problem.key.shape[-1]).to(dtype),
        torch.randn(heads, problem.value.shape[-1]).to(dtype),
    )


@given(problems(), st.sampled_from(["concat", "additive"]), st.booleans())
def test_biases_equal_the_dense_definition(problem: Problem, mode: str, per_key: bool) -> None:
    key_bias, value_bias = biases(problem, per_key)
    ours = attention_with_bias(
        problem.query, problem.key, problem.value, key_bias, value_bias, mode=mode, **problem.call
    )
    assert_close(ours, dense_bias(problem, key_bias, value_bias, mode), problem.query.dtype)


@given(problems())
def test_sigmoid_equals_the_dense_definition_and_is_bounded(problem: Problem) -> None:
    keys = problem.key.shape[2]
    call = problem.call
    ours = sigmoid_attention(problem.query, problem.key, problem.value, **call)
    assert_close(ours, dense_sigmoid(problem, keys), problem.query.dtype)
    fixed = sigmoid_attention(problem.query, problem.key, problem.value, key_length=64, **call)
    assert_close(fixed, dense_sigmoid(problem, 64), problem.query.dtype)
    # No row can weigh its values by more than the number of keys it sees.
    weight = torch.sigmoid(dense_scores(problem) - math.log(keys)).sum(-1, keepdim=True)
    largest = (
        problem.value.double()
        .abs()
        .amax((-1, -2))
        .repeat_interleave(problem.query.shape[1] // problem.value.shape[1], 1)
    )
    assert (ours.double().abs() <= weight * largest[..., None, None] * (1 + 1e-3) + 1e-6).all()


@given(problems(dtypes=(torch.float64,)))
def test_identities_of_the_bias(problem: Problem) -> None:
    """(d) = (1 - p0) PV + p0 v'; (c) = PV + p0 v'; (d) without v' is a learned sink."""
    key_bias, value_bias = biases(problem, False)
    tensors, call = (problem.query, problem.key, problem.value), problem.call
    plain = attention_state(*tensors, **call)
    scale = problem.query.shape[-1] ** -0.5 if problem.scale is None else problem.scale
    logit = torch.einsum("bhqd,hd->bhq", problem.query, key_bias) * scale
    share = torch.sigmoid(logit - plain.lse)[..., None]
    concat = attention_with_bias(*tensors, key_bias, value_bias, mode="concat", **call)
    additive = attention_with_bias(*tensors, key_bias, value_bias, mode="additive", **call)
    answer = share * value_bias[:, None]
    assert_close(concat, (1 - share) * plain.output + answer, torch.float64)
    assert_close(additive, plain.output + answer, torch.float64)
    assert_close(additive - concat, share * plain.output, torch.float64)
    silent = attention_with_bias(*tensors, key_bias, 0 * value_bias, **call)
    assert_close(silent, softmax_with_sink(plain, logit).output, torch.float64)


@pytest.mark.parametrize("mode", ["concat", "additive", "sigmoid"])
def test_gradients(mode: str) -> None:
    query = torch.randn(2, 4, 9, 6, dtype=torch.float64)
    key, value = (torch.randn(2, 2, 9, 6, dtype=torch.float64) for _ in range(2))
    key_bias, value_bias = (torch.randn(4, 6, dtype=torch.float64) for _ in range(2))
    inputs = [t.requires_grad_() for t in (query, key, value, key_bias, value_bias)]
    call = {"is_causal": True, "enable_gqa": True}
    problem = Problem(query, key, value, None, True, None, True)
    if mode == "sigmoid":
        inputs = inputs[:3]
        ours, exact = sigmoid_attention(*inputs, **call), dense_sigmoid(problem, 9)
    else:
        ours = attention_with_bias(*inputs, mode=mode, **call)
        exact = dense_bias(problem, key_bias, value_bias, mode)
    mine = torch.autograd.grad(ours.sin().sum(), inputs)
    right = torch.autograd.grad(exact.sin().sum(), inputs)
    torch.testing.assert_close(mine, right, rtol=1e-10, atol=1e-10)


def test_gradient_of_a_float_mask_through_sigmoid_attention() -> None:
    query, key, value = (torch.randn(1, 2, 5, 4, dtype=torch.float64) for _ in range(3))
    mask = torch.randn(2, 5, 5, dtype=torch.float64, requires_grad=True)
    problem = Problem(query, key, value, mask, False, None, False)
    ours = sigmoid_attention(query, key, value, attn_mask=mask).sin().sum()
    exact = dense_sigmoid(problem, 5).sin().sum()
    torch.testing.assert_close(torch.autograd.grad(ours, mask), torch.autograd.grad(exact, mask))


@pytest.mark.parametrize("mode", ["concat", "additive", "sigmoid"])
def test_bfloat16(mode: str) -> None:
    query, key, value = (torch.randn(2, 3, 17, 8, dtype=torch.bfloat16) for _ in range(3))
    problem = Problem(query, key, value, None, True, None, False)
    if mode == "sigmoid":
        ours, exact = (
            sigmoid_attention(query, key, value, is_causal=True),
            dense_sigmoid(problem, 17),
        )
    else:
        pair = (torch.randn(3, 8).bfloat16(), torch.randn(3, 8).bfloat16())
        ours = attention_with_bias(query, key, value, *pair, mode=mode, is_causal=True)
        exact = dense_bias(problem, *pair, mode)
    assert ours.dtype == torch.bfloat16
    assert_close(ours, exact, torch.bfloat16)


def test_sigmoid_depends_on_the_length_unless_it_is_given() -> None:
    """The trap of the docstring, as a fact."""
    query, key, value = (torch.randn(1, 1, 8, 4, dtype=torch.float64) for _ in range(3))
    short = (query[:, :, :4], key[:, :, :4], value[:, :, :4])
    whole = sigmoid_attention(query, key, value, is_causal=True)[:, :, :4]
    assert (whole - sigmoid_attention(*short, is_causal=True)).abs().max() > 1e-3
    fixed = sigmoid_attention(query, key, value, is_causal=True, key_length=8)[:, :, :4]
    torch.testing.assert_close(fixed, sigmoid_attention(*short, is_causal=True, key_length=8))


def test_without_keys() -> None:
    query, nothing = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 0, 4)
    assert (sigmoid_attention(query, nothing, nothing) == 0).all()
    bias = torch.ones(2, 4)
    output = attention_with_bias(query, nothing, nothing, bias, bias)
    torch.testing.assert_close(output, torch.ones_like(output))


def test_blocks_of_rows_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value = (torch.randn(1, 2, 13, 4, dtype=torch.float64) for _ in range(3))
    mask = torch.randn(2, 13, 13, dtype=torch.float64)
    whole = sigmoid_attention(query, key, value, attn_mask=mask)
    monkeypatch.setattr("attending.core.kernels.CHUNK_BYTES", 4 * 2 * 13 * 3)
    torch.testing.assert_close(sigmoid_attention(query, key, value, attn_mask=mask), whole)


def test_arguments_that_do_not_fit_are_named() -> None:
    query, bias = torch.randn(1, 4, 3, 8), torch.randn(4, 8)
    with pytest.raises(ValueError, match="mode: expected"):
        attention_with_bias(query, query, query, bias, bias, mode="both")
    with pytest.raises(ValueError, match=r"key_bias: expected .*\[4, 8\]"):
        attention_with_bias(query, query, query, bias[:3], bias)
    with pytest.raises(ValueError, match="value_bias"):
        attention_with_bias(query, query, query, bias, bias[:, :3])
    with pytest.raises(ValueError, match="key_length: expected at least 1"):
        sigmoid_attention(query, query, query, key_length=0)
