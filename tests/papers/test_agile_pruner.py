"""The experiment of AgilePruner: its scenes, what it measures, its rule."""

from pathlib import Path

import pytest
import torch

from attending.papers import _agile_pruner_shapes as experiment
from attending.papers.agile_pruner import PAPER, RULE, reproduce, settings
from attending.zoo import llava_shapes
from attending.zoo.entry import ZooModel
from attending.zoo.recipes.llava_shapes import LlavaShapesRecipe, build_model
from attending.zoo.recipes.llava_shapes_data import make_tokenizer


def numbers(**changes: list[float]) -> dict[str, list[float]]:
    """Three seeds of a run in which the claim holds, with changes."""
    found = {
        "erank_simple": [10.0] * 3,
        "erank_complex": [14.0] * 3,
        "simple_agile": [0.9] * 3,
        "complex_agile": [0.8] * 3,
        "simple_fastervlm": [0.92] * 3,
        "complex_fastervlm": [0.7] * 3,
        "simple_divprune": [0.8] * 3,
        "complex_divprune": [0.85] * 3,
    }
    return found | changes


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, "held"),
        ({"simple_divprune": [0.9, 0.8, 0.8]}, "held in direction"),
        ({"simple_divprune": [0.9, 0.86, 0.86]}, "did not hold"),
        ({"complex_fastervlm": [0.8] * 3}, "did not hold"),
        ({"erank_complex": [9.0, 14.0, 14.0]}, "did not hold"),
        ({"simple_agile": [float("nan"), 0.9, 0.9]}, "did not hold"),
        ({"erank_simple": [float("nan"), 10.0, 10.0]}, "did not hold"),
    ],
)
def test_the_rule(changes: dict[str, list[float]], verdict: str) -> None:
    assert RULE.judge(numbers(**changes)) == verdict


def test_scenes_are_simple_and_complex() -> None:
    for scene in experiment.scenes_of("simple", 4, 1):
        assert len(scene.objects) == 2
        assert scene.background == "plain"
        assert {thing.texture for thing in scene.objects} == {"solid"}
    scenes = experiment.scenes_of("complex", 4, 1)
    assert {len(scene.objects) for scene in scenes} == {6}
    assert "plain" not in {scene.background for scene in scenes}


def check(found: dict[str, float]) -> None:
    figures = {figure.measurement for figure in PAPER.figures if figure.measurement}
    assert figures <= set(found)
    for selector in experiment.SELECTORS:
        assert 0 <= found[f"simple_{selector}"] <= 1
        kept = found[f"kept_{selector}_16"]
        assert kept == 16 if selector not in ("fastv", "sparsevlm") else 16 < kept < 64
    assert found["erank_avg"] > 1


def test_every_measurement_on_an_untrained_model() -> None:
    tokenizer = make_tokenizer()
    recipe = LlavaShapesRecipe()
    model = build_model(recipe, tokenizer).eval()
    zoo_model = ZooModel(
        model, tokenizer, {}, "untrained", llava_shapes.make_processor(model, tokenizer)
    )
    before = torch.get_rng_state()
    check(experiment.run(zoo_model, 0, **settings("smoke") | {"captions": 1}))
    assert torch.equal(torch.get_rng_state(), before)


def test_smoke_run(tmp_path: Path) -> None:
    if not (llava_shapes.folder() / "card.json").exists():
        pytest.skip("needs the weights of llava-shapes")
    check(reproduce("smoke", 0, tmp_path).measurements)
