"""llava-shapes: its inputs, its recipe on a tiny configuration, and the model as it is shipped."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

import attending as at
from attending import zoo
from attending.zoo import llava_shapes, shapes, shapes_tasks
from attending.zoo.recipes.llava_shapes import LlavaShapesRecipe, build_model, train
from attending.zoo.recipes.llava_shapes_data import (
    IGNORED,
    dense_targets,
    draw_batch,
    make_rows,
    make_tokenizer,
    pixels,
)
from attending.zoo.recipes.llava_shapes_export import caption_scores, export, yes_no_scores
from attending.zoo.recipes.llava_shapes_trainee import Trainee
from attending.zoo.recipes.training_attention import fast_attention, training_attention
from attending.zoo.recipes.training_loop import CHECKPOINT
from attending.zoo.recipes.two_optimizers import TwoOptimizers
from attending.zoo.shapes_processor import ShapesProcessor

TINY = LlavaShapesRecipe(
    hidden=32,
    heads=2,
    kv_heads=1,
    head_dim=16,
    vision_layers=1,
    vision_intermediate=32,
    layers=2,
    intermediate=32,
    steps=4,
    vision_steps=2,
    vision_images=4,
    images=3,
    presence=2,
    warmup_steps=1,
    evaluate_every=2,
    bfloat16=False,
)


@pytest.fixture(scope="module")
def tiny() -> zoo.ZooModel:
    tokenizer = make_tokenizer()
    model = build_model(TINY, tokenizer).eval()
    for parameter in model.parameters():  # as it is made, a model this small predicts nothing
        nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(1))
    processor = llava_shapes.make_processor(model, tokenizer)
    return zoo.ZooModel(model, tokenizer, {}, "tiny", processor)


def test_tokenizer_knows_every_word_of_the_world(tiny: zoo.ZooModel) -> None:
    tokenizer: Any = tiny.tokenizer
    scenes = shapes.make_scenes(60, 1)
    texts = [text for scene in scenes for text in scene.captions]
    for kind in shapes.POPE_KINDS:
        texts += [q.text for q in shapes.pope_questions(scenes, kind)]
    asked = shapes.count_questions(scenes, per_scene=4) + shapes.spatial_questions(scenes)
    texts += [text for q in asked for text in (q.text, q.answer)]
    texts += [o.place for scene in scenes for o in scene.objects] + [shapes.DESCRIBE, shapes.LIST]
    for text, ids in zip(texts, tokenizer(texts)["input_ids"], strict=True):
        assert tokenizer.unk_token_id not in ids
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(ids, skip_special_tokens=True) == text.lower()
    assert tokenizer("zebra")["input_ids"][-1] == tokenizer.unk_token_id


def test_processor(tiny: zoo.ZooModel) -> None:
    tokenizer: Any = tiny.tokenizer
    scenes = shapes.make_scenes(2, 3, 64)
    inputs = tiny.processor(scenes, [shapes.LIST, "Is there an orange star in the image?"])
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    assert (ids == tokenizer.convert_tokens_to_ids("<image>")).sum(1).tolist() == [64, 64]
    short, long = mask.sum(1).tolist()
    assert short < long == mask.shape[1]
    assert not mask[0, : long - short].any()  # padded on the left
    assert mask[0, long - short :].all()
    images = torch.stack([scene.image(32) for scene in scenes])
    torch.testing.assert_close(inputs["pixel_values"], 2 * images - 1)
    same = tiny.processor(
        images, ["<image>" + shapes.LIST, "Is there an orange star in the image?"]
    )
    assert torch.equal(same["input_ids"], ids)
    with pytest.raises(ValueError, match="2 prompts and 1 images"):
        tiny.processor(scenes[:1], ["a", "b"])
    with pytest.raises(ValueError, match=r"\[batch, 3, 32, 32\], got \[1, 3, 64, 64\]"):
        tiny.processor(scenes[0].image()[None], "a")
    with pytest.raises(ValueError, match="one <image> in a prompt"):
        tiny.processor(scenes, "<image><image> what?")
    with pytest.raises(ValueError, match="at least one image"):
        tiny.processor([], [])


def test_batches_answer_as_single_questions_do(tiny: zoo.ZooModel) -> None:
    """Left padding, the order of batches and the scenes' own sizes must not matter."""
    scenes = [shapes.make_scene(0), shapes.make_scene(1, 80), shapes.make_scene(2)]
    questions = [
        *shapes.pope_questions(scenes, per_scene=1),
        *shapes.count_questions(scenes),
        *shapes.spatial_questions(scenes),
    ]
    more = {"max_new_tokens": 6}
    together = shapes_tasks.answer_questions(tiny, scenes, questions, generate_kwargs=more)
    for size in (1, 4):
        answers = shapes_tasks.answer_questions(
            tiny, scenes, questions, batch_size=size, generate_kwargs=more
        )
        assert answers == together
    assert len(set(together)) > 1
    captions = shapes_tasks.caption_scenes(
        tiny, scenes, batch_size=2, generate_kwargs={"max_new_tokens": 3}
    )
    assert len(captions) == 3
    assert shapes_tasks.caption_scenes(tiny, []) == []
    with pytest.raises(ValueError, match="batch_size of at least 1"):
        shapes_tasks.caption_scenes(tiny, scenes, batch_size=0)
    with pytest.raises(ValueError, match="'blind', which has no processor"):
        shapes_tasks.caption_scenes(replace(tiny, processor=None, name="blind"), scenes)


