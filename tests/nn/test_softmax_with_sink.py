"""The sink as a merge against a softmax that really has one more key."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from attending.core.state import AttentionState, attention_state
from attending.nn.softmax_with_sink import sink_probability, softmax_with_sink
from tests.core.problems import Problem, assert_close, problems


def dense_scores(problem: Problem) -> Tensor:
    """Scaled and masked scores in float64, -inf where a key is hidden."""
    query, key = problem.query.double(), problem.key.double()
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    scale = query.shape[-1] ** -0.5 if problem.scale is None else problem.scale
    scores = query @ key.transpose(-1, -2) * scale
    if problem.is_causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(hidden, -math.inf)
    if problem.attn_mask is None:
        return scores
    if problem.attn_mask.dtype == torch.bool:
        return scores.masked_fill(~problem.attn_mask, -math.inf)
    return scores + problem.attn_mask.double()


def dense_sink(scores: Tensor, value: Tensor, logit: Tensor, answer: Tensor) -> tuple[Tensor, ...]:
    """`(output, lse, p0)` of a softmax over the keys and, first, the sink."""
    value = value.double().repeat_interleave(scores.shape[1] // value.shape[1], 1)
    logit = logit.double().expand(scores.shape[:-1])[..., None]
    whole = torch.cat([logit, scores], -1)
    share = whole.softmax(-1)
    output = share[..., 1:] @ value + share[..., :1] * answer.double()
    return output, whole.logsumexp(-1), share[..., 0]


@given(problems(dtypes=(torch.float32, torch.float64, torch.bfloat16)), st.booleans())
def test_equals_a_softmax_over_one_more_key(problem: Problem, per_query: bool) -> None:
    torch.manual_seed(0)
    heads, queries = problem.query.shape[1:3]
    logit = torch.randn(heads, queries if per_query else 1) * 3
    answer = torch.randn(heads, 1, problem.value.shape[-1])
    state = attention_state(problem.query, problem.key, problem.value, **problem.call)
    ours = softmax_with_sink(state, logit, answer)
    output, lse, share = dense_sink(dense_scores(problem), problem.value, logit, answer)
    assert ours.output.dtype == problem.query.dtype
    dtype = problem.query.dtype
    if dtype != torch.bfloat16:
        assert_close(ours.output, output, dtype)
        assert_close(ours.lse, lse, dtype)
        assert_close(sink_probability(state.lse, logit), share, dtype)
    else:
        # bf16 rounds the inputs of a softmax whose logits reach hundreds; small ones are enough.
        assert ours.output.isfinite().all()


def test_bfloat16_to_its_rounding() -> None:
    query, key, value = (torch.randn(2, 3, 17, 8, dtype=torch.bfloat16) for _ in range(3))
    logit = torch.randn(3, 1)
    ours = softmax_with_sink(attention_state(query, key, value, is_causal=True), logit)
    scores = dense_scores(Problem(query, key, value, None, True, None, False))
    output, lse, _ = dense_sink(scores, value, logit, torch.zeros(8))
    assert_close(ours.output, output, torch.bfloat16)
    assert_close(ours.lse, lse, torch.bfloat16)
    assert ours.output.dtype == torch.bfloat16
    assert ours.lse.dtype == torch.float32


@given(problems(dtypes=(torch.float64,)))
def test_no_sink_changes_nothing_and_a_huge_one_takes_all(problem: Problem) -> None:
    state = attention_state(problem.query, problem.key, problem.value, **problem.call)
    answer = torch.ones(problem.value.shape[-1], dtype=torch.float64)
    without = softmax_with_sink(state, -math.inf, answer)
    assert_close(without.output, state.output, torch.float64)
    assert torch.equal(without.lse == -math.inf, state.lse == -math.inf)
    assert (sink_probability(state.lse, -math.inf) == 0).all()
    taken = softmax_with_sink(state, 1e9, answer)
    assert_close(taken.output, torch.ones_like(taken.output), torch.float64)


def test_off_by_one_is_a_sink_with_logit_zero() -> None:
    query, key, value = (torch.randn(1, 2, 9, 4, dtype=torch.float64) for _ in range(3))
    ours = softmax_with_sink(attention_state(query, key, value), 0.0).output
    weights = (query @ key.transpose(-1, -2) / 2).exp()
    expected = weights / (1 + weights.sum(-1, keepdim=True)) @ value
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


def test_is_the_sink_of_gpt_oss_in_transformers() -> None:
    """Against transformers' own eager attention of gpt-oss, with its learned sinks."""
    from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

    class Module(torch.nn.Module):
        num_key_value_groups = 2
        sinks = torch.randn(4, dtype=torch.float64)

    module = Module().eval()
    query = torch.randn(2, 4, 7, 8, dtype=torch.float64)
    key, value = (torch.randn(2, 2, 7, 8, dtype=torch.float64) for _ in range(2))
    mask = torch.zeros(1, 1, 7, 7, dtype=torch.float64).masked_fill(
        torch.ones(7, 7, dtype=torch.bool).triu(1), -math.inf
    )
    theirs, _ = eager_attention_forward(module, query, key, value, mask, scaling=0.3)
    state = attention_state(query, key, value, is_causal=True, scale=0.3, enable_gqa=True)
    ours = softmax_with_sink(state, module.sinks[:, None]).output.transpose(1, 2)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_are_those_of_the_dense_softmax(dtype: torch.dtype) -> None:
    query, key, value = (torch.randn(2, 2, 9, 4, dtype=dtype) for _ in range(3))
    logit, answer = torch.randn(2, 9, dtype=dtype), torch.randn(2, 1, 4, dtype=dtype)
    mask = torch.rand(2, 1, 9, 9) > 0.4
    mask[:, :, 3] = False
    inputs = [query, key, value, logit, answer]
    for tensor in inputs:
        tensor.requires_grad_()
    state = softmax_with_sink(attention_state(query, key, value, mask), logit, answer)
    ours = torch.autograd.grad(state.output.square().sum() + state.lse.sin().sum(), inputs)
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    scores = dense_scores(Problem(exact[0], exact[1], exact[2], mask, False, None, False))
    output, lse, _ = dense_sink(scores, exact[2], exact[3], exact[4])
    theirs = torch.autograd.grad(output.square().sum() + lse.sin().sum(), exact)
    for mine, right in zip(ours, theirs, strict=True):
        assert_close(mine, right, dtype)


