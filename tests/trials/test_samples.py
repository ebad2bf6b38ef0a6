"""Averages, spreads and paired changes, against numbers by hand and against statistics."""

import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attending.trials.samples import Average, Samples, change, estimate

AVERAGES: list[Average] = ["mean", "geometric mean", "median"]
positive = st.lists(st.floats(0.1, 10), min_size=2, max_size=9)


@given(positive)
def test_a_mean_has_the_standard_error_of_statistics(values: list[float]) -> None:
    found = estimate(Samples(tuple(values)), "mean")
    assert found.value == pytest.approx(statistics.mean(values))
    expected = statistics.stdev(values) / math.sqrt(len(values))
    assert found.spread == pytest.approx(expected, abs=1e-9)


@given(positive)
def test_equal_weights_are_no_weights(values: list[float]) -> None:
    plain = estimate(Samples(tuple(values)), "mean")
    weighted = estimate(Samples(tuple(values), (7.0,) * len(values)), "mean")
    assert weighted.value == pytest.approx(plain.value)
    assert weighted.spread == pytest.approx(plain.spread, abs=1e-12)


def test_weights() -> None:
    found = estimate(Samples((1.0, 4.0), (3.0, 1.0)), "mean")
    assert found.value == pytest.approx(7 / 4)
    # deviations -3/4 and 9/4, times weights: -9/4 and 9/4
    assert found.spread == pytest.approx(math.sqrt(2 * 2 * (9 / 4) ** 2) / 4)


def test_a_geometric_mean_of_perplexities_is_the_perplexity_of_all_tokens() -> None:
    losses, tokens = (1.0, 3.0), (30.0, 10.0)
    samples = Samples(tuple(map(math.exp, losses)), tokens)
    assert estimate(samples, "geometric mean").value == pytest.approx(math.exp(60 / 40))


def test_a_median_and_half_the_range() -> None:
    found = estimate(Samples((5.0, 1.0, 2.0)), "median")
    assert (found.value, found.spread) == (2.0, 2.0)


@pytest.mark.parametrize("average", AVERAGES)
def test_one_sample_has_no_spread(average: Average) -> None:
    found = estimate(Samples((3.0,)), average)
    assert found.value == pytest.approx(3.0)
    assert found.spread is None


@given(positive)
def test_against_itself_nothing_changed(values: list[float]) -> None:
    samples = Samples(tuple(values))
    for average in AVERAGES:
        found = change(samples, samples, average)
        assert found is not None
        assert found.value == pytest.approx(0.0 if average == "mean" else 1.0)
        assert found.spread == pytest.approx(0.0, abs=1e-12)


def test_changes_are_paired() -> None:
    """A constant change has no spread, however far the samples are apart."""
    plain = Samples((1.0, 10.0, 100.0))
    more = Samples(tuple(value + 2 for value in plain.values))
    found = change(more, plain, "mean")
    assert found is not None
    assert (found.value, found.spread) == (pytest.approx(2.0), pytest.approx(0.0, abs=1e-12))
    for average in ("geometric mean", "median"):
        found = change(Samples(tuple(2 * v for v in plain.values)), plain, average)
        assert found is not None
        assert (found.value, found.spread) == (pytest.approx(2.0), pytest.approx(0.0, abs=1e-12))


def test_what_cannot_be_paired() -> None:
    assert change(Samples((1.0,)), Samples((1.0, 2.0)), "mean") is None


def test_infinities_stay_what_they_are() -> None:
    endless = Samples((math.inf, 2.0))
    assert estimate(endless, "geometric mean").value == math.inf
    found = change(endless, Samples((1.0, 0.0)), "median")
    assert found is not None
    assert found.value == math.inf