def test_scores(tiny: zoo.ZooModel, monkeypatch: pytest.MonkeyPatch) -> None:
    scenes = shapes.make_scenes(2, 5)
    there = scenes[0].names
    missing = [name for name in shapes.KINDS if name not in there]
    told = [f"a {there[0]}, a {missing[0]} and a {missing[0]}.", scenes[1].captions[0]]
    monkeypatch.setattr(
        "attending.zoo.recipes.llava_shapes_export.caption_scenes", lambda *_, **__: told
    )
    scores = caption_scores(tiny, scenes, shapes.DESCRIBE)
    objects = [len(scene.names) for scene in scenes]
    assert scores["chair_i"] == pytest.approx(2 / (3 + objects[1]))
    assert scores["chair_s"] == 0.5
    assert scores["recall"] == pytest.approx((1 + objects[1]) / sum(objects))
    questions = [shapes.Question(0, "?", a) for a in ("yes", "yes", "no", "no")]
    monkeypatch.setattr(
        "attending.zoo.recipes.llava_shapes_export.answer_questions",
        lambda *_, **__: ["yes", "no", "yes", "no"],
    )
    scores = yes_no_scores(tiny, scenes, questions)
    assert (scores["accuracy"], scores["f1"], scores["yes_share"]) == (0.5, 0.5, 0.5)


def test_dense_targets_name_what_patches_show() -> None:
    batch = draw_batch(20, seed=0, step=5)
    targets = dense_targets(batch, 32, 4)
    for index, scene in enumerate(shapes.from_batch(batch, 32)):
        shares = F.avg_pool2d(scene.masks().float()[None], 4)[0].flatten(1)
        for patch in range(64):
            share, owner = shares[:, patch].max(0)
            shape = targets.shape[index, patch]
            if share <= 0.25:
                assert shape == len(shapes.SHAPES)
                continue
            assert shapes.SHAPES[shape] == scene.objects[owner].shape
            assert shapes.COLORS[targets.color[index, patch]] == scene.objects[owner].color
            assert shapes.TEXTURES[targets.texture[index, patch]] == scene.objects[owner].texture
        kinds = {shapes.KINDS[i] for i in targets.kinds[index].nonzero().flatten()}
        assert kinds == set(scene.names)


def test_packed_conversations_are_read_one_by_one(tiny: zoo.ZooModel) -> None:
    """The loss of all conversations in one row is that of the model's own forward on each."""
    model: Any = tiny.model
    tokenizer: Any = tiny.tokenizer
    batch = draw_batch(3, seed=0, step=1)
    rows = make_rows(batch, tokenizer, seed=0, step=1, presence=2)
    images = pixels(batch, 32)
    trainee = Trainee(model, TINY.hidden)
    weights = torch.linspace(0.5, 2, len(tokenizer))
    with torch.no_grad(), fast_attention(model):
        patches, _ = trainee.see(images)
        loss = trainee.text_loss(patches, rows, tokenizer.bos_token_id, weights)
    assert model.config._attn_implementation == "sdpa"
    total, weight = torch.zeros(()), torch.zeros(())
    first = [tokenizer.bos_token_id, *[tokenizer.convert_tokens_to_ids("<image>")] * 64]
    for index in range(3):
        for segment in range(1, int(rows.segments[index].max()) + 1):
            mine = rows.segments[index] == segment
            ids = torch.cat([torch.tensor(first), rows.tokens[index][mine]])
            with torch.no_grad():
                logits = model(input_ids=ids[None], pixel_values=images[index][None]).logits
            targets = rows.targets[index][mine]
            learned = targets != IGNORED
            losses = F.cross_entropy(logits[0, 65:][learned], targets[learned], reduction="none")
            total += (losses * weights[targets[learned]]).sum()
            weight += weights[targets[learned]].sum()
    torch.testing.assert_close(loss, total / weight)


