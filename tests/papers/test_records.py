"""Records, reproductions and summaries: what they refuse, and that JSON gives them back."""

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from attending.papers import Figure, Reproduction, Rule, Series, Spread, Summary
from attending.papers._experiment import Experiment
from attending.papers._store import StoredRun
from attending.papers._summary import judge, summarize
from tests.papers import pi

NUMBERS = st.floats(allow_nan=True, allow_infinity=True, width=64)


def same(left: float, right: float) -> bool:
    return left == right or (math.isnan(left) and math.isnan(right))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"slug": "Pi Points"}, "slug: .*lower case"),
        ({"arxiv": "arXiv:2303.06296"}, "arxiv: .*2303.06296"),
        ({"date": "March 2023"}, "date: expected YYYY-MM"),
        ({"date": "2023-13"}, "date: expected YYYY-MM"),
        ({"figures": ()}, "figures: expected at least one"),
        ({"rule": None}, "status: pi-points is built"),
        ({"symbols": ()}, "status: pi-points is built"),
        ({"planned_symbols": ("a.b",)}, "status: pi-points is built"),
        ({"status": "planned"}, "status: a planned paper has no symbols"),
        ({"status": "started"}, "status: expected built or planned"),
    ],
)
def test_malformed_records_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(pi.PAPER, **change)


def test_unknown_evidence_is_refused() -> None:
    with pytest.raises(ValueError, match="evidence: expected one of ran, code"):
        Figure("accuracy", "99", "hearsay")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale": "huge"}, "scale: expected one of smoke, small, full"),
        ({"measurements": {}}, "measurements: expected at least one"),
        ({"settings": {"layer": object()}}, "settings: expected strings"),
        ({"settings": {"rate": math.nan}}, "settings: expected strings"),
    ],
)
def test_malformed_reproductions_are_refused(change: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"slug": "a", "scale": "small", "seed": 0, "measurements": {"x": 1.0}}
    with pytest.raises(ValueError, match=message):
        Reproduction(**(good | change))


def test_series_of_unequal_length_is_refused() -> None:
    with pytest.raises(ValueError, match=r"x, y: .*'loss', got 2 and 1"):
        Series("loss", [0, 1], [0.5])


@given(
    measurements=st.dictionaries(st.text(min_size=1), NUMBERS, min_size=1, max_size=4),
    points=st.lists(st.tuples(NUMBERS, NUMBERS), max_size=5),
    seconds=st.none() | st.floats(0, 1e6),
)
def test_reproduction_survives_json(
    measurements: dict[str, float], points: list[tuple[float, float]], seconds: float | None
) -> None:
    """Runs that diverged survive, too."""
    series = Series("curve", [x for x, _ in points], [y for _, y in points], "panel", "x", "y")
    one = Reproduction(
        slug="a-paper",
        scale="small",
        seed=3,
        measurements=measurements,
        series=[series],
        settings={"widths": (1, 2), "nested": {"rate": 0.1}},
        seconds=seconds,
    )
    back = Reproduction.from_json(one.to_json())
    assert back.measurements.keys() == one.measurements.keys()
    assert all(same(back.measurements[name], value) for name, value in measurements.items())
    assert all(map(same, back.series[0].x, series.x))
    assert all(map(same, back.series[0].y, series.y))
    assert (back.settings, back.seconds, back.seed) == (one.settings, one.seconds, 3)
    assert back.to_json() == one.to_json()


@given(st.lists(NUMBERS, min_size=1, max_size=6))
@example([1.7976931348623157e308] * 2)
@example([1.7976931348623157e308] * 3)
def test_spread_never_fails(values: list[float]) -> None:
    spread = Spread.of(values)
    if all(math.isfinite(value) for value in values):
        assert spread.lowest <= spread.highest
        assert spread.lowest == min(values)
    if any(math.isnan(value) for value in values):
        assert math.isnan(spread.mean)
        assert math.isnan(spread.highest)
    assert isinstance(spread.in_words(), str)


def test_spread_by_hand() -> None:
    spread = Spread.of([1.0, 2.0, 6.0])
    assert (spread.mean, spread.lowest, spread.highest) == (3.0, 1.0, 6.0)
    assert spread.deviation == pytest.approx(math.sqrt((4 + 1 + 9) / 2))
    assert spread.in_words() == "3 ± 2.6 [1, 6]"
    assert Spread.of([0.5]).in_words() == "0.5"
    assert Spread.of([1.0, math.inf]).mean == math.inf


def run_of(experiment: Experiment, seed: int, **measurements: float) -> StoredRun:
    found = Reproduction(
        slug="pi-points", scale="small", seed=seed, measurements=measurements, seconds=1.5
    )
    return StoredRun(experiment.fingerprint("small"), f"2026-01-0{seed + 1}T00:00:00+00:00", found)


def test_summary_by_hand_and_through_json(pi_experiment: Experiment) -> None:
    runs = [run_of(pi_experiment, 1, pi=3.0, inside=3), run_of(pi_experiment, 0, pi=4.0, inside=4)]
    summary = summarize(pi_experiment, runs, "the command")
    assert summary.seeds == (0, 1)
    assert summary.measurements["pi"].values == (4.0, 3.0)
    assert summary.measurements["pi"].mean == 3.5
    assert (summary.verdict, summary.reason) == ("held in direction", "")
    assert summary.rule == pi.PAPER.rule.words  # type: ignore[union-attr]
    assert (summary.seconds, summary.finished) == (3.0, "2026-01-02T00:00:00+00:00")
    assert Summary.from_json(summary.to_json()) == summary


def test_the_rule_decides_from_the_numbers(pi_experiment: Experiment) -> None:
    for values, verdict in (
        ((3.1, 3.2), "held"),
        ((3.1, 3.5), "held in direction"),
        ((3.1, 9.0), "did not hold"),
        ((3.1, math.nan), "did not hold"),
    ):
        runs = [run_of(pi_experiment, i, pi=v, inside=1) for i, v in enumerate(values)]
        assert summarize(pi_experiment, runs, "").verdict == verdict


def test_no_verdict_where_the_rule_does_not_apply() -> None:
    rule = Rule("always", lambda ours: "held", scales=("full",))
    verdict, reason = judge(rule, "small", {"x": [1.0]})
    assert verdict == "out of reach here"
    assert "the rule is for scale full" in reason
    assert judge(rule, "full", {"x": [1.0]}) == ("held", "")


def test_a_rule_must_give_a_verdict() -> None:
    with pytest.raises(ValueError, match=r"rule: expected one of held.*got True"):
        judge(Rule("w", lambda ours: True), "small", {"x": [1.0]})  # type: ignore[arg-type, return-value]


def test_seeds_must_measure_the_same(pi_experiment: Experiment) -> None:
    runs = [run_of(pi_experiment, 0, pi=3.0, inside=1), run_of(pi_experiment, 1, pi=3.0)]
    with pytest.raises(ValueError, match="seeds 0 and 1 differ in inside"):
        summarize(pi_experiment, runs, "")


def test_figures_must_be_measured(pi_experiment: Experiment) -> None:
    with pytest.raises(ValueError, match=r"figures of pi-points name pi, which seed 0"):
        summarize(pi_experiment, [run_of(pi_experiment, 0, inside=1)], "")
