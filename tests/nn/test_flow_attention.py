"""Flow-Attention against its official code's vectors, its definition, and its invariants."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from attending.nn.flow_attention import (
    flow_attention,
    flow_attention_with_state,
    unclamped_flow_attention,
)
from attending.nn.linear_attention import linear_attention
from tests.core.problems import assert_close
from tests.nn import reference_flow_attention as reference

GOLDEN = Path(__file__).parents[1] / "golden" / "flow-attention"
CASES = sorted(path.stem for path in GOLDEN.glob("*.npz"))


def load(case: str) -> dict[str, Tensor]:
    with np.load(GOLDEN / f"{case}.npz") as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


@pytest.mark.parametrize("case", CASES)
def test_golden(case: str) -> None:
    data = load(case)
    tensors = (data["q"], data["k"], data["v"])
    is_causal = case.startswith("causal")
    ours = flow_attention(*tensors, is_causal=is_causal)
    torch.testing.assert_close(ours, data["core"], rtol=1e-10, atol=1e-10)
    free = unclamped_flow_attention(*tensors, is_causal=is_causal)
    torch.testing.assert_close(free, data["core_noclamp"], rtol=1e-10, atol=1e-10)
    single = flow_attention(*(t.float() for t in tensors), is_causal=is_causal)
    torch.testing.assert_close(single.double(), data["core"], rtol=2e-5, atol=2e-5)
    merged = ours.transpose(1, 2).flatten(2)
    weight, bias = data["w_out_projection_weight"], data["w_out_projection_bias"]
    torch.testing.assert_close(merged @ weight.T + bias, data["y"], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("bi")])
def test_golden_flows_are_those_of_the_reference(case: str) -> None:
    """So that the reference, which all else is held to, is held to the official code."""
    data = load(case)
    _, flows = reference.bidirectional_map(data["q"][0, 1], data["k"][0, 1])
    for name, flow in flows.items():
        torch.testing.assert_close(flow, data[name][0, 1], rtol=1e-10, atol=1e-10)
    sinks, sources = data["q"].shape[2], data["k"].shape[2]
    assert float(flows["conserved_sink"].sum()) == pytest.approx(sources, rel=1e-4)
    assert float(flows["conserved_source"].sum()) == pytest.approx(sinks, rel=1e-4)


@st.composite
def problems(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float64)):
    dtype = draw(st.sampled_from(dtypes))
    is_causal = draw(st.booleans())
    batch, kv_heads, groups = (
        draw(st.integers(1, 2)),
        draw(st.integers(1, 2)),
        draw(st.integers(1, 2)),
    )
    queries = draw(st.integers(1, 20))
    keys = queries if is_causal else draw(st.one_of(st.just(queries), st.integers(1, 20)))
    dim, value_dim = draw(st.integers(1, 7)), draw(st.integers(1, 7))
    spread = draw(st.sampled_from((0.1, 1.0, 20.0)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    visible = None
    if draw(st.booleans()):
        visible = torch.rand(batch, keys, generator=generator) > 0.4
        if draw(st.booleans()):
            visible[0] = False
    query = spread * normal(batch, kv_heads * groups, queries, dim)
    key = spread * normal(batch, kv_heads, keys, dim)
    value = normal(batch, kv_heads, keys, value_dim)
    return query.to(dtype), key.to(dtype), value.to(dtype), visible, is_causal


OPTIONS = (
    {},
    {"clamp": 5.0},
    {"competition": False},
    {"allocation": False},
    {"competition": False, "allocation": False},
    {"feature": "relu"},
)


@given(problems(), st.sampled_from(OPTIONS))
def test_equals_the_definition(problem: tuple, options: dict) -> None:
    query, key, value, visible, is_causal = problem
    mask = None if visible is None else visible[:, None, None]
    ours = flow_attention(
        query, key, value, attn_mask=mask, is_causal=is_causal, enable_gqa=True, **options
    )
    asking = visible if query.shape[2] == key.shape[2] else None
    call = {"visible": visible, "asking": asking, "is_causal": is_causal}
    exact = reference.flow_attention(query, key, value, **call, **options)
    assert ours.dtype == query.dtype
    assert_close(ours, exact, query.dtype)
    if not options:
        free = unclamped_flow_attention(
            query, key, value, attn_mask=mask, is_causal=is_causal, enable_gqa=True
        )
        assert_close(
            free, reference.flow_attention(query, key, value, **call, clamp=None), query.dtype
        )


@given(problems((torch.float64,)), st.sampled_from((1.0, None)), st.data())
def test_a_sequence_in_parts(problem: tuple, clamp: float | None, data: st.DataObject) -> None:
    query, key, value, visible, _ = problem
    tokens = min(query.shape[2], key.shape[2])
    tensors = [tensor[:, :, :tokens] for tensor in (query, key, value)]
    mask = None if visible is None else visible[:, None, None, :tokens]
    whole_of = unclamped_flow_attention if clamp is None else flow_attention
    whole = whole_of(*tensors, attn_mask=mask, is_causal=True, enable_gqa=True)
    cuts = sorted(data.draw(st.sets(st.integers(0, tokens), max_size=4)) | {0, tokens})
    state, outputs = None, []
    for start, stop in itertools.pairwise(cuts):
        output, state = flow_attention_with_state(
            *(tensor[:, :, start:stop] for tensor in tensors),
            state,
            attn_mask=None if mask is None else mask[..., start:stop],
            enable_gqa=True,
            clamp=clamp,
        )
        outputs.append(output)
    assert_close(torch.cat(outputs, 2), whole, torch.float64)


@given(problems((torch.float64,)))
def test_linear_in_the_values_and_blind_to_the_order(problem: tuple) -> None:
    query, key, value, _, _ = problem
    keys = torch.randperm(key.shape[2])
    queries = torch.randperm(query.shape[2])
    plain = flow_attention(query, key, value, enable_gqa=True)
    shuffled = flow_attention(
        query[:, :, queries], key[:, :, keys], value[:, :, keys], enable_gqa=True
    )
    assert_close(shuffled, plain[:, :, queries], torch.float64)
    assert_close(flow_attention(query, key, -3 * value, enable_gqa=True), -3 * plain, torch.float64)


def test_no_output_depends_on_a_later_token() -> None:
    tensors = [torch.randn(1, 2, 150, 4, dtype=torch.float64) for _ in range(3)]
    before = flow_attention(*tensors, is_causal=True)
    for tensor in tensors:
        tensor[:, :, 100:] = torch.randn(1, 2, 50, 4, dtype=torch.float64)
    after = flow_attention(*tensors, is_causal=True)
    assert torch.equal(after[:, :, :100], before[:, :, :100])
    assert not torch.equal(after[:, :, 100:], before[:, :, 100:])


def test_one_token() -> None:
    query, key, value = (torch.randn(1, 2, 1, 8, dtype=torch.float64) for _ in range(3))
    for is_causal in (True, False):
        output = flow_attention(query, key, value, is_causal=is_causal)
        torch.testing.assert_close(
            output, torch.sigmoid(torch.ones(())) * value, rtol=1e-4, atol=1e-5
        )


def test_without_competition_and_allocation_it_is_linear_attention() -> None:
    query, key, value = (torch.randn(1, 2, 90, 8, dtype=torch.float64) for _ in range(3))
    for is_causal in (True, False):
        plain = linear_attention(query.sigmoid(), key.sigmoid(), value, is_causal=is_causal)
        ours = flow_attention(
            query, key, value, is_causal=is_causal, competition=False, allocation=False
        )
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)


def test_the_clamp_takes_the_competition_away() -> None:
    """The trap of the docstring: more queries than keys, and all keys weigh the same."""
    query, key, value = (
        torch.randn(1, 1, 60, 16),
        torch.randn(1, 1, 20, 16),
        torch.randn(1, 1, 20, 16),
    )
    even = flow_attention(query, key, value, competition=False)
    torch.testing.assert_close(flow_attention(query, key, value), even)
    assert (unclamped_flow_attention(query, key, value) - even).abs().max() > 1e-2
    _, flows = reference.bidirectional_map(query[0, 0, :20], key[0, 0])
    assert 0.25 < (flows["conserved_source"] > 1).double().mean() < 0.75


@pytest.mark.parametrize("is_causal", [True, False])
def test_gradients(is_causal: bool) -> None:
    query = torch.randn(2, 4, 11, 3, dtype=torch.float64, requires_grad=True)
    key, value = (torch.randn(2, 2, 11, 3, dtype=torch.float64).requires_grad_() for _ in range(2))
    visible = torch.ones(2, 11, dtype=torch.bool)
    visible[0, :3] = False
    visible[1, 6:] = False
    inputs = (query, key, value)
    for clamp, function in ((1.0, flow_attention), (None, unclamped_flow_attention)):
        ours = function(
            *inputs, attn_mask=visible[:, None, None], is_causal=is_causal, enable_gqa=True
        )
        exact = reference.flow_attention(
            *inputs, visible, visible, is_causal=is_causal, clamp=clamp
        )
        torch.testing.assert_close(
            torch.autograd.grad(ours.sin().sum(), inputs),
            torch.autograd.grad(exact.sin().sum(), inputs),
            rtol=1e-9,
            atol=1e-9,
        )


@pytest.mark.parametrize("is_causal", [True, False])
def test_finite_where_sigmoids_are_saturated_or_nothing_is_seen(is_causal: bool) -> None:
    for size in (-300.0, 300.0):
        tensors = [torch.full((2, 1, 70, 4), size, requires_grad=True) for _ in range(3)]
        mask = torch.ones(2, 1, 1, 70, dtype=torch.bool)
        mask[0] = False
        output = flow_attention(*tensors, attn_mask=mask, is_causal=is_causal)
        assert (output[0] == 0).all()
        assert output.isfinite().all()
        assert all(g.isfinite().all() for g in torch.autograd.grad(output.sum(), tensors))


@pytest.mark.parametrize("is_causal", [True, False])
def test_bfloat16_and_autocast(is_causal: bool) -> None:
    tensors = [torch.randn(1, 2, 300, 8).bfloat16() for _ in range(3)]
    exact = flow_attention(*(t.double() for t in tensors), is_causal=is_causal)
    ours = flow_attention(*tensors, is_causal=is_causal)
    assert ours.dtype == torch.bfloat16
    assert_close(ours, exact, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        single = flow_attention(*(t.float() for t in tensors), is_causal=is_causal)
    assert_close(single, exact, torch.float32)


def test_masks_of_queries() -> None:
    query, key, value = torch.randn(1, 2, 6, 4), torch.randn(1, 2, 6, 4), torch.randn(1, 2, 6, 4)
    visible = torch.tensor([True] * 4 + [False] * 2)[None, None, None]
    both = flow_attention(query, key, value, attn_mask=visible)
    cut = flow_attention(query[:, :, :4], key[:, :, :4], value[:, :, :4])
    torch.testing.assert_close(both[:, :, :4], cut)
    everyone = torch.ones_like(visible)
    cross = flow_attention(query, key, value, attn_mask=visible, query_mask=everyone)
    torch.testing.assert_close(cross, flow_attention(query, key[:, :, :4], value[:, :, :4]))


def test_arguments_that_do_not_fit_are_named() -> None:
    query = torch.randn(1, 4, 3, 8)
    short = query[:, :, :2]
    everyone = torch.ones(1, 1, 1, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"clamp: .*unclamped_flow_attention"):
        flow_attention(query, query, query, clamp=float("inf"))
    with pytest.raises(ValueError, match="feature: expected one of"):
        flow_attention(query, query, query, feature="elu")
    with pytest.raises(ValueError, match="eps: expected"):
        flow_attention(query, query, query, eps=0.0)
    with pytest.raises(ValueError, match="is_causal: expected as many queries as keys"):
        flow_attention(query, short, short, is_causal=True)
    with pytest.raises(ValueError, match="query_mask: expected None"):
        flow_attention(query, query, query, query_mask=everyone, is_causal=True)
    with pytest.raises(ValueError, match="attn_mask: expected one mask for all queries"):
        flow_attention(query, query, query, attn_mask=torch.ones(3, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="key: expected as many tokens"):
        flow_attention_with_state(query, short, short)
    _, state = flow_attention_with_state(query[..., :5], query[..., :5], query[..., :5])
    with pytest.raises(ValueError, match=r"state: expected .*\[1, 4, 8, 8\]"):
        flow_attention_with_state(query, query, query, state)
