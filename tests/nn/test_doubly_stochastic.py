"""Attention with other normalisers: against the map, masks, precision, real layers, refusals."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

from attending.nn import sinkhorn_attention as module
from attending.nn.birkhoff import birkhoff_projection, orthostochastic
from attending.nn.doubly_stochastic import (
    DoublyStochasticAttention,
    doubly_stochastic_attention,
    norm_softmax_attention,
)
from attending.nn.normalizers import norm_softmax, sinkhorn
from attending.nn.quantum_circuit import CircuitMap
from attending.nn.sinkhorn_attention import sinkhorn_attention
from tests.nn import reference_doubly_stochastic as reference

seeds = st.integers(0, 2**31 - 1)


@pytest.fixture(params=["dense", "fused"])
def way(request, monkeypatch):
    """Sinkhorn attention with the map, as for small inputs, and without, as for large ones."""
    set_way(monkeypatch, request.param)
    return request.param


def set_way(monkeypatch, way):
    monkeypatch.setattr(module, "DENSE_BYTES", 0 if way == "fused" else 2**62)


def inputs(seed, queries, keys, heads=2, kv_heads=2, dim=4, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)

    def make(heads, tokens):
        return torch.randn(2, heads, tokens, dim, dtype=torch.float64, generator=generator)

    tensors = make(heads, queries) * 2, make(kv_heads, keys), make(kv_heads, keys)
    return [tensor.to(dtype).requires_grad_() for tensor in tensors]


def plain(query, key, value, half_steps=21, visible=None, bias=0.0):
    """Each map by the plain form of Sinkhorn."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.mT * reference.default_scale(query) + bias
    flat = scores.flatten(0, 1)
    hidden = [None] * len(flat)
    if visible is not None:
        hidden = visible.expand(scores.shape).flatten(0, 1)
    maps = [
        reference.sinkhorn(one, half_steps, seen) for one, seen in zip(flat, hidden, strict=True)
    ]
    return torch.stack(maps).view(scores.shape) @ value


def assert_same(ours, expected, leaves, tolerance=1e-9):
    torch.testing.assert_close(ours, expected, atol=tolerance, rtol=tolerance)
    weights = torch.randn(ours.shape, dtype=ours.dtype, generator=torch.Generator().manual_seed(0))
    grads = [torch.autograd.grad((weights * out).sum(), leaves) for out in (ours, expected)]
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, atol=tolerance, rtol=tolerance)


