"""Dynamic mask attention: golden vectors, the definition by loops, gradients, no look ahead."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from attending.nn import _lifetime_attention
from attending.nn.dynamic_mask import dynamic_mask, dynamic_mask_attention, value_scores
from tests.nn import reference_dynamic_mask as reference

GOLDEN = Path(__file__).parents[1] / "golden" / "dynamic-mask-attention"


def load(case: str) -> dict[str, Tensor]:
    with np.load(GOLDEN / f"{case}.npz") as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


def close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def tensors(
    batch: int, heads: int, kv_heads: int, queries: int, keys: int, seed: int = 0, dim: int = 4
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Query, key, value and scores with ties, in float64."""
    torch.manual_seed(seed)
    query = torch.randn(batch, heads, queries, dim, dtype=torch.float64)
    key, value = torch.randn(2, batch, kv_heads, keys, dim, dtype=torch.float64).unbind(0)
    delta = torch.randint(0, 8, (batch, kv_heads, keys)).double() / 4
    return query, key, value, delta


def past(queries: int, keys: int, offset: int = 0) -> Tensor:
    return torch.ones(1, 1, queries, keys, dtype=torch.bool).tril(offset)


@pytest.mark.parametrize("case", ["dma_case1", "dma_case2"])
def test_golden(case: str) -> None:
    data = load(case)
    names = ("q", "k", "v", "w_dt", "a")
    leaves = [data[name].clone().requires_grad_() for name in names]
    query, key, value, weight, gate = leaves
    delta = value_scores(value, weight, gate)
    window, offset = int(data["keep_window"]), key.shape[2] - query.shape[2]
    output = dynamic_mask_attention(
        query, key, value, delta, window, is_causal=True, query_offset=offset
    )
    close(delta, data["scores_delta"])
    assert torch.equal(dynamic_mask(delta, window, query_offset=offset), data["keep_mask"])
    close(output, data["out"])
    close(output, data["out_official"], 1e-6)
    grads = torch.autograd.grad(output, leaves, data["cotangent"])
    for name, grad in zip(names, grads, strict=True):
        close(grad, data[f"grad_{name}"])


@st.composite
def shapes(draw: st.DrawFn) -> dict[str, int]:
    kv_heads = draw(st.integers(1, 2))
    queries = draw(st.integers(1, 20))
    return {
        "batch": draw(st.integers(1, 2)),
        "heads": kv_heads * draw(st.integers(1, 3)),
        "kv_heads": kv_heads,
        "queries": queries,
        "keys": queries + draw(st.sampled_from([0, 0, 1, 9])),
        "seed": draw(st.integers(0, 99)),
    }


@given(shapes(), st.integers(1, 24), st.integers(0, 5), st.integers(1, 7))
@settings(max_examples=60, deadline=None)
def test_the_definition_with_padding_and_a_past(
    shape: dict[str, int], window: int, padded: int, rows: int
) -> None:
    query, key, value, delta = tensors(**shape)
    queries, keys = shape["queries"], shape["keys"]
    offset = keys - queries
    seen = torch.ones(shape["batch"], 1, 1, keys, dtype=torch.bool)
    seen[-1, ..., :padded] = False
    patched = pytest.MonkeyPatch()  # blocks so small that these sequences have many
    patched.setattr(_lifetime_attention, "ROWS", rows)
    patched.setattr(_lifetime_attention, "FEWEST", 1)
    patched.setattr(_lifetime_attention, "BLOCKS", 2)
    patched.setattr(_lifetime_attention, "CACHE_BYTES", 500)
    with patched.context():
        output = dynamic_mask_attention(
            query, key, value, delta, window, attn_mask=seen, is_causal=True, query_offset=offset
        )
    patched.undo()
    mask = reference.keep_mask(delta, past(queries, keys, offset) & seen, window)
    close(output, reference.attention(query, key, value, delta, mask), 1e-11)


