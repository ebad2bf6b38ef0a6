"""Circles in real denoisers of diffusers: FLUX, SD3 and Wan."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import attending as at
from attending.interventions import (
    BlockSparse,
    CircularWindow,
    InterventionWarning,
    load_settings,
    save_settings,
)
from attending.sparse.circular_window import circular_window_mask, pool_tokens
from attending.sparse.image_tokens import ImageTokens, read_image_tokens
from attending.taps import AttentionCall, Proceed
from tests.interventions.tiny_denoisers import (
    flux_inputs,
    sd3_inputs,
    tiny_flux,
    tiny_sd3,
    tiny_wan,
    wan_inputs,
)

MODELS = {
    "flux": (tiny_flux, flux_inputs, 3, True, (5, 6)),
    "sd3": (tiny_sd3, sd3_inputs, 3, False, (5, 6)),
    "wan": (tiny_wan, wan_inputs, 0, True, (3, 5, 6)),
}


def masked(mask: Tensor, factor: int | None = None, grid: tuple = ()) -> object:
    """The same by masks, in a tap."""

    def handler(call: AttentionCall, proceed: Proceed) -> Tensor:
        if call.is_cross:
            return proceed(call)
        text, first = call.key_length - math.prod(grid), 0
        if factor is None:
            return proceed(replace(call, attn_mask=mask))
        first = text if bool(mask[0, -1] == 0) else 0  # text rows do not see pooled keys
        image = slice(first, first + math.prod(grid))
        key, value = (
            torch.cat([one, pool_tokens(one[:, :, image], grid, factor)], 2)
            for one in (call.key, call.value)
        )
        return proceed(replace(call, key=key, value=value, attn_mask=mask))

    return handler


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("radius", [1, 2, 3.5])
def test_equals_its_mask_and_leaves_no_trace(name: str, radius: float) -> None:
    make, inputs, text, first, grid = MODELS[name]
    model = make()
    before = model(**inputs()).sample
    mask = circular_window_mask(grid, radius, text_length=text, text_first=first)
    with at.tap(model, masked(mask, grid=grid)):  # type: ignore[call-overload]
        expected = model(**inputs()).sample
    with CircularWindow(radius)(model) as run:
        found = model(**inputs()).sample
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, before)
    assert torch.equal(model(**inputs()).sample, before)
    assert not model._forward_pre_hooks
    assert run.stats["sparse_calls"] == run.stats["calls"] == {"flux": 3, "sd3": 2, "wan": 2}[name]
    assert run.density == pytest.approx(float(mask.float().mean()))
    assert "of all maps seen" in str(run)


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_a_radius_beyond_the_diagonal_changes_nothing(name: str) -> None:
    make, inputs, *_ = MODELS[name]
    model = make()
    with CircularWindow(100)(model) as run:
        found = model(**inputs()).sample
    torch.testing.assert_close(found, model(**inputs()).sample, rtol=1e-4, atol=1e-5)
    assert run.density == 1


@torch.no_grad()
@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_down_sampled_keys(name: str) -> None:
    make, _, text, first, _ = MODELS[name]
    model, grid = make(), (4, 6)
    inputs = flux_inputs(4, 6) if name == "flux" else sd3_inputs(8, 12)
    mask = circular_window_mask(grid, 2, text_length=text, text_first=first, down_factor=2)
    with at.tap(model, masked(mask, 2, grid)):  # type: ignore[call-overload]
        expected = model(**inputs).sample
    with CircularWindow(2, down_factor=2)(model):
        found = model(**inputs).sample
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_images_of_different_sizes_in_one_block() -> None:
    model = tiny_flux()
    with CircularWindow(2)(model):
        first = model(**flux_inputs()).sample
        model(**flux_inputs(6, 5))
        model(**flux_inputs(2, 2))
        again = model(**flux_inputs()).sample
    assert torch.equal(first, again)


@torch.no_grad()
def test_dual_attention_of_sd3_is_windowed_too() -> None:
    model = tiny_sd3(dual=True)
    with CircularWindow(2)(model) as run, at.tap(model) as calls:
        model(**sd3_inputs())
    assert sorted(call.key_length for call in calls if not call.is_cross) == [30, 33, 33]
    assert run.stats["sparse_calls"] == 3


@torch.no_grad()
def test_frames_apart() -> None:
    model, grid = tiny_wan(), (3, 5, 6)
    mask = circular_window_mask(grid, 2, frame_radius=1)
    with at.tap(model, masked(mask, grid=grid)):  # type: ignore[call-overload]
        expected = model(**wan_inputs()).sample
    with CircularWindow(2, frame_radius=1)(model) as run:
        found = model(**wan_inputs()).sample
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert run.density == pytest.approx(float(mask.float().mean()))


@torch.no_grad()
def test_handlers_further_in_get_a_mask() -> None:
    model = tiny_flux()
    with CircularWindow(2)(model):
        expected = model(**flux_inputs()).sample
    with CircularWindow(2)(model), at.tap(model) as calls:
        found = model(**flux_inputs()).sample
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    mask = circular_window_mask((5, 6), 2, text_length=3)
    assert all(torch.equal(call.attn_mask, mask) for call in calls)  # type: ignore[arg-type]
    inputs = flux_inputs(4, 6)
    with CircularWindow(2, down_factor=2)(model):
        expected = model(**inputs).sample
    with CircularWindow(2, down_factor=2)(model), at.tap(model) as calls:
        found = model(**inputs).sample
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert calls[0].key_length == 3 + 24 + 6


@torch.no_grad()
def test_scale_of_long_sequences() -> None:
    model = tiny_flux()

    def hotter(call: AttentionCall, proceed: Proceed) -> Tensor:
        return proceed(replace(call, scale=math.sqrt(math.log(33) / math.log(20) / 16)))

    with at.tap(model, hotter):
        expected = model(**flux_inputs()).sample
    with CircularWindow(100, log_length=True, base_length=20)(model):
        found = model(**flux_inputs()).sample
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_gradients_with_checkpointing_are_those_without() -> None:
    """Backward runs the blocks again, when another image has been through the model already."""
    grads = []
    for checkpointing in (False, True):
        model = tiny_flux()
        if checkpointing:
            model.enable_gradient_checkpointing()
        model.train()
        with CircularWindow(2)(model) as run:
            first = model(**flux_inputs()).sample
            model(**flux_inputs(3, 10))
        first.square().mean().backward()
        weight: Tensor = model.transformer_blocks[0].attn.to_q.weight  # type: ignore[union-attr]
        grads.append(weight.grad)
        assert run.stats["calls"] == 6
    torch.testing.assert_close(grads[0], grads[1])


@torch.no_grad()
def test_a_block_sparse_method_outside_sees_the_dense_call() -> None:
    model = tiny_wan()
    with (
        pytest.warns(InterventionWarning, match="gave no plan"),
        BlockSparse(lambda call, moment: None)(model),
        CircularWindow(2)(model) as inner,
    ):
        found = model(**wan_inputs()).sample
    with CircularWindow(2)(model):
        expected = model(**wan_inputs()).sample
    assert torch.equal(found, expected)
    assert inner.density < 1


def test_what_is_left_dense() -> None:
    window = CircularWindow(2)
    tokens = ImageTokens((5, 6), True)
    query = torch.zeros(1, 1, 30, 4)

    def call(**changes: object) -> AttentionCall:
        fields = {"name": "a", "layer": 0, "query": query, "key": query, "value": query}
        return AttentionCall(**fields | changes, module=nn.Identity())  # type: ignore[arg-type]

    assert window.why_dense(call(), tokens) is None
    short = torch.zeros(1, 1, 20, 4)
    for changes, words in (
        ({"key": short}, "other keys"),
        ({"key": short, "query": short}, "fewer tokens"),
        ({"is_causal": True}, "mask of its own"),
        ({"attn_mask": torch.ones(30, 30)}, "mask of its own"),
    ):
        assert words in str(window.why_dense(call(**changes), tokens))
    with pytest.raises(ValueError, match="text_first"):
        window.attend(call(), lambda call: call.query, ImageTokens((5, 5), None))
    with pytest.raises(ValueError, match="dropout"):
        window.attend(call(dropout_p=0.1), lambda call: call.query, tokens)


@torch.no_grad()
def test_a_given_grid() -> None:
    model = tiny_flux()
    with CircularWindow(2)(model):
        expected = model(**flux_inputs()).sample
    with CircularWindow(2, grid=(5, 6), text_first=True)(model):
        assert torch.equal(model(**flux_inputs()).sample, expected)
    with (
        pytest.warns(InterventionWarning, match="fewer tokens than the grid"),
        CircularWindow(2, grid=(50, 6))(model),
    ):
        model(**flux_inputs())


def test_errors() -> None:
    for options, words in (
        ({"radius": 0}, "radius"),
        ({"radius": 2, "down_factor": 0}, "down_factor"),
        ({"radius": 2, "frame_radius": 0}, "frame_radius"),
        ({"radius": 2, "grid": (3, 0)}, "grid"),
    ):
        with pytest.raises(ValueError, match=words):
            CircularWindow(**options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="grid: expected"):
        read_image_tokens(nn.Linear(2, 2), {"hidden_states": torch.zeros(1, 2)})
    ids = flux_inputs()["img_ids"]
    with pytest.raises(ValueError, match="img_ids"):
        read_image_tokens(nn.Identity(), {"img_ids": torch.cat([ids, ids])})
    assert read_image_tokens(nn.Identity(), {"img_ids": ids[None]}).grid == (5, 6)


def test_settings_on_disk(tmp_path) -> None:
    window = CircularWindow(2, down_factor=4, grid=(4, 4))
    path = save_settings(window, tmp_path / "window.json")
    assert load_settings(CircularWindow, path) == window
