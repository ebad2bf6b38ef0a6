"""The experiment of CLEAR: its rule, its baselines, and that everything is measured."""

import math
from pathlib import Path

import pytest
import torch

from attending.interventions import CircularWindow
from attending.papers import _clear_videos as experiment
from attending.papers.clear import RULE, reproduce
from attending.sparse.circular_window import circular_window_mask
from attending.zoo import load


def numbers(**changes: list[float]) -> dict[str, list[float]]:
    """Three seeds of a run in which the claim holds, with changes."""
    errors = {"circle_2": 0.5, "circle_3": 0.3, "circle_4": 0.2, "distilled": 0.1}
    errors |= {"rows_2": 0.6, "rows_3": 0.4, "rows_4": 0.3, "flow_matching": 0.3}
    found = {f"relative_l2_{name}": [error] * 3 for name, error in errors.items()}
    return found | {"recovered_distilled": [0.8] * 3, "attention_speedup": [4.0] * 3} | changes


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, "held"),
        ({"recovered_distilled": [0.4, 0.8, 0.8]}, "held in direction"),
        ({"attention_speedup": [1.5, 4.0, 4.0]}, "held in direction"),
        ({"relative_l2_flow_matching": [0.09, 0.3, 0.3]}, "held in direction"),
        ({"relative_l2_rows_2": [0.2, 0.6, 0.6]}, "held in direction"),
        ({"relative_l2_circle_4": [0.6, 0.2, 0.2]}, "held in direction"),
        ({"recovered_distilled": [-0.1] * 3}, "did not hold"),
        ({"relative_l2_flow_matching": [0.05] * 3}, "did not hold"),
        ({"relative_l2_rows_2": [0.2] * 3}, "did not hold"),
        ({"relative_l2_distilled": [math.nan, 0.1, 0.1]}, "did not hold"),
    ],
)
def test_the_rule(changes: dict[str, list[float]], verdict: str) -> None:
    assert RULE.judge(numbers(**changes)) == verdict


@pytest.mark.parametrize("radius", [2, 3, 4])
def test_baselines_see_at_least_as_much_as_the_circle(radius: int) -> None:
    grid = (8, 8, 8)
    circle = float(circular_window_mask(grid, radius).float().mean())
    plans = experiment.others(grid, radius)
    assert set(plans) == {"rows", "strided", "sequence"}
    for name, plan in plans.items():
        assert circle <= plan.density < 1.2 * circle, name
        assert plan.block_mask[0, 0].diagonal().all()


def test_trained_weights_stay_within_their_block() -> None:
    wan = load("wan-shapes")
    before = {name: one.clone() for name, one in wan.model.state_dict().items()}
    weights, losses = experiment.train(wan, 0, 2, 1, 2, 1e-3, 2, 0.5)
    assert len(losses) == 2
    assert all(".attn1.to_" in name for name in weights)
    assert not torch.equal(
        weights["blocks.0.attn1.to_q.weight"], before["blocks.0.attn1.to_q.weight"]
    )
    batch = experiment.flow_batch(0, 0, 1, 2)
    plain = experiment.velocity(wan, batch, CircularWindow(2))
    trained = experiment.velocity(wan, batch, experiment.with_weights(weights, CircularWindow(2)))
    assert not torch.equal(plain, trained)
    after = wan.model.state_dict()
    assert all(torch.equal(after[name], one) for name, one in before.items())


def test_smoke_run_measures_everything_and_leaves_the_generator_alone(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    found = reproduce("smoke", 0, tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    numbers_found = found.measurements
    RULE.judge({name: [value] for name, value in numbers_found.items()})
    assert all(math.isfinite(value) for value in numbers_found.values())
    for radius in (2, 3, 4):
        circle, rows = (numbers_found[f"density_{name}_{radius}"] for name in ("circle", "rows"))
        assert circle <= rows
    assert {"distilled", "flow matching", "circles", "rows"} == {one.name for one in found.series}
