"""The monitor in a bare loop: when it measures, what it leaves alone, when it warns."""

import json
import math
import random
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attending as at
from attending.monitor import AttentionWarning, Limits, Measurement
from attending.monitor.limits import alarms
from tests.monitor.models import adam, llama, padded_probe, text, train_one, weights


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_trained_weights_are_the_same_to_the_last_bit(dropout: float) -> None:
    trained, noise = [], []
    for watch in (False, True):
        model = llama(dropout)
        monitor, optimizer = at.AttentionMonitor(model, padded_probe(), every=2), adam(model)
        torch.manual_seed(1)
        random.seed(1)
        for step in range(5):
            train_one(model, optimizer, step)
            if watch:
                monitor.step()
        assert not watch or [found.step for found in monitor.history] == [1, 2, 4]
        trained.append(weights(model))
        noise.append((torch.rand(3).tolist(), random.random()))
    assert all(torch.equal(one, other) for one, other in zip(*trained, strict=True))
    assert noise[0] == noise[1]


def test_modes_and_gradients_are_left_alone() -> None:
    model = llama(0.3)
    model.model.layers[1].eval()
    batch = text(0)
    model(input_ids=batch, labels=batch).loss.backward()
    modes = [module.training for module in model.modules()]
    gradients = [parameter.grad for parameter in model.parameters()]
    copies = [None if gradient is None else gradient.clone() for gradient in gradients]
    at.AttentionMonitor(model, padded_probe()).measure()
    assert [module.training for module in model.modules()] == modes
    for parameter, gradient, copied in zip(model.parameters(), gradients, copies, strict=True):
        assert parameter.grad is gradient
        assert copied is None or torch.equal(gradient, copied)
    assert torch.is_grad_enabled()


def test_random_numbers_of_the_probe_do_not_count() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            x = x + torch.rand_like(x)
            return self.attention(x, x, x, need_weights=False)[0]

    monitor = at.AttentionMonitor(Noisy(), torch.randn(1, 4, 8))
    state = torch.get_rng_state()
    monitor.measure()
    assert torch.equal(torch.get_rng_state(), state)


def test_a_failing_probe_leaves_no_trace() -> None:
    model = llama(0.3)
    monitor = at.AttentionMonitor(model, {"input_ids": torch.full((1, 3), 99)})  # no such token
    state = torch.get_rng_state()
    with pytest.raises(IndexError):
        monitor.measure()
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)
    assert monitor.history == []


def test_the_probe_is_copied() -> None:
    model, probe = llama(), padded_probe()
    monitor = at.AttentionMonitor(model, probe)
    first = monitor.measure()
    probe["input_ids"].zero_()
    assert monitor.measure().layers == first.layers


def test_tuples_lists_and_a_forward_of_ones_own() -> None:
    block = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    states = torch.randn(2, 5, 16)
    expected = at.AttentionMonitor(block, states).measure().layers
    assert at.AttentionMonitor(block, (states,)).measure().layers == expected
    assert at.AttentionMonitor(block, [states]).measure().layers == expected
    own = at.AttentionMonitor(block, {"x": states}, forward=lambda model, probe: model(probe["x"]))
    assert own.measure().layers == expected


def test_logging_frames_and_the_state() -> None:
    pandas = pytest.importorskip("pandas")
    model, logged = llama(), []
    monitor = at.AttentionMonitor(
        model, padded_probe(), every=2, per_layer=False, log=lambda *what: logged.append(what)
    )
    optimizer = adam(model)
    for step in range(4):
        train_one(model, optimizer, step)
        monitor.step()
    assert [step for _, step in logged] == [1, 2, 4]
    assert logged[1][0] == monitor.history[1].scalars(per_layer=False)

    frame = monitor.to_frame()
    assert isinstance(frame, pandas.DataFrame)
    assert frame["step"].tolist() == [1, 1, 2, 2, 4, 4]
    assert frame["entropy_mean"].tolist()[2] == monitor.history[1].layers[0].entropy_mean
    by_weight = monitor.weights_to_frame()
    assert len(by_weight) == 3 * 8
    assert by_weight["update_ratio"].tolist()[-1] == monitor.history[-1].weights[-1].update_ratio

    state = json.loads(json.dumps(monitor.state_dict()))
    later = at.AttentionMonitor(model, padded_probe(), every=2)
    later.load_state_dict(state)
    assert (later.steps, later.history) == (4, monitor.history)
    train_one(model, optimizer, 4)
    assert later.step() is None
    train_one(model, optimizer, 5)
    found = later.step()
    assert found is not None
    assert found.step == 6
    assert found.scalars()["attention/update_ratio_max"] > 0


def scale_scores(model: Any, factor: float) -> None:
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(factor)


