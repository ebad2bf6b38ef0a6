"""Which heads are worth calibrating: each on its own, on calibration data ("offline filtering").

The paper's search (Yu et al. 2406.15765): for each head, run the model with only that head
calibrated on a held-out mixture, and keep the heads that do better than the model as it is. The
official repository has the resulting lists and not the step that makes them; that a head is kept if
its score improves is [recall].

The lists are tuned to the data that you give. Report results on other data.
"""

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

import torch
from rich.progress import track
from torch import Tensor, nn

from attending.interventions.intervention import InterventionWarning
from attending.interventions.prompt import PromptReader
from attending.interventions.prompt_sinks import find_sinks
from attending.interventions.vision_language import language_layers, layer_number
from attending.taps import AttentionCall, Proceed, tap
from attending.taps.running import evaluating

if TYPE_CHECKING:
    from attending.interventions.attention_calibration import AttentionCalibration

Data = TypeVar("Data")


@dataclass(frozen=True)
class HeadScores:
    """What the calibration of each single head does to a score. Keep it with `save_settings`.

    Attributes:
        baseline: the score of the model as it is.
        scores: for each layer, that with head 0, 1, ... calibrated alone. A head without a sink
            anywhere in the data has the baseline's, as nothing in it would change.
        evaluations: how often the data were run.
    """

    baseline: float
    scores: Mapping[int, tuple[float, ...]]
    evaluations: int

    def selected(self, margin: float = 0.0, most: int | None = None) -> dict[int, tuple[int, ...]]:
        """The heads that beat the baseline, for `AttentionCalibration(heads=...)`.

        Args:
            margin: by how much they have to be better. With few examples, a head that gains one is
                luck as often as not.
            most: at most so many, the best ones.
        """
        better = [
            (score, layer, head)
            for layer, scores in self.scores.items()
            for head, score in enumerate(scores)
            if score > self.baseline + margin
        ]
        better.sort(key=lambda found: (-found[0], *found[1:]))
        chosen: dict[int, tuple[int, ...]] = {}
        for _, layer, head in sorted(better[:most], key=lambda found: found[1:]):
            chosen[layer] = (*chosen.get(layer, ()), head)
        return chosen


def select_heads(
    model: nn.Module,
    data: Data,
    metric: Callable[[nn.Module, Data], float],
    method: "AttentionCalibration | None" = None,
    *,
    progress: bool = True,
) -> HeadScores:
    """Score the calibration of every single head on calibration data.

        def accuracy(model, questions): ...           # higher is better
        found = select_heads(model, questions[:900], accuracy)
        method = AttentionCalibration(heads=found.selected(margin=0.002))

    Runs the data once for the model as it is, and once for each head of the layers that has a sink
    anywhere in them; with L layers of H heads up to L * H + 1 times.

    Args:
        model: a causal language model.
        data: whatever the metric takes; handed to it as it is.
        metric: `metric(model, data)`, higher is better. It runs the model, in evaluation mode and
            without gradients.
        method: the calibration whose heads are to be found, with its `layers`; by default
            `AttentionCalibration()`, which leaves out the first two layers and the last.
        progress: whether to show a progress bar.

    Raises:
        ValueError: if the metric returns no finite number, or the method names its heads already.
    """
    from attending.interventions.attention_calibration import AttentionCalibration

    method = AttentionCalibration() if method is None else method
    if method.heads is not None:
        raise ValueError(
            f"method: expected one without heads, as they are what is searched, got "
            f"{method.heads!r}. Name the layers to search in layers."
        )
    with evaluating(model), torch.no_grad():
        own, counts, with_sinks = _baseline(model, data, metric, method)
        scores = {layer: [own] * count for layer, count in sorted(counts.items())}
        wanted = sorted(with_sinks)
        for layer, head in track(wanted, "Calibrating single heads", disable=not progress):
            alone = replace(method, heads={layer: (head,)}, layers=None)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", InterventionWarning)
                with alone(model):
                    scores[layer][head] = _score(metric, model, data)
    return HeadScores(
        own, {layer: tuple(found) for layer, found in scores.items()}, 1 + len(with_sinks)
    )


def _baseline(
    model: nn.Module,
    data: Data,
    metric: Callable[[nn.Module, Data], float],
    method: "AttentionCalibration",
) -> tuple[float, dict[int, int], set[tuple[int, int]]]:
    """The score of the model as it is, the heads of each layer, and which of them have sinks.

    As one head is calibrated at a time, what it looks at is what it looks at here.
    """
    names = list(language_layers(model))
    chosen = method.chosen_layers(len(names))
    counts: dict[int, int] = {}
    with_sinks: set[tuple[int, int]] = set()
    read = PromptReader()

    def look(call: AttentionCall, proceed: Proceed) -> Tensor:
        layer = layer_number(call.name, names)
        if layer is None or layer not in chosen or call.is_cross:
            return proceed(call)
        counts[layer] = call.num_heads
        seen = read(call)
        if seen.begins and not seen.is_encoder:
            heads = [h for h in range(call.num_heads) if (layer, h) not in with_sinks]
            found = (
                find_sinks(call, seen, heads, method.rule)
                .marks.any(-1)
                .any(0)
                .nonzero()
                .flatten()
                .tolist()
            )
            with_sinks.update((layer, head) for head in found)
        return proceed(call)

    with tap(model, look):
        return _score(metric, model, data), counts, with_sinks


def _score(metric: Callable[[nn.Module, Data], float], model: nn.Module, data: Data) -> float:
    score = float(metric(model, data))
    if not math.isfinite(score):
        raise ValueError(f"metric: expected a finite number, got {score}.")
    return score
