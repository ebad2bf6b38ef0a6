"""POPE and CHAIR of llava-shapes: plain, with DAMRO, and with what DAMRO might be mistaken for.

All ways of decoding get the same scenes and questions. Beside plain sampling and greedy decoding:

- `cut`: only adaptive plausibility, alpha = 0. Whatever it gains is not the contrast's.
- `random`: as many image tokens for the negative branch, drawn at random.
- `vcd`: a noised image for the negative branch (visual contrastive decoding, 2311.16922): the
  forward process of diffusion, 1000 steps, betas sigmoid from 1e-5 to 5e-3, at step 500. [recall]
"""

import functools
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from attending.decoding.contrastive import ContrastiveLogitsProcessor, contrast_first
from attending.decoding.damro import DAMRO
from attending.decoding.image_prompts import see_images, with_image_tokens
from attending.probes.cls_attention import outlier_tokens
from attending.probes.hallucination import chair, count_mentions, pope_scores
from attending.zoo import shapes
from attending.zoo.entry import ZooModel
from attending.zoo.shapes_tasks import answer_questions, caption_scenes

SAMPLE = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
WAYS = ("greedy", "sample", "cut", "damro", "damro_greedy", "random", "vcd")


@dataclass(frozen=True)
class Strength:
    """How a contrast is made.

    Args:
        k: image tokens of the negative branch.
        alpha: of the contrast.
        beta: of adaptive plausibility.
    """

    k: int
    alpha: float
    beta: float


def decoding(way: str, strength: Strength, generator: torch.Generator) -> dict[str, Any]:
    """The arguments with which `generate` decodes in a way of `WAYS`."""
    k, alpha, beta = strength.k, strength.alpha, strength.beta
    if way == "greedy":
        return {}
    if way == "sample":
        return dict(SAMPLE)
    if way == "damro_greedy":
        return {"custom_generate": DAMRO(k, alpha, beta).custom_generate}
    ways = {
        "cut": DAMRO(k, 0.0, beta).custom_generate,
        "damro": DAMRO(k, alpha, beta).custom_generate,
        "random": functools.partial(_against_random_tokens, strength, generator),
        "vcd": functools.partial(_against_noise, strength, generator),
    }
    return {**SAMPLE, "custom_generate": ways[way]}


def _against_random_tokens(
    strength: Strength,
    generator: torch.Generator,
    model: Any,
    input_ids: Tensor,
    logits_processor: Sequence[Any],
    stopping_criteria: Any,
    generation_config: Any,
    pixel_values: Tensor | None = None,
    **model_kwargs: Any,
) -> Any:
    images = see_images(model, pixel_values)
    noise = torch.rand(images.attention.shape, generator=generator)
    index = outlier_tokens(noise, strength.k) + images.offset
    mask = model_kwargs.get("attention_mask")
    negative = with_image_tokens(model, images, index, input_ids, mask)
    model_kwargs["mm_encoder_outputs"] = {"image": images.outputs}
    contrast = ContrastiveLogitsProcessor(model, negative, strength.alpha, strength.beta)
    processors = [contrast, *logits_processor]
    return contrast_first(
        model, input_ids, processors, stopping_criteria, generation_config, **model_kwargs
    )


def _against_noise(
    strength: Strength,
    generator: torch.Generator,
    model: Any,
    input_ids: Tensor,
    logits_processor: Sequence[Any],
    stopping_criteria: Any,
    generation_config: Any,
    pixel_values: Tensor | None = None,
    **model_kwargs: Any,
) -> Any:
    assert pixel_values is not None
    negative = {"input_ids": input_ids, "pixel_values": add_noise(pixel_values, 500, generator)}
    if model_kwargs.get("attention_mask") is not None:
        negative["attention_mask"] = model_kwargs["attention_mask"]
    images = model.get_image_features(pixel_values=pixel_values, return_dict=True)
    model_kwargs["mm_encoder_outputs"] = {"image": images}
    contrast = ContrastiveLogitsProcessor(model, negative, strength.alpha, strength.beta)
    processors = [contrast, *logits_processor]
    return contrast_first(
        model, input_ids, processors, stopping_criteria, generation_config, **model_kwargs
    )


def add_noise(
    images: Float[Tensor, "images 3 height width"], step: int, generator: torch.Generator
) -> Float[Tensor, "images 3 height width"]:
    """The forward process of diffusion, as VCD uses it."""
    betas = torch.linspace(-6, 6, 1000).sigmoid() * (5e-3 - 1e-5) + 1e-5
    kept = float((1 - betas).cumprod(0)[step])
    noise = torch.randn(images.shape, generator=generator)
    noised: Tensor = kept**0.5 * images + (1 - kept) ** 0.5 * noise
    return noised


