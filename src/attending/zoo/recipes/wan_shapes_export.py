"""Turns a training run of ``wan-shapes`` into the folder that is shipped, with its data card.

Every figure of the card is measured here, on the weights as they are stored and on scenes that
training cannot draw; none is written by hand.
"""

import os
import tempfile
from pathlib import Path
from typing import Any

from attending.zoo import wan_shapes
from attending.zoo.recipes.checkpoint import load_checkpoint, read_state
from attending.zoo.recipes.training_loop import CHECKPOINT
from attending.zoo.recipes.wan_shapes import WanShapesRecipe, build_model
from attending.zoo.recipes.wan_shapes_card import measure, paint_samples
from attending.zoo.recipes.wan_shapes_trainee import Trainee
from attending.zoo.recipes.weights_folder import write_weights

LIMITS = (
    "It paints one world, 32 x 32 pixels, one or two objects; it knows 30 words.",
    "Whether shapes, textures and backgrounds follow the caption is not measured.",
    "It has seen only 4, 8 and 16 frames, and the same travel in all of them: in 16 frames "
    "objects move half as far from frame to frame as in 8.",
    "It is small and was trained for an hour: a subject for methods, not a painter.",
)
NO_MOTION = (
    "It has not learned to follow the motion in a caption: see the table. Do not measure with it "
    "what a method does to motion."
)


def write(trainee: Trainee, folder: Path, card: dict[str, Any]) -> None:
    """Write the averaged weights, in float16, and the card."""
    write_weights(trainee.average_wan, None, folder, card)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".unfinished-") as name:
        trainee.average_text.save(Path(name))
        for file in sorted(Path(name).iterdir()):
            file.chmod(0o644)
            os.replace(file, folder / file.name)


def export(
    out_dir: str | Path, folder: str | Path, *, videos: int = 36, steps: int = 20
) -> dict[str, Any]:
    """Measure the run in ``out_dir`` and write a folder that the zoo can load.

    Args:
        out_dir: Where ``train`` left its checkpoint, finished or not.
        folder: Gets weights, ``card.json`` and ``README.md``.
        videos: How many held-out videos to measure on.
        steps: Of the sampler for the painted videos.

    Returns:
        The data card.
    """
    out, target = Path(out_dir), Path(folder)
    checkpoint = out / CHECKPOINT
    if not checkpoint.exists():
        raise ValueError(f"expected a training run in {out}, got no {checkpoint}; train first")
    state = read_state(checkpoint)
    recipe = WanShapesRecipe(**state["recipe"])
    trainee = Trainee(*build_model(recipe))
    load_checkpoint(checkpoint, trainee)
    write(trainee, target, {"name": "wan-shapes", "finished": False})
    stored = wan_shapes.load(path=target)  # measured as users will meet it
    held_out = measure(stored, videos, steps)
    lengths = [recipe.frames_at(step) for step in range(state["step"])]
    best = held_out["painted"][0]
    both = (trainee.average_wan, trainee.average_text)
    card = {
        "name": "wan-shapes",
        "finished": state["step"] == recipe.steps,
        "class": "diffusers.WanTransformer3DModel",
        "parameters": sum(p.numel() for part in both for p in part.parameters()),
        "stored_dtype": "float16",
        "recipe": state["recipe"],
        "steps": state["step"],
        "videos_seen": {
            str(frames): lengths.count(frames) * recipe.frames_per_step // frames
            for frames in sorted(set(lengths))
        },
        "machine": state["machine"],
        "seconds": state["seconds"],
        "curve": state["curve"],
        "headline": (
            f"{best['color']:.0%} of painted objects have the caption's colour and "
            f"{best['motion']:.0%} its motion (a guess: 20%)"
        ),
        "held_out": held_out,
        "sample": paint_samples(stored, target, steps),
        "limits": [*LIMITS, *([NO_MOTION] if best["motion"] < 0.4 else [])],
    }
    write(trainee, target, card)
    (target / "README.md").write_text(readme(card), encoding="utf-8")
    return card


