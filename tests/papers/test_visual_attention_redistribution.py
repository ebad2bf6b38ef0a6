"""The experiment of visual attention redistribution: its controls, what it measures, its rule."""

from pathlib import Path

import pytest
import torch

from attending import zoo
from attending.interventions import VisualAttentionRedistribution
from attending.papers import _visual_attention_redistribution_shapes as experiment
from attending.papers._visual_attention_redistribution_planted import CHANNEL, PLACES, plant
from attending.papers.visual_attention_redistribution import RULE, reproduce
from attending.zoo import shapes


def numbers(**changes: list[float]) -> dict[str, list[float]]:
    """Three seeds of a run in which the claim holds, with changes."""
    found = {
        "papers_tau": [1.0] * 3,
        "pope_plain": [0.8] * 3,
        "pope_redistributed": [0.85] * 3,
        "pope_random": [0.8] * 3,
        "pope_all_heads": [0.5] * 3,
        "chair_i_plain": [0.2] * 3,
        "chair_i_redistributed": [0.2] * 3,
    }
    return found | changes


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, "held"),
        ({"papers_tau": [1.0, 0.0, 1.0]}, "out of reach here"),
        ({"pope_redistributed": [0.8, 0.9, 0.9]}, "held in direction"),
        ({"chair_i_redistributed": [0.1, 0.1, 0.25]}, "held in direction"),
        ({"pope_random": [0.9] * 3}, "held in direction"),
        ({"pope_all_heads": [0.7] * 3}, "held in direction"),
        ({"pope_all_heads": [0.9] * 3}, "did not hold"),
        ({"pope_redistributed": [0.7, 0.8, 0.85]}, "did not hold"),
        ({"chair_i_redistributed": [0.3] * 3}, "did not hold"),
        ({"pope_redistributed": [float("nan"), 0.9, 0.9]}, "did not hold"),
    ],
)
def test_the_rule(changes: dict[str, list[float]], verdict: str) -> None:
    assert RULE.judge(numbers(**changes)) == verdict


def test_smoke_run_measures_everything_and_leaves_the_generator_alone(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    found = reproduce("smoke", 0, tmp_path).measurements
    assert torch.equal(torch.get_rng_state(), before)
    for arm in experiment.ARMS:
        for name in ("pope_random", "pope_popular", "pope_adversarial", "pope", "recall"):
            assert 0 <= found[f"{name}_{arm}"] <= 1
    for arm in experiment.ARMS[1:]:
        assert 0 < found[f"image_sinks_{arm}"] < 1
    assert found["image_sinks_random"] > 0
    assert found["edited_rows_all_heads"] > found["edited_rows_redistributed"] > 0
    assert 0 < found["largest_phi_share"] <= 1
    assert found["papers_tau"] in (0, 1)
    assert found["planted_channel_found"] == 1


@torch.no_grad()
def test_planted_sinks_are_sinks_and_the_model_stays() -> None:
    llava = zoo.load("llava-shapes")
    scenes = shapes.make_scenes(3, seed=5)
    inputs = llava.processor(scenes, "Is there a red circle in the image?")
    before = llava.model(**inputs).logits
    planted = plant(llava, inputs, seed=0)
    assert torch.equal(llava.model(**inputs).logits, before)
    assert not torch.allclose(planted.model(**inputs).logits, before, atol=0.1)
    method = VisualAttentionRedistribution((CHANNEL,), scale_tau=True, skip_first=0)
    with method(planted.model) as run:
        planted.model(**inputs)
    assert run.layers[0].image_sinks == 3 * PLACES
    assert run.layers[0].text_sinks == 3