def measure(
    zoo_model: ZooModel,
    seed: int,
    *,
    pope_scenes: int,
    captions: int,
    min_objects: int,
    tokens: int,
    k: int,
    other_k: Sequence[int],
    alpha_pope: float,
    alpha_chair: float,
    beta: float,
) -> dict[str, float]:
    """All numbers of one seed: of the scenes, the questions, the sampling, the noise."""
    asked = shapes.make_scenes(pope_scenes, seed=7000 + 2 * seed, min_objects=min_objects)
    described = shapes.make_scenes(captions, seed=7001 + 2 * seed, min_objects=min_objects)
    questions = [
        question
        for kind in shapes.POPE_KINDS
        for question in shapes.pope_questions(asked, kind, seed)
    ]
    labels = [question.answer for question in questions]
    names = list(shapes.KINDS)
    truth = count_mentions([" ".join(scene.names) for scene in described], names) > 0
    numbers: dict[str, float] = {}

    def answered(way: str, strength: Strength, name: str) -> None:
        with _seeded(seed) as generator:
            settings = decoding(way, strength, generator)
            found = answer_questions(zoo_model, asked, questions, generate_kwargs=settings)
        scores = pope_scores(found, labels)
        numbers[f"pope_accuracy_{name}"] = scores.accuracy
        numbers[f"pope_f1_{name}"] = scores.f1

    for way in WAYS:
        answered(way, Strength(k, alpha_pope, beta), way)
        with _seeded(seed) as generator:
            settings = decoding(way, Strength(k, alpha_chair, beta), generator)
            settings["max_new_tokens"] = tokens
            texts = caption_scenes(zoo_model, described, generate_kwargs=settings)
        found = chair(count_mentions(texts, names), truth)
        numbers[f"chair_i_{way}"], numbers[f"chair_s_{way}"] = found.chair_i, found.chair_s
        numbers[f"recall_{way}"] = found.recall
    for other in other_k:
        answered("damro", Strength(other, alpha_pope, beta), f"damro_k{other}")
    numbers |= where_outliers_are(zoo_model, described, k)
    numbers["cost"] = cost(zoo_model, described[:16], tokens, Strength(k, alpha_chair, beta))
    return numbers


def where_outliers_are(
    zoo_model: ZooModel, scenes: Sequence[shapes.Scene], k: int
) -> dict[str, float]:
    """The share of outlier patches that show an object, and that of all patches.

    A patch shows an object if at least half of its pixels belong to one.
    """
    model: Any = zoo_model.model
    assert zoo_model.processor is not None
    inputs = zoo_model.processor(scenes, shapes.DESCRIBE)
    with torch.no_grad():
        attention = see_images(model, inputs["pixel_values"]).attention
    side = inputs["pixel_values"].shape[-1]
    painted = torch.stack([scene.masks(side).any(0) for scene in scenes]).float()
    rows = round(attention.shape[-1] ** 0.5)
    on_object = torch.nn.functional.avg_pool2d(painted, side // rows).flatten(1) >= 0.5
    chosen = on_object.gather(1, outlier_tokens(attention, k))
    return {
        "outliers_on_objects": float(chosen.float().mean()),
        "patches_on_objects": float(on_object.float().mean()),
    }


def cost(
    zoo_model: ZooModel, scenes: Sequence[shapes.Scene], tokens: int, strength: Strength
) -> float:
    """Seconds with DAMRO over seconds without, both greedy, for the same number of tokens.

    The fastest of three runs each, in turns.
    """
    length = {"max_new_tokens": tokens, "min_new_tokens": tokens}
    generator = torch.Generator()
    best: dict[str, float] = {}
    for _ in range(3):
        for way in ("greedy", "damro_greedy"):
            settings: Mapping[str, Any] = {**decoding(way, strength, generator), **length}
            start = time.perf_counter()
            caption_scenes(zoo_model, scenes, generate_kwargs=settings)
            best[way] = min(best.get(way, float("inf")), time.perf_counter() - start)
    return best["damro_greedy"] / best["greedy"]


@contextmanager
def _seeded(seed: int) -> Iterator[torch.Generator]:
    """The global generator, seeded and put back; yields one of its own for noise."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield torch.Generator().manual_seed(seed)
