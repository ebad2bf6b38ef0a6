"""The monitor in transformers' `Trainer`."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attending.monitor.attention_monitor import AttentionMonitor
    from attending.monitor.records import Measurement


def attach(monitor: "AttentionMonitor", trainer: Any) -> None:
    """See `AttentionMonitor.attach`."""
    from transformers import TrainerCallback

    if all(part is not monitor.model for part in trainer.model.modules()):
        raise ValueError(
            f"trainer: expected one that trains the monitor's model, but the "
            f"{type(trainer.model).__name__} that it trains is another; make the monitor with "
            "trainer.model, or with a part of it."
        )

    class AttentionMonitorCallback(TrainerCallback):  # type: ignore[misc]
        """Measures and logs at the steps that are due."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if found := monitor.begin(state.global_step):
                _log(trainer, monitor, found)

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            monitor.before_step(state.global_step + 1)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if monitor.is_due(state.global_step):
                _log(trainer, monitor, monitor.measure(state.global_step))

    trainer.add_callback(AttentionMonitorCallback())


def _log(trainer: Any, monitor: "AttentionMonitor", found: "Measurement") -> None:
    """The model's numbers to everything, those of its layers to what stores them."""
    from transformers import PrinterCallback, ProgressCallback

    if not trainer.is_world_process_zero():
        return
    whole = found.scalars(per_layer=False)
    handler, callbacks = trainer.callback_handler, trainer.callback_handler.callbacks
    # Logging takes back a wish to log the loss that another callback has just uttered.
    wish = trainer.control.should_log
    trainer.log(dict(whole))
    if monitor.per_layer:
        rest = {name: value for name, value in found.scalars().items() if name not in whole}
        printers = (PrinterCallback, ProgressCallback)
        try:
            handler.callbacks = [c for c in callbacks if not isinstance(c, printers)]
            trainer.control = handler.on_log(trainer.args, trainer.state, trainer.control, rest)
        finally:
            handler.callbacks = callbacks
    trainer.control.should_log = wish
