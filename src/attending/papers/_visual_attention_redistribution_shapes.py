"""The experiment of visual attention redistribution: questions and captions of llava-shapes.

One model answers the same questions and captions the same scenes as it is, redistributed, and with
two controls: as many random image tokens in place of the sinks, and all heads in place of those
that look at the image.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attending.interventions.sink_dimensions import (
    PAPER_DIM,
    SinkDimensions,
    find_sink_dimensions,
    sink_value,
)
from attending.interventions.vision_language import (
    hidden_argument,
    image_token_mask,
    language_layers,
)
from attending.interventions.visual_attention_redistribution import VisualAttentionRedistribution
from attending.papers._visual_attention_redistribution_planted import CHANNEL, plant
from attending.probes.hallucination import chair, count_mentions, pope_scores
from attending.zoo.entry import ZooModel
from attending.zoo.shapes import (
    DESCRIBE,
    FAINT,
    KINDS,
    POPE_KINDS,
    Scene,
    make_scenes,
    pope_questions,
    presence_question,
)
from attending.zoo.shapes_tasks import answer_questions, caption_scenes

ARMS = ("plain", "redistributed", "random", "all_heads")
OUTSIDE = 10_000  # scenes with seeds from here on only serve to find sinks
SKIP_FIRST = 0
STAND_IN = 0.95  # quantile of phi over image tokens, where the paper's tau finds no sink at all


@dataclass(frozen=True)
class Sinks:
    """What was found on scenes that are not asked about.

    Attributes:
        found: the channels.
        tau: the threshold, at width 4096.
        is_papers: whether that is the paper's, 20; else it is the quantile `STAND_IN`.
        largest_phi: the largest phi of an image token at the input of an edited layer, over the
            square root of the width.
    """

    found: SinkDimensions
    tau: float
    is_papers: bool
    largest_phi: float


def run(
    zoo_model: ZooModel, seed: int, *, scenes: int, per_scene: int, captions: int, calibration: int
) -> dict[str, float]:
    """All measurements of one seed.

    Args:
        zoo_model: llava-shapes, or another of its kind.
        seed: of the scenes and questions.
        scenes: how many are asked about.
        per_scene: pairs of questions for each, of each kind.
        captions: how many scenes are captioned.
        calibration: how many scenes sinks are found on.
    """
    sinks = find_sinks(zoo_model, make_scenes(calibration, OUTSIDE + seed, opacity=FAINT))
    method = VisualAttentionRedistribution(
        sinks.found.dimensions, tau=sinks.tau, scale_tau=True, skip_first=SKIP_FIRST
    )
    numbers = {
        "papers_tau": float(sinks.is_papers),
        "largest_phi_share": sinks.largest_phi,
        "first_channel_share": sinks.found.shares[0],
        "second_channel_share": sinks.found.shares[1],
    }
    asked = make_scenes(max(scenes, captions), seed, opacity=FAINT)
    for arm in ARMS:
        with counting(zoo_model, method, arm, seed) as counts:
            found = score(zoo_model, asked, seed, scenes, per_scene, captions)
        numbers |= {f"{name}_{arm}": value for name, value in (found | counts()).items()}
    return numbers | run_planted(zoo_model, seed, asked[:scenes], per_scene, calibration)


def run_planted(
    zoo_model: ZooModel, seed: int, scenes: list[Scene], per_scene: int, calibration: int
) -> dict[str, float]:
    """The accuracy of POPE's adversarial questions where sinks were planted, in every arm."""
    outside = make_scenes(calibration, OUTSIDE + seed, opacity=FAINT)
    texts = [presence_question(scene.names[0]) for scene in outside]
    inputs = zoo_model.processor(outside, texts)
    planted = plant(zoo_model, inputs, seed)
    found = find_sink_dimensions(planted.model, inputs, k=1)
    method = VisualAttentionRedistribution(found.dimensions, scale_tau=True, skip_first=SKIP_FIRST)
    questions = pope_questions(scenes, "adversarial", seed, per_scene=per_scene)
    labels = [question.answer for question in questions]
    numbers = {"planted_channel_found": float(found.dimensions == (CHANNEL,))}
    for arm in ARMS:
        with counting(planted, method, arm, seed):
            answers = answer_questions(planted, scenes, questions)
        numbers[f"planted_{arm}"] = pope_scores(answers, labels, "first_word").accuracy
    return numbers