@given(shapes(), st.integers(1, 24))
@settings(max_examples=25, deadline=None)
def test_without_a_causal_mask_all_queries_choose_the_same(
    shape: dict[str, int], window: int
) -> None:
    query, key, value, delta = tensors(**shape)
    output = dynamic_mask_attention(query, key, value, delta, window)
    seen = torch.ones(1, 1, shape["queries"], shape["keys"], dtype=torch.bool)
    mask = reference.keep_mask(delta, seen, window)
    assert torch.equal(dynamic_mask(delta, window, is_causal=False), mask[:, :, :1])
    close(output, reference.attention(query, key, value, delta, mask), 1e-11)


def test_masks_are_recognised_and_others_read_row_by_row() -> None:
    query, key, value, delta = tensors(2, 4, 2, 12, 12)
    causal = dynamic_mask_attention(query, key, value, delta, 3, is_causal=True)
    close(dynamic_mask_attention(query, key, value, delta, 3, attn_mask=past(12, 12)), causal)
    floats = torch.zeros(1, 1, 12, 12).masked_fill(~past(12, 12), torch.finfo(torch.float32).min)
    close(dynamic_mask_attention(query, key, value, delta, 3, attn_mask=floats), causal)
    packed = past(12, 12).clone()
    packed[..., 7:, :7] = False  # two documents
    per_head = torch.rand(2, 4, 12, 12, generator=torch.Generator().manual_seed(1)) < 0.4
    per_head[0, 0, 2] = False
    for mask in (packed, per_head):
        leaves = [one.clone().requires_grad_() for one in (query, key, value, delta)]
        output = dynamic_mask_attention(*leaves, 3, attn_mask=mask)
        groups = 2 if mask is per_head else 1
        wide = [one.repeat_interleave(groups, 1) for one in leaves[1:]]
        chosen = reference.keep_mask(wide[2].detach(), mask, 3)
        expected = reference.attention(leaves[0], *wide, chosen)
        close(output, expected, 1e-11)
        for ours, theirs in zip(
            torch.autograd.grad(output.square().sum(), leaves),
            torch.autograd.grad(expected.square().sum(), leaves),
            strict=True,
        ):
            close(ours, theirs, 1e-10)
    assert not bool(output[0, 0, 2].any())


@pytest.mark.parametrize("heads", [(2, 2), (6, 2)])
@pytest.mark.parametrize("window", [1, 5, 200])
def test_gradients_are_those_of_attention_to_the_kept_keys(
    heads: tuple[int, int], window: int
) -> None:
    found = tensors(2, *heads, 70, 75, seed=3)
    found[3][1, :, :8] = -math.inf
    leaves = [one.clone().requires_grad_() for one in found]
    output = dynamic_mask_attention(*leaves, window, is_causal=True, query_offset=5)
    mask = dynamic_mask(leaves[3], window, query_offset=5)
    finite = leaves[3].masked_fill(leaves[3] == -math.inf, 0.0)
    expected = reference.attention(*leaves[:3], finite, mask)
    close(output, expected, 1e-11)
    cotangent = torch.randn_like(output)
    ours = torch.autograd.grad(output, leaves, cotangent)
    theirs = torch.autograd.grad(expected, leaves, cotangent)
    for one, other in zip(ours, theirs, strict=True):
        close(one, other, 1e-10)


@pytest.mark.parametrize("window", [3, 64])
def test_no_row_changes_with_a_later_token(window: int) -> None:
    """The leak of the official path: a choice over the whole sequence."""
    query, key, value, delta = tensors(1, 2, 1, 64, 64)
    before = dynamic_mask_attention(query, key, value, delta, window, is_causal=True)
    for token in (63, 20):
        delta[..., token] = 50.0
        value[:, :, token] += 3.0
        after = dynamic_mask_attention(query, key, value, delta, window, is_causal=True)
        assert torch.equal(after[:, :, :token], before[:, :, :token])
        assert not torch.allclose(after[:, :, token:], before[:, :, token:])


