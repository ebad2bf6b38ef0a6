"""The monitor in transformers' `Trainer`: its loggers, accumulation, resumption."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import attending as at
from tests.monitor.models import llama, padded_probe, text, weights


def make_trainer(model: Any, folder: Path, **settings: Any) -> Any:
    from transformers import Trainer, TrainingArguments

    arguments = {
        "max_steps": 4,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
        **settings,
    }
    rows = [{"input_ids": row, "labels": row} for row in text(7, 32)]
    return Trainer(
        model, TrainingArguments(output_dir=str(folder), **arguments), train_dataset=rows
    )


def events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Scalars by name, each with its steps, as TensorBoard reads them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    found.Reload()
    tags = found.Tags()["scalars"]
    return {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in tags}


def tensorboard_folder(folder: Path) -> Path:
    files = sorted(folder.rglob("events.out.tfevents.*"))
    assert len(files) == 1
    return files[0].parent


def test_numbers_arrive_in_tensorboard_and_the_loss_still_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    trainer = make_trainer(llama(), tmp_path, report_to="tensorboard")
    monitor = at.AttentionMonitor(trainer.model, padded_probe(), every=2)
    monitor.attach(trainer)
    trainer.train()
    assert [found.step for found in monitor.history] == [0, 2, 4]
    stored = events(tensorboard_folder(tmp_path))
    for found in monitor.history:
        for name, value in found.scalars().items():
            assert dict(stored[f"train/{name}"])[found.step] == pytest.approx(value, rel=1e-6)
    assert [step for step, _ in stored["train/attention/logit_max"]] == [0, 2, 4]
    assert [step for step, _ in stored["train/attention/update_ratio_max"]] == [2, 4]
    assert [step for step, _ in stored["train/loss"]] == [1, 2, 3, 4]

    # Only the numbers of the whole model are printed and kept in the trainer's state.
    log = [entry for entry in trainer.state.log_history if "attention/logit_max" in entry]
    assert [entry["step"] for entry in log] == [0, 2, 4]
    assert "attention/model.layers.0.self_attn/logit_max" not in log[0]
    printed = capsys.readouterr().out
    assert "attention/logit_max" in printed
    assert "self_attn" not in printed


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_training_is_the_same_with_and_without(tmp_path: Path) -> None:
    trained, curves = [], []
    for watch in (False, True):
        model = llama(dropout=0.2)
        trainer = make_trainer(model, tmp_path, logging_steps=2, max_steps=6)
        if watch:
            at.AttentionMonitor(model, padded_probe(), every=3).attach(trainer)
        trainer.train()
        trained.append(weights(model))
        curves.append(losses(trainer))
    assert len(curves[0]) == 3
    assert curves[0] == curves[1]
    assert all(torch.equal(one, other) for one, other in zip(*trained, strict=True))


def test_accumulated_batches_are_one_step(tmp_path: Path) -> None:
    model = llama()
    trainer = make_trainer(model, tmp_path, gradient_accumulation_steps=3, max_steps=4)
    monitor = at.AttentionMonitor(model, padded_probe(), every=2)
    monitor.attach(trainer)
    before: dict[int, torch.Tensor] = {}
    weight = model.model.layers[0].self_attn.q_proj.weight
    step_of = trainer.create_optimizer().step

    def step(*args: Any, **kwargs: Any) -> Any:
        before[trainer.state.global_step + 1] = weight.detach().clone()
        return step_of(*args, **kwargs)

    trainer.optimizer.step = step
    trainer.train()
    assert [found.step for found in monitor.history] == [0, 2, 4]
    last = monitor.history[-1].weights[0]
    assert last.name.endswith("layers.0.self_attn.q_proj.weight")
    change = torch.linalg.matrix_norm(weight.detach() - before[4], ord=2)
    assert last.update_norm == pytest.approx(float(change), rel=5e-3)


def test_a_resumed_run_keeps_its_step_numbers(tmp_path: Path) -> None:
    settings = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6}
    whole = make_trainer(llama(), tmp_path, **settings)
    complete = at.AttentionMonitor(whole.model, padded_probe(), every=2)
    complete.attach(whole)
    whole.train()

    resumed = make_trainer(llama(), tmp_path, **settings)
    monitor = at.AttentionMonitor(resumed.model, padded_probe(), every=2)
    monitor.attach(resumed)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert [found.step for found in monitor.history] == [3, 4, 6]
    assert monitor.history[-1].layers == complete.history[-1].layers
    assert monitor.history[-1].weights == complete.history[-1].weights
    steps = [e["step"] for e in resumed.state.log_history if "attention/logit_max" in e]
    assert steps == [0, 2, 3, 4, 6]  # the first two are from the checkpoint
    state = json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())
    assert any("attention/entropy_min" in entry for entry in state["log_history"])


def test_a_trainer_of_another_model_is_refused(tmp_path: Path) -> None:
    monitor = at.AttentionMonitor(llama(), padded_probe())
    with pytest.raises(ValueError, match="trainer: expected one that trains the monitor's model"):
        monitor.attach(make_trainer(llama(), tmp_path))


def test_a_part_of_the_trained_model_may_be_watched(tmp_path: Path) -> None:
    model = llama()
    trainer = make_trainer(model, tmp_path, max_steps=1, disable_tqdm=False)
    monitor = at.AttentionMonitor(model.model, padded_probe(), every=1, per_layer=False)
    monitor.attach(trainer)
    trainer.train()
    assert [layer.name for layer in monitor.history[-1].layers] == [
        "layers.0.self_attn",
        "layers.1.self_attn",
    ]
