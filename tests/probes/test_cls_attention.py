"""Attention of the class token: golden vectors, the maps transformers reports, and what holds."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from attending.probes.cls_attention import (
    cls_attention,
    outlier_tokens,
    received_attention,
    top_share,
    topk_overlap,
)
from attending.probes.patch_watch import (
    patch_attention,
    prefix_tokens,
    vision_tower,
    watch_patches,
)
from attending.taps import TapError

GOLDEN = Path(__file__).parents[1] / "golden" / "damro"
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 24,
    "patch_size": 8,
    "initializer_range": 0.5,
}


def clip() -> CLIPVisionModel:
    return CLIPVisionModel(CLIPVisionConfig(**SMALL)).eval()


def siglip() -> SiglipVisionModel:
    return SiglipVisionModel(SiglipVisionConfig(**SMALL)).eval()


def registers() -> Dinov2WithRegistersModel:
    small = {key: value for key, value in SMALL.items() if key != "intermediate_size"}
    return Dinov2WithRegistersModel(
        Dinov2WithRegistersConfig(**small, num_register_tokens=3)
    ).eval()


def heads_of(projected: Tensor, num_heads: int) -> Tensor:
    return projected.unflatten(-1, (num_heads, -1)).transpose(1, 2)


@pytest.mark.parametrize("case", ["a", "b"])
def test_golden(case: str) -> None:
    data = np.load(GOLDEN / f"cls_outlier_{case}.npz")
    num_heads, k = int(data["num_heads"]), int(data["topk"])
    query, key = (
        heads_of(torch.from_numpy(data[name]), num_heads) for name in ("q_proj_out", "k_proj_out")
    )
    features = torch.from_numpy(data["patch_features"])
    for reduce, attention, name in (
        ("merged", "cls_attn_merged", "merged"),
        ("mean", "cls_attn_head_mean", "head_mean"),
    ):
        ours = cls_attention(query, key, reduce=reduce)
        torch.testing.assert_close(ours, torch.from_numpy(data[attention]), rtol=0, atol=1e-12)
        index = outlier_tokens(ours, k)
        assert index.equal(torch.from_numpy(data[f"index_{name}"]))
        selected = features.gather(1, index[..., None].expand(-1, -1, features.shape[-1]))
        assert selected.equal(torch.from_numpy(data[f"selected_{name}"]))


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, Tensor, int]:
    batch, kv_heads, group = (draw(st.integers(1, 3)) for _ in range(3))
    tokens, dim = draw(st.integers(2, 40)), draw(st.integers(1, 9))
    prefix = draw(st.integers(1, tokens - 1))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    query = torch.randn(batch, kv_heads * group, tokens, dim, generator=generator)
    key = torch.randn(batch, kv_heads, tokens, dim, generator=generator)
    dtype = draw(st.sampled_from((torch.float64, torch.float32, torch.bfloat16)))
    return query.to(dtype), key.to(dtype), prefix


def map_of(query: Tensor, key: Tensor, visible: Tensor | None = None) -> Tensor:
    """The plain definition, in float64."""
    query, key = query.double(), key.double()
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    if visible is not None:
        scores = scores.masked_fill(~visible, -torch.inf)
    return scores.softmax(-1)


@given(problems(), st.booleans())
def test_equals_the_map(problem: tuple[Tensor, Tensor, int], masked: bool) -> None:
    query, key, prefix = problem
    visible = None
    if masked:
        visible = torch.ones(query.shape[0], 1, 1, key.shape[2], dtype=torch.bool)
        visible[..., -1] = False
    full = map_of(query, key, visible)
    given_args = {"prefix": prefix, "enable_gqa": True, "attn_mask": visible}
    expected = {
        cls_attention: full[..., 0, prefix:],
        received_attention: full[..., prefix:, prefix:].mean(-2),
    }
    for measure, heads in expected.items():
        ours = {r: measure(query, key, reduce=r, **given_args) for r in ("none", "mean", "sum")}
        assert ours["none"].dtype == torch.promote_types(query.dtype, torch.float32)
        for reduce, exact in (("none", heads), ("mean", heads.mean(1)), ("sum", heads.sum(1))):
            torch.testing.assert_close(ours[reduce].double(), exact, rtol=1e-4, atol=1e-5)
        most = measure(query, key, reduce="max", **given_args).double()
        torch.testing.assert_close(most, heads.amax(1), rtol=1e-4, atol=1e-5)


@given(problems())
def test_what_holds(problem: tuple[Tensor, Tensor, int]) -> None:
    query, key, prefix = problem
    query = query[:, : key.shape[1]].double()
    key = key.double()
    mean = cls_attention(query, key, prefix=prefix)
    rest = map_of(query, key)[..., 0, :prefix].sum(-1).mean(1)
    torch.testing.assert_close(mean.sum(-1) + rest, torch.ones_like(rest))
    merged = cls_attention(query, key, prefix=prefix, reduce="merged")
    if query.shape[1] == 1:  # with one head there is nothing to merge
        torch.testing.assert_close(merged, mean)
    # Patches in another order: the same attention, the same patches chosen.
    order = torch.randperm(mean.shape[-1])
    whole = torch.cat([torch.arange(prefix), order + prefix])
    shuffled = cls_attention(query, key[:, :, whole], prefix=prefix)
    torch.testing.assert_close(shuffled, mean[:, order])
    k = 1 + mean.shape[-1] // 2
    if mean.diff(dim=-1).abs().min() > 1e-9 if mean.shape[-1] > 1 else True:
        first, again = outlier_tokens(mean, k), order[outlier_tokens(shuffled, k)]
        assert first.sort(-1).values.equal(again.sort(-1).values)


@pytest.mark.parametrize("layer", [-1, -2, -3, 0, 2])
def test_equals_what_transformers_reports(layer: int) -> None:
    for model, prefix in ((clip(), 1), (registers(), 4)):
        pixels = torch.randn(2, 3, 24, 24)
        ours = patch_attention(model, pixels, layer, reduce="none")
        assert ours.statistic == "cls"
        model.set_attn_implementation("eager")
        maps = model(pixels, output_attentions=True).attentions
        torch.testing.assert_close(ours.attention, maps[layer][:, :, 0, prefix:])


def test_a_tower_without_class_token_has_another_statistic() -> None:
    model = siglip()  # it has a pooling head, which is no layer
    pixels = torch.randn(2, 3, 24, 24)
    ours = patch_attention(model, pixels)
    assert ours.statistic == "received"
    model.set_attn_implementation("eager")
    maps = model(pixels, output_attentions=True).attentions
    torch.testing.assert_close(ours.attention, maps[-2].mean((1, 2)))
    with pytest.raises(ValueError, match="class token, and SiglipVisionModel has none"):
        watch_patches(model, statistic="cls")
    forced = patch_attention(registers(), pixels, statistic="received")
    assert forced.statistic == "received"
    assert forced.attention.shape == (2, 9)


def test_watches_the_tower_of_a_larger_model() -> None:
    text = LlamaConfig(
        vocab_size=30,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**SMALL), text_config=text, image_token_id=29
    )
    model = LlavaForConditionalGeneration(config).eval()
    tower = vision_tower(model)
    assert tower is model.model.vision_tower
    assert prefix_tokens(tower) == (True, 1)
    pixels = torch.randn(2, 3, 24, 24)
    with watch_patches(tower) as watch:
        features = model.get_image_features(pixels, return_dict=True).pooler_output
        model.get_image_features(pixels.flip(0), return_dict=True)
    assert watch.result.attention.shape == (2, features[0].shape[0])
    alone = patch_attention(tower, pixels.flip(0)).attention  # the last forward counts
    assert watch.result.attention.equal(alone)
    assert vision_tower(tower) is tower
    with watch:  # again, and nothing of the last time is left
        model.get_image_features(pixels)
    assert watch.result.attention.equal(patch_attention(tower, pixels).attention)


def test_refusals() -> None:
    query = torch.randn(1, 2, 5, 4)
    with pytest.raises(ValueError, match="reduce: expected one of mean, sum"):
        cls_attention(query, query, reduce="median")  # not typed
    with pytest.raises(ValueError, match="prefix: expected from 0 to 4"):
        cls_attention(query, query, prefix=5)
    with pytest.raises(ValueError, match="k: expected a whole number from 1 to 4"):
        outlier_tokens(cls_attention(query, query), 5)
    model = clip()
    with pytest.raises(ValueError, match="layer: expected -3 to 2"):
        patch_attention(model, torch.randn(1, 3, 24, 24), layer=-4)
    with pytest.raises(ValueError, match="layer: expected -3 to 2"):
        patch_attention(model, torch.randn(1, 3, 24, 24), layer=3)
    with pytest.raises(TapError), watch_patches(model):
        pass
    with pytest.raises(ValueError, match='statistic: expected "auto"'):
        watch_patches(model, statistic="mean")


def test_outliers_and_diagnostics() -> None:
    attention = torch.tensor([[0.1, 0.4, 0.1, 0.2], [0.0, 0.0, 0.0, 0.0]])
    assert outlier_tokens(attention, 3).tolist() == [[1, 3, 0], [0, 1, 2]]  # ties: earlier first
    share = top_share(attention[:1], torch.tensor([[1, 3]]))
    torch.testing.assert_close(share, torch.tensor([0.75]))
    other = torch.tensor([[0.0, 0.3, 0.9, 0.1]])
    assert topk_overlap(attention[:1], other, 2).tolist() == [0.5]
    assert topk_overlap(attention[:1], other, 4).tolist() == [1.0]
