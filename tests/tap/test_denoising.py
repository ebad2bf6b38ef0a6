"""The clock of a denoising loop: steps, branches, restarts."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attending.taps.denoising import DenoisingClock, Moment


class Denoiser(nn.Module):
    def forward(self, sample: Tensor, timestep: Any = None) -> Tensor:
        return sample


def steps_of(clock: DenoisingClock, times: list[Any]) -> list[tuple[int, int]]:
    found = []
    for time in times:
        clock.model(torch.zeros(1), time)
        moment = clock.now()
        found.append((moment.step, moment.branch))
    return found


def test_steps_and_branches_follow_the_timestep() -> None:
    with DenoisingClock(Denoiser()) as clock:
        assert steps_of(clock, [1000, 1000, 700, 700, 3, 3]) == [
            (0, 0),
            (0, 1),
            (1, 0),
            (1, 1),
            (2, 0),
            (2, 1),
        ]
        assert clock.moment == Moment(2, 1, 3.0)
        assert steps_of(clock, [1000, 700]) == [(0, 0), (1, 0)]
        assert clock.generations == 2


def test_a_rising_timestep_is_told_too() -> None:
    with DenoisingClock(Denoiser()) as clock:
        times = [torch.tensor([t, t]) for t in (0.0, 0.3, 0.9, 0.0, 0.5)]
        assert [step for step, _ in steps_of(clock, times)] == [0, 1, 2, 0, 1]


def test_restarts_are_announced_before_the_model_runs() -> None:
    model, seen = Denoiser(), []
    with DenoisingClock(model) as clock:
        clock.on_restart(lambda: seen.append(clock.now().timestep))
        steps_of(clock, [5, 3, 5, 3])
        clock.reset()
        steps_of(clock, [3])
    assert seen == [5, 5, 3]
    model(torch.zeros(1), 9)
    assert clock.now().timestep == 3, "the hook is gone"


def test_models_without_timesteps_count_calls() -> None:
    model = nn.Linear(2, 2)
    with DenoisingClock(model, steps=3) as clock:
        steps = []
        for _ in range(5):
            model(torch.zeros(1, 2))
            steps.append(clock.now().step)
    assert steps == [0, 1, 2, 0, 1]
    assert not model._forward_pre_hooks


def test_errors_say_what_to_do() -> None:
    with pytest.raises(ValueError, match="steps: expected at least 1"):
        DenoisingClock(nn.Linear(1, 1), steps=0)
    clock = DenoisingClock(nn.Linear(1, 1))
    with pytest.raises(RuntimeError, match="not called yet"):
        clock.now()
    with clock, pytest.raises(RuntimeError, match="runs already"):
        clock.__enter__()
