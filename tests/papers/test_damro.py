"""The experiment of DAMRO: its controls, what it measures, its rule."""

import math
from pathlib import Path

import pytest
import torch

from attending.papers import _damro_experiment as experiment
from attending.papers.damro import RULE, reproduce
from attending.zoo import llava_shapes
from tests.decoding.models import llava, prompts


def numbers(**changes: list[float]) -> dict[str, list[float]]:
    """Three seeds of a run in which the claim holds, with changes."""
    found = {}
    for way, f1, chair in (
        ("sample", 0.8, 0.2),
        ("damro", 0.85, 0.1),
        ("random", 0.83, 0.15),
        ("cut", 0.82, 0.15),
    ):
        found |= {f"pope_f1_{way}": [f1] * 3, f"chair_i_{way}": [chair] * 3}
        found[f"recall_{way}"] = [0.7] * 3
    return found | changes


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, "held"),
        ({"pope_f1_damro": [0.79, 0.9, 0.9]}, "held in direction"),
        ({"chair_i_damro": [0.21, 0.1, 0.1]}, "held in direction"),
        ({"recall_damro": [0.6, 0.7, 0.7]}, "held in direction"),
        ({"pope_f1_random": [0.85] * 3}, "held in direction"),
        ({"chair_i_cut": [0.1] * 3}, "held in direction"),
        ({"pope_f1_damro": [0.79, 0.8, 0.8]}, "did not hold"),
        ({"chair_i_damro": [0.4, 0.1, 0.1]}, "did not hold"),
        ({"chair_i_damro": [math.nan, 0.1, 0.1]}, "did not hold"),
    ],
)
def test_the_rule(changes: dict[str, list[float]], verdict: str) -> None:
    assert RULE.judge(numbers(**changes)) == verdict


def test_noise_keeps_the_power() -> None:
    images = torch.randn(2, 3, 64, 64)
    noised = experiment.add_noise(images, 500, torch.Generator().manual_seed(1))
    assert noised.std().item() == pytest.approx(1, abs=0.05)
    similar = torch.nn.functional.cosine_similarity(images.flatten(), noised.flatten(), dim=0)
    assert similar.item() == pytest.approx(0.863, abs=0.005)  # exp(-(500 betas) / 2)
    whole = experiment.add_noise(images, 0, torch.Generator().manual_seed(1))
    torch.testing.assert_close(whole, images, rtol=0, atol=0.05)


@pytest.mark.parametrize("way", experiment.WAYS)
def test_every_way_decodes(way: str) -> None:
    model, inputs = llava(), prompts([[5, 6, 7], [8]])
    strength = experiment.Strength(k=2, alpha=1.0, beta=0.1)

    def decoded(strength: experiment.Strength) -> torch.Tensor:
        torch.manual_seed(0)
        settings = experiment.decoding(way, strength, torch.Generator().manual_seed(0))
        found = model.generate(
            **inputs, **{"do_sample": False, "max_new_tokens": 6, "eos_token_id": None, **settings}
        )
        return found[:, -6:]

    found = decoded(strength)
    assert found.shape == (2, 6)
    assert decoded(strength).equal(found)
    # Without strength, all ways that sample are plain sampling, and the others greedy.
    plain = experiment.decoding("greedy" if "greedy" in way else "sample", strength, None)
    torch.manual_seed(0)
    expected = model.generate(
        **inputs, **{"do_sample": False, "max_new_tokens": 6, "eos_token_id": None, **plain}
    )
    assert decoded(experiment.Strength(k=2, alpha=0.0, beta=0.0)).equal(expected[:, -6:])


def test_smoke_run_measures_everything_and_leaves_the_generator_alone(tmp_path: Path) -> None:
    if not (llava_shapes.folder() / "card.json").exists():
        pytest.skip("needs the weights of llava-shapes")
    before = torch.get_rng_state()
    found = reproduce("smoke", 0, tmp_path).measurements
    assert torch.equal(torch.get_rng_state(), before)
    for way in experiment.WAYS:
        assert 0 <= found[f"pope_accuracy_{way}"] <= 1
        assert 0 <= found[f"pope_f1_{way}"] <= 1
        assert 0 <= found[f"recall_{way}"] <= 1
    assert 0 < found["patches_on_objects"] < 1
    assert 0 <= found["outliers_on_objects"] <= 1
    assert found["cost"] > 0
