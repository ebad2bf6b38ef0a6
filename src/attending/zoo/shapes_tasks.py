"""Lets ``llava-shapes``, or another model with its processor, answer and caption, in batches."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from attending.zoo._shapes_text import DESCRIBE, Question
from attending.zoo.entry import ZooModel
from attending.zoo.shapes import Scene


def answer_questions(
    zoo_model: ZooModel,
    scenes: Sequence[Scene],
    questions: Sequence[Question],
    *,
    batch_size: int = 64,
    generate_kwargs: Mapping[str, Any] | None = None,
) -> list[str]:
    """Ask the model each question about its scene.

    Args:
        zoo_model: ``zoo.load("llava-shapes")``, or any with a ``processor``.
        scenes: What the questions' ``scene`` counts in.
        questions: As :func:`attending.zoo.shapes.pope_questions` and its like give them.
        batch_size: Questions generated for at once.
        generate_kwargs: For ``model.generate``; decoding is greedy unless this says otherwise, and
            stops after 4 tokens.

    Returns:
        The model's answers, such as ``"yes"``; ``question.answer`` is the right one.
    """
    return generate_texts(
        zoo_model,
        [scenes[question.scene] for question in questions],
        [question.text for question in questions],
        batch_size=batch_size,
        generate_kwargs={"max_new_tokens": 4, **(generate_kwargs or {})},
    )


def caption_scenes(
    zoo_model: ZooModel,
    scenes: Sequence[Scene],
    *,
    prompt: str = DESCRIBE,
    batch_size: int = 32,
    generate_kwargs: Mapping[str, Any] | None = None,
) -> list[str]:
    """Let the model describe each scene.

    Args:
        zoo_model: ``zoo.load("llava-shapes")``, or any with a ``processor``.
        scenes: What to describe.
        prompt: ``shapes.DESCRIBE`` for all it sees, ``shapes.LIST`` for the names alone.
        batch_size: Scenes described at once.
        generate_kwargs: For ``model.generate``; decoding is greedy unless this says otherwise, and
            stops after 64 tokens.
    """
    return generate_texts(
        zoo_model,
        scenes,
        [prompt] * len(scenes),
        batch_size=batch_size,
        generate_kwargs={"max_new_tokens": 64, **(generate_kwargs or {})},
    )


def generate_texts(
    zoo_model: ZooModel,
    scenes: Sequence[Scene],
    prompts: Sequence[str],
    *,
    batch_size: int,
    generate_kwargs: Mapping[str, Any],
) -> list[str]:
    """What the model writes after each prompt about each scene, in their order."""
    if zoo_model.processor is None:
        raise ValueError(
            f"expected a model that sees, got {zoo_model.name!r}, which has no processor; load "
            '"llava-shapes"'
        )
    if batch_size < 1:
        raise ValueError(f"expected batch_size of at least 1, got {batch_size}")
    model: Any = zoo_model.model
    texts: list[str] = []
    for start in range(0, len(prompts), batch_size):
        part = slice(start, start + batch_size)
        inputs = zoo_model.processor(scenes[part], prompts[part])
        moved = {name: value.to(model.device) for name, value in inputs.items()}
        moved["pixel_values"] = moved["pixel_values"].to(model.dtype)
        with torch.no_grad():
            output = model.generate(**moved, **{"do_sample": False, **generate_kwargs})
        texts += zoo_model.processor.decode_new(inputs, output)
    return texts
