"""Masks of frames in a real video transformer, and the search for them."""

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from attending.interventions.block_sparse import BlockSparse
from attending.interventions.frame_reference_attention import FrameReferenceAttention
from attending.interventions.layer_search import LayerSearch, frame_planner, search_layer_masks
from attending.interventions.settings import load_settings, save_settings
from attending.sparse.frame_masks import frame_reference_mask, frame_token_mask, frame_window_mask
from attending.taps import tap
from tests.interventions.denoisers import wan

GOLDEN = Path(__file__).parents[1] / "golden" / "efficient-vdit" / "layer_search.npz"
FRAMES, TOKENS = 5, 4


def inputs(seed: int = 0, timestep: float = 500.0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(2, 3, FRAMES, 4, 4, generator=generator),
        "timestep": torch.full((2,), timestep),
        "encoder_hidden_states": torch.randn(2, 5, 8, generator=generator),
    }


def masked_by_hand(model, masks):
    """The same through a dense call with a mask of tokens."""

    def attend(call, proceed):
        mask = None if call.is_cross else masks.get(call.layer)
        if mask is None:
            return proceed(call)
        return proceed(replace(call, attn_mask=frame_token_mask(mask, TOKENS)))

    return tap(model, attend)


@pytest.mark.parametrize("block_size", [None, 3])
def test_a_real_video_transformer_under_masks_and_no_trace(block_size):
    model = wan()
    masks = {0: frame_reference_mask(FRAMES, 1), 2: frame_window_mask(FRAMES, 1)}
    before = copy.deepcopy(model.state_dict())
    plain = model(**inputs()).sample
    with torch.no_grad(), masked_by_hand(model, masks):
        wanted = model(**inputs()).sample
    method = FrameReferenceAttention(masks, TOKENS, block_size=block_size)
    with method(model) as run:
        found = model(**inputs()).sample
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert (found - plain).abs().max() > 1e-4
    assert run.stats["sparse_calls"] == 2
    assert run.stats["dense_calls"] == 1
    if block_size is None:
        kept = 1 - (FRAMES - 1) * (FRAMES - 2) / FRAMES**2
        assert run.density == pytest.approx((2 * kept + 1) / 3)
    assert torch.equal(model(**inputs()).sample, plain)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert not any(module._forward_hooks for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_rounded_blocks_see_more_and_names_go_before_numbers():
    model, mask = wan(), frame_reference_mask(FRAMES, 1)
    with torch.no_grad():
        plain = model(**inputs()).sample
        with FrameReferenceAttention(mask, TOKENS, block_size=10, exact=False)(model) as run:
            rounded = model(**inputs()).sample
        assert run.density == 1.0  # two blocks a side: nothing is left out
        torch.testing.assert_close(rounded, plain)
        full = torch.ones(FRAMES, FRAMES, dtype=torch.bool)
        masks = {0: mask, "blocks.0.attn1": full}
        with FrameReferenceAttention(masks, TOKENS)(model):
            torch.testing.assert_close(model(**inputs()).sample, plain)


def test_gradients_are_those_of_the_mask():
    model, masks = wan(layers=2), {1: frame_reference_mask(FRAMES, 2)}

    def gradients(context):
        model.zero_grad()
        with context:
            model(**inputs()).sample.square().sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    found = gradients(FrameReferenceAttention(masks, TOKENS)(model))
    wanted = gradients(masked_by_hand(model, masks))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_a_mask_that_the_model_has_stays():
    class Padded(nn.Module):
        def forward(self, x, mask):
            return scaled_dot_product_attention(x, x, x, attn_mask=mask)

    torch.manual_seed(0)
    x = torch.randn(1, 2, 9, 4, dtype=torch.float64)
    padding = torch.arange(9) < 7
    frames = frame_window_mask(3, 1)
    shown = frame_token_mask(frames, 3) & padding
    wanted = scaled_dot_product_attention(x, x, x, attn_mask=shown)
    hidden = torch.zeros(9, dtype=torch.float64).masked_fill(~padding, -torch.inf)
    for mask in (padding.view(1, 1, 1, 9), hidden.view(1, 1, 1, 9)):
        for block_size in (None, 2):
            model = Padded()
            with FrameReferenceAttention(frames, 3, block_size=block_size)(model):
                torch.testing.assert_close(model(x, mask), wanted)


def test_text_in_the_same_sequence_sees_all_and_is_seen_by_all():
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
        sample_width=4,
        sample_height=4,
        sample_frames=4 * FRAMES - 3,
        max_text_seq_length=3,
    ).eval()
    given = {
        "hidden_states": torch.randn(1, FRAMES, 3, 4, 4),
        "encoder_hidden_states": torch.randn(1, 3, 8),
        "timestep": torch.tensor([500]),
    }
    mask = frame_reference_mask(FRAMES, 1)
    shown = frame_token_mask(mask, TOKENS, text_tokens=3)

    def by_hand(call, proceed):
        return proceed(replace(call, attn_mask=shown))

    with torch.no_grad():
        plain = model(**given).sample
        with tap(model, by_hand):
            wanted = model(**given).sample
        for block_size in (None, 1, 5):
            method = FrameReferenceAttention(mask, TOKENS, text_tokens=3, block_size=block_size)
            with method(model):
                torch.testing.assert_close(model(**given).sample, wanted, rtol=1e-4, atol=1e-5)
    assert (plain - wanted).abs().max() > 1e-4