def measured(monitor: at.AttentionMonitor) -> tuple[Measurement, list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = monitor.measure()
    assert all(warning.category is AttentionWarning for warning in caught)
    assert all(warning.filename == __file__ for warning in caught)
    return found, [str(warning.message) for warning in caught]


def test_a_collapse_warns_once_until_it_is_over() -> None:
    model = llama()
    monitor = at.AttentionMonitor(model, padded_probe())
    monitor.measure(41)
    assert measured(monitor)[1] == []
    scale_scores(model, 1e5)
    found, said = measured(monitor)
    share = found.layers[0].normalized_entropy_mean
    assert share < 0.1
    assert len(said) == 4  # two layers, entropy and logit
    assert "step 41" in said[0]
    assert "model.layers.0.self_attn" in said[0]
    assert f"{share:.3f}" in said[0]
    assert "below 0.1" in said[0]
    assert "sigma-reparam" in said[0]
    assert f"{found.layers[0].logit_max:.1f}" in said[1]
    assert "above 100" in said[1]
    assert measured(monitor)[1] == []
    scale_scores(model, 1e-5)
    assert measured(monitor)[1] == []
    scale_scores(model, 1e5)
    assert measured(monitor)[1] == said
    kinds = [(alarm.layer, alarm.kind) for alarm in monitor.warnings]
    assert len(kinds) == 8
    assert set(kinds) == {
        (f"model.layers.{i}.self_attn", kind) for i in range(2) for kind in ("entropy", "logit")
    }


def test_an_alarm_that_goes_on_after_a_restart_is_not_new() -> None:
    model = llama()
    scale_scores(model, 1e5)
    monitor = at.AttentionMonitor(model, padded_probe())
    assert len(measured(monitor)[1]) == 4
    later = at.AttentionMonitor(model, padded_probe())
    later.load_state_dict(monitor.state_dict())
    assert measured(later)[1] == []


def test_logits_that_double_are_a_warning_from_a_limit_on() -> None:
    model = llama()
    top = max(
        layer.logit_max for layer in at.AttentionMonitor(model, padded_probe()).measure().layers
    )
    limits = Limits(entropy=0.0, logit=math.inf, growth=2.0, growth_from=10 * top)
    monitor = at.AttentionMonitor(model, padded_probe(), limits=limits)
    for factor in (1.0, 1.0, 1.0, 5.0):  # grows, but is small
        scale_scores(model, factor)
        assert measured(monitor)[1] == []
    scale_scores(model, 4.0)
    found, said = measured(monitor)
    assert said
    assert all("times the median of the last 4 measurements" in text for text in said)
    assert {alarm.kind for alarm in monitor.warnings} == {"growth"}
    worst = max(found.layers, key=lambda layer: layer.logit_max)
    assert any(f"{worst.logit_max:.1f}" in text for text in said)


def test_broken_weights_are_said_to_be_so() -> None:
    model = llama()
    monitor = at.AttentionMonitor(model, padded_probe())
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight.fill_(torch.nan)
    found, said = measured(monitor)
    assert len(said) == 1
    assert "model.layers.1.self_attn is not finite" in said[0]
    assert math.isnan(found.scalars()["attention/logit_max"])
    assert math.isnan(found.scalars()["attention/weight_norm_max"])


def test_warnings_can_stop_a_training() -> None:
    model = llama()
    scale_scores(model, 1e5)
    monitor = at.AttentionMonitor(model, padded_probe())
    with warnings.catch_warnings():
        warnings.simplefilter("error", AttentionWarning)
        with pytest.raises(AttentionWarning, match="collapses"):
            monitor.step()
    assert len(monitor.history) == 1


def test_a_healthy_model_raises_no_alarm() -> None:
    zoo = at.zoo.load("llama-stdlib")
    inputs = zoo.tokenizer("import os\n\n\ndef main():\n    return os.getcwd()\n" * 8)
    probe = {"input_ids": torch.tensor([inputs["input_ids"]])}
    found = at.AttentionMonitor(zoo.model, probe).measure()
    assert alarms(found, [found] * 5, Limits()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": 3}, "model: expected a torch.nn.Module"),
        ({"probe": "a text"}, "probe: expected one batch.*tokenizer"),
        ({"probe": {}}, "probe: expected a batch, got an empty one"),
        ({"every": 0}, "every: expected a number of steps"),
        ({"every": 2.5}, "every: expected a number of steps"),
        ({"every": True}, "every: expected a number of steps"),
    ],
)
def test_bad_arguments_are_named(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"model": llama(), "probe": padded_probe(), **changes}
    with pytest.raises(ValueError, match=message):
        at.AttentionMonitor(arguments.pop("model"), arguments.pop("probe"), **arguments)


@pytest.mark.parametrize("changes", [{"logit": math.nan}, {"entropy": "low"}, {"window": 2}])
def test_limits_are_numbers(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(changes))}: expected"):
        Limits(**changes)
