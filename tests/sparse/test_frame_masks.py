"""Masks of frames: golden masks, the sparsities that the paper prints, and their invariants."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attending.core.block_plan import BlockPlan
from attending.core.blocks import block_sparse_attention
from attending.sparse.frame_masks import (
    default_block_size,
    expand_frame_mask,
    frame_reference_mask,
    frame_sparsity,
    frame_token_mask,
    frame_window_mask,
    mask_of_references,
    reference_frames,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "efficient-vdit"
# (frames, k) and the sparsity in percent that the paper prints for it, of 3600 tokens a frame in
# blocks of 128: 29 and 93 frames of 720p.
PRINTED = {
    (8, 4): 17.60,
    (8, 3): 29.88,
    (8, 2): 45.47,
    (8, 1): 64.38,
    (24, 12): 21.51,
    (24, 8): 40.30,
    (24, 6): 51.88,
    (24, 4): 64.98,
    (24, 3): 72.05,
}
FRAMES_AND_K = st.integers(1, 12).flatmap(
    lambda frames: st.tuples(st.just(frames), st.integers(1, frames))
)


@pytest.mark.parametrize("frames", [8, 24])
def test_golden_masks(frames):
    vectors = np.load(GOLDEN / "masks.npz")
    for k, mask in zip(vectors[f"k{frames}"], vectors[f"m{frames}"], strict=True):
        found = frame_reference_mask(frames, int(k))
        assert torch.equal(found, torch.from_numpy(mask))


@pytest.mark.parametrize("placement", ["even", "even_last"])
@pytest.mark.parametrize(("frames", "k"), PRINTED)
def test_the_sparsities_that_the_paper_prints(frames, k, placement):
    mask = frame_reference_mask(frames, k, placement=placement)
    plan = expand_frame_mask(mask, 3600, block_size=128)
    assert abs(100 * (1 - plan.density) - PRINTED[frames, k]) <= 0.01


@pytest.mark.parametrize(("frames", "k"), PRINTED)
def test_the_first_frames_as_references_do_not_give_them(frames, k):
    mask = frame_reference_mask(frames, k, placement="first")
    plan = expand_frame_mask(mask, 3600, block_size=128)
    if k > 1:
        assert abs(100 * (1 - plan.density) - PRINTED[frames, k]) > 0.1


@given(FRAMES_AND_K, st.sampled_from(["even", "even_last", "first", "random"]))
def test_the_family(frames_and_k, placement):
    frames, k = frames_and_k
    chosen = reference_frames(frames, k, placement=placement)
    assert chosen == sorted(set(chosen))
    assert len(chosen) == k
    mask = frame_reference_mask(frames, k, placement=placement)
    assert torch.equal(mask, mask.T)
    assert mask.diagonal().all()
    rows = mask.sum(1).tolist()
    assert sorted(set(rows)) in ([frames], [k + 1, frames])
    assert rows.count(frames) >= k
    assert frame_sparsity(mask) == pytest.approx((frames - k) * (frames - k - 1) / frames**2)
    assert frame_sparsity(mask) == pytest.approx(frame_sparsity(frame_window_mask(frames, k)))
    if k == frames:
        assert mask.all()


@given(
    FRAMES_AND_K,
    st.integers(1, 7),
    st.integers(0, 5),
    st.booleans(),
    st.sampled_from([None, 1, 2, 3, 4, 100]),
)
def test_a_plan_is_the_token_mask_rounded_up_to_blocks(frames_and_k, tokens, text, first, block):
    frames, k = frames_and_k
    mask = frame_reference_mask(frames, k)
    kind = {"text_tokens": text, "text_first": first}
    plan = expand_frame_mask(mask, tokens, block_size=block, **kind)
    exact = frame_token_mask(mask, tokens, **kind)
    rounded = BlockPlan.from_mask(exact, block_size=plan.block_size)
    assert torch.equal(plan.block_mask, rounded.block_mask)
    if block is None and not text:
        assert torch.equal(plan.visible()[0, 0], exact)


def test_text_sees_all_and_is_seen_by_all():
    mask = frame_window_mask(3, 0)
    first = frame_token_mask(mask, 2, text_tokens=3)
    last = frame_token_mask(mask, 2, text_tokens=3, text_first=False)
    assert all(part.all() for part in (first[:3], first[:, :3], last[-3:], last[:, -3:]))
    assert torch.equal(first[3:, 3:], last[:-3, :-3])
    assert default_block_size(1350, 226) == 128
    assert default_block_size(96, 32) == 32
    assert default_block_size(7) == 7


@pytest.mark.parametrize("block", [None, 16])
def test_attention_over_the_plan_is_attention_under_the_mask(block):
    """Enough tokens that the engine gathers; blocks of 16 straddle frames of 88."""
    torch.manual_seed(0)
    mask, tokens = frame_reference_mask(7, 2), 88
    query, key, value = torch.randn(3, 1, 2, 7 * tokens, 8, dtype=torch.float64).unbind(0)
    shown = frame_token_mask(mask, tokens)
    plan = expand_frame_mask(mask, tokens, block_size=block)
    bias = None if block is None else shown[None, None]
    found = block_sparse_attention(query, key, value, plan, bias=bias)
    scores = (query @ key.mT / 8**0.5).masked_fill(~shown, -torch.inf)
    torch.testing.assert_close(found.output, scores.softmax(-1) @ value, rtol=1e-12, atol=1e-12)


def test_what_does_not_fit_is_named():
    for k in (0, 9, -1):
        with pytest.raises(ValueError, match="k: expected from 1"):
            frame_reference_mask(8, k)
    with pytest.raises(ValueError, match="placement"):
        frame_reference_mask(8, 1, placement="middle")
    with pytest.raises(ValueError, match="references"):
        mask_of_references(4, [4])
    with pytest.raises(ValueError, match="radius"):
        frame_window_mask(4, -1)
    with pytest.raises(ValueError, match="mask: expected booleans"):
        expand_frame_mask(torch.ones(2, 3, dtype=torch.bool), 4)
    with pytest.raises(ValueError, match="tokens_per_frame"):
        expand_frame_mask(torch.ones(2, 2, dtype=torch.bool), 0)
    with pytest.raises(ValueError, match="block_size"):
        expand_frame_mask(torch.ones(2, 2, dtype=torch.bool), 4, block_size=0)
