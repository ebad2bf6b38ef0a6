"""Turns a training run of ``llava-shapes`` into the folder that is shipped, with its data card.

Every figure of the card is measured here, on the weights as they are stored and on scenes that
training cannot draw; none is written by hand.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from attending.zoo import llava_shapes
from attending.zoo.entry import ZooModel
from attending.zoo.recipes.checkpoint import load_checkpoint, read_state
from attending.zoo.recipes.llava_shapes import (
    LlavaShapesRecipe,
    build_model,
)
from attending.zoo.recipes.llava_shapes_data import make_tokenizer
from attending.zoo.recipes.llava_shapes_trainee import Trainee
from attending.zoo.recipes.training_loop import CHECKPOINT
from attending.zoo.recipes.weights_folder import write_weights
from attending.zoo.shapes import (
    DESCRIBE,
    FAINT,
    LIST,
    POPE_KINDS,
    Question,
    Scene,
    count_questions,
    make_scenes,
    mentions,
    pope_questions,
    spatial_questions,
)
from attending.zoo.shapes_tasks import answer_questions, caption_scenes

# Of the scenes that the card's figures are measured on; others are free for other experiments.
CARD_SEED = 20_000
LIMITS = (
    "It knows 75 words and one world; any other word is <unk>, and photographs mean nothing to it.",
    "It answers after one question about one image; it has seen no longer conversations.",
    "It errs, as the figures say: that is what it is for. Do not take its answers for truth.",
)


def quick_accuracy(model: Any, tokenizer: Any) -> float:
    """Share of right answers to adversarial questions about 30 held-out scenes: for watching."""
    training = model.training
    model.eval()
    scenes = make_scenes(30, CARD_SEED + 1)
    questions = pope_questions(scenes, "adversarial", reference=make_scenes(1000, CARD_SEED + 2))
    accuracy = yes_no_scores(_zoo_model(model, tokenizer), scenes, questions)["accuracy"]
    model.train(training)
    return accuracy


def yes_no_scores(
    zoo_model: ZooModel, scenes: Sequence[Scene], questions: Sequence[Question]
) -> dict[str, float]:
    """Accuracy, F1 of "yes" and the share of "yes" among the answers."""
    answers = answer_questions(zoo_model, scenes, questions)
    said = [answer.split()[:1] == ["yes"] for answer in answers]
    true = [question.answer == "yes" for question in questions]
    both = sum(s and t for s, t in zip(said, true, strict=True))
    return {
        "questions": len(questions),
        "accuracy": sum(s == t for s, t in zip(said, true, strict=True)) / len(true),
        "f1": 2 * both / max(1, sum(said) + sum(true)),
        "yes_share": sum(said) / len(said),
    }


def exact_scores(
    zoo_model: ZooModel, scenes: Sequence[Scene], questions: Sequence[Question]
) -> dict[str, float]:
    """Share of answers that are right word for word."""
    answers = answer_questions(zoo_model, scenes, questions)
    right = [a == question.answer for a, question in zip(answers, questions, strict=True)]
    return {"questions": len(questions), "accuracy": sum(right) / len(right)}


def caption_scores(zoo_model: ZooModel, scenes: Sequence[Scene], prompt: str) -> dict[str, float]:
    """How often captions name what is not there (CHAIR) and how much of what is there they name.

    CHAIR_i is the share of mentions, CHAIR_s that of captions with at least one such mention.
    """
    captions = caption_scenes(zoo_model, scenes, prompt=prompt)
    named = [mentions(caption) for caption in captions]
    wrong = [[m for m in ms if m not in s.names] for ms, s in zip(named, scenes, strict=True)]
    found = sum(len(set(ms) & set(s.names)) for ms, s in zip(named, scenes, strict=True))
    return {
        "captions": len(captions),
        "chair_i": sum(map(len, wrong)) / max(1, sum(map(len, named))),
        "chair_s": sum(map(bool, wrong)) / len(wrong),
        "recall": found / sum(len(scene.names) for scene in scenes),
        "words": sum(len(caption.split()) for caption in captions) / len(captions),
    }


def measure(zoo_model: ZooModel, scenes: int = 300) -> dict[str, dict[str, float]]:
    """All figures of the card, on ``scenes`` held-out scenes and as many faint ones."""
    held_out = make_scenes(scenes, CARD_SEED)
    figures = {
        f"pope_{kind}": yes_no_scores(zoo_model, held_out, pope_questions(held_out, kind))
        for kind in POPE_KINDS
    }
    figures["spatial"] = yes_no_scores(
        zoo_model, held_out, spatial_questions(held_out, per_scene=2)
    )
    figures["count"] = exact_scores(zoo_model, held_out, count_questions(held_out, per_scene=2))
    figures["describe"] = caption_scores(zoo_model, held_out, DESCRIBE)
    figures["list"] = caption_scores(zoo_model, held_out, LIST)
    faint = make_scenes(scenes, CARD_SEED, opacity=FAINT)
    for kind in POPE_KINDS:
        questions = pope_questions(faint, kind)
        figures[f"faint_pope_{kind}"] = yes_no_scores(zoo_model, faint, questions)
    figures["faint_describe"] = caption_scores(zoo_model, faint, DESCRIBE)
    figures["faint_list"] = caption_scores(zoo_model, faint, LIST)
    return figures


def export(out_dir: str | Path, folder: str | Path, *, scenes: int = 300) -> dict[str, Any]:
    """Measure the run in ``out_dir`` and write a folder that the zoo can load.

    Args:
        out_dir: Where ``train`` left its checkpoint, finished or not.
        folder: Gets weights, tokenizer, ``card.json`` and ``README.md``.
        scenes: How many held-out scenes to measure on.

    Returns:
        The data card.
    """
    out, target = Path(out_dir), Path(folder)
    checkpoint = out / CHECKPOINT
    if not checkpoint.exists():
        raise ValueError(f"expected a training run in {out}, got no {checkpoint}; train first")
    state = read_state(checkpoint)
    recipe = LlavaShapesRecipe(**state["recipe"])
    tokenizer = make_tokenizer()
    trainee = Trainee(build_model(recipe, tokenizer), recipe.hidden)
    load_checkpoint(checkpoint, trainee)
    model = trainee.llava.eval()
    write_weights(model, tokenizer, target, {"name": "llava-shapes", "finished": False})
    stored = llava_shapes.load(path=target)  # measured as users will meet it
    steps = state["step"]
    seen = min(steps, recipe.vision_steps)
    figures = measure(stored, scenes)
    card = {
        "name": "llava-shapes",
        "finished": steps == recipe.steps,
        "class": "transformers.LlavaForConditionalGeneration",
        "parameters": model.num_parameters(),
        "stored_dtype": "float16",
        "recipe": state["recipe"],
        "steps": steps,
        "vision_scenes": seen * recipe.vision_images,
        "text_scenes": (steps - seen) * recipe.images,
        "machine": state["machine"],
        "seconds": state["seconds"],
        "curve": state["curve"],
        "headline": (
            f"{figures['pope_adversarial']['accuracy']:.1%} of held-out adversarial questions right"
        ),
        "held_out": {"seed": CARD_SEED, "scenes": scenes, **figures},
        "sample": _sample(stored),
        "limits": list(LIMITS),
    }
    write_weights(model, tokenizer, target, card)
    (target / "README.md").write_text(readme(card), encoding="utf-8")
    return card


def _zoo_model(model: Any, tokenizer: Any) -> ZooModel:
    processor = llava_shapes.make_processor(model, tokenizer)
    return ZooModel(model, tokenizer, {}, "llava-shapes", processor)


def _sample(zoo_model: ZooModel) -> list[dict[str, str]]:
    scenes = make_scenes(3, CARD_SEED)
    written = caption_scenes(zoo_model, scenes)
    return [
        {"truth": scene.captions[0], "model": text}
        for scene, text in zip(scenes, written, strict=True)
    ]


def readme(card: dict[str, Any]) -> str:
    """The data card for people, written from the card for programs."""
    held_out, machine, recipe = card["held_out"], card["machine"], card["recipe"]
    pope = [f"pope_{kind}" for kind in POPE_KINDS]
    asked = [*pope, "spatial", "count", *(f"faint_{name}" for name in pope)]
    answers = "\n".join(
        f"| {name.replace('_', ' ')} | {held_out[name]['questions']} "
        f"| {held_out[name]['accuracy']:.1%} "
        + (f"| {held_out[name]['yes_share']:.1%} |" if "yes_share" in held_out[name] else "| |")
        for name in asked
    )
    captions = "\n".join(
        f"| {prompt} | {held_out[name]['chair_i']:.1%} | {held_out[name]['chair_s']:.1%} "
        f"| {held_out[name]['recall']:.1%} | {held_out[name]['words']:.1f} |"
        for name, prompt in (
            ("describe", DESCRIBE),
            ("list", LIST),
            ("faint_describe", f"{DESCRIBE} (faint)"),
            ("faint_list", f"{LIST} (faint)"),
        )
    )
    curve = card["curve"]
    points = "\n".join(
        f"| {p['step']} | {p['training_loss']:.3f} "
        f"| {format(p['held_out_accuracy'], '.1%') if 'held_out_accuracy' in p else ''} |"
        for p in sorted(
            {p["step"]: p for p in [*curve[:: max(1, len(curve) // 10)], *curve[-1:]]}.values(),
            key=lambda p: p["step"],
        )
    )
    samples = "\n".join(f"- truth: {s['truth']}\n  model: {s['model']}" for s in card["sample"])
    limits = "\n".join(f"- {limit}" for limit in card["limits"])
    return f"""# {card["name"]}

