"""Schedules of feature caches, against the golden vectors and what the papers report."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attending.interventions.cache_schedule import (
    CacheSchedule,
    DecreasingSteps,
    FixedSteps,
    UniformSteps,
    block_calls,
    runs_of,
)
from attending.interventions.drift_schedule import DriftSteps

GOLDEN = Path(__file__).parents[1] / "golden" / "profiling-dit"
OFFICIAL = (6, 18, 26, 32, 38, 42, 46, 48)


def test_the_greedy_rule_gives_the_list_of_the_card() -> None:
    assert DecreasingSteps(50).chosen == (6, 18, 27, 34, 39, 43, 46, 48)


def test_block_counts_of_the_paper() -> None:
    """The speed-up by counting blocks is what the paper measured: 1.87x and 2.01x."""
    stepwise = FixedSteps(OFFICIAL, warmup=6).computed(50)
    every_sixth = UniformSteps(6, warmup=6).computed(50)
    double = block_calls(every_sixth, 50, blocks=20, cached=14)
    single = block_calls(stepwise, 50, blocks=40, cached=24)
    assert round(50 * 60 / (double + single), 3) == 1.838
    assert round(50 * 40 / block_calls(every_sixth, 50, blocks=40, cached=28), 3) == 2.016


def test_teacache_against_the_golden_vectors() -> None:
    golden = np.load(GOLDEN / "teacache_a.npz")
    schedule = DriftSteps(
        float(golden["threshold"]),
        tuple(golden["coefficients"].tolist()),
        warmup=int(golden["ret_steps"]),
        until=int(golden["cutoff_steps"]),
    )
    decide = schedule.start()
    for step, signal in enumerate(torch.from_numpy(golden["modulated_inputs"])):
        assert decide(step, signal) == golden["should_compute"][step]
        assert abs(decide.accumulated - golden["accumulated"][step]) <= 1e-12


def test_a_polynomial_has_its_highest_power_first() -> None:
    decide = DriftSteps(10.0, (2.0, 3.0, 0.5)).start()
    decide(0, torch.ones(4))
    decide(1, torch.full((4,), 1.5))
    assert decide.drift == 0.5
    assert decide.accumulated == 2 * 0.25 + 3 * 0.5 + 0.5


def test_drift_from_nothing_is_computed() -> None:
    decide = DriftSteps(1.0).start()
    assert decide(0, torch.zeros(3))
    assert not decide(1, torch.zeros(3))
    assert decide(2, torch.ones(3))


@given(st.integers(1, 60), st.integers(0, 10), st.floats(1, 15), st.floats(1, 15), st.booleans())
def test_decreasing_gaps(steps: int, warmup: int, one: float, other: float, inverse: bool) -> None:
    if warmup >= steps:
        return
    longest, shortest = max(one, other), min(one, other)
    chosen = DecreasingSteps(steps, warmup, longest, shortest, inverse=inverse).chosen
    gaps = np.diff(chosen)
    assert chosen[0] == warmup
    assert chosen[-1] < steps
    assert (gaps >= 1).all()
    # The last gap ends with the generation, so in the mirror it is the first.
    inner = gaps[1:] if inverse else gaps
    assert (np.diff(inner) * (1 if inverse else -1) >= 0).all()
    assert len(chosen) == len(DecreasingSteps(steps, warmup, longest, shortest).chosen)


SCHEDULES = st.one_of(
    st.builds(FixedSteps, st.lists(st.integers(0, 30)).map(tuple), st.integers(0, 8)),
    st.builds(UniformSteps, st.integers(1, 9), st.integers(0, 8)),
    st.builds(DecreasingSteps, st.integers(9, 40), st.integers(0, 8)),
)


@given(SCHEDULES, st.integers(1, 40))
def test_the_warmup_and_the_step_after_it_are_computed(
    schedule: FixedSteps | UniformSteps | DecreasingSteps, total: int
) -> None:
    assert isinstance(schedule, CacheSchedule)
    first = range(min(total, schedule.warmup + 1))
    assert set(first) <= set(schedule.computed(total))


@given(st.sets(st.integers(0, 30)))
def test_runs_are_maximal_and_hold_all(blocks: set[int]) -> None:
    runs = runs_of(blocks)
    assert {block for first, last in runs for block in range(first, last + 1)} == blocks
    assert all(later[0] > earlier[1] + 1 for earlier, later in itertools.pairwise(runs))


@pytest.mark.parametrize(
    "make",
    [
        lambda: UniformSteps(0),
        lambda: UniformSteps(2, warmup=-1),
        lambda: FixedSteps((3, -1)),
        lambda: DecreasingSteps(6, warmup=6),
        lambda: DecreasingSteps(50, longest=2, shortest=3),
        lambda: DriftSteps(-0.1),
        lambda: DriftSteps(0.1, ()),
        lambda: DriftSteps(0.1, warmup=0),
        lambda: DriftSteps(0.1).start()(0),
    ],
)
def test_what_cannot_be_is_refused(make: object) -> None:
    assert callable(make)
    with pytest.raises(ValueError, match="expected"):
        make()
