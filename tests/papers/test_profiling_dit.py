"""The experiment of ProfilingDiT: equal budgets, thresholds, its rule."""

import math
from pathlib import Path

import pytest
import torch

from attending.interventions.cache_schedule import block_calls
from attending.papers import _profiling_dit_experiment as experiment
from attending.papers.profiling_dit import OURS, RULE, reproduce, settings


def numbers(**changes: list[float]) -> dict[str, list[float]]:
    """Three seeds of a run in which the claim holds, with changes."""
    found = {
        f"psnr_{name}": [24.0] * 3
        for name in (
            "teacache",
            "foreground_stepwise",
            "background_uniform",
            "background_inverse",
            "all_blocks",
            "fewer_steps",
        )
    }
    found |= {f"psnr_{OURS}": [26.0] * 3, f"computed_{OURS}": [0.7] * 3}
    return found | {"computed_teacache": [0.7] * 3} | changes


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, "held"),
        ({"psnr_teacache": [27.0, 24.0, 24.0]}, "held in direction"),
        ({"psnr_foreground_stepwise": [26.0, 24.0, 24.0]}, "held in direction"),
        ({"psnr_background_uniform": [26.5] * 3}, "held in direction"),
        ({"psnr_fewer_steps": [30.0] * 3}, "held in direction"),
        ({"psnr_all_blocks": [27.0, 26.0, 26.0]}, "held in direction"),
        ({"psnr_teacache": [29.0, 29.0, 24.0]}, "did not hold"),
        ({"psnr_foreground_stepwise": [27.0] * 3}, "did not hold"),
        ({f"psnr_{OURS}": [math.nan, 26.0, 26.0]}, "did not hold"),
        ({"computed_teacache": [0.7, 0.7, 0.8]}, "out of reach here"),
    ],
)
def test_the_rule(changes: dict[str, list[float]], verdict: str) -> None:
    assert RULE.judge(numbers(**changes)) == verdict


@pytest.mark.parametrize("scale", ["smoke", "small", "full"])
def test_budgets_are_equal(scale: str) -> None:
    chosen = settings(scale)  # type: ignore[arg-type]
    names = ("steps", "warmup", "interval", "longest", "cached")
    budget = experiment.Budget(blocks=8, **{name: chosen[name] for name in names})
    calls = {
        block_calls(schedule.computed(budget.steps), budget.steps, 8, budget.cached)
        for schedule in budget.schedules.values()
    }
    assert calls == {round(budget.density * budget.steps * 8)}
    assert len(budget.spread_evenly().computed(budget.steps)) == budget.whole_steps
    assert abs(budget.whole_steps / budget.steps - budget.density) <= 0.5 / budget.steps + 1e-9


def test_schedules_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match="equally many steps"):
        _ = experiment.Budget(30, 3, 9, 6.0, 8, 4).schedules


def test_a_threshold_computes_what_is_wanted() -> None:
    drifts = torch.rand(30, generator=torch.Generator().manual_seed(0)).tolist()
    for wanted in (1, 10, 29):
        threshold = experiment._threshold(lambda t: sum(d > t for d in drifts), wanted)
        assert sum(d > threshold for d in drifts) == wanted


@pytest.mark.slow
def test_smoke(tmp_path: Path) -> None:
    found = reproduce("smoke", 0, tmp_path)
    assert (
        found.measurements[f"computed_{OURS}"] == found.measurements["computed_background_uniform"]
    )
    assert 0 <= found.measurements["ratio_lowest"] <= found.measurements["ratio_highest"] <= 1
    assert found.measurements["relative_l2_teacache"] >= 0
