"""wan-shapes: its data, its text encoder, its recipe on a tiny configuration, and as shipped."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attending as at
from attending import zoo
from attending.taps import AttentionCall
from attending.zoo import wan_shapes
from attending.zoo.caption_embedding import CaptionEmbedding
from attending.zoo.recipes.training_loop import CHECKPOINT
from attending.zoo.recipes.wan_shapes import WanShapesRecipe, build_model, train
from attending.zoo.recipes.wan_shapes_card import losses_by_level
from attending.zoo.recipes.wan_shapes_data import (
    LONGEST_CAPTION,
    WORDS,
    draw_videos,
    spread_levels,
    step_batch,
)
from attending.zoo.recipes.wan_shapes_export import export
from attending.zoo.recipes.wan_shapes_trainee import QuickWanAttention
from attending.zoo.shapes_motion import make_moving_scenes
from attending.zoo.video_checks import caption_scores
from attending.zoo.video_tasks import make_videos

pytest.importorskip("diffusers")

TINY = WanShapesRecipe(
    size=16,
    heads=2,
    head_dim=12,
    layers=2,
    ffn=16,
    text_dim=8,
    time_dim=8,
    frames_per_step=16,
    steps=6,
    warmup_steps=1,
    evaluate_every=3,
    bfloat16=False,
    compiled=False,
)
CAPTION = "a red circle moving left on a plain background."


@pytest.fixture(scope="module")
def wan() -> zoo.ZooModel:
    return zoo.load("wan-shapes")


def awake(recipe: WanShapesRecipe) -> tuple[Any, CaptionEmbedding]:
    """A model as it is made predicts nothing; this one predicts something."""
    model, text = build_model(recipe)
    nn.init.normal_(model.proj_out.weight, generator=torch.Generator().manual_seed(0))
    return model.eval(), text.eval()


def test_text_encoder_knows_every_caption_of_its_world() -> None:
    text = CaptionEmbedding(WORDS, 8, LONGEST_CAPTION)
    captions = [scene.caption for scene in make_moving_scenes(300, 2, 1, max_objects=2)]
    tokens = text.tokens(captions)
    for row, caption in zip(tokens, captions, strict=True):
        words = [WORDS[i - 1] for i in row.tolist() if i]
        assert " ".join(words) == caption.removesuffix(".")
    assert set(tokens.flatten().tolist()) == set(range(len(WORDS) + 1))
    assert not text.tokens([""]).any()
    assert text([CAPTION, ""]).shape == (2, LONGEST_CAPTION, 8)
    with pytest.raises(ValueError, match="'zebra' in 'a zebra'"):
        text(["a zebra"])
    with pytest.raises(ValueError, match="at most 16 words, got 21"):
        text([" ".join(["a"] * 21)])
    with pytest.raises(ValueError, match="a list of captions, got one string"):
        text(CAPTION)


def test_text_encoder_is_stored(tmp_path: Path) -> None:
    text = CaptionEmbedding(WORDS, 8, LONGEST_CAPTION).eval()
    text.save(tmp_path)
    stored = CaptionEmbedding.load(tmp_path)
    torch.testing.assert_close(stored([CAPTION]), text([CAPTION]), atol=5e-3, rtol=5e-3)
    assert stored.embedding.weight.dtype == torch.float32


def test_batches_are_what_they_say() -> None:
    settings: dict[str, Any] = {
        "videos": 4,
        "frames": 4,
        "size": 16,
        "shift": 4.0,
        "without_caption": 0.0,
    }
    batch = step_batch(0, 7, **settings)
    again = step_batch(0, 7, **settings)
    assert torch.equal(batch.noisy, again.noisy)
    assert batch.captions == again.captions
    assert batch.captions != step_batch(0, 8, **settings).captions
    video = batch.noisy - batch.levels[:, None, None, None, None] * batch.velocity
    assert video.min() >= -1.001
    assert video.max() <= 1.001
    noise = video + batch.velocity
    assert noise.std() == pytest.approx(1, abs=0.03)
    assert all(caption.endswith("background.") for caption in batch.captions)
    dropped = [
        step_batch(0, step, **{**settings, "without_caption": 0.5}).captions.count("")
        for step in range(50)
    ]
    assert 70 < sum(dropped) < 130


def test_captions_belong_to_their_videos() -> None:
    """Colour and motion of the painted training videos are what their captions say."""
    generator = torch.Generator().manual_seed(1)
    captions, videos = draw_videos(200, 4, 32, generator)
    single = [i for i, caption in enumerate(captions) if " and " not in caption]
    assert 60 < len(single) < 140
    painted = (videos[single].transpose(1, 2) + 1) / 2
    from attending.zoo.video_checks import single_colors, single_motions

    colors, motions = single_colors(painted), single_motions(painted)
    right = [
        color in captions[i]
        and (f"moving {motion} " if motion else "standing still") in captions[i]
        for i, color, motion in zip(single, colors, motions, strict=True)
    ]
    assert sum(right) / len(right) > 0.9


def test_levels_and_lengths() -> None:
    levels = spread_levels(4, 0.3, 4.0)
    assert len(set(levels.tolist())) == 4
    assert (levels >= 0).all()
    assert (levels < 1).all()
    assert (spread_levels(1000, 0.0, 4.0) > 0.8).float().mean() == pytest.approx(0.5, abs=0.01)
    recipe = WanShapesRecipe(steps=100, short=0.3, long=0.2)
    lengths = [recipe.frames_at(step) for step in range(100)]
    assert lengths == [4] * 30 + [8] * 50 + [8, 16] * 10
    assert [len(recipe.batch_at(step).captions) for step in (0, 30, 81)] == [8, 4, 2]
    assert recipe.batch_at(81).noisy.shape == (2, 3, 16, 32, 32)


def test_quick_attention_is_that_of_diffusers() -> None:
    model, text = awake(TINY)
    inputs = {
        "hidden_states": torch.randn(2, 3, 4, 16, 16),
        "timestep": torch.tensor([300.0, 900.0]),
        "encoder_hidden_states": text([CAPTION, ""]).detach(),
    }

    def run() -> list[Tensor]:
        model.zero_grad()
        out = model(**inputs).sample
        torch.autograd.backward(out.square().mean())
        return [out.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    usual = run()
    model.set_attn_processor(QuickWanAttention())
    for quick, expected in zip(run(), usual, strict=True):
        torch.testing.assert_close(quick, expected, atol=1e-4, rtol=1e-4)


def test_interrupted_training_ends_as_the_uninterrupted_one(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", TINY)

    def interrupt(step: int, loss: float) -> None:
        if step == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "parts", TINY, on_step=interrupt)
    torch.manual_seed(12345)  # nothing of the run may hang on the global generator
    parts = train(tmp_path / "parts", TINY)
    assert parts["losses"] == whole["losses"]
    assert parts["curve"] == whole["curve"]
    card = export(tmp_path / "parts", tmp_path / "shipped", videos=3, steps=1)
    assert card["finished"]
    assert card["videos_seen"] == {"4": 8, "8": 6, "16": 1}
    loaded = wan_shapes.load(path=tmp_path / "shipped")
    expected = losses_by_level(loaded.model, loaded.processor, videos=3).tolist()
    assert card["held_out"]["loss_by_frames"]["8"] == pytest.approx(expected)
    readme = (tmp_path / "shipped" / "README.md").read_text()
    assert f"{expected[0]:.4f}" in readme
    with pytest.raises(ValueError, match="expected the recipe of the run"):
        train(tmp_path / "parts", replace(TINY, seed=1))
    with pytest.raises(ValueError, match="train first"):
        export(tmp_path / "nowhere", tmp_path / "shipped")


def test_the_running_average_is_shipped(tmp_path: Path) -> None:
    recipe = replace(TINY, steps=3, average=1.0)
    train(tmp_path / "run", recipe, export_to=tmp_path / "out")
    shipped = wan_shapes.load(path=tmp_path / "out")
    from safetensors.torch import load_file

    stored = load_file(tmp_path / "run" / CHECKPOINT)
    for name, value in shipped.model.named_parameters():
        average, last = (stored[f"model.{part}.{name}"] for part in ("average_wan", "wan"))
        torch.testing.assert_close(value, average, atol=2e-3, rtol=2e-3)
        assert not torch.equal(average, last)


def test_bad_settings() -> None:
    with pytest.raises(ValueError, match="multiple of 16"):
        WanShapesRecipe(frames_per_step=24)
    with pytest.raises(ValueError, match="steps of at least 1"):
        WanShapesRecipe(steps=0)
    with pytest.raises(ValueError, match="patch to divide size"):
        WanShapesRecipe(size=30)
    with pytest.raises(ValueError, match="seed from 0"):
        WanShapesRecipe(seed=-1)


def test_shipped_model(wan: zoo.ZooModel) -> None:
    from diffusers import WanTransformer3DModel

    assert isinstance(wan.model, WanTransformer3DModel)
    assert not wan.model.training
    assert wan.tokenizer is None
    record = next(record for record in zoo.describe() if record.name == "wan-shapes")
    parts = (wan.model, wan.processor)
    assert record.parameters == sum(p.numel() for part in parts for p in part.parameters())
    assert record.parameters == wan.card["parameters"]
    assert record.trainable
    size = sum(file.stat().st_size for file in wan_shapes.folder().iterdir())
    assert size < 8_000_000
    assert wan.card["finished"]
    assert WanShapesRecipe(**wan.card["recipe"]) == WanShapesRecipe()
    card = json.loads((wan_shapes.folder() / "card.json").read_text())
    assert card["curve"][-1]["step"] == WanShapesRecipe().steps
    assert zoo.load("wan-shapes", dtype=torch.bfloat16).processor.positions.dtype == torch.bfloat16


def test_shipped_model_predicts_as_its_card_says(wan: zoo.ZooModel) -> None:
    """The first videos of the card's, so the figures differ a little."""
    found = losses_by_level(wan.model, wan.processor, videos=4).tolist()
    told = wan.card["held_out"]["loss_by_frames"]["8"]
    for mine, card in zip(found, told, strict=True):
        assert 0.6 * card < mine < 1.6 * card


