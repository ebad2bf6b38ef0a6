"""The monitor in Lightning's `Trainer`."""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attending.monitor.attention_monitor import AttentionMonitor
    from attending.monitor.records import Measurement


def make_callback(monitor: "AttentionMonitor") -> Any:
    """See `AttentionMonitor.lightning_callback`."""
    base: Any = _lightning().Callback

    class AttentionMonitorCallback(base):  # type: ignore[misc]
        """Measures and logs at the steps that are due."""

        last = 0  # the last step that was seen

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            if all(part is not monitor.model for part in pl_module.modules()):
                raise ValueError(
                    f"trainer: expected one that trains the monitor's model, but "
                    f"{type(pl_module).__name__} does not hold it; make the monitor with a part "
                    "of the LightningModule."
                )
            self.last = trainer.global_step
            with trainer.precision_plugin.forward_context():
                _log(trainer, monitor, monitor.begin(trainer.global_step))

        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            monitor.before_step(trainer.global_step + 1)

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            # Several optimizers make several steps for one batch.
            if trainer.global_step // monitor.every > self.last // monitor.every:
                with trainer.precision_plugin.forward_context():
                    _log(trainer, monitor, monitor.measure(trainer.global_step))
            self.last = trainer.global_step

        def state_dict(self) -> dict[str, Any]:
            return monitor.state_dict()

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            monitor.load_state_dict(state_dict)

    return AttentionMonitorCallback()


def _log(trainer: Any, monitor: "AttentionMonitor", found: "Measurement | None") -> None:
    if found is not None and trainer.is_global_zero:
        for logger in trainer.loggers:
            logger.log_metrics(found.scalars(monitor.per_layer), step=found.step)


def _lightning() -> Any:
    """The Lightning that the user works with: it has two names."""
    names = ["lightning.pytorch", "pytorch_lightning"]
    names.sort(key=lambda name: name not in sys.modules)
    for name in names:
        try:
            return import_module(name)
        except ModuleNotFoundError as error:
            if error.name not in (name, name.partition(".")[0]):
                raise
    raise ImportError("lightning_callback needs Lightning: pip install lightning.")
