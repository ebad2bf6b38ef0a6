"""The experiment of Rectified SpaAttn: equal densities, smooth tokens, its rule."""

import math
from pathlib import Path

import pytest
import torch

from attending.papers._rectified_spaattn_experiment import (
    METHODS,
    NAMES,
    methods,
    smooth_errors,
    smooth_tokens,
)
from attending.papers.rectified_spaattn import LABELS, RULE, reproduce, settings


def numbers(**changes: list[float]) -> dict[str, list[float]]:
    """Three seeds of a run in which the claim holds, with changes."""
    found = {}
    for method, psnr, ssim, error in (
        ("ipar_gapr", 30.0, 0.95, 0.1),
        ("none", 25.0, 0.9, 0.2),
        ("window", 24.0, 0.8, 0.3),
    ):
        found |= {f"psnr_{method}": [psnr] * 3, f"ssim_{method}": [ssim] * 3}
        found[f"relative_l2_{method}"] = [error] * 3
    return found | changes


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, "held"),
        ({"psnr_ipar_gapr": [24.5, 40.0, 40.0]}, "held in direction"),
        ({"ssim_ipar_gapr": [0.89, 0.95, 0.95]}, "held in direction"),
        ({"relative_l2_ipar_gapr": [0.12] * 3}, "held in direction"),
        ({"relative_l2_window": [0.05] * 3}, "held in direction"),
        ({"psnr_ipar_gapr": [24.5] * 3}, "did not hold"),
        ({"psnr_window": [31.0] * 3}, "did not hold"),
        ({"psnr_ipar_gapr": [math.nan, 30.0, 30.0]}, "did not hold"),
    ],
)
def test_the_rule(changes: dict[str, list[float]], verdict: str) -> None:
    assert RULE.judge(numbers(**changes)) == verdict


def test_smooth_tokens_are_alike_over_the_length() -> None:
    tokens = smooth_tokens(4000, 8, 10.0, 0.0, 0)
    assert float(tokens.var()) == pytest.approx(1.0, abs=0.1)
    for distance in (5, 10, 20):
        product = (tokens[..., distance:, :] * tokens[..., :-distance, :]).mean()
        expected = math.exp(-((distance / 20) ** 2))
        assert float(product) == pytest.approx(expected, abs=0.08)


def test_everything_is_nearer_than_plain_on_smooth_tokens() -> None:
    given = {**settings("small")["smooth"], "lengths": [24, 3]}
    found = smooth_errors(0, **given)
    assert set(found) == set(NAMES.values())
    for name in set(found) - {"none"}:
        assert all(one < plain for one, plain in zip(found[name], found["none"], strict=True))


def test_names() -> None:
    assert set(methods(**settings("small"))) == set(METHODS) == set(LABELS)


def test_smoke_run_measures_everything_and_leaves_the_generator_alone(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    found = reproduce("smoke", 0, tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    numbers_found = found.measurements
    RULE.judge({name: [value] for name, value in numbers_found.items()})
    assert all(math.isfinite(value) for value in numbers_found.values())
    densities = {numbers_found[f"density_{method}"] for method in METHODS}
    assert len(densities) == 1
    assert 0.2 < densities.pop() < 0.7
