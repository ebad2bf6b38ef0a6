"""The experiment of Deconstructing attention: its task, what it measures, and its rule."""

import math
from pathlib import Path

import pytest
import torch

from attending.papers._deconstructing_attention_experiment import Task
from attending.papers.deconstructing_attention import RELAXED, RULE, reproduce


def numbers(**changes: list[float]) -> dict[str, list[float]]:
    """Three seeds of a run in which the claim holds, with changes."""
    found = {"standard": [0.95] * 3}
    found |= {f"{variant}_uniform": [0.5] * 3 for variant in RELAXED}
    found |= {f"{variant}_even": [0.9] * 3 for variant in RELAXED}
    return found | {"mlp_uniform": [0.13] * 3} | changes


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, "held"),
        ({"taylor_uniform": [0.92] * 3, "taylor_even": [0.1] * 3}, "held"),
        ({"static_qk_uniform": [0.5, 0.94, 0.5]}, "held in direction"),
        ({"random_qk_even": [0.9, 0.9, 0.7]}, "held in direction"),
        ({"random_qk_even": [0.9, 0.9, math.nan]}, "held in direction"),
        ({"mlp_even": [0.9, 0.9, 0.5]}, "did not hold"),
        ({"mlp_uniform": [0.13, 0.2, 0.13]}, "did not hold"),
        ({"taylor_uniform": [0.5, 0.12, 0.5]}, "did not hold"),
        ({"standard": [math.nan] * 3}, "did not hold"),
    ],
)
def test_the_rule(changes: dict[str, list[float]], verdict: str) -> None:
    assert RULE.judge(numbers(**changes)) == verdict


def test_the_task_can_be_answered_from_the_sequence_and_from_nothing_else() -> None:
    task = Task(keys=6, values=4, pairs=5)
    words, answers = task.sample(2000, torch.Generator().manual_seed(0))
    assert words.shape == (2000, 10)
    assert answers.shape == (2000, 5)
    assert int(words.max()) < task.vocabulary
    shown, asked = words[:, :5], words[:, 5:] - 24
    assert all(len(set(row)) == 5 for row in (shown // 4).tolist())  # no key twice
    for pairs, keys, found in zip(shown[:50].tolist(), asked[:50], answers[:50], strict=True):
        values = {pair // 4: pair % 4 for pair in pairs}
        assert [values[key] for key in keys.tolist()] == (found - 30).tolist()
    for key in range(6):  # the value of a key is another in each sequence
        share = torch.bincount(answers[asked == key] - 30, minlength=4) / (asked == key).sum()
        torch.testing.assert_close(share, torch.full((4,), 0.25), atol=0.05, rtol=0)


def test_smoke_run_measures_everything_and_leaves_the_generator_alone(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    found = reproduce("smoke", 0, tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    assert set(found.measurements) == set(numbers())
    assert all(0 <= number <= 1 for number in found.measurements.values())
    assert len(found.series) == 12
    assert reproduce("smoke", 0, tmp_path).measurements == found.measurements
