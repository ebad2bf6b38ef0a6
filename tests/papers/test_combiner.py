"""The experiment of Combiner: its layouts, what it measures, and its rule."""

from pathlib import Path

import pytest
import torch

from attending.papers import _combiner_experiment as experiment
from attending.papers.combiner import LAYOUTS, RULE, VARIANTS, reproduce


def numbers(**changes: list[float]) -> dict[str, list[float]]:
    """Three seeds of a run in which the claim holds, with changes."""
    found = {f"bits_{layout}": [2.1] * 3 for layout in LAYOUTS}
    found |= {f"bits_combiner_{layout}": [2.0] * 3 for layout in LAYOUTS}
    return found | changes


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, "held"),
        ({"bits_combiner_axial": [2.2, 1.9, 1.9]}, "held in direction"),
        ({"bits_combiner_axial": [2.2, 2.2, 2.1]}, "did not hold"),
        ({"bits_combiner_fixed": [float("nan"), 2.0, 2.0]}, "did not hold"),
    ],
)
def test_the_rule(changes: dict[str, list[float]], verdict: str) -> None:
    assert RULE.judge(numbers(**changes)) == verdict


def test_sparse_layouts() -> None:
    seen = {layout: experiment.sparse_mask(layout) for layout in LAYOUTS}
    assert seen["fixed"][19].nonzero().flatten().tolist() == [7, 15, 16, 17, 18, 19]
    assert seen["axial"][19].nonzero().flatten().tolist() == [3, 11, 16, 17, 18, 19]
    assert seen["logsparse"][19].nonzero().flatten().tolist() == [3, 11, 15, 17, 18, 19]
    assert not any(bool(mask.triu(1).any()) for mask in seen.values())
    with pytest.raises(ValueError, match="layout: expected fixed"):
        experiment.sparse_mask("dense")


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_pixel_sees_later_ones(variant: str) -> None:
    model = experiment.PixelModel(16, 2, 2, experiment.attention_of(variant)).eval()
    pixels = torch.randint(0, 17, (2, 64))
    changed = pixels.clone()
    changed[:, 30:] = (changed[:, 30:] + 3) % 17
    first, second = model(pixels), model(changed)
    torch.testing.assert_close(first[:, :31], second[:, :31])
    assert not torch.allclose(first[:, 31:], second[:, 31:])


def test_smoke_run_measures_everything_and_leaves_the_generator_alone(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    found = reproduce("smoke", 0, tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(1.5 < found.measurements[f"bits_{name}"] < 6 for name in VARIANTS)
    assert 0 <= found.measurements["layouts_improved"] <= 3
    assert reproduce("smoke", 0, tmp_path).measurements == found.measurements
