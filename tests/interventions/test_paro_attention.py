from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import attending as at
from attending.interventions.intervention import InterventionWarning
from attending.interventions.paro_attention import PAROAttention, watch
from attending.interventions.settings import load_settings
from attending.sparse.axis_order import head_token_index, inverse_index
from attending.sparse.paro import PAROPlan
from attending.sparse.paro_calibration import PAROCalibration
from attending.taps import AttentionCall, Proceed, tap
from tests.interventions.tiny_denoisers import flux_inputs, tiny_flux, tiny_wan, wan_inputs

GRID = (3, 5, 6)  # of wan_inputs: 90 tokens
STEPS = 4


def sampled(model: nn.Module, steps: int = STEPS, frames: int = 3) -> Tensor:
    """Euler steps from noise, with two branches in each."""
    inputs = wan_inputs(frames)
    text = inputs["encoder_hidden_states"]
    latents = inputs["hidden_states"]
    with torch.no_grad():
        for step in range(steps):
            given = {"timestep": torch.tensor([1000.0 * (1 - step / steps)])}
            cond = model(latents, encoder_hidden_states=text, **given).sample
            plain = model(latents, encoder_hidden_states=0 * text, **given).sample
            latents = latents - (plain + 2 * (cond - plain)) / steps
    return latents


def calibrated(model: nn.Module, **options: Any) -> PAROAttention:
    settings: dict[str, Any] = {"steps": STEPS, "block_size": 16, "timestep_bins": 4, "eps": 5e-3}
    return PAROAttention.calibrate(model, lambda: sampled(model), GRID, **settings | options)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """With a text that matters: larger weights than at the start of training."""
    wan = tiny_wan()
    with torch.no_grad():
        for parameter in wan.parameters():
            parameter.mul_(2.0)
    return wan


@pytest.fixture(scope="module")
def paro(model: nn.Module) -> PAROAttention:
    return calibrated(model, density=0.5)


def test_it_is_the_map_with_blocks_hidden(model: nn.Module, paro: PAROAttention) -> None:
    """Against a handler that hides, in the order of the model, what the plan leaves out."""
    plan = paro.plan
    steps = iter(range(2 * STEPS * len(plan.layers)))

    def hide(call: AttentionCall, proceed: Proceed) -> Tensor:
        if call.is_cross:
            return proceed(call)
        step = next(steps) // (2 * len(plan.layers))
        row = plan.layers.index(call.name)
        place = inverse_index(head_token_index(GRID, plan.orders[row].tolist())) // 16
        mask = plan.masks()[min(step, 2), row]
        shown = torch.stack(
            [one[of[:, None], of[None]] for one, of in zip(mask, place, strict=True)]
        )
        return scaled_dot_product_attention(call.query, call.key, call.value, attn_mask=shown[None])

    with tap(model, hide):
        expected = sampled(model)
    with paro(model) as run:
        found = sampled(model)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not torch.equal(found, sampled(model))
    calls = 2 * STEPS * len(plan.layers)
    assert run.stats["calls"] == run.stats["sparse_calls"] == calls
    assert run.density == pytest.approx(plan.density, abs=0.03)
    assert len(plan.packed_masks) == 3  # 0, 1, and one for the second half


def test_no_trace(model: nn.Module, paro: PAROAttention) -> None:
    before = sampled(model)
    hooks = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()]
    with paro(model):
        sampled(model)
    assert torch.equal(sampled(model), before)
    assert hooks == [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()]


def test_all_blocks_are_dense_attention(model: nn.Module, paro: PAROAttention) -> None:
    whole = PAROAttention(paro.plan.dense())
    with whole(model) as run:
        found = sampled(model)
    torch.testing.assert_close(found, sampled(model), rtol=1e-4, atol=1e-5)
    assert run.density == 1.0


def test_saved_and_loaded(model: nn.Module, paro: PAROAttention, tmp_path: Path) -> None:
    path = paro.save(tmp_path / "paro.json")
    loaded = PAROAttention.load(path)
    assert torch.equal(loaded.plan.masks(), paro.plan.masks())
    assert torch.equal(loaded.plan.orders, paro.plan.orders)
    assert loaded.plan.layers == paro.plan.layers
    assert loaded.plan.grid == paro.plan.grid
    with loaded(model):
        again = sampled(model)
    with paro(model):
        assert torch.equal(sampled(model), again)
    plan = at.interventions.save_settings(paro.plan, tmp_path / "plan.json")
    assert load_settings(PAROPlan, plan).density == paro.plan.density


def test_a_tap_inside_sees_a_dense_call(model: nn.Module, paro: PAROAttention) -> None:
    with paro(model) as run:
        alone = sampled(model)
    with paro(model) as nested, tap(model) as calls:
        found = sampled(model)
    torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-5)
    masks = [call.attn_mask for call in calls if not call.is_cross]
    assert all(mask is not None for mask in masks)
    share = sum(float(mask.double().mean()) for mask in masks if mask is not None) / len(masks)
    assert nested.density == run.density
    assert share == pytest.approx(run.density, abs=0.1)  # blocks at the end are shorter
    with (
        pytest.raises(ValueError, match="quant, renormalize"),
        PAROAttention(paro.plan, quant="int8")(model),
        tap(model),
    ):
        sampled(model)


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("quant", [None, "int8"])
def test_variants_run(model: nn.Module, paro: PAROAttention, quant: Any, renormalize: bool) -> None:
    with PAROAttention(paro.plan, quant=quant, renormalize=renormalize)(model):
        found = sampled(model)
    assert bool(found.isfinite().all())
    with paro(model):
        plain = sampled(model)
    assert torch.equal(found, plain) == (quant is None and renormalize)


