"""What a trial measures besides outputs and text: tasks, which have a score."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, runtime_checkable

from torch import nn

from attending.probes.hallucination import parse_yes_no
from attending.trials.samples import Measure
from attending.zoo import shapes
from attending.zoo.entry import ZooModel
from attending.zoo.shapes_tasks import answer_questions

Score: TypeAlias = float | Sequence[float] | Sequence[str]
"""A number; or a number for each item; or a text for each item, to compare with plain's."""


@runtime_checkable
class Task(Protocol):
    """Something that a model is to do, and that can be scored.

        class Squares:
            name = "squares"

            def run(self, model):
                answers = [ask(model, f"{n} * {n} =") for n in range(10)]
                right = [float(answer == n * n) for n, answer in enumerate(answers)]
                return {"accuracy": right, "answers": answers}

    It runs once a repeat with every contender. What it does must not depend on how often it ran.

    A task may have an attribute `measures`, a list of `Measure`, which says of its scores what they
    are and which way is better. Those without an entry are shown by their name.

    Attributes:
        name: for people.
    """

    @property
    def name(self) -> str:
        """For people."""
        ...

    def run(self, model: nn.Module) -> Mapping[str, Score]:
        """Let the model do it.

        Returns:
            Scores by name: a number, or one for each item of the task, in a fixed order. With one
            for each item, changes against plain are paired item by item. Texts for each item are
            not scored; how many are those of plain is reported.
        """
        ...


@dataclass(frozen=True)
class ShapesPope:
    """POPE on images of coloured shapes: "Is there a red circle in the image?", yes or no.

    Half of the questions ask for what is there. The others ask for what is not: anything
    ("random"), what is frequent ("popular"), or what often comes with what is there
    ("adversarial"). Accuracy alone hides a model that agrees to everything, so there is the share
    of "yes", too, of which one half is right.

        task = ShapesPope(zoo.load("llava-shapes"))
        at.trial(task.model, task, {"damro": DAMRO()})

    Attributes:
        zoo_model: a model that sees with its processor, such as `zoo.load("llava-shapes")`; what is
            run is the model that a trial hands over.
        kind: which questions, see above.
        scenes: how many images, six questions each.
        seed: of images and questions; none of the images was trained on.
        faint: whether the objects are hard to see, so that a model makes up more.
        batch_size: questions at once.
        generate_kwargs: for `model.generate`, beside greedy decoding.
    """

    zoo_model: ZooModel
    kind: str = "adversarial"
    scenes: int = 24
    seed: int = 0
    faint: bool = False
    batch_size: int = 48
    generate_kwargs: Mapping[str, Any] | None = None

    @property
    def name(self) -> str:
        """For people."""
        faint = ", faint" if self.faint else ""
        return f"shapes-pope, {self.kind}{faint}, {len(self.asked[1])} questions"

    @property
    def model(self) -> nn.Module:
        """The model of `zoo_model`."""
        model: nn.Module = self.zoo_model.model
        return model

    @property
    def measures(self) -> list[Measure]:
        """What its scores are."""
        right = "The share of questions that were answered rightly."
        yes = 'The share of questions that were answered "yes"; one half is right.'
        said = "The share of questions with the answer that the plain model gives."
        return [
            Measure("accuracy", "Accuracy", "share", right, "higher", "mean", "question"),
            Measure("yes_ratio", "Said yes", "share", yes, None, "mean", "question"),
            Measure("same_answers", "Same answer", "share", said, None, "mean", "question", True),
        ]

    @functools.cached_property
    def asked(self) -> tuple[list[shapes.Scene], list[shapes.Question]]:
        """The images and the questions."""
        if self.faint:
            scenes = shapes.make_scenes(self.scenes, self.seed, opacity=shapes.FAINT)
        else:
            scenes = shapes.make_scenes(self.scenes, self.seed)
        return scenes, shapes.pope_questions(scenes, self.kind, self.seed)

    def run(self, model: nn.Module) -> Mapping[str, Score]:
        """Ask all questions."""
        scenes, questions = self.asked
        answers = answer_questions(
            dataclasses.replace(self.zoo_model, model=model),
            scenes,
            questions,
            batch_size=self.batch_size,
            generate_kwargs=self.generate_kwargs,
        )
        said = [parse_yes_no(answer, "first_word") for answer in answers]
        truth = [question.answer == "yes" for question in questions]
        return {
            "accuracy": [float(a is b) for a, b in zip(said, truth, strict=True)],
            "yes_ratio": [float(a is True) for a in said],
            "answers": answers,
        }