A `{card["class"]}` of {card["parameters"]:,} parameters, trained from random weights by
`attending.zoo.recipes.llava_shapes`. Stored in {card["stored_dtype"]}, meant to be loaded in
float32: `attending.zoo.load("{card["name"]}")`. This page is written by the recipe's export.

## Data

Scenes of `attending.zoo.shapes`, drawn and painted during training; no scene is seen twice.
Scenes of `make_scenes` have other seeds and are held out. Licence: Apache-2.0.

## Training

{card["vision_scenes"]:,} scenes for the vision tower alone, then {card["text_scenes"]:,} scenes
with captions and questions for all parts together: {card["steps"]} steps,
{card["seconds"]:.0f} seconds on {machine["processor"]}, {machine["threads"]} of
{machine["logical_processors"]} threads, PyTorch {machine["torch"]}. Seed {recipe["seed"]}.
All settings are in `card.json`.

The loss, averaged since the measurement before, is that of naming patches for the first
{recipe["vision_steps"]} steps, then that of the text in nats per token; the accuracy is that of
adversarial questions about 30 held-out scenes.

| step | loss | accuracy |
|---|---|---|
{points}

## How good it is

On {held_out["scenes"]} held-out scenes (seed {held_out["seed"]}), greedy decoding; "faint" are as
many scenes with `opacity=FAINT`, fainter than most that it was trained on:

| questions | number | right | answered yes |
|---|---|---|---|
{answers}

| prompt | CHAIR_i | CHAIR_s | objects named | words |
|---|---|---|---|---|
{captions}

The first scenes and what the model says of them:

{samples}

## Limits

{limits}
"""