def test_int8_alone_is_close(model: nn.Module, paro: PAROAttention) -> None:
    with PAROAttention(paro.plan.dense(), quant="int8")(model):
        found = sampled(model)
    exact = sampled(model)
    assert 0 < float((found - exact).norm() / exact.norm()) < 0.05


def test_other_numbers_of_steps(model: nn.Module, paro: PAROAttention) -> None:
    """Twice as many steps: told, each mask serves twice as long; not told, the last one does."""
    told, untold = PAROAttention(paro.plan, steps=8), paro
    with told(model) as run:
        longer = sampled(model, 8)
    assert run.clock.generations == 1
    with untold(model) as run:
        other = sampled(model, 8)
    assert run.clock.generations == 1
    assert not torch.equal(longer, other)
    with told(model) as run:
        sampled(model, 8)
        again = sampled(model, 8)
    assert run.clock.generations == 2
    assert torch.equal(longer, again)


def test_several_densities_from_one_calibration(model: nn.Module) -> None:
    calibration = PAROCalibration(GRID, steps=STEPS, block_size=16, timestep_bins=2)
    watch(model, lambda: sampled(model), calibration)
    thin, thick = calibration.plan(0.4), calibration.plan(0.8)
    assert thin.density < thick.density
    assert bool((thick.masks() | ~thin.masks()).all())
    assert torch.equal(thin.orders, thick.orders)


def test_one_call_and_images(model: nn.Module) -> None:
    """Keyword arguments in place of a sampling; a single frame is an image of two axes."""
    paro = PAROAttention.calibrate(
        model, wan_inputs(1), (5, 6), density=0.7, block_size=6, candidates=["WH"]
    )
    assert set(paro.plan.names(0)) == {"WH"}
    with paro(model) as run:
        sampled(model, frames=1)
    assert run.density == pytest.approx(0.7, abs=0.05)


def by_hand(plan: PAROPlan, text: int) -> Any:
    """A handler that hides, in the order of the model, what the plan leaves out of its one step."""

    def hide(call: AttentionCall, proceed: Proceed) -> Tensor:
        row = plan.layers.index(call.name)
        index = head_token_index(plan.grid, plan.orders[row].tolist(), text_tokens=text)
        place = inverse_index(index) // plan.block_size
        shown = torch.stack(
            [
                one[of[:, None], of[None]]
                for one, of in zip(plan.masks()[0, row], place, strict=True)
            ]
        )
        return proceed(replace(call, attn_mask=shown[None]))

    return hide


def test_cogvideox_has_text_before_the_video() -> None:
    from diffusers import CogVideoXTransformer3DModel

    torch.manual_seed(0)
    model = CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=3,
        out_channels=3,
        time_embed_dim=8,
        text_embed_dim=8,
        num_layers=2,
        sample_width=8,
        sample_height=4,
        sample_frames=9,
        max_text_seq_length=3,
    ).eval()
    given = {
        "hidden_states": torch.randn(1, 3, 3, 4, 8),
        "encoder_hidden_states": torch.randn(1, 3, 8),
        "timestep": torch.tensor([500]),
    }
    options = {"density": 0.6, "block_size": 4, "text_tokens": 3, "candidates": ["WHF", "HWF"]}
    paro = PAROAttention.calibrate(model, given, (3, 2, 4), **options)
    assert len(paro.plan.layers) == 2
    with torch.no_grad(), paro(model) as run:
        found = model(**given).sample
    with torch.no_grad(), tap(model, by_hand(paro.plan, 3)):
        torch.testing.assert_close(found, model(**given).sample, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        assert float((found - model(**given).sample).abs().max()) > 1e-4
    assert run.stats["sparse_calls"] == 2


def test_flux_has_two_kinds_of_blocks_and_two_axes() -> None:
    """Both kinds count their layers from 0: the plan knows them by name."""
    model, given = tiny_flux(), flux_inputs()
    text = given["encoder_hidden_states"].shape[1]
    options = {"density": 0.6, "block_size": 4, "text_tokens": text}
    paro = PAROAttention.calibrate(model, given, (5, 6), **options)
    assert len(paro.plan.layers) == len(set(paro.plan.layers)) > 2
    assert {name for layer in paro.plan.layers for name in paro.plan.names(layer)} <= {"HW", "WH"}
    with torch.no_grad(), paro(model) as run:
        found = model(**given).sample
    with torch.no_grad(), tap(model, by_hand(paro.plan, text)):
        torch.testing.assert_close(found, model(**given).sample, rtol=1e-4, atol=1e-5)
    assert run.stats["sparse_calls"] == run.stats["calls"] == len(paro.plan.layers)


def test_other_tokens_stay_dense(model: nn.Module, paro: PAROAttention) -> None:
    with pytest.warns(InterventionWarning, match="the plan is for 90 tokens"), paro(model) as run:
        found = sampled(model, frames=2)
    assert run.density == 1.0
    assert torch.equal(found, sampled(model, frames=2))


def test_what_is_refused(model: nn.Module) -> None:
    with pytest.raises(ValueError, match="steps: expected 4, as many as the run had, got 3"):
        calibrated(model, steps=3)
    with pytest.raises(ValueError, match=r"grid: expected one that .* got 120"):
        PAROAttention.calibrate(model, lambda: sampled(model), (4, 5, 6), steps=STEPS)
    with pytest.raises(ValueError, match="steps: expected the number"):
        PAROAttention.calibrate(model, lambda: sampled(model), GRID)
    with pytest.raises(ValueError, match="density"):
        calibrated(model, density=0.0)
