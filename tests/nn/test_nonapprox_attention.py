"""Non-approximate attention: golden vectors, the float64 reference, and its running state."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attending.core.state import AttentionState
from attending.nn import nonapprox_attention as module
from attending.nn.nonapprox_attention import (
    nonapprox_attention,
    nonapprox_logit,
    running_softmax_mean,
)
from tests.nn import reference_deconstructing_attention as reference

GOLDEN = Path(__file__).parents[1] / "golden" / "deconstructing-attention" / "variants.npz"


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_golden(dtype, atol):
    with np.load(GOLDEN) as arrays:
        query, key, value, output, attention, logits = (
            torch.from_numpy(arrays[name]).to(dtype)
            for name in ("q", "k", "v", "nonapprox_out", "nonapprox_attn", "nonapprox_logits")
        )
    torch.testing.assert_close(nonapprox_logit(query, key), logits, atol=atol, rtol=atol)
    ours = nonapprox_attention(query, key, value, is_causal=True)
    torch.testing.assert_close(ours, output, atol=atol, rtol=atol)
    eye = torch.eye(7, dtype=dtype).expand(2, 2, 7, 7)
    ours = nonapprox_attention(query, key, eye, is_causal=True)
    torch.testing.assert_close(ours, attention, atol=atol, rtol=atol)


@given(
    st.integers(1, 2),
    st.sampled_from([(1, 1), (4, 2), (3, 1)]),
    st.sampled_from([1, 2, 7, 64, 65, 130]),
    st.booleans(),
    st.booleans(),
    st.integers(0, 10**6),
)
def test_values_and_gradients_are_those_of_the_reference(
    batch, heads, tokens, masked, is_causal, seed
):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    query, key = draw(batch, heads[0], tokens, 4), draw(batch, heads[1], tokens, 4)
    value = draw(batch, heads[1], tokens, 3)
    mask = torch.rand(batch, 1, 1, tokens, generator=generator) > 0.5 if masked else None
    ours = nonapprox_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=is_causal,
        scale=1.3,
        enable_gqa=heads[0] != heads[1],
    )
    groups = heads[0] // heads[1]
    wide = [tensor.repeat_interleave(groups, 1) for tensor in (key, value)]
    expected = reference.nonapprox(query, *wide, mask, is_causal, 1.3)
    torch.testing.assert_close(ours, expected, atol=1e-9, rtol=1e-9)
    weights = torch.rand(ours.shape, generator=generator, dtype=torch.float64)
    wanted = (query, key, value)
    for mine, other in zip(
        torch.autograd.grad((ours * weights).sum(), wanted),
        torch.autograd.grad((expected * weights).sum(), wanted, materialize_grads=True),
        strict=True,
    ):
        torch.testing.assert_close(mine, other, atol=1e-8, rtol=1e-8)


def test_rows_differ_only_by_the_causal_cut():
    query, key = torch.randn(2, 1, 1, 6, 4).unbind(0)
    eye = torch.eye(6).expand(1, 1, 6, 6)
    rows = nonapprox_attention(query, key, eye, is_causal=True)[0, 0]
    last = rows[-1]
    for place in range(6):
        seen = last[: place + 1] / last[: place + 1].sum()
        torch.testing.assert_close(rows[place, : place + 1], seen)


@pytest.mark.parametrize("sizes", [[1] * 9, [4, 5], [70, 60], [64, 64, 2]])
def test_going_on_from_a_state_is_one_call(sizes):
    tokens = sum(sizes)
    logit, value = torch.randn(2, 4, tokens) * 5, torch.randn(2, 2, tokens, 3)
    whole = running_softmax_mean(logit, value)
    state, start, parts = None, 0, []
    for size in sizes:
        here = slice(start, start + size)
        part = running_softmax_mean(logit[:, :, here], value[:, :, here], state=state)
        state = AttentionState(part.output[:, :, -1:], part.lse[:, :, -1:])
        parts.append(part)
        start += size
    torch.testing.assert_close(torch.cat([part.output for part in parts], 2), whole.output)
    torch.testing.assert_close(torch.cat([part.lse for part in parts], 2), whole.lse)
    torch.testing.assert_close(whole.lse, logit.logcumsumexp(-1))
    start = state.lse.new_zeros(2, 4, 1)
    both = running_softmax_mean(
        logit, value, is_causal=False, state=AttentionState(torch.ones(2, 4, 1, 3), start)
    )
    expected = torch.cat([start, logit], -1).logsumexp(-1, keepdim=True).expand(-1, -1, tokens)
    torch.testing.assert_close(both.lse, expected)


def test_logits_in_the_thousands_are_exact():
    """Trained uniform models reach them in late layers."""
    logit = torch.tensor([[[0.0, 4000.0, -4000.0, 4000.0]]])
    value = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 1, 4, 1)
    output = running_softmax_mean(logit, value).output.flatten()
    torch.testing.assert_close(output, torch.tensor([1.0, 2.0, 2.0, 3.0]))


def test_memory_is_linear(monkeypatch):
    """No part of the work is wider than a chunk."""
    widths = []
    dense_rows = module.dense_rows

    def watch(scores, value):
        widths.append(scores.shape[-2:].numel())
        return dense_rows(scores, value)

    monkeypatch.setattr(module, "dense_rows", watch)
    running_softmax_mean(torch.randn(1, 1, 1000), torch.randn(1, 1, 1000, 2))
    assert len(widths) == 16
    assert max(widths) == module.CHUNK**2


def test_bf16_and_no_tokens():
    query, key, value = torch.randn(3, 1, 2, 40, 16).bfloat16().unbind(0)
    ours = nonapprox_attention(query, key, value, is_causal=True)
    exact = nonapprox_attention(query.float(), key.float(), value.float(), is_causal=True)
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours.float(), exact, atol=2e-2, rtol=2e-2)
    nothing = nonapprox_attention(query[:, :, :0], key[:, :, :0], value[:, :, :0], is_causal=True)
    assert nothing.shape == (1, 2, 0, 16)


def test_wrong_arguments():
    query = torch.randn(1, 2, 4, 4)
    with pytest.raises(ValueError, match="query: expected as many tokens as key has, 3, got 4"):
        nonapprox_attention(query, query[:, :, :3], query[:, :, :3])
    with pytest.raises(ValueError, match="attn_mask: expected one mask for all queries"):
        nonapprox_attention(query, query, query, attn_mask=torch.ones(4, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="value: expected"):
        running_softmax_mean(torch.randn(1, 2, 4), query[:, :, :3])
    with pytest.raises(ValueError, match="state: expected one row"):
        running_softmax_mean(
            torch.randn(1, 2, 4), query, state=AttentionState(query, query[..., 0])
        )
