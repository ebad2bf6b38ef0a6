"""Scores in a trial: those of a task, and the user's own metrics."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from attending.taps import TapError
from attending.trials.contenders import Contender
from attending.trials.memory import peak_memory
from attending.trials.samples import Measure, Samples
from attending.trials.stages import Clock, Found, memory, over_repeats, speed
from attending.trials.tasks import Score, Task


class TaskStage:
    """A task: its scores, how fast it is done, memory."""

    part = "the task"

    def __init__(self, model: nn.Module, task: Task, device: torch.device, seed: int) -> None:
        self.model, self.task, self.seed = model, task, seed
        self.steps = 1
        self.clock = Clock(device)
        self.seconds: dict[str, list[float]] = {}
        self.scores: dict[str, list[Mapping[str, Score]]] = {}
        self.memory: dict[str, int] = {}
        self.same: dict[str, bool] = {}

    def compare(self, contenders: Sequence[Contender], step: Callable[[str], None]) -> None:
        """Warm up, and see how much memory it takes."""
        for contender in contenders:
            if contender.status == "ran":
                torch.manual_seed(self.seed)
                run = partial(self.task.run, self.model)
                peak = contender.run(
                    self.model, partial(peak_memory, self.model, run), part=self.part
                )
                if peak is not None:
                    self.memory[contender.name] = peak
                step(contender.name)

    def repeat(self, contender: Contender, number: int) -> None:
        """Do the task, and time it."""
        torch.manual_seed(self.seed + number)
        timed = contender.run(self.model, self._timed, part=self.part)
        if timed is not None:
            self.seconds.setdefault(contender.name, []).append(timed[0])
            self.scores.setdefault(contender.name, []).append(timed[1])

    def finish(self, contenders: Sequence[Contender]) -> tuple[list[Measure], Found]:
        """Scores per item, averaged over repeats, or per repeat; speed per repeat."""
        plain = self.scores[contenders[0].name]
        items = max((len(s) for s in plain[0].values() if isinstance(s, Sequence)), default=0)
        known = {measure.name: measure for measure in getattr(self.task, "measures", ())}
        measures: dict[str, Measure] = {}
        found: Found = {}
        for contender in contenders:
            name = contender.name
            columns: dict[str, Samples] = {}
            for score, first in plain[0].items():
                values = [scores[score] for scores in self.scores[name]]
                others = [scores[score] for scores in plain]
                measure, samples = _of_score(score, first, values, others, known)
                measures[measure.name] = measure
                columns[measure.name] = samples
            columns["task_speed"] = Samples(tuple((items or 1) / s for s in self.seconds[name]))
            if name in self.memory:
                columns["task_memory"] = Samples((float(self.memory[name]),))
            found[name] = columns
            self.same[name] = self.scores[name] == plain
        own = speed(
            "task_speed",
            "Task speed",
            "items" if items else "runs",
            f"{'Items' if items else 'Runs'} of the task per second.",
        )
        return [*measures.values(), own, memory("task_memory", "Task memory", "the task")], found

    def _timed(self) -> tuple[float, Mapping[str, Score]]:
        start = self.clock.read()
        scores = self.task.run(self.model)
        return self.clock.read() - start, scores


class MetricStage:
    """The user's own metrics: numbers of a model, once a repeat."""

    part = ""

    def __init__(
        self, model: nn.Module, metrics: Mapping[str, Callable[[nn.Module], float]], seed: int
    ) -> None:
        self.model, self.metrics, self.seed = model, metrics, seed
        self.steps = 0
        self.same: dict[str, bool] = {}
        self.values: dict[str, dict[str, list[float]]] = {}

    def compare(self, contenders: Sequence[Contender], step: Callable[[str], None]) -> None:
        """Nothing: they are not timed, so that they need no warm-up."""

    def repeat(self, contender: Contender, number: int) -> None:
        """Take all metrics."""
        torch.manual_seed(self.seed + number)
        # A metric may run nothing of the model, or only a forward, or only generate.
        taken = contender.run(self.model, self._taken, quiet=(UserWarning, TapError))
        own = self.values.setdefault(contender.name, {name: [] for name in self.metrics})
        for name, value in (taken or {}).items():
            own[name].append(value)

    def finish(self, contenders: Sequence[Contender]) -> tuple[list[Measure], Found]:
        """A sample per repeat."""
        measures = [
            Measure(name, name, "", "A metric of yours.", None, "mean", "repeat")
            for name in self.metrics
        ]
        return measures, {
            one.name: {name: Samples(tuple(v)) for name, v in self.values[one.name].items()}
            for one in contenders
        }

    def _taken(self) -> dict[str, float]:
        return {name: float(metric(self.model)) for name, metric in self.metrics.items()}


def _of_score(
    name: str,
    first: Score,
    values: Sequence[Any],
    others: Sequence[Any],
    known: Mapping[str, Measure],
) -> tuple[Measure, Samples]:
    if _is_number(first):
        measure = Measure(name, name, "", "A score of the task.", None, "mean", "repeat")
        return known.get(name, measure), Samples(tuple(float(value) for value in values))
    if isinstance(first, Sequence) and first and isinstance(first[0], str):
        name = f"same_{name}"
        words = "The share of items at which the model says what the plain model says."
        measure = Measure(name, f"Same {name[5:]}", "share", words, None, "mean", "item", True)
        pairs = [
            [float(a == b) for a, b in zip(one, other, strict=True)]
            for one, other in zip(values, others, strict=True)
        ]
        return known.get(name, measure), over_repeats(pairs)
    words = "A score of the task, averaged over its items."
    measure = Measure(name, name, "", words, None, "mean", "item")
    return known.get(name, measure), over_repeats([[float(x) for x in one] for one in values])


def _is_number(score: Score) -> TypeGuard[float]:
    return isinstance(score, int | float) or (isinstance(score, Tensor) and score.dim() == 0)
