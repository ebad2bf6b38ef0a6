"""Differential attention, the function: its definition, its invariants, what it refuses."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

from attending.nn.differential_attention import (
    differential_attention,
    differential_maps,
    differential_outputs,
)
from attending.nn.head_maps import DifferentialHeads, grouped_head_map
from tests.core.problems import assert_close
from tests.nn import reference_differential_attention as reference

DTYPES = (torch.float64, torch.float32, torch.bfloat16)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@st.composite
def problems(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = (torch.float64,)):
    """Query, key, value, ratio, and the mask: a flag, or a boolean mask with empty rows."""
    dtype = draw(st.sampled_from(dtypes))
    batch, pairs, groups, ratio = (draw(st.integers(1, high)) for high in (2, 2, 2, 5))
    queries = draw(st.integers(1, 20))
    is_causal = draw(st.booleans())
    keys = queries if is_causal else draw(st.integers(1, 20))
    dim, value_dim = draw(st.integers(1, 9)), draw(st.integers(1, 18))
    seed = draw(st.integers(0, 2**31))
    noise = pairs * groups
    query = draw(st.sampled_from((0.1, 1.0, 20.0))) * normal(
        batch, noise * (ratio + 1), queries, dim, seed=seed
    )
    key = normal(batch, 2 * pairs, keys, dim, seed=seed + 1)
    value = normal(batch, pairs, keys, value_dim, seed=seed + 2)
    mask = None
    if not is_causal and draw(st.booleans()):
        mask = normal(batch, queries, keys, seed=seed + 3) > draw(st.sampled_from((-0.5, 1.0)))
        mask[0, 0] = False
    return query.to(dtype), key.to(dtype), value.to(dtype), ratio, mask, is_causal


@given(problems(DTYPES), st.sampled_from(("number", "head", "token")))
def test_equals_the_definition(problem: tuple, form: str) -> None:
    query, key, value, ratio, mask, is_causal = problem
    batch, heads, queries, _ = query.shape
    signal = heads // (ratio + 1) * ratio
    shape = {"number": (), "head": (signal, 1), "token": (batch, signal, queries)}[form]
    weight = normal(*shape)
    ours = differential_attention(
        query,
        key,
        value,
        float(weight) if form == "number" else weight,
        ratio=ratio,
        attn_mask=None if mask is None else mask[:, None],
        is_causal=is_causal,
        enable_gqa=True,
    )
    visible = torch.ones(queries, key.shape[2], dtype=torch.bool).tril() if is_causal else None
    visible = visible.expand(batch, -1, -1) if visible is not None else mask
    exact = reference.differential_attention(query, key, value, weight, ratio, visible)
    assert ours.dtype == query.dtype
    if query.dtype == torch.bfloat16:  # the difference of two rounded outputs
        assert float((ours.double() - exact).abs().max()) < 0.06 * (1 + float(weight.abs().max()))
    else:
        assert_close(ours, exact, query.dtype)


@given(problems())
def test_maps_and_the_sum_of_their_rows(problem: tuple) -> None:
    query, key, value, ratio, mask, is_causal = problem
    call = {"ratio": ratio, "is_causal": is_causal, "enable_gqa": True}
    call["attn_mask"] = None if mask is None else mask[:, None]
    signal, noise = differential_maps(query, key, **call)
    heads = DifferentialHeads(signal.shape[1], noise.shape[1], value.shape[1])
    assert (heads.num_query, heads.ratio) == (query.shape[1], ratio)
    difference = signal - 0.3 * noise[:, list(heads.noise_of_signal)]
    ours = differential_attention(query, key, value, 0.3, **call)
    whole = difference @ value[:, list(heads.pair_of_signal)]
    torch.testing.assert_close(ours, whole, rtol=1e-10, atol=1e-10)
    sums = difference.sum(-1)
    empty = signal.sum(-1) == 0
    torch.testing.assert_close(sums[~empty], torch.full_like(sums[~empty], 0.7))
    assert (ours[empty] == 0).all()


@given(problems())
@settings(max_examples=30)
def test_without_noise_it_is_softmax_attention(problem: tuple) -> None:
    query, key, value, ratio, _, is_causal = problem
    heads = DifferentialHeads(
        query.shape[1] // (ratio + 1) * ratio, query.shape[1] // (ratio + 1), value.shape[1]
    )
    ours = differential_attention(
        query, key, value, 0.0, ratio=ratio, is_causal=is_causal, enable_gqa=True
    )
    plain = scaled_dot_product_attention(
        query[:, list(heads.signal)], key[:, 0::2], value, is_causal=is_causal, enable_gqa=True
    )
    torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-9)


def test_equal_maps_leave_a_share_of_the_attention() -> None:
    one, other, value = normal(1, 2, 7, 4), normal(1, 2, 7, 4, seed=1), normal(1, 2, 7, 8, seed=2)
    query, key = one.repeat_interleave(2, 1), other.repeat_interleave(2, 1)
    ours = differential_attention(query, key, value, 0.8, is_causal=True)
    plain = scaled_dot_product_attention(one, other, value, is_causal=True)
    torch.testing.assert_close(ours, 0.2 * plain)


def test_permuting_the_groups_permutes_the_heads() -> None:
    query, key, value = normal(1, 8, 6, 4), normal(1, 2, 6, 4, seed=1), normal(1, 1, 6, 8, seed=2)
    before = differential_attention(query, key, value, 0.4, ratio=3, enable_gqa=True)
    turned = query.unflatten(1, (2, 4)).flip(1).flatten(1, 2)
    after = differential_attention(turned, key, value, 0.4, ratio=3, enable_gqa=True)
    torch.testing.assert_close(after, before.unflatten(1, (2, 3)).flip(1).flatten(1, 2))


def test_one_token_and_no_later_token() -> None:
    query, key, value = normal(2, 6, 9, 4), normal(2, 4, 9, 4, seed=1), normal(2, 2, 9, 5, seed=2)
    call = {"noise_weight": 0.25, "ratio": 2, "is_causal": True}
    before = differential_attention(query, key, value, **call)
    expected = (0.75 * value[:, :, :1]).repeat_interleave(2, 1)
    torch.testing.assert_close(before[:, :, :1], expected)
    for tensor in (query, key, value):
        tensor[:, :, 6:] = 7.0
    after = differential_attention(query, key, value, **call)
    torch.testing.assert_close(after[:, :, :6], before[:, :, :6])


@given(problems())
@settings(max_examples=30)
def test_gradients(problem: tuple) -> None:
    query, key, value, ratio, mask, is_causal = problem
    weight = torch.tensor(0.4, dtype=torch.float64)
    leaves = [tensor.requires_grad_() for tensor in (query, key, value, weight)]
    ours = differential_attention(
        *leaves,
        ratio=ratio,
        attn_mask=None if mask is None else mask[:, None],
        is_causal=is_causal,
        enable_gqa=True,
    )
    if is_causal:
        rows = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril()
        mask = rows.expand(len(query), -1, -1)
    exact = reference.differential_attention(*leaves, ratio, mask)
    torch.testing.assert_close(
        torch.autograd.grad(ours.sin().sum(), leaves),
        torch.autograd.grad(exact.sin().sum(), leaves),
        rtol=1e-8,
        atol=1e-8,
    )


class LargestTensor(TorchDispatchMode):
    """Sees every operation, of the backward pass too, and keeps the largest size of a result."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        results = func(*args, **(kwargs or {}))
        for one in results if isinstance(results, tuple | list) else [results]:
            if isinstance(one, Tensor):
                self.numel = max(self.numel, one.numel())
        return results


