"""The monitor: a probe batch through the model every so many steps, and what is made of it."""

import copy
import dataclasses
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from attending.diagnosis.inputs import Forward
from attending.monitor.layers import measure_layers
from attending.monitor.limits import Alarm, AttentionWarning, Limits, alarms
from attending.monitor.records import Measurement
from attending.monitor.weights import attention_weights, check_patterns, measure_weights
from attending.taps.refusal import refuse_what_bypasses
from attending.taps.running import device_of, evaluating, run_model, to_device

if TYPE_CHECKING:
    import pandas

Log = Callable[[dict[str, float], int], object]


class AttentionMonitor:
    """Watches the attention of a model while it trains.

    Every `every` steps of the optimizer it runs a fixed probe batch through the model and measures
    each attention module: entropy, sinks, the largest logit; and by how much the last step changed
    the weights of attention. No map of queries by keys is kept, and fused attention stays fused.

        monitor = AttentionMonitor(model, probe, log=lambda scalars, step: wandb.log(scalars, step))
        for batch in loader:
            loss(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
            monitor.step()
        monitor.to_frame()

    With transformers: `monitor.attach(trainer)` before `trainer.train()`. With Lightning:
    `Trainer(callbacks=[monitor.lightning_callback()])`.

    Training is not touched: the probe runs in evaluation mode and without gradients, the random
    number generators are left where they were, and every module is back in its mode afterwards.
    Weights trained with and without a monitor are the same to the last bit.

    **What is measured.** Per layer, least, mean and largest over the heads: see
    `LayerMeasurement`. Exact, also for half precision (queries and keys as the model computed them,
    statistics in float32). The largest logit needs no map: in each row
    `max_j s_j = lse + log max_j p_j`. Of the weights: `||W_t||_2` and
    `||W_t - W_(t-1)||_2 / ||W_t||_2`, by a few Lanczos steps: see
    `attending.monitor.weights.spectral_norms`. The weights before a step are copied when the next
    step is due, so for one step in `every` the monitor holds a second copy of the attention
    weights. Query, key and value in one weight (GPT-2) have one number.

    **What it costs.** One forward of the probe in evaluation mode, and about 0.6 times as much for
    the statistics, measured for a small Llama on a CPU; with a probe as large as a training
    batch that was half of a training step. `Measurement.seconds` says it for your model. Leave
    labels out of the probe where the model allows: the loss is not used. On a GPU the largest logit
    takes an eager map in blocks: mind the length of the probe there. (It was not timed on one.)

    **Several processes.** Data parallel: the model inside the wrapper is measured, on every process
    alike, and the first process warns. Of sharded weights (FSDP, `fully_shard`, ZeRO-3) no process
    has the whole, so they are left out, and `skipped_weights` says which; all processes have to
    measure together, as the probe's forward gathers the weights. (Only the leaving-out is tested.)

    **Compiled models.** A tap does not see into compiled code. `compiled = torch.compile(model)`
    shares its weights with `model`: train `compiled` and give the monitor `model`. After
    `model.compile()`, or with attention that bypasses `scaled_dot_product_attention` (eager,
    flash-attn, flex), the monitor is refused, and the message says what to set.

    Args:
        model: the model that is trained, or the part of it that attends.
        probe: one batch, the same for the whole run: a mapping of keyword arguments, a tensor, or a
            tuple or list of positional arguments. It is copied. 4 sequences of the usual length are
            plenty; statistics of different probes do not compare.
        every: measure after each step that is a multiple of this. At the default, 100, it costs
            about 0.5 % of the training that `benchmarks/monitor.py` runs; 5 % are reached at 10.
        limits: when to warn.
        weights: names of linear layers to watch, as in `model.named_modules()`, with `*` and `?` as
            wildcards; by default those in modules whose class is named after attention. `()` for
            none.
        per_layer: log the numbers of every layer and weight, not only those of the whole model.
        log: called with scalars by name, and the step, after each measurement.
        forward: `forward(model, probe)` runs the probe, where calling the model is not enough.

    Attributes:
        steps: of the optimizer, so far.
        history: all measurements, oldest first.
        warnings: all alarms that were raised, oldest first.
        skipped_weights: why weights were left out of the last measurement, by name.

    Raises:
        ValueError: for a model that cannot be watched, no probe, or names that match nothing.
    """

    def __init__(
        self,
        model: nn.Module,
        probe: Any,
        *,
        every: int = 100,
        limits: Limits | None = None,
        weights: Sequence[str] | None = None,
        per_layer: bool = True,
        log: Log | None = None,
        forward: Forward | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise ValueError(f"model: expected a torch.nn.Module, got {type(model).__name__}.")
        if isinstance(model, DistributedDataParallel):
            model = model.module
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"every: expected a number of steps, at least 1, got {every!r}.")
        if not isinstance(probe, Mapping | Tensor | tuple | list) or isinstance(probe, str):
            raise ValueError(
                "probe: expected one batch, as a mapping of the model's arguments, a tensor, or a "
                f"tuple or list of positional arguments, got {type(probe).__name__}. Of a "
                "DataLoader take one: next(iter(loader)); of a text, what the tokenizer returns."
            )
        if not isinstance(probe, Tensor) and not len(probe):
            raise ValueError("probe: expected a batch, got an empty one.")
        refuse_what_bypasses(model)
        with torch.no_grad(), evaluating(model):
            check_patterns(model, weights)
        self.model, self.every, self.per_layer, self.log = model, every, per_layer, log
        self.limits = Limits() if limits is None else limits
        self.steps = 0
        self.history: list[Measurement] = []
        self.warnings: list[Alarm] = []
        self.skipped_weights: dict[str, str] = {}
        self._probe = copy.deepcopy(probe)
        self._forward = run_model if forward is None else forward
        self._patterns = weights
        self._kept: tuple[int, dict[str, Tensor]] | None = None  # weights, and after which step
        self._active: set[tuple[str, str]] = set()  # alarms that have not ended

    def step(self) -> Measurement | None:
        """Count one step of the optimizer, after it was made; measure if that is due.

        The first call measures too, whatever its number, so that what cannot be measured is said
        at once. A step that leaves the weights alone (one that a gradient scaler skips) counts.

        Returns:
            The measurement, or None if none was due.
        """
        self.steps += 1
        found = None
        if self.is_due(self.steps) or not self.history:
            found = self.measure()
        self.before_step(self.steps + 1)
        return found

    def is_due(self, step: int) -> bool:
        """Whether this step is one after which is measured."""
        return step % self.every == 0

    def before_step(self, step: int) -> None:
        """Copy the weights if the coming step, of this number, is due.

        `step` does it by itself; this is for what calls before and after each step.
        """
        if self.is_due(step) and self._patterns != ():
            with torch.no_grad(), evaluating(self.model):
                weights = attention_weights(self.model, self._patterns)
                copies = {w.name: w.value.clone() for w in weights if w.problem is None}
            self._kept = (step - 1, copies)

    def begin(self, step: int) -> Measurement | None:
        """Measure before the first step, unless a resumed history ends with this step."""
        if self.history and self.history[-1].step == step:
            self.steps = step
            return None
        return self.measure(step)

    def measure(self, step: int | None = None) -> Measurement:
        """Measure now, log and warn.

        Args:
            step: the number to give the measurement; by default that of the last step. Set, it
                becomes the number from which `step` counts on.

        Returns:
            The measurement, which is also added to `history`.

        Raises:
            TapError: if the probe ran but no attention was seen; says why.
        """
        self.steps = self.steps if step is None else step
        start = time.perf_counter()
        with _same_random_numbers(self.model), torch.no_grad(), evaluating(self.model):
            # Before the forward, after which some of the sharded weights are whole for a while.
            weights = attention_weights(self.model, self._patterns)
            kept = self._kept if self._kept and self._kept[0] == self.steps - 1 else None
            norms = measure_weights(weights, {} if kept is None else kept[1])
            self._probe = to_device(self._probe, device_of(self.model))
            layers = measure_layers(self.model, self._probe, self._forward)
        self._kept = None
        self.skipped_weights = {w.name: w.problem for w in weights if w.problem is not None}
        seconds = time.perf_counter() - start
        found = Measurement(self.steps, tuple(layers), tuple(norms), seconds)
        raised = alarms(found, self.history, self.limits)
        self.history.append(found)
        if self.log is not None:
            self.log(found.scalars(self.per_layer), self.steps)
        self._raise(raised)
        return found

    def to_frame(self) -> "pandas.DataFrame":
        """One row per step and layer: the fields of `LayerMeasurement`."""
        rows = [row for found in self.history for row in found.layer_rows()]
        return _frame(rows)

    def weights_to_frame(self) -> "pandas.DataFrame":
        """One row per step and weight: the fields of `WeightMeasurement` and the ratio."""
        rows = [row for found in self.history for row in found.weight_rows()]
        return _frame(rows)

    def state_dict(self) -> dict[str, Any]:
        """The steps and the history as plain data, to go on after a restart."""
        history = [dataclasses.asdict(found) for found in self.history]
        return {"steps": self.steps, "history": history}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self.steps = int(state["steps"])
        self.history = [Measurement.from_dict(found) for found in state["history"]]
        self._kept, self._active = None, set()
        if self.history:  # what was an alarm then is none anew
            last = alarms(self.history[-1], self.history[:-1], self.limits)
            self._active = {(alarm.layer, alarm.kind) for alarm in last}

    def attach(self, trainer: Any) -> None:
        """Watch a training by transformers' `Trainer`; call it before `trainer.train()`.

        Adds a `TrainerCallback` that measures before the first step and after each due step of the
        optimizer (accumulated batches are one step), with the trainer's own step numbers, those of
        a resumed run too. It needs the trainer because transformers does not let a callback log.

        The numbers of the whole model go through `trainer.log`: to the console, `log_history` and
        whatever `report_to` names (TensorBoard, W&B, trackio, ...). Those of layers and weights go
        to what `report_to` names alone, since there may be hundreds. Loggers of transformers
        put `train/` before all names. The process that logs is the trainer's first one.

        Raises:
            ValueError: if the trainer trains another model.
        """
        from attending.monitor.transformers_trainer import attach

        attach(self, trainer)

    def lightning_callback(self) -> Any:
        """A callback for Lightning: `Trainer(callbacks=[monitor.lightning_callback()])`.

        The monitor's model is the attending module inside the LightningModule, or the
        LightningModule itself if calling it with the probe runs the model. The callback measures
        before the first step and after each due step of the optimizer, under the trainer's
        precision, and logs to all of the trainer's loggers with its `global_step`. Its history is
        part of the checkpoints.

        Returns:
            A `lightning.pytorch.Callback`, or a `pytorch_lightning.Callback` if only that is
            installed, or only that was imported so far.

        Raises:
            ImportError: if neither is installed.
        """
        from attending.monitor.lightning_trainer import make_callback

        return make_callback(self)

    def _raise(self, raised: list[Alarm]) -> None:
        """Warn of what is new: once until the layer has recovered."""
        new = [alarm for alarm in raised if (alarm.layer, alarm.kind) not in self._active]
        self._active = {(alarm.layer, alarm.kind) for alarm in raised}
        self.warnings += new
        if not _is_first_process():
            return
        level = _caller()
        for alarm in new:
            warnings.warn(alarm.text, AttentionWarning, stacklevel=level)


@contextmanager
def _same_random_numbers(model: nn.Module) -> Iterator[None]:
    """The generators of PyTorch are afterwards where they were."""
    devices = {parameter.device for parameter in model.parameters()}
    others = [device for device in devices if device.type not in ("cpu", "meta")]
    kind = others[0].type if others else "cuda"
    with torch.random.fork_rng([device.index or 0 for device in others], device_type=kind):
        yield


def _is_first_process() -> bool:
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return True
    return distributed.get_rank() == 0


def _caller() -> int:
    """How far up the caller of the monitor is: a warning is to name a line outside of it."""
    level = 1
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(__package__):
        frame, level = frame.f_back, level + 1
    return level


def _frame(rows: list[dict[str, object]]) -> "pandas.DataFrame":
    try:
        import pandas
    except ImportError as error:
        raise ImportError(
            'A frame needs pandas: pip install "attending[frames]". `history` holds the same '
            "numbers without it."
        ) from error
    return pandas.DataFrame(rows)
