"""The experiment of frozen-QK attention: fair comparisons, and the rule of its verdict."""

import math
from pathlib import Path

import pytest
import torch

from attending.papers import _random_feature_attention_theory_errors as errors
from attending.papers.random_feature_attention_theory import (
    COUNTS,
    MODELS,
    RULE,
    TARGETS,
    reproduce,
    settings,
)


def test_settings_measure_what_the_rule_looks_at() -> None:
    for scale in RULE.scales:
        assert set(COUNTS) <= set(settings(scale)["samples"])


def test_errors_are_of_held_out_sets_and_go_down() -> None:
    found = errors.run(0, settings("smoke"))
    assert tuple(found) == MODELS
    for one in found.values():
        assert tuple(one) == tuple(TARGETS)
        for few, many in one.values():
            assert 0 < many < few * 1.2 < 2.4


def test_a_target_that_the_heads_compute_is_learned_exactly() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(90, 12, dtype=torch.float64, generator=generator)
    y = features @ torch.randn(12, dtype=torch.float64, generator=generator)
    noise = torch.randn(90, dtype=torch.float64, generator=generator)
    parts = {"train": slice(0, 30), "validation": slice(30, 60), "test": slice(60, 90)}
    found = errors._errors(
        {part: features[where] for part, where in parts.items()},
        {part: {"own": y[where], "noise": noise[where]} for part, where in parts.items()},
        [6, 30],
        [1e-12, 1e-2, 1e6],
    )
    assert found["own"][0] > 0.1
    assert found["own"][1] < 1e-9
    assert found["noise"][1] == pytest.approx(1.0, abs=0.2)  # strong ridge, chosen on validation


def numbers(**changes: float) -> dict[str, list[float]]:
    usual = {"zero": 0.5, "identity": 0.4, "network": 0.6}
    found = {
        f"{target}_{model}_{count}": [usual[model]] * 3
        for target in TARGETS
        for model in MODELS
        for count in COUNTS
    }
    for name, value in changes.items():
        assert name in found
        found[name] = [found[name][0], value, found[name][0]]
    return found


def test_the_rule() -> None:
    judge = RULE.judge
    assert judge(numbers()) == "held"
    assert judge(numbers(key_4_identity_256=0.9, correlation_3_identity_1024=0.9)) == "held"
    assert judge(numbers(key_2_network_256=0.4)) == "held in direction"
    assert judge(numbers(correlation_1_identity_1024=0.5)) == "held in direction"
    assert judge(numbers(correlation_relu_identity_4096=0.55)) == "did not hold"
    assert judge(numbers(key_2_zero_256=9.0)) == "did not hold"
    assert judge(numbers(mixed_2_zero_4096=math.nan)) == "did not hold"


def test_smoke_leaves_the_generator_alone(tmp_path: Path) -> None:
    state = torch.random.get_rng_state()
    first, second = (reproduce("smoke", seed, tmp_path) for seed in (0, 1))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert len(first.measurements) == len(TARGETS) * len(MODELS) * 2
    assert first.measurements != second.measurements
    assert reproduce("smoke", 0, tmp_path).measurements == first.measurements
