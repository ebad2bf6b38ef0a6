"""The experiment of DependencyViT: its images, what it measures, and its rule."""

from pathlib import Path

import torch

from attending import papers
from attending.papers import _dependency_vit_training as training
from attending.papers.dependency_vit import RULE


def test_shapes_and_their_truth() -> None:
    images, sorts, tokens = training.shapes(20, torch.Generator().manual_seed(0))
    again = training.shapes(20, torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip((images, sorts, tokens), again, strict=True))
    assert images.shape == (20, 3, 16, 16)
    assert tokens.shape == (20, 64)
    assert set(tokens.amax(1).tolist()) == {2, 3}
    assert (sorts.sum(1) >= 1).all()
    assert (sorts.sum(1) <= tokens.amax(1)).all()  # two shapes may be of one sort
    brightness = images.amax(1).unfold(1, 2, 2).unfold(2, 2, 2).mean((3, 4)).flatten(1)
    assert brightness[tokens > 0].mean() > brightness[tokens == 0].mean() + 0.3


def numbers(**changes: float) -> dict[str, list[float]]:
    held = {
        "accuracy_reversed": 95.0,
        "accuracy_forward": 94.0,
        "accuracy_pruned_message": 93.0,
        "accuracy_pruned_random": 90.0,
        "ari_tree_reversed": 0.6,
        "ari_tree_forward": 0.2,
        "ari_kmeans": 0.5,
    }
    return {name: [number] * 3 for name, number in (held | changes).items()}


def test_the_rule() -> None:
    judge = RULE.judge
    assert judge(numbers()) == "held"
    for change in (
        {"accuracy_reversed": 93.5},
        {"accuracy_pruned_random": 94.0},
        {"ari_kmeans": 0.7},
    ):
        assert judge(numbers(**change)) == "held in direction"
    assert judge(numbers(accuracy_reversed=92.5)) == "did not hold"
    assert judge(numbers(ari_tree_forward=0.7)) == "did not hold"
    assert judge(numbers(ari_tree_reversed=float("nan"))) == "did not hold"
    one_seed = numbers()
    one_seed["ari_tree_forward"][1] = 0.7
    assert judge(one_seed) == "did not hold"


def test_smoke(tmp_path: Path) -> None:
    state = torch.random.get_rng_state()
    summary = papers.reproduce("dependency-vit", out_dir=tmp_path, picture=False)
    assert torch.equal(torch.random.get_rng_state(), state)
    for name in ("reversed", "forward"):
        assert 0 <= summary.measurements[f"accuracy_{name}"].mean <= 100
        assert -1 <= summary.measurements[f"ari_tree_{name}"].mean <= 1
    assert 0 <= summary.measurements["accuracy_pruned_message"].mean <= 100
