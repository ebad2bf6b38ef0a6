"""Phased and multistep consistency: golden vectors of the official solver, and invariants."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attending.diffusion import noise_levels
from attending.losses.multistep_consistency import (
    NoiseLevel,
    cosine_level,
    ddim_step,
    inverse_ddim_step,
    multistep_consistency_target,
)
from attending.losses.phased_consistency import (
    PhasedConsistencySolver,
    phase_start,
    phased_consistency_loss,
    pseudo_huber,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "efficient-vdit" / "phased_consistency.npz"


def flow_sigmas(train_steps: int, shift: float = 1.0) -> torch.Tensor:
    return noise_levels(train_steps, shift)[:-1].flip(0)


STEPS_AND_PHASES = st.integers(1, 30).flatmap(
    lambda steps: st.tuples(st.just(steps), st.integers(1, steps))
)


def test_golden_vectors_of_the_official_solver():
    vectors = np.load(GOLDEN)
    tensor = {name: torch.from_numpy(vectors[name]) for name in vectors if vectors[name].ndim}
    sigmas = flow_sigmas(int(vectors["num_train_timesteps"]), float(vectors["shift"]))
    steps, phases = int(vectors["euler_timesteps"]), int(vectors["phases"])
    solver = PhasedConsistencySolver(sigmas, steps, phases)
    index, x, v = tensor["index"], tensor["x"], tensor["v"]
    before = solver.step(x, v, index)
    found = {
        "sigmas": solver.sigmas,
        "sigmas_prev": solver.sigmas_previous,
        "x_prev": before,
        "student_pred": solver.jump(x, v, index),
        "target_pred": solver.jump(before, v, index, after_step=True),
    }
    for name, value in found.items():
        torch.testing.assert_close(value, tensor[name], rtol=0, atol=1e-12)
    assert torch.equal(solver.edge_of(index), tensor["end_index"])


@given(STEPS_AND_PHASES)
def test_phases(steps_and_phases):
    steps, phases = steps_and_phases
    index = torch.arange(steps)
    start = phase_start(index, steps, phases)
    naive = [max(p * steps // phases for p in range(phases) if p * steps // phases <= i)
             for i in range(steps)]  # fmt: skip
    assert start.tolist() == naive
    assert len(set(naive)) == phases
    assert phase_start(index, steps, 1).tolist() == [0] * steps
    assert phase_start(index, steps, steps).tolist() == index.tolist()


@given(STEPS_AND_PHASES, st.floats(0.5, 8.0), st.integers(1, 4))
def test_on_a_straight_path_student_and_target_agree(steps_and_phases, shift, per_step):
    steps, phases = steps_and_phases
    solver = PhasedConsistencySolver(flow_sigmas(steps * per_step, shift), steps, phases)
    index = torch.arange(steps)
    data, noise = torch.randn(2, steps, 2, 3, dtype=torch.float64).unbind(0)
    loss = phased_consistency_loss(
        solver,
        data,
        noise,
        index,
        student=lambda x, sigma: noise - data,
        teacher=lambda x, sigma: noise - data,
    )
    assert 0 <= loss.item() < 1e-12
    noisy = solver.add_noise(data, noise, index)
    edge = solver.sigmas_previous[solver.edge_of(index)][:, None, None]
    torch.testing.assert_close(
        solver.jump(noisy, noise - data, index), edge * noise + (1 - edge) * data
    )


def test_the_loss_is_its_definition_and_only_the_student_learns():
    torch.manual_seed(1)
    solver = PhasedConsistencySolver(flow_sigmas(40, 3.0), 10, 2)
    weights = [torch.randn(3, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    data, noise = torch.randn(2, 4, 3, dtype=torch.float64).unbind(0)
    index = torch.tensor([0, 4, 5, 9])

    def model(weight):
        return lambda x, sigma: x @ weight * sigma[:, None]

    student, teacher, average = (model(weight) for weight in weights)
    loss = phased_consistency_loss(
        solver, data, noise, index, student=student, teacher=teacher, average=average, c=0.1
    )
    total = torch.zeros((), dtype=torch.float64)
    for n, i in enumerate(index.tolist()):
        here, before = solver.sigmas[i], solver.sigmas_previous[i]
        end = solver.sigmas_previous[5 if i >= 5 else 0]
        x = here * noise[n] + (1 - here) * data[n]
        x_before = x + (before - here) * (x @ weights[1] * here)
        found = x + (end - here) * (x @ weights[0] * here)
        wanted = x_before + (end - before) * (x_before @ weights[2] * before)
        total = total + (((found - wanted.detach()) ** 2 + 0.01) ** 0.5 - 0.1).sum()
    torch.testing.assert_close(loss, total / 12)
    expected = torch.autograd.grad(total / 12, weights[0])[0]
    loss.backward()
    torch.testing.assert_close(weights[0].grad, expected)
    assert weights[1].grad is None
    assert weights[2].grad is None


def test_pseudo_huber_is_a_square_near_and_a_distance_far():
    near, far = torch.tensor([1e-4], dtype=torch.float64), torch.tensor([50.0])
    assert pseudo_huber(near, near * 0, c=1.0).item() == pytest.approx(1e-8 / 2, rel=1e-6)
    assert pseudo_huber(far, far * 0, c=0.001).item() == pytest.approx(50 - 0.001, rel=1e-6)
    assert pseudo_huber(far, far).item() == 0.0


def test_ddim_steps_have_an_inverse_and_stay_on_the_path():
    torch.manual_seed(2)
    clean, noise = torch.randn(2, 5, 3, dtype=torch.float64).unbind(0)
    t = torch.tensor([1.0, 0.9, 0.5, 0.3, 0.1], dtype=torch.float64)
    s = t * torch.tensor([0.0, 0.9, 0.1, 0.5, 0.99], dtype=torch.float64)
    at, to = cosine_level(t), cosine_level(s)
    torch.testing.assert_close(at.alpha**2 + at.sigma**2, torch.ones_like(t))

    def on_path(level: NoiseLevel):
        return level.alpha[:, None] * clean + level.sigma[:, None] * noise

    reached = ddim_step(on_path(at), clean, at, to)
    torch.testing.assert_close(reached, on_path(to))
    torch.testing.assert_close(inverse_ddim_step(on_path(at), reached, at, to), clean)


@given(STEPS_AND_PHASES)
def test_an_exact_model_is_its_own_target(steps_and_phases):
    steps, segments = steps_and_phases
    clean, noise = torch.randn(2, steps, 3, dtype=torch.float64).unbind(0)
    index = torch.arange(steps)
    level = cosine_level((index + 1).double() / steps)
    noisy = level.alpha[:, None] * clean + level.sigma[:, None] * noise
    target = multistep_consistency_target(
        noisy,
        index,
        student=lambda z, time: clean,
        teacher=lambda z, time: clean,
        steps=steps,
        segments=segments,
    )
    torch.testing.assert_close(target, clean, rtol=1e-8, atol=1e-8)


def test_as_many_segments_as_steps_is_the_teacher_and_one_is_consistency_distillation():
    torch.manual_seed(3)
    steps, index = 6, torch.arange(6)
    noisy = torch.randn(6, 3, dtype=torch.float64)
    weights = torch.randn(2, 3, 3, dtype=torch.float64, requires_grad=True)

    def student(z, time):
        return z @ weights[0] + time[:, None]

    def teacher(z, time):
        return z @ weights[1] - time[:, None]

    def target(segments):
        return multistep_consistency_target(
            noisy, index, student=student, teacher=teacher, steps=steps, segments=segments
        )

    t = (index + 1).double() / steps
    assert not target(1).requires_grad
    torch.testing.assert_close(target(steps), teacher(noisy, t).detach())
    found = target(1)
    for i in range(1, steps):
        angle, after = (math.pi / 2 * j / steps for j in (i + 1, i))
        x = teacher(noisy[i : i + 1], t[i : i + 1])
        ratio = math.sin(after) / math.sin(angle)
        z = math.cos(after) * x + ratio * (noisy[i] - math.cos(angle) * x)
        x = student(z, t[i : i + 1] - 1 / steps)  # its jump ends at time 0: at x itself
        torch.testing.assert_close(found[i : i + 1], x.detach())


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match="sigmas: expected noise levels that ascend"):
        PhasedConsistencySolver(flow_sigmas(10).flip(0), 5, 1)
    with pytest.raises(ValueError, match="steps: expected a divisor of the 10"):
        PhasedConsistencySolver(flow_sigmas(10), 3, 1)
    with pytest.raises(ValueError, match="phases"):
        PhasedConsistencySolver(flow_sigmas(10), 5, 6)
    with pytest.raises(ValueError, match="index"):
        PhasedConsistencySolver(flow_sigmas(10), 5, 1).edge_of(torch.tensor([5]))
    with pytest.raises(ValueError, match="c: expected"):
        pseudo_huber(torch.ones(1), torch.ones(1), 0.0)
    with pytest.raises(ValueError, match="wanted"):
        pseudo_huber(torch.ones(1), torch.ones(2))