@pytest.mark.parametrize("masked", [False, True])
def test_training_attention_is_attention(masked: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, heads, 7, 8, generator=generator) for heads in (6, 2, 2))
    mask = torch.ones(2, 1, 7, 7, dtype=torch.bool).tril() if masked else None
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
    out, _ = training_attention(nn.Identity(), query, key, value, mask)
    torch.testing.assert_close(out, expected.transpose(1, 2))


def test_two_optimizers_move_everything_and_resume() -> None:
    def run(steps: int, halt: int | None = None) -> dict[str, Tensor]:
        model = build_model(TINY, make_tokenizer())
        muon = {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.0}
        adamw = {"lr": 0.01, "betas": (0.9, 0.9), "weight_decay": 0.0}
        both = TwoOptimizers(model, muon, adamw)
        for step in range(steps):
            if step == halt:
                fresh = TwoOptimizers(model, muon, adamw)
                fresh.load_state_dict(both.state_dict())
                both = fresh
            both.set_rate(0.5)
            generator = torch.Generator().manual_seed(step)
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            both.step()
            both.zero_grad()
        return {name: p.detach().clone() for name, p in model.named_parameters()}

    start, whole, halted = run(0), run(3), run(3, halt=2)
    for name, value in whole.items():
        assert torch.equal(value, halted[name])
        assert not torch.equal(value, start[name])