def test_painted_videos_follow_their_captions(wan: zoo.ZooModel) -> None:
    scenes = make_moving_scenes(4, 31, 8, max_objects=1)
    captions = [scene.caption for scene in scenes]
    videos = make_videos(wan, captions, steps=6)
    assert videos.shape == (4, 8, 3, 32, 32)
    assert 0 <= videos.min() < videos.max() <= 1
    assert caption_scores(videos, scenes)["color"] >= 0.5


def test_videos_do_not_depend_on_their_batch(wan: zoo.ZooModel) -> None:
    captions = [CAPTION, "", "a blue star standing still on a grainy background."]
    together = make_videos(wan, captions, steps=2, seed=3)
    apart = make_videos(wan, captions, steps=2, seed=[3, 4, 5], batch_size=1)
    torch.testing.assert_close(apart, together, atol=1e-4, rtol=1e-4)
    longer = make_videos(wan, captions[:1], steps=1, frames=16, guidance_scale=1.0)
    assert longer.shape == (1, 16, 3, 32, 32)


def test_attention_of_the_model_is_tapped(wan: zoo.ZooModel) -> None:
    seen: list[AttentionCall] = []

    def look(call: AttentionCall, proceed: Any) -> Tensor:
        seen.append(call)
        out: Tensor = proceed(call)
        return out

    with at.tap(wan.model, look):
        make_videos(wan, [CAPTION], steps=1, guidance_scale=1.0)
    assert [call.name for call in seen[:4]] == [
        "blocks.0.attn1",
        "blocks.0.attn2",
        "blocks.1.attn1",
        "blocks.1.attn2",
    ]
    assert [call.is_cross for call in seen] == [False, True] * 8
    assert seen[0].query.shape == (1, 5, 512, 32)
    assert seen[1].key.shape == (1, 5, 16, 32)


def test_without_diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ImportError, match=r'pip install "attending\[diffusion\]"'):
        zoo.load("wan-shapes")
    record = next(record for record in zoo.describe() if record.name == "wan-shapes")
    assert record.parameters  # told from the files alone


def test_make_videos_refuses(wan: zoo.ZooModel) -> None:
    with pytest.raises(ValueError, match="expected a video model"):
        make_videos(replace(wan, processor=None, name="other"), [CAPTION])
    with pytest.raises(ValueError, match="a list of at least one"):
        make_videos(wan, CAPTION)
    with pytest.raises(ValueError, match="a list of at least one"):
        make_videos(wan, [])
    with pytest.raises(ValueError, match="got 0 and 8"):
        make_videos(wan, [CAPTION], frames=0)
    with pytest.raises(ValueError, match="one seed for each of the 1 rows, got 2"):
        make_videos(wan, [CAPTION], seed=[1, 2])
