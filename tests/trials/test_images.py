"""Trials of a model that sees: the task, and batches with images."""

import dataclasses
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor

import attending as at
from attending import zoo
from attending.decoding.damro import DAMRO
from attending.interventions.attention_calibration import AttentionCalibration
from attending.interventions.visual_token_pruning import VisualTokenPruning
from attending.probes.hallucination import pope_scores
from attending.trials import ShapesPope
from attending.zoo import shapes
from attending.zoo.shapes_tasks import answer_questions

PRUNING = VisualTokenPruning("divprune", keep=16, positions="original")
ACT = AttentionCalibration(layers=(1, 2, 3), alpha=2.0, beta=0.0)
PROMPTS = ["Is there a red circle in the image?", "Describe the image.", "List the objects."]


@pytest.fixture(scope="module")
def seeing() -> zoo.ZooModel:
    return zoo.load("llava-shapes")


@pytest.fixture(scope="module")
def inputs(seeing: zoo.ZooModel) -> dict[str, Tensor]:
    found: dict[str, Tensor] = seeing.processor(shapes.make_scenes(3, 5), PROMPTS)
    return found


@pytest.mark.parametrize("faint", [False, True])
def test_the_task_scores_as_pope_does(seeing: zoo.ZooModel, faint: bool) -> None:
    task = ShapesPope(seeing, scenes=6, seed=2, faint=faint)
    scenes, questions = task.asked
    found: Any = task.run(seeing.model)
    answers = answer_questions(seeing, scenes, questions)
    scores = pope_scores(answers, [q.answer for q in questions], "first_word")
    assert found["answers"] == answers
    assert sum(found["accuracy"]) / len(questions) == pytest.approx(scores.accuracy)
    assert sum(found["yes_ratio"]) / len(questions) == pytest.approx(scores.yes_ratio)
    assert ("faint" in task.name) == faint
    assert max(thing.opacity for scene in scenes for thing in scene.objects) <= 0.4 or not faint


def test_the_task_runs_the_model_of_the_trial(seeing: zoo.ZooModel) -> None:
    other = dataclasses.replace(seeing, model=None)  # type: ignore[arg-type]
    task = ShapesPope(other, scenes=2)
    found = at.trial(seeing.model, task, {"damro": DAMRO(k=4)}, repeats=1)
    assert found["damro"].status == "ran"
    assert found.inputs.startswith("task shapes-pope, adversarial, ")


def test_pruned_images_are_scored_on_the_same_tokens(
    seeing: zoo.ZooModel, inputs: dict[str, Tensor]
) -> None:
    methods = {"pruned": PRUNING, "both": [PRUNING, ACT]}
    found = at.trial(seeing.model, inputs, methods, repeats=1, generate=4)
    plain = found.plain.samples["perplexity"]
    for name in methods:
        assert found[name].samples["perplexity"].weights == plain.weights
        memory, whole = (
            found.estimate(name, "forward_memory"),
            found.estimate("none", "forward_memory"),
        )
        assert memory is not None
        assert whole is not None
        assert memory.value < whole.value
    with torch.no_grad(), PRUNING(seeing.model):
        logits = seeing.model(**inputs).logits[0].double()
    tokens = inputs["input_ids"][0]
    text = tokens[(tokens == seeing.model.config.image_token_id).nonzero()[-1] + 1 :]
    loss = torch.nn.functional.cross_entropy(logits[-len(text) : -1], text[1:])
    value = found["pruned"].samples["perplexity"].values[0]
    assert value == pytest.approx(float(loss.exp()), rel=1e-4)
    told = at.trial(seeing.model, inputs, methods, repeats=1, prompt_length=70)
    assert any("before pruning" in note for note in told["both"].notes)
    assert not any("before pruning" in note for note in told["pruned"].notes)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("pruned", [False, True])
def test_a_stack_decodes_with_a_cache_as_it_reads(
    seeing: zoo.ZooModel, inputs: dict[str, Tensor], order: tuple[int, int], pruned: bool
) -> None:
    model, new = seeing.model, 4
    other: Any = PRUNING if pruned else redistribution(seeing)
    stack = [(ACT, other)[place] for place in order]
    length = inputs["input_ids"].shape[1]

    def block(**settings: int) -> ExitStack:
        blocks = ExitStack()
        for method in stack:
            blocks.enter_context(
                method(model)
                if isinstance(method, VisualTokenPruning)
                else method(model, **settings)
            )
        return blocks

    with torch.no_grad():
        with block():
            out: Any = model.generate(
                **inputs, max_new_tokens=new, min_new_tokens=new, do_sample=False,
                output_logits=True, return_dict_in_generate=True,
            )  # fmt: skip
        mask = torch.cat([inputs["attention_mask"], torch.ones(3, new, dtype=torch.long)], 1)
        whole = inputs | {"input_ids": out.sequences, "attention_mask": mask}
        left = length - (64 - 16 if pruned else 0)  # the places of the prompt in the model
        with block(prompt_length=left):
            logits = model(**whole).logits
    for step in range(new):
        torch.testing.assert_close(
            logits[:, step - new - 1], out.logits[step], rtol=1e-4, atol=1e-4
        )


def redistribution(seeing: zoo.ZooModel) -> Any:
    from attending.interventions.visual_attention_redistribution import (
        VisualAttentionRedistribution,
    )

    method = VisualAttentionRedistribution(scale_tau=True, tau=2.0, skip_first=1)
    data = seeing.processor(shapes.make_scenes(4, 1), shapes.DESCRIBE)
    return method.calibrate(seeing.model, data)