def test_a_window_of_everything_is_dense_attention_with_a_bias() -> None:
    query, key, value, delta = tensors(1, 4, 2, 30, 30)
    same = torch.full_like(delta, 1.7)
    plain = scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    close(dynamic_mask_attention(query, key, value, same, 30, is_causal=True), plain, 1e-12)
    bias = delta.repeat_interleave(2, 1)[:, :, None].masked_fill(~past(30, 30), -math.inf)
    dense = scaled_dot_product_attention(query, key, value, attn_mask=bias, enable_gqa=True)
    close(dynamic_mask_attention(query, key, value, delta, 99, is_causal=True), dense, 1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_and_autocast(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    query = torch.randn(1, 4, 90, 8).to(dtype)
    key, value = torch.randn(2, 1, 2, 90, 8).to(dtype).unbind(0)
    weight, gate = torch.randn(2, 16).to(dtype), torch.tensor([0.25, -1.0]).to(dtype)
    delta = value_scores(value, weight, gate)
    assert delta.dtype == torch.float32
    assert bool(delta.isfinite().all())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(value_scores(value, weight, gate), delta)
        output = dynamic_mask_attention(query, key, value, delta, 7, is_causal=True)
    exact = [one.double() for one in (query, key, value, delta)]
    expected = dynamic_mask_attention(*exact, 7, is_causal=True)
    assert output.dtype == dtype
    tolerance = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}[dtype]
    close(output.double(), expected, tolerance)


def test_the_exponent_is_held() -> None:
    value = torch.full((1, 1, 2, 1), 50.0, requires_grad=True)
    delta = value_scores(value, torch.ones(1, 1), torch.tensor([2.0]))
    assert delta.max().item() == pytest.approx(math.exp(10))
    assert float(torch.autograd.grad(delta.sum(), value)[0].abs().max()) == 0.0
    raw = value_scores(value, torch.ones(1, 1), torch.tensor([2.0]), score="linear")
    assert raw.max().item() == pytest.approx(100.0)


def test_scores_are_the_definition() -> None:
    torch.manual_seed(0)
    value, weight = torch.randn(2, 3, 5, 4).double(), torch.randn(3, 12).double()
    gate = torch.tensor([0.5, -1.0, 0.0]).double()
    close(value_scores(value, weight, gate), reference.scores(value, weight, gate), 1e-12)


def test_nothing_is_as_large_as_the_map() -> None:
    """What the backward pass keeps: the tensors that came in."""
    query, key, value, delta = (one.float() for one in tensors(1, 2, 1, 2048, 2048))
    saved: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = dynamic_mask_attention(
            query.requires_grad_(), key, value, delta.requires_grad_(), 100, is_causal=True
        )
    output.sum().backward()
    assert max(saved) <= query.numel()


def test_empty_inputs() -> None:
    for batch, queries, keys in ((0, 3, 3), (1, 0, 3), (1, 0, 0)):
        found = tensors(batch, 2, 1, queries, keys)
        for is_causal in (True, False):
            output = dynamic_mask_attention(*found, 1, is_causal=is_causal)
            assert output.shape == (batch, 2, queries, 4)


def test_bad_arguments_are_named() -> None:
    query, key, value, delta = tensors(1, 4, 2, 6, 6)
    call = dynamic_mask_attention
    with pytest.raises(ValueError, match="delta: expected one score per key"):
        call(query, key, value, delta[:, :1], 3)
    with pytest.raises(ValueError, match="query_offset: expected 0"):
        call(query, key, value, delta, 3, is_causal=True, query_offset=1)
    with pytest.raises(ValueError, match="query_offset: expected 0 to keys - queries = -2"):
        call(query, key[:, :, :4], value[:, :, :4], delta[:, :, :4], 3, is_causal=True)
    with pytest.raises(ValueError, match="attn_mask: expected a mask that only hides"):
        call(query, key, value, delta, 3, attn_mask=torch.ones(1, 1, 6, 6))
    with pytest.raises(ValueError, match="window: expected"):
        call(query, key, value, delta, 0)
    with pytest.raises(ValueError, match="query_offset: expected 0 to 6"):
        dynamic_mask(delta, 2, query_offset=7)
    with pytest.raises(ValueError, match="weight: expected"):
        value_scores(value, torch.ones(2, 4), torch.ones(2))
    with pytest.raises(ValueError, match="gate: expected"):
        value_scores(value, torch.ones(2, 8), torch.ones(1))
    with pytest.raises(ValueError, match="score: expected"):
        value_scores(value, torch.ones(2, 8), torch.ones(2), score="relu")  # type: ignore[arg-type]
