"""What a trial measures besides outputs and text: tasks, which have a score."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias, runtime_checkable

from torch import nn

from attending.trials.samples import Measure

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

    name: str

    def run(self, model: nn.Module) -> Mapping[str, Score]:
        """Let the model do it.

        Returns:
            Scores by name: a number, or one for each item of the task, in a fixed order. With one
            for each item, changes against plain are paired item by item. Texts for each item are
            not scored; how many are those of plain is reported.
        """
        ...


@dataclass
class ShapesPope:
    """POPE on images of coloured shapes: "Is there a red circle in the image?", yes or no.

    Half of the questions name what is there. The others name what is not: anything ("random"), what
    is frequent ("popular"), or what often comes with what is there ("adversarial"). Scores are the
    accuracy, and the share of "yes": far above a half, the model hallucinates by agreeing.

    Attributes:
        zoo_model: a model that `attending.zoo.load` gave, with its tokenizer and processor; what is
            run is the model that the trial hands over.
        kind: which questions, see above.
        scenes: how many images.
        seed: of the images and questions.
        batch_size: questions at once.
        name: for people.
    """

    zoo_model: Any
    kind: str = "adversarial"
    scenes: int = 32
    seed: int = 0
    batch_size: int = 32
    name: str = "shapes-pope"
    measures: list[Measure] = field(
        default_factory=lambda: [
            Measure(
                "accuracy",
                "Accuracy",
                "share",
                "The share of questions that were answered rightly.",
                "higher",
                "mean",
                "question",
            ),
            Measure(
                "yes_ratio",
                "Said yes",
                "share",
                'The share of questions that were answered "yes"; right is one half.',
                None,
                "mean",
                "question",
            ),
        ]
    )

    def run(self, model: nn.Module) -> Mapping[str, Score]:
        """Ask all questions."""
        raise NotImplementedError