def find_sinks(zoo_model: ZooModel, scenes: list[Scene]) -> Sinks:
    """The sink channels of the model, and the threshold to use."""
    inputs = zoo_model.processor(scenes, DESCRIBE)
    found = find_sink_dimensions(zoo_model.model, inputs)
    image = image_token_mask(zoo_model.model, inputs["input_ids"])
    method = VisualAttentionRedistribution(skip_first=SKIP_FIRST)
    seen: list[Tensor] = []

    def look(_: object, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        seen.append(sink_value(hidden_argument(args, kwargs), found.dimensions)[image])

    layers = list(language_layers(zoo_model.model).values())
    edited = layers[method.skip_first : len(layers) - method.skip_last]
    hooks = [layer.register_forward_pre_hook(look, with_kwargs=True) for layer in edited]
    try:
        with torch.no_grad():
            zoo_model.model(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    shares = torch.cat(seen) / found.dim**0.5
    papers = method.tau / PAPER_DIM**0.5
    is_papers = bool((shares >= papers).any())
    tau = method.tau if is_papers else float(shares.quantile(STAND_IN)) * PAPER_DIM**0.5
    return Sinks(found, tau, is_papers, float(shares.max()))


@contextmanager
def counting(
    zoo_model: ZooModel, method: VisualAttentionRedistribution, arm: str, seed: int
) -> Iterator[Callable[[], dict[str, float]]]:
    """The model as an arm has it; yields what says how much was edited."""
    if arm == "plain":
        with nullcontext():
            yield dict
        return
    if arm == "all_heads":
        method = replace(method, min_image_mass=0.0, min_non_sink_ratio=0.0)
    generator = torch.Generator().manual_seed(seed)

    def shuffled(layer: int, sinks: Tensor, image: Tensor) -> Tensor:
        """As many image tokens of each sequence, drawn at random; sinks in the text stay."""
        chance = torch.rand(image.shape, generator=generator).to(image.device)
        rank = chance.masked_fill(~image, 2.0).argsort(-1).argsort(-1)
        count = (sinks & image).sum(-1, keepdim=True)
        return (sinks & ~image) | (image & (rank < count))

    with method(zoo_model.model, change_sinks=shuffled if arm == "random" else None) as run:

        def counts() -> dict[str, float]:
            layers = run.layers.values()
            rows = max(1, sum(one.rows for one in layers))
            tokens = max(1, sum(one.image_tokens for one in layers))
            edited = sum(one.edited_rows for one in layers)
            return {
                "edited_rows": edited / rows,
                "moved_mass": sum(one.moved_mass for one in layers) / max(1, edited),
                "image_sinks": sum(one.image_sinks for one in layers) / tokens,
            }

        yield counts


def score(
    zoo_model: ZooModel, scenes: list[Scene], seed: int, asked: int, per_scene: int, captions: int
) -> dict[str, float]:
    """POPE's accuracy of each kind and over all, and CHAIR."""
    numbers = {}
    for kind in POPE_KINDS:
        questions = pope_questions(scenes[:asked], kind, seed, per_scene=per_scene)
        answers = answer_questions(zoo_model, scenes, questions)
        found = pope_scores(answers, [question.answer for question in questions], "first_word")
        numbers[f"pope_{kind}"] = found.accuracy
    numbers["pope"] = sum(numbers.values()) / len(numbers)
    described = scenes[:captions]
    texts = caption_scenes(zoo_model, described)
    truth = torch.tensor([[name in scene.names for name in KINDS] for scene in described])
    hallucinated = chair(count_mentions(texts, KINDS), truth)
    numbers["chair_i"] = hallucinated.chair_i
    numbers["chair_s"] = hallucinated.chair_s
    numbers["recall"] = hallucinated.recall
    return numbers
