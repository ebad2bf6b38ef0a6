"""VAR on maps: golden vectors of the official code, plain loops, invariants; and without maps."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from attending.interventions._visual_groups import Groups, edit
from attending.interventions.sink_dimensions import KNOWN_SINK_DIMENSIONS, sink_value
from attending.interventions.visual_attention_redistribution import (
    VisualAttentionRedistribution,
    redistribute_attention,
    select_image_centric_heads,
)
from attending.taps import AttentionCall
from tests.interventions.reference_visual_attention_redistribution import (
    redistributed,
    selected_heads,
    sink_values,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "visual-attention-redistribution"
CHOICE = {"min_image_mass": 0.2, "min_non_sink_ratio": 0.5}


@pytest.mark.parametrize("name", ["prefill", "decode"])
def test_golden_vectors_of_the_official_code(name: str) -> None:
    vectors = {key: torch.tensor(found) for key, found in np.load(GOLDEN / f"{name}.npz").items()}
    hidden, attention = vectors["hidden_states"], vectors["attn_in"]
    start, length = int(vectors["image_start"]), int(vectors["image_len"])
    queries, keys = attention.shape[2:]
    method = VisualAttentionRedistribution.from_official_code(
        vectors["sink_dims"].tolist(),
        tau=float(vectors["tau"]),
        rho=float(vectors["rho"]),
        summ=float(vectors["summ"]),
        p=float(vectors["keep_fraction"]),
    )
    assert method.move_fraction == pytest.approx(float(vectors["move_fraction"]))
    phi = sink_value(hidden, method.sink_dimensions)
    torch.testing.assert_close(phi[0], vectors["phi"], atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(phi, sink_values(hidden, list(method.sink_dimensions)))
    sinks = torch.zeros(1, keys, dtype=torch.bool)
    sinks[:, : hidden.shape[1]] = phi > method.tau
    assert sinks[0].nonzero().flatten().tolist() == vectors["sink_index"].tolist()
    image = torch.zeros(1, keys, dtype=torch.bool)
    image[:, start : start + length] = True
    text = torch.arange(queries)[None] + keys - queries >= start + length
    thresholds = {
        "min_image_mass": method.min_image_mass,
        "min_non_sink_ratio": method.min_non_sink_ratio,
    }
    selected = select_image_centric_heads(attention, image, sinks, query_mask=text, **thresholds)
    assert torch.equal(selected, vectors["modified_rows"])
    assert torch.equal(selected, selected_heads(attention, image, sinks, text, **thresholds))
    output = redistribute_attention(attention, image, sinks, selected, method.move_fraction)
    torch.testing.assert_close(output, vectors["attn_out"], atol=1e-12, rtol=1e-12)
    by_loops = redistributed(attention, image, sinks, selected, method.move_fraction)
    torch.testing.assert_close(by_loops, vectors["attn_out"], atol=1e-12, rtol=1e-12)


@st.composite
def maps(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    """A map, which keys are image tokens, which are sinks."""
    batch, heads = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    queries, keys = draw(st.integers(1, 6)), draw(st.integers(1, 9))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    scores = 2 * torch.randn(batch, heads, queries, keys, generator=generator, dtype=torch.float64)
    scores = scores.masked_fill(torch.rand(scores.shape, generator=generator) < 0.2, -torch.inf)
    attention = scores.softmax(-1).nan_to_num(0.0)  # a row that sees nothing is 0
    image, sinks = (torch.rand(2, batch, keys, generator=generator) < 0.5).unbind(0)
    return attention, image, sinks


@given(maps(), st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
def test_maps_against_loops(example, mass: float, ratio: float, fraction: float) -> None:
    attention, image, sinks = example
    everyone = torch.ones(attention.shape[0], attention.shape[2], dtype=torch.bool)
    for required in (True, False):
        selected = select_image_centric_heads(
            attention,
            image,
            sinks,
            min_image_mass=mass,
            min_non_sink_ratio=ratio,
            require_visual_sink=required,
        )
        expected = selected_heads(attention, image, sinks, everyone, mass, ratio, required)
        assert torch.equal(selected, expected)
    output = redistribute_attention(attention, image, sinks, selected, fraction)
    expected = redistributed(attention, image, sinks, selected, fraction)
    torch.testing.assert_close(output, expected, atol=1e-12, rtol=1e-12)


@given(maps(), st.floats(0, 1))
def test_invariants_of_the_map(example, fraction: float) -> None:
    attention, image, sinks = example
    selected = select_image_centric_heads(attention, image, sinks, **CHOICE)
    output = redistribute_attention(attention, image, sinks, selected, fraction)
    assert bool((output >= 0).all())
    torch.testing.assert_close(output.sum(-1), attention.sum(-1))
    assert torch.equal(output[~selected], attention[~selected])
    others = (~image & ~sinks)[:, None, None].expand_as(output)
    assert torch.equal(output[others], attention[others])
    inside = (image & ~sinks)[:, None, None]
    gained = ((output - attention) * inside).sum(-1)[selected]
    lost = (attention * sinks[:, None, None]).sum(-1)[selected]
    torch.testing.assert_close(gained, fraction * lost, atol=1e-12, rtol=1e-9)
    for row in (selected).nonzero().tolist():
        before, after = attention[tuple(row)], output[tuple(row)]
        seen = inside[row[0], 0, 0] & (before > 0)
        growth = after[seen] / before[seen]
        torch.testing.assert_close(growth, growth[:1].expand_as(growth))
    assert torch.equal(redistribute_attention(attention, image, sinks, selected, 0.0), attention)
    none = select_image_centric_heads(attention, image, sinks, min_non_sink_ratio=1.5)
    assert not bool(none.any())
    assert not bool(select_image_centric_heads(attention, image, sinks & ~image).any())


def test_a_row_with_nothing_beside_the_sinks_stays() -> None:
    attention = torch.tensor([0.5, 0.5, 0.0]).reshape(1, 1, 1, 3)
    image, sinks = torch.tensor([[[True, True, True]], [[True, True, False]]])
    assert not bool(select_image_centric_heads(attention, image, sinks, min_non_sink_ratio=0).any())
    selected = torch.ones(1, 1, 1, dtype=torch.bool)
    assert torch.equal(redistribute_attention(attention, image, sinks, selected), attention)


@given(st.integers(0, 10_000), st.sampled_from([0.5, 3.0, 1e4]))
def test_phi_has_no_scale_and_a_ceiling(seed: int, factor: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(2, 3, 16, generator=generator) ** 5
    phi = sink_value(hidden, (3, 7))
    torch.testing.assert_close(sink_value(factor * hidden, (3, 7)), phi, atol=1e-3, rtol=1e-2)
    assert bool((phi <= 4).all())
    single = nn.functional.one_hot(torch.tensor([3]), 16).half() * 1000
    torch.testing.assert_close(sink_value(single, (3,)), torch.tensor([4.0]))
    torch.testing.assert_close(
        sink_value(hidden, (3, 7)).double(), sink_values(hidden, [3, 7]), atol=1e-5, rtol=1e-5
    )


@st.composite
def calls(draw: st.DrawFn) -> tuple[AttentionCall, Groups, Tensor]:
    """A call with its groups, and which of its map is visible."""
    batch, kv_heads, group = (draw(st.integers(1, 2)) for _ in range(3))
    keys = draw(st.integers(1, 12))
    kind = draw(st.sampled_from(["causal", "none", "bool", "float", "decode"]))
    queries = 1 if kind == "decode" else keys
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    dim, width = draw(st.sampled_from([(4, 4), (3, 5), (6, 2)]))
    query = torch.randn(batch, group * kv_heads, queries, dim, generator=generator)
    key = torch.randn(batch, kv_heads, keys, dim, generator=generator)
    value = torch.randn(batch, kv_heads, keys, width, generator=generator)
    past = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    visible = past.expand(batch, 1, queries, keys)
    mask = None
    if kind in ("bool", "float"):  # left padding; what a padded query sees does not matter
        padding = torch.arange(keys) < torch.randint(0, keys, (batch, 1), generator=generator)
        visible = visible & ~padding[:, None, None] | padding[:, None, :, None]
        mask = visible
        if kind == "float":
            mask = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    if kind == "none":
        visible = torch.ones_like(visible)
    random = torch.rand(2, batch, keys, generator=generator)
    image, sinks = random[0] < 0.6, random[1] < 0.4
    asking = torch.rand(batch, queries, generator=generator) < 0.8
    call = AttentionCall(
        name="layers.0",
        layer=0,
        query=query.double(),
        key=key.double(),
        value=value.double(),
        attn_mask=mask,
        is_causal=kind == "causal",
        scale=draw(st.sampled_from([None, 1.3])),
        enable_gqa=group > 1,
        module=nn.Identity(),
    )
    return call, Groups(image & ~sinks, image & sinks, sinks & ~image, asking), visible


def attend(call: AttentionCall) -> Tensor:
    names = ["query", "key", "value", "attn_mask", "is_causal", "scale", "enable_gqa"]
    return scaled_dot_product_attention(**{name: getattr(call, name) for name in names})


def attention_map(call: AttentionCall, visible: Tensor) -> Tensor:
    key = call.key.repeat_interleave(call.num_heads // call.key.shape[1], 1)
    scores = call.softmax_scale * call.query @ key.mT
    return scores.masked_fill(~visible, -torch.inf).softmax(-1)


@settings(max_examples=200)
@given(calls(), st.floats(0, 1), st.floats(0, 1))
def test_without_a_map(example, ratio: float, fraction: float) -> None:
    call, groups, visible = example
    if call.attn_mask is not None and call.attn_mask.is_floating_point():
        call = replace(call, attn_mask=call.attn_mask.double())
    attention = attention_map(call, visible)
    image, sinks = groups.inside | groups.image_sinks, groups.image_sinks | groups.text_sinks
    found = edit(
        call,
        attend,
        groups,
        min_image_mass=0.2,
        min_non_sink_ratio=ratio,
        move_fraction=fraction,
    )
    selected = selected_heads(attention, image, sinks, groups.queries, 0.2, ratio, False)
    close = near_a_threshold(attention, groups, ratio)
    assert torch.equal(found.selected[~close], selected[~close])
    edited = redistributed(attention, image, sinks, found.selected, fraction)
    value = call.value.repeat_interleave(call.num_heads // call.key.shape[1], 1)
    torch.testing.assert_close(found.output, edited @ value, atol=1e-9, rtol=1e-9)


def near_a_threshold(attention: Tensor, groups: Groups, ratio: float) -> Tensor:
    inside, sinks = (
        (attention * mask[:, None, None]).sum(-1) for mask in (groups.inside, groups.image_sinks)
    )
    return ((inside + sinks - 0.2).abs() < 1e-9) | (
        (inside - ratio * (inside + sinks)).abs() < 1e-9
    )


def test_gradients_against_float64_maps() -> None:
    torch.manual_seed(3)
    tensors = [torch.randn(1, 2, 8, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    image, sinks = torch.zeros(2, 1, 8, dtype=torch.bool).unbind(0)
    image[:, 1:6] = True
    sinks[:, [0, 2]] = True
    groups = Groups(image & ~sinks, image & sinks, sinks & ~image, torch.arange(8)[None] >= 6)

    def output(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        call = AttentionCall(
            name="",
            layer=0,
            query=query,
            key=key,
            value=value,
            is_causal=True,
            module=nn.Identity(),
        )
        found = edit(
            call, attend, groups, min_image_mass=0.1, min_non_sink_ratio=0.3, move_fraction=0.6
        )
        assert bool(found.selected.any())
        return found.output

    assert torch.autograd.gradcheck(output, tensors)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
def test_half_precision(dtype: torch.dtype, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 2, 9, 8, generator=generator).to(dtype) for _ in range(3))
    image, sinks = torch.zeros(2, 2, 9, dtype=torch.bool).unbind(0)
    image[:, 1:6] = True
    sinks[:, [0, 2]] = True
    groups = Groups(
        image & ~sinks, image & sinks, sinks & ~image, (torch.arange(9) >= 6).expand(2, 9)
    )
    call = AttentionCall(
        name="", layer=0, query=query, key=key, value=value, is_causal=True, module=nn.Identity()
    )
    options = {"min_image_mass": 0.2, "min_non_sink_ratio": 0.5, "move_fraction": 0.6}
    found = edit(call, attend, groups, **options)
    exact = replace(call, query=query.double(), key=key.double(), value=value.double())
    expected = edit(exact, attend, groups, **options)
    assert found.output.dtype == dtype
    assert torch.equal(found.selected, expected.selected)
    assert bool(found.selected.any())
    torch.testing.assert_close(found.output.double(), expected.output, atol=tolerance, rtol=0.0)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="tau: expected a number above 0"):
        VisualAttentionRedistribution(tau=0)
    with pytest.raises(ValueError, match='convention: expected "paper"'):
        VisualAttentionRedistribution(convention="code")
    with pytest.raises(ValueError, match="skip_last: expected 0 or more"):
        VisualAttentionRedistribution(skip_last=-1)
    with pytest.raises(ValueError, match="move_fraction: expected a share"):
        VisualAttentionRedistribution(move_fraction=1.5)
    with pytest.raises(ValueError, match="min_image_mass: expected a share"):
        VisualAttentionRedistribution(min_image_mass=2)
    with pytest.raises(ValueError, match="min_non_sink_ratio: expected a number"):
        VisualAttentionRedistribution(min_non_sink_ratio=-1)
    with pytest.raises(ValueError, match=r"sink_dimensions: .*between 0 and 7.*find_sink"):
        sink_value(torch.zeros(1, 2, 8), (8,))
    with pytest.raises(ValueError, match=r"sink_dimensions: expected at least one"):
        sink_value(torch.zeros(1, 2, 8), ())
    with pytest.raises(ValueError, match=r"hidden: expected a float tensor"):
        sink_value(torch.zeros(1, 2, 8).long(), (1,))
    attention, mask = torch.ones(1, 1, 1, 3) / 3, torch.ones(1, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"sink_mask: .*\[1, 3\], got torch.float32"):
        select_image_centric_heads(attention, mask, mask.float())
    with pytest.raises(ValueError, match=r"image_mask: .*\[1, 3\], got torch.bool \[1, 2\]"):
        select_image_centric_heads(attention, mask[:, :2], mask)
    with pytest.raises(ValueError, match=r"attention: expected a map"):
        select_image_centric_heads(attention[0], mask, mask)


def test_the_known_channels_are_data() -> None:
    assert KNOWN_SINK_DIMENSIONS["LLaMA-2-7B"].dimensions == (1415, 2533)
    assert "LLaVA-1.5-7B" in KNOWN_SINK_DIMENSIONS["LLaMA-2-7B"].models
    assert all(one.dimensions and one.evidence for one in KNOWN_SINK_DIMENSIONS.values())
