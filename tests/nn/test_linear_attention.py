"""The core of linear attention against its map, and its state."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from attending.nn import _causal_sum
from attending.nn.linear_attention import (
    LinearAttentionState,
    causal_linear_attention,
    linear_attention,
    linear_state,
    read_state,
)
from tests.core.problems import assert_close
from tests.nn import reference_linear_attention as reference


@st.composite
def problems(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float64)):
    dtype = draw(st.sampled_from(dtypes))
    batch, kv_heads, groups = (draw(st.integers(1, 2)) for _ in range(3))
    queries = draw(st.integers(1, 150))
    keys = draw(st.one_of(st.just(queries), st.integers(1, 150)))
    dim, value_dim = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64).to(dtype)

    mask = None
    if draw(st.booleans()):
        mask = torch.rand(batch, 1, 1, keys, generator=generator) > 0.4
        if draw(st.booleans()):
            mask[0] = False
    query = uniform(batch, kv_heads * groups, queries, dim)
    key, value = (
        uniform(batch, kv_heads, keys, dim),
        uniform(batch, kv_heads, keys, value_dim) - 0.5,
    )
    return query, key, value, mask


@given(problems(), st.booleans(), st.booleans())
def test_equals_the_map(problem: tuple, is_causal: bool, normalize: bool) -> None:
    query, key, value, mask = problem
    ours = linear_attention(
        query, key, value, attn_mask=mask, is_causal=is_causal, enable_gqa=True, normalize=normalize
    )
    exact = reference.linear_attention(query, key, value, mask, is_causal, normalize)
    assert ours.dtype == query.dtype
    scale = 1.0 if normalize else max(1.0, float(exact.abs().max()))
    assert_close(ours / scale, exact / scale, query.dtype)
    if mask is not None and normalize and not mask[0].any():
        assert (ours[0] == 0).all()


@given(problems((torch.float64,)), st.data())
def test_a_sequence_in_parts(problem: tuple, data: st.DataObject) -> None:
    query, key, value, mask = problem
    tokens = min(query.shape[2], key.shape[2])
    query, key, value = query[:, :, :tokens], key[:, :, :tokens], value[:, :, :tokens]
    mask = None if mask is None else mask[..., :tokens]
    whole = linear_attention(query, key, value, attn_mask=mask, is_causal=True, enable_gqa=True)
    cuts = sorted(data.draw(st.sets(st.integers(0, tokens), max_size=3)) | {0, tokens})
    state, outputs = None, []
    for start, stop in itertools.pairwise(cuts):
        part = (tensor[:, :, start:stop] for tensor in (query, key, value))
        here = None if mask is None else mask[..., start:stop]
        output, state = causal_linear_attention(*part, state, attn_mask=here, enable_gqa=True)
        outputs.append(output)
    assert_close(torch.cat(outputs, 2), whole, torch.float64)
    seen = None if mask is None else mask[:, :, 0]
    everything = linear_state(key, value, seen)
    assert_close(state.key_value, everything.key_value, torch.float64)
    assert_close(state.key_sum, everything.key_sum, torch.float64)


def test_states_of_disjoint_keys_add_up() -> None:
    query, key, value = (torch.rand(2, 3, 20, 5, dtype=torch.float64) for _ in range(3))
    parts = [linear_state(key[:, :, s], value[:, :, s]) for s in (slice(0, 7), slice(7, 20))]
    whole = read_state(parts[0] + parts[1], query)
    assert_close(whole, linear_attention(query, key, value), torch.float64)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("is_causal", [True, False])
def test_gradients(is_causal: bool, normalize: bool) -> None:
    query = torch.rand(2, 4, 133, 3, dtype=torch.float64, requires_grad=True)
    key = torch.rand(2, 2, 133, 3, dtype=torch.float64, requires_grad=True)
    value = torch.randn(2, 2, 133, 5, dtype=torch.float64, requires_grad=True)
    inputs = (query, key, value)
    ours = linear_attention(*inputs, is_causal=is_causal, enable_gqa=True, normalize=normalize)
    exact = reference.linear_attention(*inputs, None, is_causal, normalize)
    torch.testing.assert_close(
        torch.autograd.grad(ours.tanh().sum(), inputs),
        torch.autograd.grad(exact.tanh().sum(), inputs),
        rtol=1e-9,
        atol=1e-9,
    )


def test_second_derivatives_and_gradients_through_the_state() -> None:
    tensors = [torch.rand(1, 2, 5, 2, dtype=torch.float64, requires_grad=True) for _ in range(3)]

    def second(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        first = (t[:, :, :3] for t in (query, key, value))
        rest = (t[:, :, 3:] for t in (query, key, value))
        _, state = causal_linear_attention(*first)
        return causal_linear_attention(*rest, state)[0]

    assert torch.autograd.gradcheck(second, tensors)
    assert torch.autograd.gradgradcheck(second, tensors)


@pytest.mark.parametrize("is_causal", [True, False])
def test_bfloat16_sums_in_float32(is_causal: bool) -> None:
    """A sum of 2000 equal summands in bfloat16 would stop growing at 256."""
    ones = torch.ones(1, 1, 2000, 1, dtype=torch.bfloat16)
    output = linear_attention(ones, ones, ones, is_causal=is_causal, normalize=False)
    assert output.dtype == torch.bfloat16
    assert output[0, 0, -1, 0] == 2000
    with torch.autocast("cpu", torch.bfloat16):
        output = linear_attention(*[ones.float()] * 3, is_causal=is_causal, normalize=False)
    assert output.dtype == torch.float32
    assert output[0, 0, -1, 0] == 2000


def test_backward_keeps_no_states() -> None:
    """What the graph holds of the causal form is the features, whatever the dims are."""
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.untyped_storage().data_ptr())
        return tensor

    tensors = [torch.rand(1, 2, 500, 32, requires_grad=True) for _ in range(3)]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        linear_attention(*tensors, is_causal=True, normalize=False)
    assert set(kept) == {tensor.untyped_storage().data_ptr() for tensor in tensors}


def test_chunks_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = [torch.rand(1, 2, 23, 4, dtype=torch.float64) for _ in range(3)]
    whole = linear_attention(*tensors, is_causal=True)
    for size in (1, 7, 23):
        monkeypatch.setattr(_causal_sum, "CHUNK", size)
        assert_close(linear_attention(*tensors, is_causal=True), whole, torch.float64)


def test_without_keys() -> None:
    query, nothing = torch.rand(1, 2, 3, 4), torch.rand(1, 2, 0, 4)
    for is_causal in (True, False):
        assert (linear_attention(query, nothing, nothing, is_causal=is_causal) == 0).all()
        assert linear_attention(nothing, query, query, is_causal=is_causal).shape == (1, 2, 0, 4)


def test_arguments_that_do_not_fit_are_named() -> None:
    query = torch.rand(1, 4, 3, 8)
    with pytest.raises(ValueError, match="attn_mask: expected a boolean mask"):
        linear_attention(query, query, query, attn_mask=torch.zeros(3))
    with pytest.raises(ValueError, match=r"attn_mask: expected one mask for all queries"):
        linear_attention(query, query, query, attn_mask=torch.ones(3, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"attn_mask: expected a shape .*\[1, 4, 1, 3\]"):
        linear_attention(query, query, query, attn_mask=torch.ones(1, 1, 1, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="key: expected 4 heads"):
        linear_attention(query, query[:, :2], query[:, :2])
    with pytest.raises(ValueError, match="key: expected as many tokens"):
        causal_linear_attention(query, query[:, :, :2], query[:, :, :2])
    state = LinearAttentionState(torch.zeros(1, 4, 8, 7), torch.zeros(1, 4, 8))
    with pytest.raises(ValueError, match=r"state: expected .*\[1, 4, 8, 8\]"):
        causal_linear_attention(query, query, query, state)
    with pytest.raises(ValueError, match="query: expected dim 8"):
        read_state(state, query[..., :5])
