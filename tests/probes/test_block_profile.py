"""Profiles of blocks: golden vectors, dense maps, and models of diffusers."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import attending as at
from attending.probes.block_profile import BlockProfile, profile_blocks
from attending.probes.foreground import (
    foreground_ratio,
    foreground_tokens,
    principal_foreground,
    step_moves,
)
from attending.zoo.shapes_motion import make_moving_scene
from tests.interventions.denoisers import fingerprint, sd3, sd3_inputs, wan, wan_inputs

GOLDEN = Path(__file__).parents[1] / "golden" / "profiling-dit"


def test_against_the_golden_vectors() -> None:
    golden = {k: torch.from_numpy(v) for k, v in np.load(GOLDEN / "profile_a.npz").items()}
    received = golden["attention"].mean(-2)
    torch.testing.assert_close(received, golden["received"], atol=1e-6, rtol=0)
    mask = golden["foreground_mask"]
    ratios = foreground_ratio(received, mask, float(golden["threshold"]))
    assert torch.equal(ratios, golden["ratio_per_step"])
    blocks = ratios.shape[1]
    profile = BlockProfile(
        tuple(f"blocks.{index}" for index in range(blocks)),
        tuple(range(blocks)),
        ratios,
        received.mean(0),
        *step_moves(list(golden["noise_preds"])),
    )
    torch.testing.assert_close(profile.ratio, golden["ratio"], atol=1e-12, rtol=0)
    tau = float(golden["tau"])
    assert list(profile.foreground(tau)) == golden["foreground_blocks"].tolist()
    assert list(profile.background(tau)) == golden["background_blocks"].tolist()
    torch.testing.assert_close(profile.l1, golden["l1"], atol=1e-12, rtol=0)
    torch.testing.assert_close(profile.relative_l1, golden["rel_l1"], atol=1e-12, rtol=0)


@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 99))
def test_the_ratio_is_a_recall(tokens: int, frames: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    received = torch.rand(2, frames * tokens, generator=generator)
    mask = torch.rand(2, frames * tokens, generator=generator) < 0.5
    mask[:, 0] = True
    ratio = foreground_ratio(received, mask, 0.5, frames=frames)
    for sample in range(2):
        shares = []
        for frame in range(frames):
            part = slice(frame * tokens, (frame + 1) * tokens)
            area = mask[sample, part].sum()
            if area:
                hits = (mask[sample, part] & (received[sample, part] > 0.5)).sum()
                shares.append(float(hits / area))
        assert float(ratio[sample]) == pytest.approx(sum(shares) / len(shares))
    assert torch.equal(
        foreground_ratio(received, mask, -1.0, frames=frames), torch.ones(2).double()
    )
    assert torch.equal(
        foreground_ratio(received, mask, 2.0, frames=frames), torch.zeros(2).double()
    )


def dense_received(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    with torch.no_grad(), at.tap(model) as calls:
        model(**inputs)
    found = {}
    for call in calls:
        if not call.is_cross:
            scores = call.query.double() @ call.key.double().mT * call.softmax_scale
            found[call.name] = scores.softmax(-1).mean(1)
    return found


def test_of_wan_against_dense_maps() -> None:
    model = wan(layers=3)
    mask = torch.tensor([True, False, False, True, True, False, False, False])
    times = (900.0, 600.0, 300.0)
    before = fingerprint(model)

    def sample() -> None:
        for time in times:
            for seed in (0, 1):  # the two calls of guidance
                model(**wan_inputs(time, seed))

    profile = profile_blocks(model, sample, mask, frames=2)
    assert fingerprint(model) == before
    assert profile.names == tuple(f"blocks.{index}.attn1" for index in range(3))
    assert profile.blocks == (0, 1, 2)
    for step, time in enumerate(times):
        maps = [dense_received(model, wan_inputs(time, seed)) for seed in (0, 1)]
        for index, name in enumerate(profile.names):
            ratios = [foreground_ratio(m[name].mean(-2), mask, 1 / 8, frames=2) for m in maps]
            expected = float(torch.stack(ratios).mean())
            assert float(profile.ratio_per_step[step, index]) == pytest.approx(expected)
    torch.testing.assert_close(profile.received.sum(-1), torch.ones(3))
    with torch.no_grad():
        outs = [[model(**wan_inputs(t, seed)).sample for t in times] for seed in (0, 1)]
    moves = torch.stack([step_moves(branch)[0] for branch in outs]).mean(0)
    torch.testing.assert_close(profile.l1, moves)
    assert sorted(profile.least(1) + profile.most(2)) == [0, 1, 2]
    assert "R = [" in repr(profile)


def test_only_the_video_of_a_model_that_attends_to_text_too() -> None:
    model = sd3(layers=2)
    mask = torch.arange(16) < 4
    inputs = sd3_inputs(500.0)
    profile = profile_blocks(model, lambda: model(**inputs), mask, tokens=slice(0, 16))
    maps = dense_received(model, inputs)
    for index, name in enumerate(profile.names):
        received = maps[name][:, :16, :16].mean(-2)
        expected = foreground_ratio(received, mask, 1 / 21)
        assert float(profile.ratio_per_step[0, index]) == pytest.approx(float(expected))
        torch.testing.assert_close(profile.received[index].double(), received[0], atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="say which are the video's"):
        profile_blocks(model, lambda: model(**inputs), mask)


def test_a_batch_is_judged_by_the_masks_of_its_samples() -> None:
    model = wan(layers=2)
    masks = torch.tensor([[True] * 4 + [False] * 4, [False] * 4 + [True] * 4])
    inputs = wan_inputs(500.0, batch=4)  # two videos, with and without the condition
    profile = profile_blocks(model, lambda: model(**inputs), masks)
    received = dense_received(model, inputs)["blocks.0.attn1"].mean(-2)
    expected = foreground_ratio(received, masks.repeat(2, 1), 1 / 8).mean()
    assert float(profile.ratio_per_step[0, 0]) == pytest.approx(float(expected))
    with pytest.raises(ValueError, match="one for each of the 4"):
        profile_blocks(model, lambda: model(**inputs), masks[[0, 0, 1]])


def test_tokens_of_pixels() -> None:
    scene = make_moving_scene(seed=3, frames=4)
    pixels = scene.foreground()
    tokens = foreground_tokens(pixels, (1, 4, 4))
    assert tokens.shape == (4 * 64,)
    frame, row, column = 2, 3, 5
    patch = pixels[frame, row * 4 : row * 4 + 4, column * 4 : column * 4 + 4]
    assert bool(tokens[frame * 64 + row * 8 + column]) == bool(patch.double().mean() >= 0.5)
    assert torch.equal(foreground_tokens(pixels[None], (1, 4, 4)), tokens[None])
    assert foreground_tokens(pixels, (1, 1, 1)).equal(pixels.flatten())
    with pytest.raises(ValueError, match="patch: expected sizes that divide"):
        foreground_tokens(pixels, (1, 5, 4))


@given(st.integers(0, 50), st.integers(1, 5))
def test_what_stands_out_is_found(seed: int, channels: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    prediction = 0.1 * torch.randn(2, channels, 3, 8, 8, generator=generator)
    mask = torch.zeros(2, 3, 8, 8, dtype=torch.bool)
    mask[0, :, 2:4, 2:6] = True
    mask[1, 1:, 4:8, 0:2] = True
    prediction = prediction + 3.0 * mask[:, None]
    found = principal_foreground(prediction, (1, 2, 2))
    assert torch.equal(found, foreground_tokens(mask, (1, 2, 2)))


def test_nothing_stands_out_of_nothing() -> None:
    assert not principal_foreground(torch.ones(1, 2, 1, 4, 4)).any()
    assert principal_foreground(torch.ones(1, 2, 1, 1, 1)).shape == (1, 1)
    with pytest.raises(ValueError, match="patch: expected sizes that divide"):
        principal_foreground(torch.ones(1, 2, 1, 4, 4), (1, 3, 1))


def test_what_cannot_be_is_refused() -> None:
    model = wan(layers=2)

    def sample() -> None:
        model(**wan_inputs(500.0))

    some = torch.ones(8, dtype=torch.bool)
    with pytest.raises(ValueError, match="foreground: expected at least one"):
        profile_blocks(model, sample, ~some)
    with pytest.raises(ValueError, match="frames: expected a number that divides"):
        profile_blocks(model, sample, some, frames=3)
    with pytest.raises(ValueError, match="only: expected the beginning"):
        profile_blocks(model, sample, some, only="layers.")
    with pytest.raises(ValueError, match="count: expected between"):
        profile_blocks(model, sample, some).least(3)
