"""Generation in a trial: what is written on from the inputs, its speed and memory."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from attending.trials import generation
from attending.trials.contenders import Contender
from attending.trials.generation import Written
from attending.trials.memory import peak_memory
from attending.trials.samples import Measure, Samples
from attending.trials.stages import Clock, Found, device_of_batches, memory, over_repeats, speed


class GenerationStage:
    """Text after the beginnings of the inputs: diversity, sameness, speed, memory."""

    part = "generation"

    def __init__(
        self,
        model: nn.Module,
        prompts: Sequence[Mapping[str, Any]],
        settings: Mapping[str, Any],
        seed: int,
    ) -> None:
        self.model, self.prompts, self.settings, self.seed = model, prompts, settings, seed
        self.steps = 1
        self.clock = Clock(device_of_batches(prompts))
        self.seconds: dict[str, list[float]] = {}
        self.texts: dict[str, list[list[tuple[int, ...]]]] = {}  # by contender, repeat, prompt
        self.memory: dict[str, int] = {}
        self.same: dict[str, bool] = {}

    def compare(self, contenders: Sequence[Contender], step: Callable[[str], None]) -> None:
        """Warm up, and see how much memory it takes."""
        for contender in contenders:
            if contender.status == "ran":
                torch.manual_seed(self.seed)
                peak = contender.run(
                    self.model, partial(peak_memory, self.model, self._write), part=self.part
                )
                if peak is not None:
                    self.memory[contender.name] = peak
                step(contender.name)

    def repeat(self, contender: Contender, number: int) -> None:
        """Time the writing; where it is a matter of chance, each repeat has its own seed."""
        torch.manual_seed(self.seed + number)
        timed = contender.run(self.model, self._timed, part=self.part)
        if timed is not None:
            seconds, found = timed
            self.seconds.setdefault(contender.name, []).append(seconds)
            texts = [text for written in found for text in written.texts]
            self.texts.setdefault(contender.name, []).append(texts)

    def finish(self, contenders: Sequence[Contender]) -> tuple[list[Measure], Found]:
        """Diversity per text, averaged over repeats; speed per repeat."""
        own = speed(
            "generation_speed",
            "Generation speed",
            "tokens",
            "New tokens per second of generation, the reading of the prompts included.",
        )
        peak = memory("generation_memory", "Generation memory", "generation, its cache included,")
        plain, found = self.texts[contenders[0].name], {}
        for contender in contenders:
            name = contender.name
            repeats = self.texts[name]
            counts = [sum(map(len, texts)) for texts in repeats]
            columns = {
                "diversity": over_repeats(
                    [[generation.diversity_of(text) for text in texts] for texts in repeats]
                ),
                "same_text": over_repeats(
                    [
                        [generation.sameness(a, b) for a, b in zip(texts, others, strict=False)]
                        for texts, others in zip(repeats, plain, strict=True)
                    ]
                ),
                "new_tokens": over_repeats([[float(len(t)) for t in texts] for texts in repeats]),
                "generation_speed": Samples(
                    tuple(n / s for n, s in zip(counts, self.seconds[name], strict=True))
                ),
            }
            if name in self.memory:
                columns["generation_memory"] = Samples((float(self.memory[name]),))
            found[name] = columns
            self.same[name] = repeats == plain
        return [*generation.MEASURES, own, peak], found

    def _timed(self) -> tuple[float, list[Written]]:
        start = self.clock.read()
        found = self._write()
        return self.clock.read() - start, found

    def _write(self) -> list[Written]:
        return [generation.written(self.model, prompt, self.settings) for prompt in self.prompts]