def readme(card: dict[str, Any]) -> str:
    """The data card for people, written from the card for programs."""
    held_out, machine, recipe = card["held_out"], card["machine"], card["recipe"]
    seen = ", ".join(f"{count:,} of {frames}" for frames, count in card["videos_seen"].items())
    points = "\n".join(
        f"| {p['step']} | {p['training_loss']:.4f} | {p['held_out_loss']:.4f} |"
        for p in card["curve"]
    )
    levels = " | ".join(str(level) for level in held_out["levels"])
    losses = "\n".join(
        f"| {frames} | {held_out['loss_videos'][frames]} | "
        f"{' | '.join(f'{loss:.4f}' for loss in values)} |"
        for frames, values in held_out["loss_by_frames"].items()
    )
    painted = "\n".join(
        f"| {p['frames']} | {p['guidance_scale']:g} | {p['videos']} "
        f"| {p['color']:.1%} ({p['color_of_the_world']:.1%}) "
        f"| {p['motion']:.1%} ({p['motion_of_the_world']:.1%}) "
        f"| {p['both']:.1%} ({p['both_of_the_world']:.1%}) "
        f"| {p['found_still']:.1%} ({p['told_still']:.1%}) |"
        for p in held_out["painted"]
    )
    samples = "\n".join(
        f"- {s['frames']} frames: {s['caption']} Found: {s['color'] or 'no colour'}, "
        f"{ {None: 'nothing to follow', '': 'still'}.get(s['motion'], s['motion']) }."
        for s in card["sample"]
    )
    limits = "\n".join(f"- {limit}" for limit in card["limits"])
    return f"""# {card["name"]}

A `{card["class"]}` with its text encoder, {card["parameters"]:,} parameters together, trained from
random weights by `attending.zoo.recipes.wan_shapes`. Stored in {card["stored_dtype"]}, meant to be
loaded in float32: `attending.zoo.load("{card["name"]}")`. This page is written by the recipe's
export.

## Data

Videos of `attending.zoo.shapes_motion`, one or two objects, drawn and painted during training; no
video is seen twice. Those of `make_moving_scenes` have other seeds and are held out. Licence:
Apache-2.0.

## Training

{card["steps"]} steps, {card["seconds"]:.0f} seconds on {machine["processor"]},
{machine["threads"]} of {machine["logical_processors"]} threads, PyTorch {machine["torch"]}; other
programs ran beside it. Videos seen, by number of frames: {seen}. Seed {recipe["seed"]}. All
settings are in `card.json`. What is shipped is the running average of the weights.

The training loss is that of the velocity, averaged since the measurement before, at lengths that
change during training (4, then 8, then 8 and 16 frames); the held-out loss is that of the running
average on 12 videos of 8 frames, the mean over the noise levels below.

| step | training loss | held-out loss |
|---|---|---|
{points}

## How good it is

Mean squared error of the velocity on held-out videos (seed {held_out["seed"]}), by noise level `s`.
Always predicting zero would give {held_out["loss_of_predicting_zero"]:.2f}.

| frames | videos | {levels} |
|---|---|{"---|" * len(held_out["levels"])}
{losses}

Videos painted from held-out captions of one object, {held_out["steps"]} steps, shift
{held_out["shift"]:g}: the share with the caption's colour (chance 1 in 8) and motion (1 in 5), by
the rules of `attending.zoo.video_checks`; in brackets what the same rules say of the true videos.
A video of 8 frames took {held_out["seconds_per_video_of_8_frames"]:.1f} seconds with guidance.

| frames | guidance | videos | colour | motion | both | found still (told to be) |
|---|---|---|---|---|---|---|
{painted}

The first captions, and what the rules find in the videos, a row each below:

{samples}

![6 videos of 8 frames](samples-8.png)

![3 videos of 16 frames](samples-16.png)

## Limits

{limits}
"""
