"""Taylor attention: golden vectors, the float64 reference, and its linear form."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attending.nn.linear_attention import causal_linear_attention
from attending.nn.taylor_attention import taylor_attention, taylor_features
from tests.nn import reference_deconstructing_attention as reference

GOLDEN = Path(__file__).parents[1] / "golden" / "deconstructing-attention" / "variants.npz"


def golden(*names: str, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    with np.load(GOLDEN) as arrays:
        return [torch.from_numpy(arrays[name]).to(dtype) for name in names]


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_joint_golden(dtype, atol):
    *qkv, expected, attention = golden(
        "q", "k", "v", "approx_joint_out", "approx_joint_attn", dtype=dtype
    )
    torch.testing.assert_close(
        taylor_attention(*qkv, is_causal=True), expected, atol=atol, rtol=atol
    )
    eye = torch.eye(7, dtype=dtype).expand(2, 2, 7, 7)
    ours = taylor_attention(qkv[0], qkv[1], eye, is_causal=True)
    torch.testing.assert_close(ours, attention, atol=atol, rtol=atol)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-10), (torch.float32, 1e-3)])
def test_per_order_golden(dtype, rtol):
    *qkv, expected = golden("q", "k", "v", "approx_per_order_out", dtype=dtype)
    ours = taylor_attention(*qkv, is_causal=True, normalization="per_order")
    torch.testing.assert_close(ours, expected, atol=rtol, rtol=rtol)


@given(
    st.integers(1, 2),
    st.sampled_from([(1, 1), (4, 2), (3, 1)]),
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(1, 5),
    st.booleans(),
    st.sampled_from(["joint", "per_order"]),
    st.integers(0, 10**6),
)
def test_values_and_gradients_are_those_of_the_reference(
    batch, heads, queries, keys, dim, masked, normalization, seed
):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        drawn = torch.rand(shape, generator=generator, dtype=torch.float64)
        # Positive, so that no sum of the first order is near 0.
        return (drawn + 0.1 if normalization == "per_order" else 2 * drawn - 1).requires_grad_()

    query, key = draw(batch, heads[0], queries, dim), draw(batch, heads[1], keys, dim)
    value = draw(batch, heads[1], keys, 3)
    mask = torch.rand(batch, 1, queries, keys, generator=generator) > 0.5 if masked else None
    ours = taylor_attention(
        query,
        key,
        value,
        normalization=normalization,
        attn_mask=mask,
        is_causal=not masked,
        scale=0.7,
        enable_gqa=heads[0] != heads[1],
    )
    groups = heads[0] // heads[1]
    wide = [tensor.repeat_interleave(groups, 1) for tensor in (key, value)]
    expected = reference.taylor(query, *wide, mask, not masked, 0.7, normalization)
    torch.testing.assert_close(ours, expected, atol=1e-9, rtol=1e-9)
    weights = torch.rand(ours.shape, generator=generator, dtype=torch.float64)
    wanted = (query, key, value)
    for mine, other in zip(
        torch.autograd.grad((ours * weights).sum(), wanted),
        torch.autograd.grad((expected * weights).sum(), wanted, materialize_grads=True),
        strict=True,
    ):
        torch.testing.assert_close(mine, other, atol=1e-8, rtol=1e-8)


def test_rows_sum_to_one_and_to_three():
    query, key = torch.rand(2, 1, 2, 6, 4).unbind(0)
    ones = torch.ones(1, 2, 6, 1)
    for normalization, total in (("joint", 1.0), ("per_order", 3.0)):
        sums = taylor_attention(query, key, ones, is_causal=True, normalization=normalization)
        torch.testing.assert_close(sums, torch.full_like(sums, total))


def test_the_first_token_sees_itself():
    query, key, value = torch.randn(3, 1, 2, 5, 4).unbind(0)
    first = taylor_attention(query, key, value, is_causal=True)[:, :, 0]
    torch.testing.assert_close(first, value[:, :, 0])


def test_features_make_the_polynomial_and_a_state_goes_on_from_it():
    query, key, value = torch.randn(3, 2, 3, 12, 5, dtype=torch.float64).unbind(0)
    scores = 0.3 * query @ key.transpose(-1, -2)
    q, k = taylor_features(query, 0.3), taylor_features(key, 0.3)
    assert q.shape[-1] == 1 + 5 + 15
    torch.testing.assert_close(q @ k.transpose(-1, -2), 1 + scores + scores**2 / 2)
    expected = taylor_attention(query, key, value, is_causal=True, scale=0.3)
    head, state = causal_linear_attention(q[:, :, :7], k[:, :, :7], value[:, :, :7])
    outputs = [head]
    for place in range(7, 12):
        here = slice(place, place + 1)
        output, state = causal_linear_attention(
            q[:, :, here], k[:, :, here], value[:, :, here], state
        )
        outputs.append(output)
    torch.testing.assert_close(torch.cat(outputs, 2), expected)


def test_bf16_is_near_float32():
    query, key, value = torch.randn(3, 1, 2, 40, 16).unbind(0)
    half = [tensor.bfloat16() for tensor in (query, key, value)]
    ours = taylor_attention(*half, is_causal=True)
    assert ours.dtype == torch.bfloat16
    exact = taylor_attention(*(tensor.float() for tensor in half), is_causal=True)
    torch.testing.assert_close(ours.float(), exact, atol=2e-2, rtol=2e-2)


def test_an_empty_row_is_zero_and_has_gradients():
    query, key, value = (torch.randn(1, 1, 3, 4, requires_grad=True) for _ in range(3))
    mask = torch.tensor([[False] * 3, [True] * 3, [False] * 3])
    for normalization in ("joint", "per_order"):
        output = taylor_attention(query, key, value, attn_mask=mask, normalization=normalization)
        assert (output[0, 0, [0, 2]] == 0).all()
        output.sum().backward()
        assert all(bool(tensor.grad.isfinite().all()) for tensor in (query, key, value))
    assert taylor_attention(query[:, :, :0], key, value).shape == (1, 1, 0, 4)


def test_a_hiding_float_mask_is_that_mask_and_others_are_refused():
    query, key, value = torch.randn(3, 1, 1, 4, 4).unbind(0)
    seen = torch.rand(4, 4) > 0.4
    lowest = torch.zeros(4, 4).masked_fill(~seen, torch.finfo(torch.float32).min)
    torch.testing.assert_close(
        taylor_attention(query, key, value, attn_mask=lowest),
        taylor_attention(query, key, value, attn_mask=seen),
    )
    with pytest.raises(ValueError, match="attn_mask: expected a mask that only hides"):
        taylor_attention(query, key, value, attn_mask=torch.randn(4, 4))


def test_wrong_arguments():
    query = torch.randn(1, 1, 4, 4)
    with pytest.raises(ValueError, match="normalization: expected"):
        taylor_attention(query, query, query, normalization="rows")
    with pytest.raises(ValueError, match="scale: expected a positive"):
        taylor_features(query, -1.0)
    with pytest.raises(ValueError, match="tensor: expected at least one channel"):
        taylor_features(query[..., :0])