def test_settings_are_stored(tmp_path):
    method = FrameReferenceAttention(
        {0: frame_reference_mask(4, 2), "b": frame_window_mask(4, 1)}, 8
    )
    found = load_settings(FrameReferenceAttention, save_settings(method, tmp_path / "masks.json"))
    assert found.tokens_per_frame == 8
    assert all(torch.equal(found.masks[key], mask) for key, mask in method.masks.items())


def test_what_does_not_fit_is_named():
    model = wan(layers=1)
    with (
        pytest.raises(ValueError, match="after the patches"),
        FrameReferenceAttention(frame_reference_mask(4, 1), TOKENS)(model),
    ):
        model(**inputs())
    with pytest.raises(ValueError, match="masks: expected a mask"):
        FrameReferenceAttention({}, 4)
    with pytest.raises(ValueError, match="mask: expected booleans"):
        FrameReferenceAttention(torch.ones(3, 2, dtype=torch.bool), 4)


class Layers(nn.Module):
    """Attention over queries, keys and values that are given, a layer after the other."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Attention() for _ in range(count))

    def forward(self, query, key, value):
        return [
            block(*tensors) for block, *tensors in zip(self.blocks, query, key, value, strict=True)
        ]


class Attention(nn.Module):
    def forward(self, query, key, value):
        return scaled_dot_product_attention(query, key, value)


def test_golden_search():
    vectors = np.load(GOLDEN)
    query, key, value = (torch.from_numpy(vectors[name]) for name in "qkv")
    masks = [torch.from_numpy(mask) for mask in vectors["frame_masks"]]
    names = [str(k) for k in vectors["reference_counts"]]
    tokens = int(vectors["tokens_per_frame"])
    model = Layers(len(query))
    search = search_layer_masks(
        model,
        lambda: model(query, key, value),
        {name: frame_planner(mask, tokens) for name, mask in zip(names, masks, strict=True)},
        float(vectors["threshold"]),
    )
    found = torch.tensor([[row[name] for name in names] for row in search.errors.values()])
    torch.testing.assert_close(
        found.double(), torch.from_numpy(vectors["mse"]), rtol=1e-6, atol=1e-10
    )
    for row, wanted in zip(search.errors.values(), vectors["mse"], strict=True):
        assert max(abs(row[name] - w) for name, w in zip(names, wanted, strict=True)) <= 1e-10
    picked = [-1 if name is None else names.index(name) for name in search.choose().values()]
    assert picked == vectors["picked"].tolist()
    for row in search.densities.values():
        assert [1 - row[name] for name in names] == pytest.approx(vectors["sparsity"].tolist())
    assert list(search.choose(torch.inf).values()) == ["1"] * len(query)
    assert list(search.choose(-1.0).values()) == [None] * len(query)
    assert search.density(-1.0) == 1.0
    assert "layer" in str(search)


@pytest.mark.parametrize("probe", ["attention", "block", "output"])
@pytest.mark.parametrize("metric", ["mse", "relative_mse"])
def test_errors_are_those_of_a_layer_alone(probe, metric):
    model = wan(layers=2)
    # Weights of training size: at random ones, blocks differ by rounding only.
    for parameter in model.parameters():
        parameter.data.mul_(2.0)
    batches = [inputs(0, 900.0), inputs(1, 100.0)]
    masks = {str(k): frame_reference_mask(FRAMES, k) for k in (2, 1)}

    def run():
        return torch.cat([model(**batch).sample for batch in batches])

    def outputs():
        kept = {"attention": [], "block": []}
        block = model.blocks[1].register_forward_hook(lambda m, a, out: kept["block"].append(out))

        def keep(call, proceed):
            found = proceed(call)
            if call.name == "blocks.1.attn1":
                kept["attention"].append(found)
            return found

        with torch.no_grad(), tap(model, keep):
            kept["output"] = [run()]
        block.remove()
        return torch.cat(kept[probe])

    candidates = {name: frame_planner(mask, TOKENS) for name, mask in masks.items()}
    search = search_layer_masks(model, run, candidates, 0.0, metric=metric, probe=probe)
    dense = outputs()
    for name, mask in masks.items():
        # The tap that records is the inner one: it sees what the mask makes of the call.
        with masked_by_hand(model, {1: mask}):
            error = (outputs() - dense).double().square().mean()
        if metric == "relative_mse":
            error = error / dense.double().square().mean()
        assert search.errors["blocks.1.attn1"][name] == pytest.approx(error.item(), rel=1e-3)
    assert list(search.errors) == ["blocks.0.attn1", "blocks.1.attn1"]
    chosen = search.choose(torch.inf)
    with torch.no_grad(), BlockSparse(search.planner(torch.inf))(model) as one:
        by_planner = run()
    method = FrameReferenceAttention(search.entries(masks, torch.inf), TOKENS)
    with torch.no_grad(), method(model):
        torch.testing.assert_close(run(), by_planner)
    assert one.density == pytest.approx(search.density(torch.inf))
    assert set(chosen.values()) == {"1"}


LEVELS = st.floats(0, 1, allow_nan=False)


@given(st.lists(st.lists(LEVELS, min_size=3, max_size=3), min_size=1, max_size=4), LEVELS, LEVELS)
def test_a_larger_budget_is_never_denser(table, one, other):
    names = ["a", "b", "c"]
    errors = {f"layer{n}": dict(zip(names, row, strict=True)) for n, row in enumerate(table)}
    densities = {layer: {"a": 0.2, "b": 0.5, "c": 0.8} for layer in errors}
    planners = dict.fromkeys(names, lambda call, moment: None)
    search = LayerSearch(errors, errors, densities, planners, one, "mse", "attention")
    low, high = sorted((one, other))
    assert search.density(high) <= search.density(low)
    for layer, name in search.choose().items():
        within = [n for n in names if errors[layer][n] <= one]
        assert name == (within[0] if within else None)
    for target in (0.2, 0.5, 0.9):
        threshold = search.threshold_for(target)
        assert search.density(threshold) <= target + 1e-9
    with pytest.raises(ValueError, match="sparser candidates"):
        search.threshold_for(0.1)


def test_a_search_says_what_does_not_fit():
    model = wan(layers=1)
    planners = {"1": frame_planner(frame_reference_mask(FRAMES, 1), TOKENS)}
    with pytest.raises(ValueError, match="candidates"):
        search_layer_masks(model, lambda: None, {}, 0.1)
    with pytest.raises(ValueError, match="metric, probe"):
        search_layer_masks(model, lambda: None, planners, 0.1, metric="mae")
    with pytest.raises(ValueError, match="return what the model returned"):
        search_layer_masks(model, lambda: model(**inputs()) and None, planners, 0.1, probe="output")
