"""Rectified SpaAttn in transformers of diffusers: what they compute, and nothing left behind."""

import math

import pytest
import torch
from torch import Tensor, nn

import attending as at
from attending.interventions.intervention import InterventionWarning
from attending.interventions.rectified_attention import RectifiedAttention
from attending.interventions.settings import load_settings, save_settings
from attending.sparse.curve_order import block_neighbors, gilbert_order
from attending.sparse.image_tokens import ImageTokens, read_image_tokens
from attending.sparse.rectified import rectified_block_sparse_attention
from tests.interventions import denoisers

diffusers = pytest.importorskip("diffusers")

FRAMES, HEIGHT, WIDTH = 3, 4, 6  # tokens: 72, of which blocks of 16 leave a short one
GRID = (FRAMES, HEIGHT, WIDTH)
ALWAYS = {"dense_layers": 0, "dense_steps": 0}


def randomly(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.eval()


@pytest.fixture(scope="module")
def wan() -> nn.Module:
    with torch.random.fork_rng():
        return randomly(denoisers.wan())


@pytest.fixture(scope="module")
def sd3() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return randomly(
            diffusers.SD3Transformer2DModel(
                sample_size=16,
                patch_size=2,
                in_channels=3,
                num_layers=2,
                attention_head_dim=8,
                num_attention_heads=2,
                joint_attention_dim=12,
                caption_projection_dim=16,
                pooled_projection_dim=10,
                out_channels=3,
                pos_embed_max_size=16,
            )
        )


@pytest.fixture(scope="module")
def flux() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return randomly(
            diffusers.FluxTransformer2DModel(
                patch_size=1,
                in_channels=4,
                num_layers=1,
                num_single_layers=1,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=12,
                pooled_projection_dim=10,
                axes_dims_rope=(4, 6, 6),
            )
        )


@pytest.fixture(scope="module")
def hunyuan() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return randomly(
            diffusers.HunyuanVideoTransformer3DModel(
                in_channels=3,
                out_channels=3,
                num_attention_heads=2,
                attention_head_dim=10,
                num_layers=1,
                num_single_layers=1,
                num_refiner_layers=1,
                patch_size=2,
                patch_size_t=1,
                guidance_embeds=False,
                text_embed_dim=12,
                pooled_projection_dim=10,
                rope_axes_dim=(2, 4, 4),
            )
        )


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def denoise(wan: nn.Module, timestep: float = 500.0, batch: int = 1) -> Tensor:
    return wan(
        hidden_states=noise(batch, 3, FRAMES, 2 * HEIGHT, 2 * WIDTH),
        timestep=torch.full((batch,), timestep),
        encoder_hidden_states=noise(batch, 5, 8, seed=1),
    ).sample


@torch.no_grad()
def paint(sd3: nn.Module, text: int = 7) -> Tensor:
    return sd3(
        hidden_states=noise(2, 3, 8, 12),
        encoder_hidden_states=noise(2, text, 12, seed=1),
        pooled_projections=noise(2, 10, seed=2),
        timestep=torch.tensor([500.0, 500.0]),
    ).sample


@torch.no_grad()
def paint_flux(flux: nn.Module, text: int = 7) -> Tensor:
    height, width = 4, 6
    places = torch.zeros(height, width, 3)
    places[..., 1] = torch.arange(height)[:, None]
    places[..., 2] = torch.arange(width)
    return flux(
        hidden_states=noise(1, height * width, 4),
        encoder_hidden_states=noise(1, text, 12, seed=1),
        pooled_projections=noise(1, 10, seed=2),
        timestep=torch.tensor([0.5]),
        img_ids=places.flatten(0, 1),
        txt_ids=torch.zeros(text, 3),
    ).sample


@torch.no_grad()
def film(hunyuan: nn.Module, words: tuple[int, ...] = (7, 4)) -> Tensor:
    there = torch.arange(7) < torch.tensor(words)[:, None]
    return hunyuan(
        hidden_states=noise(2, 3, FRAMES, 2 * HEIGHT, 2 * WIDTH),
        timestep=torch.tensor([500, 500]),
        encoder_hidden_states=noise(2, 7, 12, seed=1),
        encoder_attention_mask=there.long(),
        pooled_projections=noise(2, 10, seed=2),
    ).sample


MODELS = {"wan": denoise, "sd3": paint, "flux": paint_flux, "hunyuan": film}


@pytest.fixture
def model(request: pytest.FixtureRequest) -> tuple[nn.Module, object]:
    return request.getfixturevalue(request.param), MODELS[request.param]


@pytest.mark.parametrize("model", MODELS, indirect=True)
@pytest.mark.parametrize("rectify", ["ipar+gapr", "row"])
def test_everything_kept_changes_nothing(model, rectify) -> None:
    transformer, call = model
    before = call(transformer)
    method = RectifiedAttention(block_size=8, top_p=1.0, rectify=rectify, **ALWAYS)
    with method(transformer) as run:
        within = call(transformer)
    torch.testing.assert_close(within, before, atol=2e-5, rtol=1e-4)
    assert run.edited_calls > 0
    assert run.density == pytest.approx(1.0)


@pytest.mark.parametrize("model", MODELS, indirect=True)
def test_no_trace(model) -> None:
    transformer, call = model
    before = call(transformer)
    weights = {name: one.clone() for name, one in transformer.state_dict().items()}
    hooks = [
        (len(one._forward_hooks), len(one._forward_pre_hooks)) for one in transformer.modules()
    ]
    with RectifiedAttention(block_size=8, drop=0.9, top_p=None, neighbors=False, **ALWAYS)(
        transformer
    ) as run:
        within = call(transformer)
    assert not torch.allclose(within, before, atol=1e-4)
    assert within.isfinite().all()
    assert run.density < 0.95
    assert torch.equal(call(transformer), before)
    assert all(torch.equal(one, weights[name]) for name, one in transformer.state_dict().items())
    assert hooks == [
        (len(one._forward_hooks), len(one._forward_pre_hooks)) for one in transformer.modules()
    ]


@pytest.mark.parametrize("reorder", [True, False])
@pytest.mark.parametrize("first_frame", [True, False])
def test_a_call_of_wan_by_hand(wan, reorder, first_frame) -> None:
    order = gilbert_order(*GRID)
    forward = order.forward if reorder else torch.arange(math.prod(GRID))
    near = torch.zeros(5, 5, dtype=torch.bool)
    if reorder:
        near = block_neighbors(order, 16)
    near[:1, :1] |= first_frame  # five blocks for three frames
    seen = []

    def compare(call, proceed) -> Tensor:
        output = proceed(call)
        if not call.is_cross:
            expected = rectified_block_sparse_attention(
                *(one[:, :, forward] for one in (call.query, call.key, call.value)),
                block_size=16,
                top_k=2,
                top_p=0.3,
                neighbors=near,
            )
            torch.testing.assert_close(output[:, :, forward], expected, atol=1e-5, rtol=1e-5)
            seen.append(call.name)
        return output

    method = RectifiedAttention(
        block_size=16,
        drop=0.6,
        reorder=reorder,
        neighbors=reorder,
        first_frame=first_frame,
        **ALWAYS,
    )
    with at.tap(wan, compare), method(wan) as run:
        denoise(wan, batch=2)
    assert seen == [f"blocks.{layer}.attn1" for layer in range(3)]
    assert run.stats["sparse_calls"] == 3
    assert run.stats["blocks_of_dense"] == 3 * 2 * 2 * 25


def test_text_of_sd3_is_dense(sd3) -> None:
    def compare(call, proceed) -> Tensor:
        output = proceed(call)
        dense = nn.functional.scaled_dot_product_attention(call.query, call.key, call.value)
        torch.testing.assert_close(output[:, :, 24:], dense[:, :, 24:], atol=1e-5, rtol=1e-5)
        assert not torch.allclose(output[:, :, :24], dense[:, :, :24], atol=1e-3)
        return output

    with (
        at.tap(sd3, compare),
        RectifiedAttention(block_size=4, drop=0.9, rectify="none", neighbors=False, **ALWAYS)(sd3),
    ):
        paint(sd3)


def test_text_of_flux_comes_first(flux) -> None:
    def compare(call, proceed) -> Tensor:
        output = proceed(call)
        dense = nn.functional.scaled_dot_product_attention(call.query, call.key, call.value)
        torch.testing.assert_close(output[:, :, :7], dense[:, :, :7], atol=1e-5, rtol=1e-5)
        assert not torch.allclose(output[:, :, 7:], dense[:, :, 7:], atol=1e-3)
        return output

    with (
        at.tap(flux, compare),
        RectifiedAttention(block_size=4, drop=0.9, rectify="none", neighbors=False, **ALWAYS)(flux),
    ):
        paint_flux(flux)


def test_padding_of_text_is_read_from_the_mask(hunyuan) -> None:
    """And the attention of the refiner of text, which is shorter than the video, stays dense."""
    order = gilbert_order(*GRID).forward
    index = torch.cat([order, torch.arange(7) + 72])
    there = torch.arange(7) < torch.tensor([7, 4])[:, None]
    seen = []

    def compare(call, proceed) -> Tensor:
        output = proceed(call)
        if call.key_length == len(index):
            expected = rectified_block_sparse_attention(
                *(one[:, :, index] for one in (call.query, call.key, call.value)),
                text_length=7,
                text_mask=there,
                block_size=8,
                top_k=1,
            )
            torch.testing.assert_close(output[:, :, index], expected, atol=1e-5, rtol=1e-5)
            seen.append(call.name)
        return output

    method = RectifiedAttention(block_size=8, drop=0.8, neighbors=False, **ALWAYS)
    with at.tap(hunyuan, compare), method(hunyuan) as run:
        film(hunyuan)
    assert len(seen) == run.edited_calls == 2
    assert run.left_alone == {"it has fewer tokens than the grid": 1}


def test_layers_and_steps_that_stay_dense(wan) -> None:
    with RectifiedAttention(block_size=8, dense_layers=1, dense_steps=2)(wan) as run:
        for timestep in (900, 900, 700, 700, 400, 400):  # two calls a step, as with guidance
            denoise(wan, timestep)
    assert run.left_alone == {"the first layers are dense": 6, "the first steps are dense": 8}
    assert run.edited_calls == 4
    assert run.heads == {(layer, head) for layer in (1, 2) for head in (0, 1)}


def test_nothing_is_edited_in_place(wan) -> None:
    def compare(call, proceed) -> Tensor:
        before = [one.clone() for one in (call.query, call.key, call.value)]
        output = proceed(call)
        after = (call.query, call.key, call.value)
        assert all(torch.equal(one, old) for one, old in zip(after, before, strict=True))
        return output

    with at.tap(wan, compare), RectifiedAttention(block_size=16, **ALWAYS)(wan):
        denoise(wan)


def test_half_precision_and_gradients(wan) -> None:
    video = noise(1, 3, FRAMES, 2 * HEIGHT, 2 * WIDTH).requires_grad_()
    text = {"timestep": torch.tensor([500.0]), "encoder_hidden_states": noise(1, 5, 8)}
    with RectifiedAttention(block_size=16, **ALWAYS)(wan):
        full = wan(hidden_states=video, **text).sample
        full.sum().backward()
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
            half = wan(hidden_states=video, **text).sample
    assert video.grad.isfinite().all()
    assert (half - full).norm() < 0.2 * full.norm()


def test_the_grid_is_read(wan, sd3, flux, hunyuan) -> None:
    for transformer, call, tokens in (
        (wan, denoise, ImageTokens(GRID, None)),
        (sd3, paint, ImageTokens((4, 6), False)),
        (flux, paint_flux, ImageTokens((4, 6), True)),
        (hunyuan, film, ImageTokens(GRID, False)),
    ):
        with RectifiedAttention(block_size=8, **ALWAYS)(transformer) as run:
            call(transformer)
        assert run.tokens == tokens
        with RectifiedAttention(tokens.grid, block_size=8, **ALWAYS)(transformer) as run:
            call(transformer)
        assert run.tokens == tokens


def test_other_ways_to_tell_the_grid() -> None:
    class CogVideoXTransformer3DModel(nn.Module):
        class config:
            patch_size, patch_size_t = 2, None

    video = {"hidden_states": noise(1, 5, 4, 6, 8)}  # frames before channels
    assert read_image_tokens(CogVideoXTransformer3DModel(), video) == ImageTokens((5, 3, 4), True)
    told = {"hidden_states": noise(1, 24, 4), "num_frames": 2, "height": 3, "width": 4}
    assert read_image_tokens(nn.Identity(), told) == ImageTokens((2, 3, 4), None)


def test_a_grid_that_is_given_or_cannot_be_known(wan) -> None:
    part = wan.blocks[0].attn1
    states = noise(1, 24, 24)

    def attend(**settings) -> Tensor:
        with RectifiedAttention(block_size=4, **settings, **ALWAYS)(part), torch.no_grad():
            return part(states)

    with pytest.raises(ValueError, match=r"^grid: expected"):
        attend()
    assert attend(grid=(4, 6)).shape == states.shape
    with pytest.raises(ValueError, match=r"^text_first: expected True or False"):
        attend(grid=(4, 5))
    first, last = (attend(grid=(4, 5), drop=0.9, neighbors=False, text_first=b) for b in (1, 0))
    assert not torch.allclose(first, last)
    with pytest.warns(InterventionWarning, match="fewer tokens than the grid"):
        attend(grid=(4, 7))


def test_masks_that_hide_the_picture_stay_dense() -> None:
    class Attention(nn.Module):
        def forward(self, tokens, mask=None, causal=False) -> Tensor:
            return nn.functional.scaled_dot_product_attention(
                tokens, tokens, tokens, attn_mask=mask, is_causal=causal
            )

    model, tokens = Attention(), noise(1, 2, 26, 4)
    hiding_text = torch.ones(1, 1, 1, 26, dtype=torch.bool)
    hiding_text[..., 25] = False
    method = RectifiedAttention((4, 6), block_size=4, text_first=False, **ALWAYS)
    with method(model) as run:
        changed = tokens.clone()
        changed[:, :, 25] = 9.0
        outputs = [model(one, hiding_text)[:, :, :25] for one in (tokens, changed)]
        torch.testing.assert_close(*outputs)
        model(tokens, hiding_text.roll(5))
        model(tokens, torch.zeros(26, 26))
        model(tokens, torch.randn(26, 26))
        model(tokens, causal=True)
    assert run.left_alone == {"its mask hides more than text": 2, "it is causal": 1}
    assert run.edited_calls == 3


def test_on_disk(tmp_path) -> None:
    method = RectifiedAttention(grid=(2, 3, 4), block_size=16, top_p=None, rectify="row")
    path = save_settings(method, tmp_path / "rectified.json")
    assert load_settings(RectifiedAttention, path) == method


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"grid": (2,)}, "grid"),
        ({"grid": (2, 0)}, "grid"),
        ({"block_size": 0}, "block_size"),
        ({"drop": 1.1}, "drop"),
        ({"top_p": -0.1}, "top_p"),
        ({"dense_steps": -1}, "dense_steps"),
        ({"rectify": "most"}, "rectify"),
    ],
)
def test_bad_settings(settings, name) -> None:
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        RectifiedAttention(**settings)


def test_dropout_is_refused() -> None:
    class Attention(nn.Module):
        def forward(self, tokens) -> Tensor:
            return nn.functional.scaled_dot_product_attention(tokens, tokens, tokens, dropout_p=0.1)

    model = Attention()
    method = RectifiedAttention((4, 6), block_size=4, **ALWAYS)
    with pytest.raises(ValueError, match="dropout"), method(model):
        model(noise(1, 2, 24, 4))
