"""Biases as features against the same bias as a matrix."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import attending as at
from attending.core import bias, reference
from tests.core.problems import Problem, assert_close, problems


@given(problems(masks=("none", "causal", "bool", "keys"), spreads=(0.01, 1.0, 8.0)), st.booleans())
def test_key_bias_goes_with_every_mask(problem: Problem, with_gradient: bool) -> None:
    torch.manual_seed(0)
    batch, kv_heads, keys, _ = problem.key.shape
    key_bias = torch.randn(batch, kv_heads, keys).to(problem.query.dtype) * 3
    key_bias[..., :: max(2, keys // 3)] = -math.inf
    key_bias.requires_grad_(with_gradient)
    state = at.biased_attention_state(
        problem.query, problem.key, problem.value, key_bias=key_bias, **problem.call
    )
    visible = torch.ones(1, 1, problem.query.shape[2], keys, dtype=torch.bool)
    if problem.is_causal:
        visible = visible.tril()
    if problem.attn_mask is not None:
        visible = visible & problem.attn_mask
    groups = problem.query.shape[1] // kv_heads
    dense = key_bias.detach().double().repeat_interleave(groups, 1)[:, :, None]
    dense = dense.expand(-1, -1, problem.query.shape[2], -1).masked_fill(~visible, -math.inf)
    output, lse = reference.attention_state(
        problem.query,
        problem.key,
        problem.value,
        dense,
        scale=problem.scale,
        enable_gqa=problem.enable_gqa,
    )
    assert_close(state.output.detach(), output, problem.query.dtype)
    assert_close(state.lse.detach(), lse, problem.query.dtype)
    if with_gradient:
        (state.output.sum() + state.lse.masked_fill(state.lse == -math.inf, 0).sum()).backward()
        assert key_bias.grad.isfinite().all()


def test_gradient_of_a_key_bias() -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, 11, 4, dtype=torch.float64) for _ in range(3))
    key_bias = torch.randn(1, 2, 11, dtype=torch.float64, requires_grad=True)
    ours = at.biased_attention_state(query, key, value, key_bias=key_bias, is_causal=True)
    causal = torch.zeros(11, 11, dtype=torch.float64).masked_fill(
        ~torch.ones(11, 11, dtype=torch.bool).tril(), -math.inf
    )
    theirs = reference.attention_state(query, key, value, key_bias[:, :, None] + causal)
    for mine, exact in zip(ours, theirs, strict=True):
        torch.testing.assert_close(
            torch.autograd.grad(mine.square().sum(), key_bias, retain_graph=True),
            torch.autograd.grad(exact.square().sum(), key_bias, retain_graph=True),
        )


@given(heads=st.integers(1, 12), tokens=st.integers(1, 70), extra=st.integers(0, 9))
def test_alibi(heads: int, tokens: int, extra: int) -> None:
    generator = torch.Generator().manual_seed(heads)
    query = torch.randn(1, heads, tokens, 6, generator=generator)
    key = torch.randn(1, heads, tokens + extra, 6, generator=generator)
    slopes = bias.alibi_slopes(heads)
    factors = bias.alibi_factors(slopes, tokens, tokens + extra)
    row = torch.arange(tokens)[:, None] + extra
    column = torch.arange(tokens + extra)
    matrix = (slopes[:, None, None] * (column - row)).masked_fill(column > row, -math.inf)
    visible = column <= row
    state = at.biased_attention_state(query, key, key, low_rank_bias=factors, attn_mask=visible)
    output, lse = reference.attention_state(query, key, key, matrix)
    assert_close(state.output, output, torch.float32)
    assert_close(state.lse, lse, torch.float32)


def test_alibi_slopes_of_the_paper() -> None:
    assert bias.alibi_slopes(8).tolist() == [2.0**-h for h in range(1, 9)]
    twelve = bias.alibi_slopes(12)
    assert twelve[:8].tolist() == [2.0**-h for h in range(1, 9)]
    torch.testing.assert_close(twelve[8:], 2.0 ** -torch.tensor([0.5, 1.5, 2.5, 3.5]))


def test_query_bias_moves_only_the_lse() -> None:
    torch.manual_seed(0)
    query, key = torch.randn(1, 2, 5, 4), torch.randn(1, 2, 7, 4)
    shift = torch.randn(1, 2, 5)
    wide_query, wide_key, scale = bias.add_query_bias(query, key, shift)
    assert wide_query.shape[-1] % 8 == 0
    shifted = at.attention_state(wide_query, wide_key, key, scale=scale)
    plain = at.attention_state(query, key, key)
    torch.testing.assert_close(shifted.output, plain.output)
    torch.testing.assert_close(shifted.lse, plain.lse + shift)


@pytest.mark.parametrize("scale", [0.0, -0.5, 2.0])
def test_any_finite_scale(scale: float) -> None:
    torch.manual_seed(0)
    query, key = torch.randn(1, 1, 5, 4), torch.randn(1, 1, 7, 4)
    key_bias = torch.randn(1, 1, 7)
    key_bias[..., 2] = -math.inf
    wide_query, wide_key, wide_scale = bias.add_key_bias(query, key, key_bias, scale)
    state = at.attention_state(wide_query, wide_key, key, scale=wide_scale)
    output, lse = reference.attention_state(query, key, key, key_bias[:, :, None], scale=scale)
    assert_close(state.output, output, torch.float32)
    assert_close(state.lse, lse, torch.float32)


def test_half_precision_is_widened() -> None:
    query = torch.randn(1, 1, 5, 8, dtype=torch.bfloat16)
    pair = bias.add_key_bias(query, query, torch.full((1, 1, 5), 7.3456))
    assert pair.query.dtype == torch.float32
    assert (
        at.biased_attention_state(
            query, query, query, key_bias=torch.zeros(1, 1, 5), is_causal=True
        ).output.dtype
        == torch.bfloat16
    )


def test_bad_biases() -> None:
    query = torch.zeros(1, 2, 5, 4)
    with pytest.raises(ValueError, match="right: expected the rank"):
        bias.add_low_rank_bias(query, query, torch.ones(1, 1, 1, 2), torch.ones(1, 1, 5, 3))
    with pytest.raises(ValueError, match="key_bias"):
        at.biased_attention_state(query, query, query, key_bias=torch.ones(5))
    with pytest.raises(ValueError, match="num_heads"):
        bias.alibi_slopes(0)
