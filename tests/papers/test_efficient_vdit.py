"""The experiment of Efficient-vDiT: its rule, equal costs, and that everything is measured."""

import copy
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from attending.papers import _efficient_vdit_experiment as experiment
from attending.papers.efficient_vdit import KS, RULE, SHOWN, reproduce
from attending.sparse.frame_masks import frame_sparsity


def numbers(**changes: list[float]) -> dict[str, list[float]]:
    """Three seeds of a run in which the claim holds, with changes."""
    found = {}
    for k in KS:
        found[f"error_even_{k}"] = [0.4 / k] * 3
        for other in ("first", "random", "window"):
            found[f"error_{other}_{k}"] = [0.5 / k] * 3
    for name, error in (("searched", 0.2), ("uniform", 0.3), ("window_by_layer", 0.4)):
        found[f"relative_l2_{name}"] = [error] * 3
    return found | changes


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, "held"),
        ({"relative_l2_searched": [0.35, 0.1, 0.1]}, "held in direction"),
        ({"relative_l2_window_by_layer": [0.1] * 3}, "held in direction"),
        ({"error_first_2": [0.2] * 3}, "held in direction"),
        ({"error_random_3": [0.1] * 3}, "held in direction"),
        ({"error_first_1": [0.1] * 3}, "held"),  # with one reference it is the same mask
        ({"error_even_3": [0.05, 0.13, 0.13]}, "did not hold"),
        ({"relative_l2_searched": [0.35] * 3}, "did not hold"),
        ({"relative_l2_searched": [math.nan, 0.1, 0.1]}, "did not hold"),
        ({"error_even_4": [math.nan, 0.1, 0.1]}, "did not hold"),
    ],
)
def test_the_rule(changes: dict[str, list[float]], verdict: str) -> None:
    assert RULE.judge(numbers(**changes)) == verdict


def test_all_families_cost_the_same() -> None:
    masks = experiment.mask_families(3)
    for k in KS:
        costs = [frame_sparsity(mask) for name, mask in masks.items() if name.endswith(f":{k}")]
        assert len(costs) == 5
        assert costs == pytest.approx(costs[:1] * 5)


def test_the_weights_of_a_student_are_taken_back() -> None:
    model, student = nn.Linear(2, 2), nn.Linear(2, 2)
    before = copy.deepcopy(model.state_dict())
    method = experiment.with_weights_of(student, lambda one: torch.no_grad())
    assert method is not None
    with method(model):
        assert torch.equal(model.weight, student.weight)
    assert all(torch.equal(model.state_dict()[name], one) for name, one in before.items())


def test_smoke_run_measures_everything_and_leaves_model_and_generator_alone(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    found = reproduce("smoke", 0, tmp_path).measurements
    assert torch.equal(torch.get_rng_state(), before)
    assert found["sparsity_uniform"] == pytest.approx(46.875)
    for name in SHOWN:
        assert found[f"density_{name}"] <= found["density_uniform"] + 1e-9
        assert math.isfinite(found[f"relative_l2_{name}"])
    assert found["error_even_1"] == pytest.approx(found["error_first_1"])
    assert sum(found[f"layers_with_{k}"] for k in KS) + found["layers_dense"] == 8