@pytest.mark.parametrize("is_causal", [True, False])
def test_no_map_is_stored_forward_or_backward(is_causal: bool) -> None:
    tokens = 700
    query, key, value = (
        torch.randn(1, heads, tokens, width, requires_grad=True)
        for heads, width in ((4, 8), (2, 8), (1, 16))
    )
    with LargestTensor() as largest:
        output = differential_attention(query, key, value, 0.5, ratio=3, is_causal=is_causal)
        output.sin().sum().backward()
    assert query.grad is not None
    assert query.numel() <= largest.numel < tokens * tokens / 4
    with LargestTensor() as largest:
        differential_maps(query, key, ratio=3, is_causal=is_causal)
    assert largest.numel >= tokens * tokens  # the mode does see maps


def test_a_mask_for_each_head_is_in_the_order_of_the_query_heads() -> None:
    query, key, value = normal(1, 6, 5, 4), normal(1, 4, 5, 4, seed=1), normal(1, 2, 5, 8, seed=2)
    mask = torch.ones(1, 6, 5, 5, dtype=torch.bool)
    mask[:, 2] = False  # the first noise head sees nothing
    mask[:, 4] = False  # nor does the second signal head of the second group
    free = differential_outputs(query, key, value, ratio=2)
    masked = differential_outputs(query, key, value, ratio=2, attn_mask=mask)
    assert (masked.noise[:, 0] == 0).all()
    assert (masked.signal[:, 3] == 0).all()
    torch.testing.assert_close(masked.noise[:, 1], free.noise[:, 1])
    torch.testing.assert_close(masked.signal[:, :3], free.signal[:, :3])
    bias = torch.zeros(1, 6, 5, 5, dtype=torch.float64).masked_fill(~mask, -torch.inf)
    torch.testing.assert_close(
        differential_outputs(query, key, value, ratio=2, attn_mask=bias), masked
    )


