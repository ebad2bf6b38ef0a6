"""Rectified block-sparse attention: golden vectors, the definition, what must hold exactly."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from attending.sparse.implicit_attention import critical_blocks, pooling_gains
from attending.sparse.pooled import pool_blocks
from attending.sparse.rectified import (
    RECTIFY,
    apply_rectification,
    rectification,
    rectified_block_sparse_attention,
)
from tests.sparse.reference_rectified import rectified_by_definition

GOLDEN = Path(__file__).parent.parent / "golden" / "rectified-spaattn"
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5}  # those of the golden vectors

modes = st.sampled_from(RECTIFY)


def golden(name: str) -> dict[str, torch.Tensor]:
    return {key: torch.from_numpy(np.array(one)) for key, one in np.load(GOLDEN / name).items()}


def qkv(tokens, *, batch=1, heads=2, kv_heads=None, dim=8, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    shapes = [
        (batch, count, tokens, dim) for count in (heads, kv_heads or heads, kv_heads or heads)
    ]
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes
    ]


def any_mask(blocks, *, batch=1, heads=2, seed=0, share=0.3):
    mask = torch.rand(batch, heads, blocks, blocks, generator=torch.Generator().manual_seed(seed))
    return (mask < share) | torch.eye(blocks, dtype=torch.bool)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", ["with_text.npz", "visual_only_padded.npz"])
def test_golden_vectors(name, dtype) -> None:
    stored = golden(name)
    query, key, value = (stored[one].to(dtype) for one in "qkv")
    blocks, size = stored["probs"].shape[2], int(stored["block_size"])
    near = stored["neighbor"].clone()
    near = near if near.numel() else torch.zeros(blocks, blocks, dtype=torch.bool)
    corner = int(stored.get("first_frame_blocks", 0))
    near[:corner, :corner] = True
    given = {
        "text_length": int(stored.get("text_length", 0)),
        "block_size": size,
        "top_k": int(stored["top_k"]),
        "top_p": float(stored["prob_threshold"]),
        "neighbors": near,
        "zero_padded": True,
    }
    close = {"atol": TOLERANCE[dtype], "rtol": 0}
    found = rectification(query, key, value, **given)
    torch.testing.assert_close(found.shares.double(), stored["probs"], **close)
    torch.testing.assert_close(found.factor.double(), stored["R"], **close)
    kept = stored["block_mask"][..., :blocks]
    assert torch.equal(found.plan.block_mask, kept)
    assert torch.equal(found.pooled, ~kept & ~stored["no_gapr"])
    output = rectified_block_sparse_attention(query, key, value, **given)
    torch.testing.assert_close(output.double(), stored["out"], **close)
    if "sparse_out" in stored:
        plain = rectified_block_sparse_attention(query, key, value, rectify="none", **given)
        plain = plain[:, :, : blocks * size].double()
        torch.testing.assert_close(plain, stored["sparse_out"], **close)


def test_golden_gate() -> None:
    stored = golden("gapr.npz")
    query, key = (stored[one].flatten(2, 3) for one in ("Q_blocks", "K_blocks"))
    size = stored["Q_blocks"].shape[3]
    gains = pooling_gains(query, key, pool_blocks(query, size), pool_blocks(key, size), size)
    assert torch.equal(~gains, stored["no_gapr"])


@given(
    rectify=modes,
    tokens=st.integers(1, 40),
    size=st.integers(1, 9),
    text=st.integers(0, 5),
    masked=st.booleans(),
    kv_heads=st.sampled_from([1, 2]),
    seed=st.integers(0, 99),
)
@settings(max_examples=60)
def test_the_definition(rectify, tokens, size, text, masked, kv_heads, seed) -> None:
    query, key, value = qkv(tokens + text, batch=2, kv_heads=kv_heads, seed=seed)
    kept = any_mask(-(-tokens // size), batch=2, seed=seed)
    mask = None
    if masked:
        mask = torch.rand(2, text, generator=torch.Generator().manual_seed(seed)) < 0.6
    given = {"text_length": text, "text_mask": mask, "rectify": rectify, "block_size": size}
    found = rectified_block_sparse_attention(query, key, value, keep=kept, **given)
    expected = rectified_by_definition(query, key, value, kept, **given)
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)


@given(modes, st.integers(1, 50), st.integers(1, 12), st.integers(0, 7), st.integers(0, 99))
def test_everything_kept_is_dense(rectify, tokens, size, text, seed) -> None:
    query, key, value = qkv(tokens + text, seed=seed)
    expected = scaled_dot_product_attention(query, key, value)
    for rule in ({"top_p": 1.0}, {"top_k": tokens + 1}):
        found = rectification(
            query, key, value, text_length=text, block_size=size, rectify=rectify, **rule
        )
        assert bool(found.plan.block_mask.all())
        assert not bool(found.pooled.any())
        assert bool((found.factor == 1).all())
        output = apply_rectification(query, key, value, found)
        torch.testing.assert_close(output, expected, atol=1e-12, rtol=0)


@given(
    st.sampled_from(["ipar+gapr", "all", "row"]),
    st.integers(1, 60),
    st.integers(1, 12),
    st.integers(0, 99),
)
def test_blocks_of_equal_tokens_are_exact(rectify, tokens, size, seed) -> None:
    """Whatever is dropped; also with a last block that is shorter."""
    blocks = -(-tokens // size)
    query, key, value = (
        one.repeat_interleave(size, 2)[:, :, :tokens] for one in qkv(blocks, seed=seed)
    )
    kept = any_mask(blocks, seed=seed)
    found = rectification(query, key, value, block_size=size, keep=kept, rectify=rectify)
    assert torch.equal(found.pooled, ~kept)
    output = apply_rectification(query, key, value, found)
    expected = scaled_dot_product_attention(query, key, value)
    torch.testing.assert_close(output, expected, atol=1e-12, rtol=0)


@given(
    st.sampled_from(["none", "ipar+gapr", "all", "row"]),
    st.integers(1, 40),
    st.integers(1, 9),
    st.integers(0, 4),
    st.integers(0, 99),
)
def test_weights_sum_to_one(rectify, tokens, size, text, seed) -> None:
    query, key, value = qkv(tokens + text, seed=seed)
    output = rectified_block_sparse_attention(
        query,
        key,
        torch.ones_like(value),
        text_length=text,
        block_size=size,
        top_p=0.1,
        rectify=rectify,
    )
    torch.testing.assert_close(output, torch.ones_like(output), atol=1e-12, rtol=0)


@given(modes, st.integers(1, 8), st.integers(1, 7), st.integers(0, 99))
def test_order_within_blocks_does_not_matter(rectify, blocks, size, seed) -> None:
    query, key, value = qkv(blocks * size, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.cat(
        [at * size + torch.randperm(size, generator=generator) for at in range(blocks)]
    )
    given = {"block_size": size, "keep": any_mask(blocks, seed=seed), "rectify": rectify}
    output = rectified_block_sparse_attention(query, key, value, **given)
    moved = (one[:, :, shuffled] for one in (query, key, value))
    of_moved = rectified_block_sparse_attention(*moved, **given)
    torch.testing.assert_close(of_moved, output[:, :, shuffled], atol=1e-12, rtol=0)


def test_the_choice_of_blocks() -> None:
    shares = torch.tensor([[[[0.5, 0.1, 0.25, 0.15], [0.1, 0.2, 0.3, 0.4]]]], dtype=torch.float64)

    def kept(**rule) -> list[list[int]]:
        rows = critical_blocks(shares, 3, **rule)[0, 0]
        return [row.nonzero().squeeze(1).tolist() for row in rows]

    assert kept(top_k=2) == [[0, 2], [2]]  # the last column is that of text
    assert kept(top_p=0.0) == [[0], []]
    assert kept(top_p=0.45) == [[0], [2]]
    assert kept(top_p=0.5) == [[0, 2], [2]]  # exactly top_p: one more than needed
    assert kept(top_p=0.1, top_k=3) == [[0, 2], [1, 2]]
    assert kept(top_p=1.0) == [[0, 1, 2], [0, 1, 2]]
    assert kept(top_k=99) == [[0, 1, 2], [0, 1, 2]]


@pytest.mark.parametrize("rectify", RECTIFY)
@pytest.mark.parametrize("text", [0, 5])
def test_gradients(rectify, text) -> None:
    query, key, value = qkv(23 + text, heads=2, kv_heads=1, dim=4)
    kept = any_mask(6)
    mask = torch.tensor([[True, False, True, True, False]]) if text else None
    given = {"text_length": text, "text_mask": mask, "block_size": 4, "keep": kept}
    inputs = [one.requires_grad_() for one in (query, key, value)]
    found = rectified_block_sparse_attention(*inputs, rectify=rectify, **given)
    expected = rectified_by_definition(
        *inputs,
        kept,
        rectify=rectify,
        **{name: one for name, one in given.items() if name != "keep"},
    )
    weights = torch.randn_like(found)
    ours, theirs = (torch.autograd.grad((one * weights).sum(), inputs) for one in (found, expected))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-10, rtol=1e-8)


def test_gradients_where_all_text_is_hidden() -> None:
    inputs = [one.requires_grad_() for one in qkv(20)]
    mask = torch.zeros(1, 4, dtype=torch.bool)
    output = rectified_block_sparse_attention(
        *inputs, text_length=4, text_mask=mask, block_size=4, top_k=2
    )
    output.sum().backward()
    assert all(bool(one.grad.isfinite().all()) for one in inputs)


@pytest.mark.parametrize("rectify", RECTIFY)
def test_a_large_map_is_the_same(rectify) -> None:
    """Beyond the size up to which blocks are a mask; with a short last block and shared heads."""
    query, key, value = qkv(700, kv_heads=1, dim=8)
    given = {"block_size": 64, "top_k": 3, "text_length": 20, "rectify": rectify}
    found = rectification(query, key, value, **given)
    given.pop("top_k")
    expected = rectified_by_definition(query, key, value, found.plan.block_mask, **given)
    torch.testing.assert_close(
        apply_rectification(query, key, value, found), expected, atol=1e-10, rtol=0
    )


@pytest.mark.parametrize("rectify", RECTIFY)
def test_bfloat16(rectify) -> None:
    """The output is that of the rounded inputs in float64, up to its own rounding."""
    tensors = qkv(90, dtype=torch.bfloat16)
    given = {"block_size": 16, "text_length": 10, "top_k": 2, "rectify": rectify}
    before = [one.clone() for one in tensors]
    found = rectification(*tensors, **given)
    exact = rectification(*(one.double() for one in tensors), **given)
    assert found.shares.dtype == torch.float32
    torch.testing.assert_close(found.shares.double(), exact.shares, atol=1e-5, rtol=1e-5)
    output = rectified_block_sparse_attention(*tensors, **given)
    assert output.dtype == torch.bfloat16
    expected = apply_rectification(*(one.double() for one in tensors), exact)
    torch.testing.assert_close(output.double(), expected, atol=2e-2, rtol=2e-2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        within = rectification(*(one.float() for one in tensors), **given)
    torch.testing.assert_close(within.shares, found.shares, atol=1e-6, rtol=0)
    assert all(torch.equal(one, old) for one, old in zip(tensors, before, strict=True))


def test_smooth_tokens() -> None:
    """The card's experiment in small: everything is closer to dense than plain block-sparse."""
    generator = torch.Generator().manual_seed(0)
    width = torch.arange(-48, 49, dtype=torch.float64)
    kernel = torch.exp(-0.5 * (width / 12) ** 2)
    kernel = (kernel / kernel.norm())[None, None]
    noise = torch.randn(3 * 16, 1, 512 + 96, generator=generator, dtype=torch.float64)
    smooth = torch.nn.functional.conv1d(noise, kernel)[:, 0].view(3, 1, 1, 16, 512).mT
    query, key, value = 2 * smooth[0], 2 * smooth[1], smooth[2]
    dense = scaled_dot_product_attention(query, key, value)
    error = {
        rectify: float(
            (
                rectified_block_sparse_attention(
                    query, key, value, block_size=16, top_k=3, top_p=None, rectify=rectify
                )
                - dense
            ).norm()
            / dense.norm()
        )
        for rectify in RECTIFY
    }
    assert all(error[one] < error["none"] for one in RECTIFY if one != "none"), error
    assert error["row"] < error["ipar+gapr"], error


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"rectify": "some"}, "rectify"),
        ({"block_size": 0}, "block_size"),
        ({"text_length": 20}, "text_length"),
        ({"text_length": 4, "text_mask": torch.ones(1, 3, dtype=torch.bool)}, "text_mask"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_p": None}, "top_k, top_p"),
        ({"neighbors": torch.ones(3, 3, dtype=torch.bool)}, "neighbors"),
        ({"keep": torch.ones(5, 5)}, "keep"),
        ({"keep": torch.zeros(5, 5, dtype=torch.bool)}, "keep"),
    ],
)
def test_bad_input(changes, name) -> None:
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        rectified_block_sparse_attention(*qkv(20), **{"block_size": 4, **changes})


def test_another_length_of_keys() -> None:
    query, key, value = qkv(20)
    with pytest.raises(ValueError, match=r"^key: expected"):
        rectified_block_sparse_attention(query[:, :, :10], key, value)
