"""The harness that papers on faster video models share, on a tiny model with random weights."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from attending import zoo
from attending.papers._video_trial import HIGHEST_PSNR, VideoTrial, video_trial
from attending.zoo.recipes.wan_shapes import WanShapesRecipe, build_model


@pytest.fixture(scope="module")
def tiny() -> zoo.ZooModel:
    recipe = WanShapesRecipe(heads=1, head_dim=12, layers=2, ffn=16, text_dim=8, time_dim=8)
    model, text = build_model(recipe)
    torch.nn.init.normal_(model.proj_out.weight, generator=torch.Generator().manual_seed(0))
    return zoo.ZooModel(model.eval(), None, {}, "tiny", text.eval())


@contextmanager
def louder(model: nn.Module) -> Iterator[Any]:
    """A method: the first block's attention counts twice; its run says so."""
    run = SimpleNamespace(stats={"density": 0.25, "calls": 0})

    def double(module: nn.Module, args: object, output: torch.Tensor) -> torch.Tensor:
        run.stats["calls"] += 1
        return 2 * output

    attention: Any = model.get_submodule("blocks.0.attn1")
    hook = attention.register_forward_hook(double)
    try:
        yield run
    finally:
        hook.remove()


@pytest.fixture(scope="module")
def trial(tiny: zoo.ZooModel) -> VideoTrial:
    return video_trial(
        {"nothing": None, "louder": louder, "fewer": None},
        seeds=(4, 9),
        videos_per_seed=2,
        steps=3,
        steps_of={"fewer": 1},
        wan=tiny,
    )


def test_methods_are_compared_on_the_same_noise(trial: VideoTrial) -> None:
    assert trial.methods == ["dense", "nothing", "louder", "fewer"]
    assert [score.seed for score in trial.scores] == [4, 9] * 4
    assert len(trial.captions) == 2
    for name in trial.methods:
        assert trial.videos[name].shape == (2, 8, 3, 32, 32)
    assert torch.equal(trial.videos["nothing"], trial.videos["dense"])
    for same in ("dense", "nothing"):
        assert trial.values(same, "psnr") == [HIGHEST_PSNR] * 2
        assert trial.values(same, "relative_l2") == [0.0, 0.0]
        assert trial.mean(same, "ssim") == pytest.approx(1)
    assert trial.values("dense", "cpu_ratio") == [1.0, 1.0]
    for other in ("louder", "fewer"):
        assert trial.mean(other, "psnr") < 60
        assert trial.mean(other, "relative_l2") > 1e-3
        assert trial.mean(other, "ssim") < 1
    one, two = trial.values("louder", "psnr")
    assert one != two
    assert trial.spread("louder", "psnr") == pytest.approx(abs(one - two) / math.sqrt(2))


def test_figures_are_those_of_their_definitions(trial: VideoTrial) -> None:
    ours, dense = (trial.videos[name].double() for name in ("louder", "dense"))
    error = (2 * ours - 2 * dense).norm() / (2 * dense - 1).norm()
    assert trial.values("louder", "relative_l2")[0] == pytest.approx(float(error), rel=1e-4)
    decibels = -10 * (ours - dense).square().mean((2, 3, 4)).log10()
    assert trial.values("louder", "psnr")[0] == pytest.approx(float(decibels.mean()), rel=1e-4)


def test_runs_report_and_tables_show(trial: VideoTrial) -> None:
    assert trial.values("louder", "calls") == [6.0, 6.0]  # 3 steps, with and without caption
    assert trial.mean("louder", "density") == 0.25
    assert trial.mean("fewer", "seconds_ratio") < 1
    lines = trial.table().splitlines()
    assert len(lines) == 2 + 4
    assert lines[4].startswith("| louder | ")
    assert lines[4].endswith("| 0.250 |")
    with pytest.raises(ValueError, match=r"\['calls', 'density'\] for 'louder', got 'speed'"):
        trial.mean("louder", "speed")
    with pytest.raises(ValueError, match="'quiet'"):
        trial.mean("quiet", "psnr")


def test_bad_input(tiny: zoo.ZooModel) -> None:
    with pytest.raises(ValueError, match="at least one each"):
        video_trial({"dense": None}, wan=tiny)
    with pytest.raises(ValueError, match="seeds once each"):
        video_trial({"a": None}, seeds=(1, 1), wan=tiny)
    with pytest.raises(ValueError, match=r"names of methods, got \['b'\]"):
        video_trial({"a": None}, steps_of={"b": 1}, wan=tiny)
    with pytest.raises(ValueError, match="videos_per_seed"):
        video_trial({"a": None}, videos_per_seed=0, wan=tiny)
