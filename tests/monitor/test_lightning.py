"""The monitor in Lightning: its loggers, accumulation, checkpoints."""

import csv
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

import attending as at
from tests.monitor.models import adam, llama, padded_probe, text, weights
from tests.monitor.test_transformers import events, tensorboard_folder

pl = pytest.importorskip("lightning.pytorch")


class Module(pl.LightningModule):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.model = llama(dropout)

    def training_step(self, batch: Tensor, _: int) -> Tensor:
        loss = self.model(input_ids=batch, labels=batch).loss
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return adam(self.model)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Lightning warns of few workers and the like."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        yield


def fit(module: Module, folder: Path, callbacks: list[Any], **settings: Any) -> Any:
    quiet = {
        "accelerator": "cpu",
        "devices": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "logger": False,
        "log_every_n_steps": 1,
        "max_steps": 4,
    }
    checkpoint = settings.pop("ckpt_path", None)
    trainer = pl.Trainer(default_root_dir=folder, callbacks=callbacks, **{**quiet, **settings})
    trainer.fit(module, DataLoader(text(7, 32), batch_size=2), ckpt_path=checkpoint)
    return trainer


def test_numbers_arrive_in_all_loggers(tmp_path: Path) -> None:
    module = Module()
    monitor = at.AttentionMonitor(module.model, padded_probe(), every=2)
    loggers = [
        pl.loggers.TensorBoardLogger(tmp_path / "board"),
        pl.loggers.CSVLogger(tmp_path / "csv"),
    ]
    fit(module, tmp_path, [monitor.lightning_callback()], logger=loggers)
    assert [found.step for found in monitor.history] == [0, 2, 4]
    stored = events(tensorboard_folder(tmp_path / "board"))
    assert len(stored["loss"]) == 4
    with next((tmp_path / "csv").rglob("metrics.csv")).open() as file:
        rows = [row for row in csv.DictReader(file) if row["attention/logit_max"]]
    assert [row["step"] for row in rows] == ["0", "2", "4"]
    for found, row in zip(monitor.history, rows, strict=True):
        for name, value in found.scalars().items():
            assert dict(stored[name])[found.step] == pytest.approx(value, rel=1e-6)
            assert float(row[name]) == pytest.approx(value)
    assert "attention/model.layers.1.self_attn.o_proj.weight/update_ratio" in rows[1]


def test_training_is_the_same_with_and_without(tmp_path: Path) -> None:
    trained = []
    for watch in (False, True):
        module = Module(dropout=0.2)
        monitor = at.AttentionMonitor(module.model, padded_probe(), every=3)
        torch.manual_seed(5)
        fit(module, tmp_path, [monitor.lightning_callback()] if watch else [], max_steps=6)
        assert not watch or [found.step for found in monitor.history] == [0, 3, 6]
        trained.append(weights(module))
    assert all(torch.equal(one, other) for one, other in zip(*trained, strict=True))


def test_accumulated_batches_are_one_step_and_updates_are_known(tmp_path: Path) -> None:
    module = Module()
    before: list[Tensor] = []
    weight = module.model.model.layers[0].self_attn.q_proj.weight

    class Keep(pl.Callback):
        def on_before_optimizer_step(self, *_: Any) -> None:
            before.append(weight.detach().clone())

    monitor = at.AttentionMonitor(module.model, padded_probe(), every=2)
    callbacks = [Keep(), monitor.lightning_callback()]
    fit(module, tmp_path, callbacks, accumulate_grad_batches=3)
    assert [found.step for found in monitor.history] == [0, 2, 4]
    last = monitor.history[-1].weights[0]
    change = torch.linalg.matrix_norm(weight.detach() - before[3], ord=2)
    assert last.update_norm == pytest.approx(float(change), rel=5e-3)


def test_a_resumed_run_goes_on_with_its_history(tmp_path: Path) -> None:
    module = Module()
    monitor = at.AttentionMonitor(module.model, padded_probe(), every=2)
    trainer = fit(module, tmp_path, [monitor.lightning_callback()])
    trainer.save_checkpoint(tmp_path / "last.ckpt")

    resumed = Module()
    later = at.AttentionMonitor(resumed.model, padded_probe(), every=2)
    callbacks = [later.lightning_callback()]
    fit(resumed, tmp_path, callbacks, max_steps=8, ckpt_path=tmp_path / "last.ckpt")
    assert [found.step for found in later.history] == [0, 2, 4, 6, 8]
    assert later.history[:3] == monitor.history
    assert later.history[-1].scalars()["attention/update_ratio_max"] > 0


def test_mixed_precision_is_that_of_the_trainer(tmp_path: Path) -> None:
    module = Module()
    seen = []

    def forward(model: Any, probe: Any) -> Any:
        seen.append(torch.is_autocast_enabled("cpu"))
        return model(**probe)

    monitor = at.AttentionMonitor(module.model, padded_probe(), every=2, forward=forward)
    fit(module, tmp_path, [monitor.lightning_callback()], precision="bf16-mixed", max_steps=2)
    assert seen == [True, True]


def test_another_model_is_refused(tmp_path: Path) -> None:
    monitor = at.AttentionMonitor(llama(), padded_probe())
    with pytest.raises(ValueError, match="trainer: expected one that trains the monitor's model"):
        fit(Module(), tmp_path, [monitor.lightning_callback()])


def test_the_lightning_that_was_imported_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    import lightning.pytorch

    monitor = at.AttentionMonitor(llama(), padded_probe())
    assert isinstance(monitor.lightning_callback(), lightning.pytorch.Callback)
    for name in ("lightning", "lightning.pytorch", "pytorch_lightning"):
        monkeypatch.setitem(sys.modules, name, None)  # as if not installed
    with pytest.raises(ImportError, match="pip install lightning"):
        monitor.lightning_callback()
