"""The experiment of PAROAttention: its rule, and that everything is measured."""

import math
from pathlib import Path

import pytest
import torch

from attending.papers.paro_attention import PERCENTS, RULE, reproduce


def numbers(**changes: list[float]) -> dict[str, list[float]]:
    """Three seeds of a run in which the claim holds, with changes."""
    found = {}
    for percent in PERCENTS:
        for name, psnr in (("paro", 30.0), ("fhw", 28.0), ("window", 25.0)):
            found[f"psnr_{name}_{percent}"] = [psnr] * 3
    for bits in ("int8", "int4"):
        found |= {f"psnr_{bits}_block": [30.0] * 3, f"psnr_{bits}_row": [27.0] * 3}
    return found | changes


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, "held"),
        ({"psnr_fhw_50": [29.5] * 3}, "held in direction"),  # less than 1 dB
        ({"psnr_window_19": [31.0, 20.0, 20.0]}, "held in direction"),
        ({"psnr_int4_row": [30.5, 27.0, 27.0]}, "held in direction"),
        ({"psnr_int8_block": [math.nan, 30.0, 30.0]}, "held in direction"),
        ({"psnr_fhw_19": [30.0, 30.0, 31.0]}, "did not hold"),
        ({"psnr_window_50": [33.0, 33.0, 25.0]}, "did not hold"),
        ({"psnr_paro_50": [math.nan, 30.0, 30.0]}, "did not hold"),
    ],
)
def test_the_rule(changes: dict[str, list[float]], verdict: str) -> None:
    assert RULE.judge(numbers(**changes)) == verdict


def test_smoke_run_measures_everything_and_leaves_the_generator_alone(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    found = reproduce("smoke", 0, tmp_path).measurements
    assert torch.equal(torch.get_rng_state(), before)
    for percent, density in zip(PERCENTS, (0.5, 0.1875), strict=True):
        for name in ("paro", "fhw", "literal", "mass", "window"):
            assert found[f"density_{name}_{percent}"] == pytest.approx(density)
            assert 0 < found[f"psnr_{name}_{percent}"] < 100
    for name in ("paro", "literal", "mass"):
        chosen = [found[f"heads_{name}_{order}"] for order in ("FHW", "FWH", "HWF", "HFW", "WHF")]
        assert sum(chosen) + found[f"heads_{name}_WFH"] == pytest.approx(1)
    assert found["psnr_int8_block"] > found["psnr_int4_block"]
    assert found["density_int8_row"] == 1
