"""Euler's steps along a velocity: the grid of diffusers' scheduler, guidance, rows on their own."""

from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attending.diffusion import FlowStep, noise_levels, sample_flow

CONDITION = torch.linspace(-1, 1, 12, dtype=torch.float32).reshape(2, 3, 2)
SHAPE = (2, 3, 4, 5)


def velocity(hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Any:
    """Nonlinear in everything that a model is given."""
    told = encoder_hidden_states.mean((1, 2))[:, None, None, None, None]
    level = timestep[:, None, None, None, None] / 1000
    return SimpleNamespace(sample=torch.tanh(hidden_states + told) * (1 + level))


@pytest.mark.parametrize(("steps", "shift"), [(1, 1.0), (5, 1.0), (20, 3.0), (7, 0.5)])
def test_every_step_is_that_of_the_scheduler_of_diffusers(steps: int, shift: float) -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    sigmas = torch.linspace(1, 1 / steps, steps, dtype=torch.float64).numpy()
    scheduler.set_timesteps(sigmas=sigmas)
    torch.testing.assert_close(noise_levels(steps, shift).float(), scheduler.sigmas)

    seen: list[FlowStep] = []
    sample = sample_flow(
        velocity, CONDITION, shape=SHAPE, steps=steps, shift=shift, seed=3, on_step=seen.append
    )
    expected = seen[0].sample
    for step, timestep in zip(seen, scheduler.timesteps, strict=True):
        torch.testing.assert_close(step.sample, expected, atol=1e-5, rtol=1e-5)
        assert 1000 * step.level == pytest.approx(float(timestep), rel=1e-6)
        found = velocity(expected, timestep.expand(2), CONDITION).sample
        expected = scheduler.step(found, timestep, expected, return_dict=False)[0]
    torch.testing.assert_close(sample, expected, atol=1e-5, rtol=1e-5)
    assert [step.index for step in seen] == list(range(steps))
    assert [step.next_level for step in seen] == [*(step.level for step in seen[1:]), 0.0]


@settings(max_examples=25, deadline=None)
@given(steps=st.integers(1, 40), shift=st.floats(0.1, 10))
def test_a_straight_flow_is_followed_exactly(steps: int, shift: float) -> None:
    """If the model knows the data, its velocity is constant along the way and no step errs."""
    data = torch.linspace(-1, 1, 24).reshape(1, 1, 1, 4, 6)

    def model(hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        return (hidden_states - data) / (timestep[:, None, None, None, None] / 1000)

    levels = noise_levels(steps, shift)
    assert (levels[0], levels[-1]) == (1, 0)
    assert (levels.diff() < 0).all()
    sample = sample_flow(model, CONDITION, shape=data.shape[1:], steps=steps, shift=shift)
    torch.testing.assert_close(sample, data.expand_as(sample), atol=1e-4, rtol=1e-4)


def test_rows_do_not_depend_on_their_neighbours() -> None:
    both = sample_flow(velocity, CONDITION, shape=SHAPE, steps=3, seed=5)
    for row in range(2):
        alone = sample_flow(velocity, CONDITION[row : row + 1], shape=SHAPE, steps=3, seed=5 + row)
        torch.testing.assert_close(alone[0], both[row])
    swapped = sample_flow(velocity, CONDITION.flip(0), shape=SHAPE, steps=3, seed=[6, 5])
    torch.testing.assert_close(swapped.flip(0), both)
    assert not torch.equal(both[0], both[1])


def test_guidance_calls_with_and_without_in_their_contexts() -> None:
    told: list[tuple[str, float, float]] = []

    class Model:
        name = ""

        @contextmanager
        def cache_context(self, name: str) -> Any:
            self.name = name
            yield
            self.name = ""

        def __call__(self, **inputs: Tensor) -> Tensor:
            condition = float(inputs["encoder_hidden_states"].mean())
            told.append((self.name, float(inputs["timestep"][0]), condition))
            return torch.full_like(inputs["hidden_states"], condition)

    one = torch.ones(1, 2, 3)
    settings: dict[str, Any] = {"shape": SHAPE, "steps": 2, "shift": 1.0}
    noise: list[FlowStep] = []
    out = sample_flow(
        Model(),
        2 * one,
        unconditional=one,
        guidance_scale=3.0,
        on_step=noise.append,
        **settings,
    )
    assert told == [
        ("cond", 1000.0, 2.0),
        ("uncond", 1000.0, 1.0),
        ("cond", 500.0, 2.0),
        ("uncond", 500.0, 1.0),
    ]
    torch.testing.assert_close(out, noise[0].sample - (1 + 3 * (2 - 1)))
    told.clear()
    sample_flow(Model(), one, unconditional=one, **settings)
    assert [name for name, _, _ in told] == ["cond", "cond"]


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="steps: expected at least 1, got 0"):
        sample_flow(velocity, CONDITION, shape=SHAPE, steps=0)
    with pytest.raises(ValueError, match="shift: expected a positive number, got 0"):
        noise_levels(3, 0)
    with pytest.raises(ValueError, match=r"shape: expected \(channels, frames, height, width\)"):
        sample_flow(velocity, CONDITION, shape=(2, *SHAPE))
    with pytest.raises(ValueError, match=r"expected \[batch, tokens, dim\]"):
        sample_flow(velocity, CONDITION[0], shape=SHAPE)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no condition for guidance_scale 2"):
        sample_flow(velocity, CONDITION, shape=SHAPE, guidance_scale=2.0)
    with pytest.raises(ValueError, match="finite number"):
        sample_flow(velocity, CONDITION, shape=SHAPE, guidance_scale=float("nan"))
    with pytest.raises(ValueError, match="one row, or as many as conditions"):
        sample_flow(
            velocity,
            CONDITION,
            shape=SHAPE,
            guidance_scale=2.0,
            unconditional=torch.zeros(3, 3, 2),
        )
    with pytest.raises(ValueError, match="one seed for each of the 2 rows, got 1"):
        sample_flow(velocity, CONDITION, shape=SHAPE, seed=[1])
    with pytest.raises(ValueError, match="evaluation mode"):
        sample_flow(torch.nn.Linear(1, 1), CONDITION, shape=SHAPE)
    with pytest.raises(ValueError, match="velocity of the sample's shape"):
        sample_flow(lambda **inputs: inputs["timestep"], CONDITION, shape=SHAPE)