@settings(max_examples=20, deadline=None)
@given(
    seeds, st.integers(1, 9), st.integers(1, 9), st.integers(1, 6), st.sampled_from([1, 2]),
    st.sampled_from(["dense", "fused"]),
)  # fmt: skip
def test_sinkhorn_attention_is_the_plain_form(seed, queries, keys, half_steps, kv_heads, way):
    with pytest.MonkeyPatch.context() as monkeypatch:
        set_way(monkeypatch, way)
        query, key, value = inputs(seed, queries, keys, kv_heads=kv_heads)
        ours = sinkhorn_attention(query, key, value, iterations=half_steps, enable_gqa=True)
        expected = plain(query, key, value, half_steps)
        assert_same(ours, expected, (query, key, value))
        with torch.no_grad():
            quick = sinkhorn_attention(query, key, value, iterations=half_steps, enable_gqa=True)
        torch.testing.assert_close(quick, expected.detach(), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("half_steps", [1, 2, 5, 6])
def test_the_truncated_gradient_is_that_of_the_map(monkeypatch, half_steps):
    set_way(monkeypatch, "fused")
    query, key, value = inputs(0, 6, 7)
    options = {"iterations": half_steps, "gradient": "truncated"}
    ours = sinkhorn_attention(query, key, value, **options)
    scores = query @ key.mT * reference.default_scale(query)
    assert_same(ours, sinkhorn(scores, **options) @ value, (query, key, value))


def padding(side, tokens=7, length=4):
    seen = torch.zeros(2, tokens, dtype=torch.bool)
    seen[0, :length] = True
    seen[1] = True
    return seen.flip(1) if side == "left" else seen


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("half_steps", [4, 5])
@pytest.mark.parametrize("whole", [False, True])
def test_padding(way, side, half_steps, whole):
    query, key, value = inputs(1, 7, 7)
    seen = padding(side)
    mask = seen[:, None, None, :].expand(2, 1, 7 if whole else 1, 7)
    ours = sinkhorn_attention(query, key, value, iterations=half_steps, attn_mask=mask)
    visible = seen[:, None, None, :] & seen[:, None, :, None]
    expected = plain(query, key, value, half_steps, visible)
    assert_same(ours, expected, (query, key, value))
    assert bool((ours.mT[0, :, :, ~seen[0]] == 0).all())


def test_patterns_and_biases(way):
    query, key, value = inputs(2, 6, 6)
    window = torch.ones(6, 6, dtype=torch.bool).tril(2).triu(-2)
    ours = sinkhorn_attention(query, key, value, attn_mask=window, iterations=5)
    assert_same(ours, plain(query, key, value, 5, window), (query, key, value))
    bias = torch.randn(2, 6, 6, dtype=torch.float64, requires_grad=True)
    ours = sinkhorn_attention(query, key, value, attn_mask=bias, iterations=5)
    expected = plain(query, key, value, 5, bias=bias)
    assert_same(ours, expected, (query, key, value, bias))
    both = bias.masked_fill(~window, -torch.inf)
    ours = sinkhorn_attention(query, key, value, attn_mask=both, iterations=4, temperature=2.0)
    half = (query / 2, key, value, 4, window, bias / 2)
    assert_same(ours, plain(*half), (query, key, value, bias))


def test_cross_attention_with_padding(way):
    query, key, value = inputs(3, 5, 7)
    seen = padding("right")
    ours = sinkhorn_attention(query, key, value, attn_mask=seen[:, None, None], iterations=5)
    visible = seen[:, None, None].expand(2, 1, 5, 7)
    assert_same(ours, plain(query, key, value, 5, visible), (query, key, value))
    # Of as many queries as keys one has to say that they are other tokens.
    query, key, value = inputs(4, 7, 7)
    asked = torch.ones(1, 7, dtype=torch.bool)
    asked[0, 2] = False
    mask = {"attn_mask": seen[:, None, None], "query_mask": asked}
    ours = sinkhorn_attention(query, key, value, iterations=5, **mask)
    visible = seen[:, None, None] & asked[:, None, :, None]
    expected = plain(query, key, value, 5, visible)
    assert_same(ours, expected, (query, key, value))
    assert bool((ours[:, :, 2] == 0).all())


def test_nothing_visible_and_empty_inputs(way):
    query, key, value = inputs(5, 4, 4)
    mask = torch.ones(2, 1, 1, 4, dtype=torch.bool)
    mask[0] = False
    for half_steps in (3, 4):
        ours = sinkhorn_attention(query, key, value, attn_mask=mask, iterations=half_steps)
        ours.sum().backward()
        assert bool((ours[0] == 0).all())
        assert bool(query.grad.isfinite().all())
    empty = torch.zeros(1, 2, 0, 4)
    assert sinkhorn_attention(empty, empty, empty).shape == (1, 2, 0, 4)


def test_one_half_step_is_sdpa_and_many_keep_the_mean(way):
    query, key, value = inputs(6, 8, 8)
    ours = sinkhorn_attention(query, key, value, iterations=1)
    torch.testing.assert_close(ours, scaled_dot_product_attention(query, key, value))
    ours = sinkhorn_attention(query, key, value, iterations=301)
    torch.testing.assert_close(ours.mean(2), value.mean(2), atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_precision(way, dtype):
    query, key, value = inputs(7, 9, 9, dtype=dtype)
    ours = sinkhorn_attention(query, key, value)
    assert ours.dtype == dtype
    expected = plain(query.double(), key.double(), value.double()).to(dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(ours, expected, atol=tolerance, rtol=tolerance)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(sinkhorn_attention(query, key, value), ours)
    ours.float().sum().backward()
    assert query.grad.dtype == dtype


class LargestTensor(TorchDispatchMode):
    """How many numbers the largest tensor has that an operation makes."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for one in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(one, torch.Tensor):
                self.numel = max(self.numel, one.numel())
        return result


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("gradient", ["full", "truncated"])
def test_nothing_is_as_large_as_a_map(monkeypatch, gradient, padded):
    set_way(monkeypatch, "fused")
    query, key, value = inputs(13, 300, 300, heads=1, kv_heads=1, dtype=torch.float32)
    mask = torch.ones(2, 1, 1, 300, dtype=torch.bool)
    mask[1, ..., 200:] = False
    with LargestTensor() as largest:
        ours = sinkhorn_attention(
            query, key, value, iterations=4, gradient=gradient, attn_mask=mask if padded else None
        )
        ours.square().sum().backward()
    assert largest.numel <= 2 * 300 * 16  # query and key with their bias, padded to a multiple of 8


NORMALIZERS = {
    "orthostochastic": orthostochastic,
    "birkhoff": birkhoff_projection,
    "circuit": CircuitMap(4, 1, 2, dtype=torch.float64),
    "softmax": partial(norm_softmax, cap=0.7),
}


@pytest.mark.parametrize("name", sorted(NORMALIZERS))
def test_other_normalizers(name):
    function = NORMALIZERS[name]
    query, key, value = inputs(8, 4, 4, heads=4)
    named = name if name in ("orthostochastic", "birkhoff") else function
    ours = doubly_stochastic_attention(query, key, value, normalizer=named, enable_gqa=True)
    groups = [tensor.repeat_interleave(2, 1) for tensor in (key, value)]
    scores = query @ groups[0].mT * reference.default_scale(query)
    assert_same(ours, function(scores) @ groups[1], (query, key, value))
    if name != "softmax":
        torch.testing.assert_close(ours.mean(2), groups[1].mean(2), atol=1e-7, rtol=1e-7)
    half = [tensor.detach().bfloat16() for tensor in (query, key, value)]
    with torch.autocast("cpu", torch.bfloat16):
        found = doubly_stochastic_attention(*half, normalizer=named, enable_gqa=True)
    assert found.dtype == torch.bfloat16
    wide = [tensor.float() for tensor in half]
    expected = doubly_stochastic_attention(*wide, normalizer=named, enable_gqa=True)
    torch.testing.assert_close(found.float(), expected, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("name", ["orthostochastic", "birkhoff"])
def test_padding_of_the_others(name):
    query, key, value = inputs(9, 7, 7, dim=8)
    seen = padding("left")
    mask = seen[:, None, None, :]
    ours = doubly_stochastic_attention(query, key, value, normalizer=name, attn_mask=mask)
    cut = [tensor[:1, :, seen[0]] for tensor in (query, key, value)]
    alone = doubly_stochastic_attention(*cut, normalizer=name)
    torch.testing.assert_close(ours[:1, :, seen[0]], alone, atol=1e-8, rtol=1e-8)
    assert bool((ours[0, :, ~seen[0]] == 0).all())
    bias = torch.randn(7, 7, dtype=torch.float64)
    ours = doubly_stochastic_attention(query, key, value, normalizer=name, attn_mask=bias)
    scores = query @ key.mT * reference.default_scale(query) + bias
    torch.testing.assert_close(ours, NORMALIZERS[name](scores) @ value)


def norm_masks():
    seen = padding("left")[:, None, None]
    rows = torch.ones(7, 7, dtype=torch.bool).tril(2)
    rows[3] = False
    return {"none": None, "keys": seen, "rows": rows, "causal": "causal"}


@pytest.mark.parametrize("statistic", ["variance", "std"])
@pytest.mark.parametrize("kind", ["none", "keys", "rows", "causal"])
def test_norm_softmax_attention(kind, statistic):
    query, key, value = inputs(10, 7, 7, heads=4)
    mask = norm_masks()[kind]
    options = {"statistic": statistic, "enable_gqa": True, "scale": 0.4}
    if kind == "causal":
        ours = norm_softmax_attention(query, key, value, is_causal=True, **options)
        visible = torch.ones(7, 7, dtype=torch.bool).tril()
    else:
        ours = norm_softmax_attention(query, key, value, attn_mask=mask, **options)
        visible = torch.ones(7, 7, dtype=torch.bool) if mask is None else mask
    groups = [tensor.repeat_interleave(2, 1) for tensor in (key, value)]
    scores = query @ groups[0].mT
    maps = norm_softmax(scores, visible.expand(2, 1, 7, 7), cap=2.5, statistic=statistic)
    assert_same(ours, maps @ groups[1], (query, key, value))
    half = [tensor.detach().bfloat16() for tensor in (query, key, value)]
    found = norm_softmax_attention(*half, is_causal=kind == "causal", **options)
    assert found.dtype == torch.bfloat16
    assert bool(found.isfinite().all())


def test_norm_softmax_of_equal_keys_is_even():
    query, key, value = inputs(11, 5, 5)
    same = key[:, :, :1].expand(-1, -1, 5, -1)
    for causal in (False, True):
        ours = norm_softmax_attention(query, same, value, is_causal=causal)
        ours.sum().backward()
        torch.testing.assert_close(ours[:, :, -1], value.mean(2), atol=1e-6, rtol=1e-6)
    assert bool(query.grad.isfinite().all())


@pytest.mark.parametrize("normalizer", ["sinkhorn", "orthostochastic", "circuit"])
def test_the_layer_learns(normalizer):
    torch.manual_seed(0)
    circuit = CircuitMap(4, 1, 2, mode="trainable")
    layer = DoublyStochasticAttention(8, 2, circuit if normalizer == "circuit" else normalizer)
    hidden, target = torch.randn(2, 16, 4, 8).unbind(0)
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = (layer(hidden) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
    assert ("normalizer.theta" in layer.state_dict()) == (normalizer == "circuit")
    if normalizer != "circuit":
        mask = padding("right", 4, 2)[:, None, None, :]
        padded = layer(hidden[:2], mask)
        torch.testing.assert_close(padded[:1, :2], layer(hidden[:1, :2]), atol=1e-5, rtol=1e-4)


def test_wrong_arguments():
    query, key, value = inputs(12, 4, 4)
    attend = partial(doubly_stochastic_attention, query, key, value)
    causal = torch.ones(4, 4, dtype=torch.bool).tril()
    for match, call in {
        "is_causal: expected False: .*only the identity": lambda: attend(is_causal=True),
        "is_causal: expected False": lambda: attend(is_causal=True, normalizer="birkhoff"),
        "attn_mask: expected no causal mask": lambda: attend(attn_mask=causal),
        "attn_mask: the QR map can leave out": lambda: attend(
            attn_mask=causal, normalizer="orthostochastic"
        ),
        "attn_mask: expected none that hides": lambda: attend(
            attn_mask=causal, normalizer=CircuitMap(4, 1, 1)
        ),
        "normalizer: expected one of": lambda: attend(normalizer="softermax"),
        "query_mask: expected booleans": lambda: attend(query_mask=torch.ones(2, 4)),
        "iterations: expected": lambda: sinkhorn_attention(query, key, value, iterations=1.5),
        "key: expected 2 heads": lambda: sinkhorn_attention(query, key[:, :1], value[:, :1]),
        "scale: expected a positive": lambda: norm_softmax_attention(query, key, value, scale=-1.0),
        "attn_mask: expected a mask that only hides": lambda: norm_softmax_attention(
            query, key, value, attn_mask=causal * 0.3
        ),
        "num_heads: expected a divisor": lambda: DoublyStochasticAttention(8, 3),
        "normalizer: expected": lambda: DoublyStochasticAttention(8, 2, "sinkhorn2"),
    }.items():
        with pytest.raises(ValueError, match=match):
            call()