def test_a_row_without_keys_has_the_sink_alone_and_finite_gradients() -> None:
    query, key, value = (torch.randn(1, 1, 3, 4, requires_grad=True) for _ in range(3))
    logit = torch.zeros(1, 1, 1, requires_grad=True)
    mask = torch.tensor([[True, False, True], [False] * 3, [True] * 3])
    state = attention_state(query, key, value, mask)
    ours = softmax_with_sink(state, logit, torch.full((4,), 5.0))
    torch.testing.assert_close(ours.output[0, 0, 1], torch.full((4,), 5.0))
    assert sink_probability(state.lse, logit)[0, 0, 1] == 1
    (ours.output.sum() + sink_probability(state.lse, logit).sum()).backward()
    for tensor in (query, key, value, logit):
        assert tensor.grad.isfinite().all()


def test_sinks_in_sequence_add_up() -> None:
    """Two sinks are one with the sum of their weights: the states are a monoid."""
    state = AttentionState(torch.randn(2, 5, 3), torch.randn(2, 5))
    twice = softmax_with_sink(softmax_with_sink(state, 0.3), 1.1)
    once = softmax_with_sink(state, math.log(math.exp(0.3) + math.exp(1.1)))
    torch.testing.assert_close(twice, once)


def test_arguments_that_do_not_fit_are_named() -> None:
    state = AttentionState(torch.randn(2, 3, 5, 4), torch.randn(2, 3, 5))
    with pytest.raises(ValueError, match=r"logit: expected a shape .* number per head"):
        softmax_with_sink(state, torch.zeros(3))
    with pytest.raises(ValueError, match="value: expected a shape"):
        softmax_with_sink(state, 0.0, torch.zeros(3))