def test_interrupted_training_ends_as_the_uninterrupted_one(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", TINY)

    def interrupt(step: int, loss: float) -> None:
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "parts", TINY, on_step=interrupt)
    torch.manual_seed(12345)  # nothing of the run may hang on the global generator
    parts = train(tmp_path / "parts", TINY)
    assert parts["losses"] == whole["losses"]
    assert parts["curve"] == whole["curve"]
    ours, theirs = (load_file(tmp_path / run / CHECKPOINT) for run in ("parts", "whole"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    with pytest.raises(ValueError, match=r"recipe of the run.*resume=False"):
        train(tmp_path / "parts", replace(TINY, steps=5))


def test_recipe_runs_and_exports(tmp_path: Path) -> None:
    run, folder = tmp_path / "run", tmp_path / "weights"
    train(run, replace(TINY, steps=2, vision_steps=1), export_to=folder)
    assert llava_shapes.load(path=folder).card["finished"] is False
    card = export(run, folder, scenes=3)
    loaded = llava_shapes.load(path=folder)
    assert loaded.card == card
    assert card["finished"]
    assert card["vision_scenes"] == TINY.vision_images
    assert card["text_scenes"] == TINY.images
    stored, trained = load_file(folder / "model.safetensors"), load_file(run / CHECKPOINT)
    for name, value in loaded.model.state_dict().items():
        if name != "lm_head.weight":
            assert torch.equal(value, trained[f"model.llava.{name}"].to(torch.float16).float())
    assert {value.dtype for value in stored.values()} == {torch.float16}
    assert (folder / "README.md").read_text(encoding="utf-8").startswith("# llava-shapes")


def test_schedule() -> None:
    recipe = LlavaShapesRecipe()
    rates = [recipe.rate_at(step) for step in range(recipe.steps)]
    assert max(rates) == 1
    assert rates[recipe.vision_steps] < 0.02  # the text starts anew
    assert rates[-1] < 0.01
    assert rates[round((1 - recipe.cooldown) * recipe.steps) - 1] == 1
    with pytest.raises(ValueError, match=r"patch_size to divide image_size \(32\), got 5"):
        LlavaShapesRecipe(patch_size=5)
    with pytest.raises(ValueError, match="steps of at least 1, got 0"):
        LlavaShapesRecipe(steps=0)
    with pytest.raises(ValueError, match="seed from 0 up to 2048, got 2048"):
        LlavaShapesRecipe(seed=2048)
    with pytest.raises(ValueError, match=r"got stpes.*steps"):
        zoo.train("llava-shapes", "nowhere", stpes=3)


@pytest.fixture(scope="module")
def shipped() -> zoo.ZooModel:
    return zoo.load("llava-shapes")


def test_shipped_model_is_a_real_llava(shipped: zoo.ZooModel) -> None:
    from transformers import LlavaForConditionalGeneration

    model: Any = shipped.model
    assert isinstance(model, LlavaForConditionalGeneration)
    assert isinstance(shipped.processor, ShapesProcessor)
    assert 3_000_000 < model.num_parameters() < 6_000_000
    assert model.num_parameters() == shipped.card["parameters"]
    text = model.config.text_config
    assert text.num_key_value_heads < text.num_attention_heads
    assert len(shipped.tokenizer) == text.vocab_size
    files = list(llava_shapes.folder().iterdir())
    assert sum(file.stat().st_size for file in files) < 8_000_000
    assert {file.suffix for file in files} == {".safetensors", ".json", ".md"}
    config = json.loads((llava_shapes.folder() / "generation_config.json").read_text())
    assert config["eos_token_id"] == shipped.tokenizer.eos_token_id


def test_shipped_model_sees(shipped: zoo.ZooModel) -> None:
    """Held-out questions: as good as the card says, up to chance, and not blind."""
    scenes = shapes.make_scenes(25, 77)
    questions = shapes.pope_questions(scenes, "adversarial")
    scores = yes_no_scores(shipped, scenes, questions)
    assert len(questions) > 100
    assert abs(scores["accuracy"] - shipped.card["held_out"]["pope_adversarial"]["accuracy"]) < 0.12
    assert scores["accuracy"] > 0.7
    blank = [replace(scene, objects=()) for scene in scenes]
    assert yes_no_scores(shipped, blank, questions)["accuracy"] < 0.6
    captions = caption_scores(shipped, scenes, shapes.DESCRIBE)
    assert captions["chair_i"] < 0.2
    assert captions["recall"] > 0.75
    faint = shapes.make_scenes(25, 77, opacity=shapes.FAINT)
    assert [scene.names for scene in faint] == [scene.names for scene in scenes]
    assert caption_scores(shipped, faint, shapes.DESCRIBE)["chair_i"] > captions["chair_i"]


def test_card_is_consistent(shipped: zoo.ZooModel) -> None:
    card = shipped.card
    assert card["finished"]
    assert card["steps"] == card["recipe"]["steps"]
    readme = (llava_shapes.folder() / "README.md").read_text(encoding="utf-8")
    for name, figures in card["held_out"].items():
        if name not in ("seed", "scenes") and "accuracy" in figures:
            assert f"| {name.replace('_', ' ')} |" in readme
            assert f"{figures['accuracy']:.1%}" in readme
    assert f"{card['held_out']['describe']['chair_i']:.1%}" in readme
    for text in card["limits"]:
        assert text in readme


def test_a_tap_sees_both_towers(shipped: zoo.ZooModel) -> None:
    model: Any = shipped.model
    inputs = shipped.processor(shapes.make_scenes(2, 0), shapes.DESCRIBE)
    with torch.no_grad(), at.tap(model) as calls:
        model(**inputs)
    names = [call.name for call in calls]
    vision, text = model.config.vision_config, model.config.text_config
    assert sum("vision_tower" in name for name in names) == vision.num_hidden_layers
    assert sum("language_model" in name for name in names) == text.num_hidden_layers
    assert calls[0].query.shape == (2, vision.num_attention_heads, 65, 32)
    assert calls[-1].key.shape[1] == text.num_key_value_heads


def test_diagnosis(shipped: zoo.ZooModel) -> None:
    inputs = shipped.processor(shapes.make_scenes(2, 0), shapes.DESCRIBE)
    text = str(at.diagnose(shipped.model, [inputs], tokenizer=shipped.tokenizer, name="shapes"))
    assert text.startswith("shapes: LlavaForConditionalGeneration")


def test_saving_keeps_what_it_computes(shipped: zoo.ZooModel, tmp_path: Path) -> None:
    from transformers import LlavaForConditionalGeneration

    model: Any = shipped.model
    model.save_pretrained(tmp_path)
    again = LlavaForConditionalGeneration.from_pretrained(tmp_path).eval()
    inputs = shipped.processor(shapes.make_scenes(2, 0), shapes.DESCRIBE)
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs).logits, model(**inputs).logits)
