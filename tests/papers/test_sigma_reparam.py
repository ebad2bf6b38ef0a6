"""The experiment of sigmaReparam: its variants, its measurements, and its rule."""

import copy
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from attending import papers
from attending.nn.sigma_reparam import spectral_norms
from attending.papers import _sigma_reparam_training as training
from attending.papers.sigma_reparam import RULE, VARIANTS, settings

SETTINGS = settings("smoke")


def test_variants_differ_in_nothing_but_what_they_are_named_after() -> None:
    assert set(training.VARIANTS) == set(VARIANTS)
    for name, make in training.TASKS.items():
        task = make(SETTINGS[name], 0)
        models = {}
        for variant, (keeps_norm, reparametrised) in training.VARIANTS.items():
            torch.manual_seed(3)
            model = training.prepare(task.build(0), keeps_norm, reparametrised, "spectral")
            has_norm = any(isinstance(module, nn.LayerNorm) for module in model.modules())
            assert has_norm == keeps_norm
            assert bool(spectral_norms(model)) == reparametrised
            models[variant] = model
        # With gamma = sigma it computes what the plain model does: the weights are the same.
        torch.testing.assert_close(task.loss(models["plain"], 0), task.loss(models["ours"], 0))
        plain = dict(models["plain"].named_parameters())
        normed = dict(models["norm"].named_parameters())
        assert set(plain) < set(normed)
        for parameter in plain:
            assert torch.equal(plain[parameter], normed[parameter]), parameter


def test_measurements_are_those_of_the_model() -> None:
    task = training.digits_task(SETTINGS["digits"], 0)
    torch.manual_seed(0)
    model = training.prepare(task.build(0), True, False, "one")
    state = copy.deepcopy(model.state_dict())
    measured = task.measure(model)
    assert model.training
    assert len(measured.entropies) == SETTINGS["digits"]["layers"]
    model.set_attn_implementation("eager")
    images, labels = training._digits()
    with torch.no_grad():
        output = model.eval()(images[: training.TEST_IMAGES], output_attentions=True)
    for found, dense in zip(measured.entropies, output.attentions, strict=True):
        expected = -torch.xlogy(dense, dense).sum(-1).mean().item()
        assert found == pytest.approx(expected, rel=1e-4)
    right = output.logits.argmax(-1) == labels[: training.TEST_IMAGES]
    assert measured.quality == pytest.approx(right.float().mean().item())
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)


def test_a_run_that_explodes_has_diverged() -> None:
    task = training.digits_task(SETTINGS["digits"] | {"steps": 12}, 0)
    wild = training.train(task, "plain", 1e6, SETTINGS["digits"] | {"steps": 12}, 0)
    assert wild.diverged
    calm = training.train(task, "norm", 1e-4, SETTINGS["digits"] | {"steps": 12}, 0)
    assert not calm.diverged
    assert 0 < calm.lowest_entropy <= math.log(17)


GOOD = {
    "entropy_ours": 2.0,
    "entropy_norm": 0.1,
    "entropy_plain": 0.0,
    "diverged_ours": 0,
    "diverged_norm": 0,
    "diverged_plain": 0,
}


def ours(**changes: float) -> dict[str, list[float]]:
    found = {f"{task}_{name}": value for task in ("digits", "text") for name, value in GOOD.items()}
    found |= {"digits_accuracy_ours": 0.9, "digits_accuracy_norm": 0.91}
    found |= {"text_loss_ours": 6.0, "text_loss_norm": 5.96}
    return {name: [value, changes.get(name, value)] for name, value in found.items()}


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, "held"),
        ({"text_entropy_norm": 1.7}, "held in direction"),
        ({"text_entropy_norm": 2.1}, "did not hold"),
        ({"text_entropy_norm": 2.1, "text_diverged_norm": 1}, "held"),
        ({"text_entropy_plain": math.nan}, "did not hold"),
        ({"text_entropy_plain": math.nan, "text_diverged_plain": 1}, "held"),
        ({"digits_diverged_ours": 1}, "did not hold"),
        ({"digits_entropy_ours": math.nan}, "did not hold"),
        ({"digits_accuracy_ours": 0.8}, "held in direction"),
        ({"text_loss_ours": 6.1}, "held in direction"),
        ({"text_loss_ours": math.nan}, "held in direction"),
    ],
)
def test_rule(changes: dict[str, float], verdict: str) -> None:
    assert RULE.judge(ours(**changes)) == verdict


@pytest.mark.slow
def test_smoke(tmp_path: Path) -> None:
    summary = papers.reproduce("sigma-reparam", out_dir=tmp_path, picture=False)
    assert summary.verdict == "out of reach here"
    assert (tmp_path / "sigma-reparam.json").exists()