def test_scale() -> None:
    query, key, value = normal(1, 2, 5, 4), normal(1, 2, 5, 4, seed=1), normal(1, 1, 5, 8, seed=2)
    ours = differential_attention(query, key, value, 0.4, scale=0.1)
    torch.testing.assert_close(ours, differential_attention(query * 0.2, key, value, 0.4))


def test_head_maps() -> None:
    assert grouped_head_map(6, 2) == (0, 0, 0, 1, 1, 1)
    heads = DifferentialHeads(6, 2, 1)
    assert heads.signal == (0, 1, 2, 4, 5, 6)
    assert heads.noise == (3, 7)
    assert heads.noise_of_signal == (0, 0, 0, 1, 1, 1)
    assert heads.pair_of_signal == (0,) * 6
    assert heads.grown_from(2) == (0, 0, 1, 1, 2, 2, 3, 4, 4, 5, 5, 6, 6, 7)
    for wrong in ((5, 2, 1), (4, 4, 3), (0, 1, 1), (2, 0, 1), (2, 2, 0)):
        with pytest.raises(ValueError, match="expected a"):
            DifferentialHeads(*wrong)
    with pytest.raises(ValueError, match="num_heads: expected a multiple"):
        grouped_head_map(5, 2)


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 5), st.integers(1, 4))
def test_copies_keep_their_keys_and_their_noise(
    pairs: int, groups: int, ratio: int, factor: int
) -> None:
    heads = DifferentialHeads(pairs * groups * ratio, pairs * groups, pairs)
    grown = DifferentialHeads(heads.num_signal * factor, heads.num_noise, pairs)
    copied = heads.grown_from(factor)
    assert len(copied) == grown.num_query
    assert [copied[head] for head in grown.noise] == list(heads.noise)
    for new, head in enumerate(grown.signal):
        old = heads.signal.index(copied[head])
        assert grown.pair_of_signal[new] == heads.pair_of_signal[old]
        assert grown.noise_of_signal[new] == heads.noise_of_signal[old]


def test_arguments_that_do_not_fit_are_named() -> None:
    query, key, value = torch.randn(1, 6, 3, 4), torch.randn(1, 4, 3, 4), torch.randn(1, 2, 3, 8)
    with pytest.raises(ValueError, match="ratio: expected at least 1"):
        differential_attention(query, key, value, 0.5, ratio=0)
    with pytest.raises(ValueError, match="query: expected groups of 3 signal heads"):
        differential_attention(query, key, value, 0.5, ratio=3)
    with pytest.raises(ValueError, match="key: expected pairs of heads"):
        differential_attention(query, key[:, :3], value, 0.5, ratio=2)
    with pytest.raises(ValueError, match=r"key: expected a pair .*enable_gqa"):
        differential_attention(query, key[:, :2], value[:, :1], 0.5, ratio=2)
    with pytest.raises(ValueError, match=r"key: expected a pair .*divide"):
        differential_attention(query, key, value, 0.5, ratio=1, enable_gqa=True)
    with pytest.raises(ValueError, match="value: expected"):
        differential_attention(query, key, value[:, :1], 0.5, ratio=2)
    with pytest.raises(ValueError, match="key: expected the last dimension"):
        differential_attention(query, key[..., :3], value, 0.5, ratio=2)
    with pytest.raises(ValueError, match="noise_weight: expected a shape"):
        differential_attention(query, key, value, torch.ones(5), ratio=2)
    mask = torch.ones(3, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="attn_mask: expected None"):
        differential_attention(query, key, value, 0.5, ratio=2, attn_mask=mask, is_causal=True)
    with pytest.raises(ValueError, match="query: expected"):
        differential_attention(query[0], key, value, 0.5, ratio=2)
