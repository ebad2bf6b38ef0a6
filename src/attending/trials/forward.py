"""Forward passes in a trial: quality of the outputs, drift from plain, speed and memory."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from attending.decoding.generating import DecodingWarning
from attending.taps.running import first_tensor, run_model
from attending.trials import quality
from attending.trials.contenders import Contender, Result
from attending.trials.memory import peak_memory
from attending.trials.quality import Outputs, Scores
from attending.trials.samples import Measure, Samples
from attending.trials.stages import Clock, Found, device_of_batches, memory, speed

Forward = Callable[[nn.Module, Any], Any]
# A way to decode has nothing to do in a forward pass, and need not say so here.
QUIET = (DecodingWarning,)
_TRACE = 1e-4  # relative change of the plain outputs that no nondeterminism explains


class ForwardStage:
    """The batches through the model: quality of the outputs, drift, speed, memory."""

    part = "a forward pass"

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Any],
        forward: Forward | None,
        prompt_length: int | None,
    ) -> None:
        self.model, self.batches, self.prompt_length = model, batches, prompt_length
        self.forward = run_model if forward is None else forward
        self.clock = Clock(device_of_batches(batches))
        self.steps = len(batches)
        self.tokens = 0
        self.counts_tokens = True
        self.scores: dict[str, Scores] = {}
        self.seconds: dict[str, list[float]] = {}
        self.memory: dict[str, int] = {}
        self.same: dict[str, bool] = {}

    def compare(self, contenders: Sequence[Contender], step: Callable[[str], None]) -> None:
        """Score the outputs of every batch against those of the plain model."""
        plain = contenders[0]
        for number, batch in enumerate(self.batches):
            reference = quality.outputs_of(self.forward(self.model, batch))
            what = None
            if reference is not None:
                what = quality.scored(self.model, batch, reference, self.prompt_length)
            self._count(batch, reference, what)
            for contender in contenders:
                if contender.status != "ran":
                    continue
                found = self._run(contender, batch, partial(self.forward, self.model, batch))
                outputs = None if found is None else quality.outputs_of(found)
                del found
                if contender.status == "ran" and outputs and reference and what:
                    self._score(contender, outputs, reference, what)
                if number == 0 and contender is not plain and reference is not None:
                    self._look_for_traces(contender, batch, reference)
                step(contender.name)
        for contender in contenders:
            if contender.status == "ran":
                peak = self._peak(contender)
                if peak is not None:
                    self.memory[contender.name] = peak

    def repeat(self, contender: Contender, number: int) -> None:
        """Time all batches, each in a block of its own."""
        seconds = 0.0
        for batch in self.batches:
            seconds += self._run(contender, batch, partial(self._timed, batch)) or 0.0
        self.seconds.setdefault(contender.name, []).append(seconds)

    def finish(self, contenders: Sequence[Contender]) -> tuple[list[Measure], Found]:
        """Quality per sequence, speed per repeat."""
        unit, what = ("tokens", "Tokens") if self.counts_tokens else ("samples", "Samples")
        own = speed(
            "forward_speed",
            "Forward speed",
            unit,
            f"{what} of the inputs per second of forward passes.",
        )
        peak = memory("forward_memory", "Forward memory", "the forward pass of a batch")
        found: Found = {}
        for contender in contenders:
            name = contender.name
            columns = {
                measure: Samples(tuple(values), tuple(weights))
                for measure, (values, weights) in self.scores.get(name, {}).items()
            }
            columns["forward_speed"] = Samples(tuple(self.tokens / s for s in self.seconds[name]))
            if name in self.memory:
                columns["forward_memory"] = Samples((float(self.memory[name]),))
            found[name] = columns
        return [*quality.MEASURES, own, peak], found

    def prompt_places(self, batch: Any) -> int | Tensor | None:
        """The length of the prompts with the padding before them: one, or one for each sequence."""
        mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        if self.prompt_length is None or not isinstance(mask, Tensor) or mask.dim() != 2:
            return self.prompt_length
        padding = (mask.cumsum(1) == 0).sum(1)
        return self.prompt_length + padding if bool(padding.any()) else self.prompt_length

    def _run(self, contender: Contender, batch: Any, work: Callable[[], Result]) -> Result | None:
        places = self.prompt_places(batch)
        return contender.run(self.model, work, places, part=self.part, quiet=QUIET)

    def _timed(self, batch: Any) -> float:
        start = self.clock.read()
        self.forward(self.model, batch)
        return self.clock.read() - start

    def _peak(self, contender: Contender) -> int | None:
        """The most of any batch."""
        peaks = []
        for batch in self.batches:
            work = partial(peak_memory, self.model, partial(self.forward, self.model, batch))
            peaks.append(self._run(contender, batch, work))
        known = [peak for peak in peaks if peak is not None]
        return max(known) if known else None

    def _count(self, batch: Any, reference: Outputs | None, what: quality.Scored | None) -> None:
        given = batch if isinstance(batch, Mapping) else {"input_ids": first_tensor(batch)}
        ids, mask = given.get("input_ids"), given.get("attention_mask")
        if isinstance(ids, Tensor) and not ids.is_floating_point() and ids.dim() == 2:
            whole = isinstance(mask, Tensor) and mask.shape == ids.shape
            self.tokens += int(mask.sum()) if whole and mask is not None else ids.numel()
            return
        self.counts_tokens = False
        self.tokens += 1 if reference is None else len(reference.values)

    def _score(
        self, contender: Contender, outputs: Outputs, reference: Outputs, what: quality.Scored
    ) -> None:
        same = outputs.values.shape == reference.values.shape
        same = same and torch.equal(outputs.values, reference.values)
        self.same[contender.name] = same and self.same.get(contender.name, True)
        if not bool(outputs.values.isfinite().all()) and bool(reference.values.isfinite().all()):
            contender.note("some outputs are not finite numbers")
        try:
            scores = quality.score(outputs, reference, what)
        except ValueError as error:
            contender.note(str(error))
            return
        own = self.scores.setdefault(contender.name, {})
        for name, (values, weights) in scores.items():
            mine = own.setdefault(name, ([], []))
            mine[0].extend(values)
            mine[1].extend(weights)

    def _look_for_traces(self, contender: Contender, batch: Any, reference: Outputs) -> None:
        again = quality.outputs_of(self.forward(self.model, batch))
        assert again is not None
        if torch.equal(again.values, reference.values):
            return
        gap = (again.values.double() - reference.values.double()).norm()
        if not float(gap) <= _TRACE * float(reference.values.double().norm()):
            raise RuntimeError(
                f"the model is not what it was after the block of {contender.name!r}: its plain "
                "outputs changed, so nothing that follows could be trusted. The method must undo "
                "on exit what it does to the model. Load the model anew."
            )
