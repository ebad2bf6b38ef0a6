"""Each finding on both sides of its threshold."""

import math
from typing import Any

import numpy as np
import pytest

from attending.diagnosis import Thresholds
from attending.diagnosis.findings import find
from attending.diagnosis.findings.structure import repetition
from attending.diagnosis.record import Finding, HiddenRecord, LayerRecord, TopKey

TOKEN = TopKey("the", 3, 0, 0.5)


def layer(number: int = 0, heads: int = 2, **statistics: list[float]) -> LayerRecord:
    return LayerRecord(
        name=f"layers.{number}.attention",
        layer=number,
        kind="self",
        is_causal=False,
        head_dim=8,
        statistics={"entropy": [2.0] * heads} | statistics,
        top_keys=[[TOKEN]] * heads,
        longest=64,
    )


def block(number: int = 0, **changed: Any) -> HiddenRecord:
    values: dict[str, Any] = {
        "token_similarity": 0.3, "effective_rank": 20.0, "max_abs": 9.0, "median_abs": 0.5,
        "mean_abs": 0.7, "max_token": "[CLS]", "max_position": 0, "max_channel": 7,
    }  # fmt: skip
    return HiddenRecord(name=f"layers.{number}", layer=number, **(values | changed))


def kinds(
    layers: list[LayerRecord], hidden: list[HiddenRecord] | None = None, **thresholds: float
) -> dict[str, Finding]:
    found = find(layers, hidden or [], Thresholds(**thresholds))
    for finding in found:
        assert finding.evidence
        assert finding.threshold
        assert finding.source
        assert "{" not in finding.summary
    return {finding.kind: finding for finding in found}


def quiet() -> LayerRecord:
    """Entropies so spread out that nothing is to be said of them."""
    return layer(heads=4, entropy=[1.0, 2.0, 2.5, 4.0])


def test_nothing_found() -> None:
    assert kinds([quiet()], [block()]) == {}
    assert find([], [], Thresholds()) == []


def test_collapsed() -> None:
    heads = layer(entropy=[1.0, 4.0, 2.0, 0.5], heads=4, normalized_entropy=[0.1, 0.9, 0.5, 0.09])
    finding = kinds([heads])["collapsed"]
    assert [(e.where, e.head) for e in finding.evidence] == [("layers.0.attention", 3)]
    assert finding.severity == "info"
    assert "1 of 4 heads, in 1 of 1 layer," in finding.summary
    assert "“the”" in finding.evidence[0].text
    assert "collapsed" not in kinds([heads], collapsed_entropy=0.09)
    assert kinds([heads], collapsed_share=0.25)["collapsed"].severity == "warning"


def test_overloaded() -> None:
    even = layer(heads=4, entropy=[4.0, 3.0, 2.9, 1.0], normalized_entropy=[0.96, 0.95, 0.5, 0.3])
    finding = kinds([even])["overloaded"]
    assert [e.head for e in finding.evidence] == [0]
    assert finding.severity == "warning"  # 2 of 4 lie in the top quarter
    calm = kinds([even], overloaded_share=0.5)["overloaded"]
    assert calm.severity == "info"
    assert "overloaded" not in kinds([even], overloaded_share=0.5, uniform_entropy=0.97)
    only_crowded = kinds([layer(heads=4, entropy=[4.0, 3.0, 2.9, 1.0])])["overloaded"]
    assert [e.head for e in only_crowded.evidence] == [0, 1]


def test_sinks_are_told_by_key() -> None:
    layers = []
    for number in range(4):
        one = layer(number, heads=4, entropy=[1, 2, 2.5, 4.0], sink=[0.9, 0.5, 0.31, 0.3])
        one.strong_keys = {"[SEP]": [0.9, 0.5, 0, 0], ".": [0, 0, 0.3, 0.2], ",": [0, 0, 0, 0.1]}
        layers.append(one)
    found = find(layers, [], Thresholds())
    assert [finding.title for finding in found] == [
        "Attention sink: “[SEP]”",
        "Attention sink: “.”",
    ]
    assert [len(finding.evidence) for finding in found] == [8, 4]
    assert [finding.severity for finding in found] == ["warning", "info"]
    assert "8 of 16 heads, in 4 of 4 layers, give it 70%" in found[0].summary
    layers[0].longest = 15
    assert sum(len(f.evidence) for f in find(layers, [], Thresholds())) == 9
    assert find(layers, [], Thresholds(sink_importance=0.9)) == []


def test_keys_of_single_heads_share_a_finding() -> None:
    one = layer(heads=8, entropy=[1, 1, 1, 1, 1, 2, 2, 4.0], sink=[0.5] * 8)
    one.strong_keys = {f"k{i}": [0.5 * (i == head) for head in range(8)] for i in range(8)}
    found = find([one], [], Thresholds())
    assert [len(finding.evidence) for finding in found] == [1, 7]
    assert found[1].title == "Attention sinks: other keys"


def test_oversmoothing() -> None:
    blocks = [block(0), block(1, token_similarity=0.95), block(2, token_similarity=0.9)]
    finding = kinds([], blocks)["oversmoothing"]
    assert [(e.where, e.value) for e in finding.evidence] == [("layers.1", 0.95)]
    assert finding.severity == "info"
    last = kinds([], blocks, oversmoothing_similarity=0.89)["oversmoothing"]
    assert last.severity == "warning"
    assert "0.30 after the first block and 0.90 after the last" in last.summary


@pytest.mark.parametrize(
    ("largest", "median", "massive"),
    [(101, 0.1, True), (100, 0.05, False), (500, 0.5, False), (501, 0.5, True), (50, 0.001, False)],
)
def test_massive_activations(largest: float, median: float, massive: bool) -> None:
    found = kinds([], [block(max_abs=largest, median_abs=median)])
    assert ("massive" in found) == massive
    if massive:
        assert "channel 7" in found["massive"].summary
        assert "“[CLS]” (token 0)" in found["massive"].evidence[0].text


def test_duplicates_are_told_once() -> None:
    one = quiet()
    one.similarity = np.array(
        [[1, 0.96, 0.1, 0.95], [0.96, 1, 0, 0], [0.1, 0, 1, 0.99], [0.95, 0, 0.99, 1]]
    ).tolist()
    finding = kinds([one])["duplicates"]
    assert [(e.head, e.text) for e in finding.evidence] == [
        (2, "like head 3: CKA 0.990"),
        (0, "like head 1: CKA 0.960"),
    ]
    assert "2 pairs of heads, 4 heads in all" in finding.summary


@pytest.mark.parametrize(
    ("kind", "statistic", "values", "found"),
    [
        ("local", "local_mass", [0.9, 0.8, 0.81, 0.1], [0, 2]),
        ("block_sparse", "block_density", [0.3, 0.35, 0.9, 0.1], [3, 0]),
    ],
)
def test_structure(kind: str, statistic: str, values: list[float], found: list[int]) -> None:
    one = quiet()
    one.statistics[statistic] = values
    assert kind not in kinds([one])  # without a map there is no structure
    one.pooled = np.full((4, 16, 16), 1 / 16).tolist()
    assert [e.head for e in kinds([one])[kind].evidence] == found
    assert kind not in kinds([one], min_buckets=17)
    one.kind = "cross"
    assert kind not in kinds([one])


def tiled(size: int, period: int, noise: float = 0.0) -> np.ndarray:
    at = np.arange(size)
    distance = np.abs((at[:, None] - at) % period)
    logits = -2.0 * np.minimum(distance, period - distance)
    logits = logits + np.random.default_rng(0).normal(0, noise, (size, size))
    weights = np.exp(logits)
    return weights / weights.sum(1, keepdims=True)


@pytest.mark.parametrize("period", [4, 6, 8, 11, 16])
def test_repetition_finds_the_period(period: int) -> None:
    found, correlation = repetition(tiled(32, period, 0.1))
    assert found == period
    assert correlation > 0.9


def test_what_is_smooth_or_uniform_does_not_repeat() -> None:
    at = np.arange(32)
    smooth = np.exp(-((at[:, None] - at) ** 2) / 400)
    assert repetition(smooth)[1] < 0.9
    assert repetition(np.full((32, 32), 1 / 32)) == (0, 0.0)
    assert repetition(np.random.default_rng(0).random((32, 32)))[1] < 0.5
    sink = np.full((32, 32), 0.01)
    sink[:, 0] = 0.7
    assert repetition(sink)[1] < 0.9


def test_tiles() -> None:
    one = quiet()
    one.pooled = [tiled(16, 4).tolist(), *np.full((3, 16, 16), 1 / 16).tolist()]
    finding = kinds([one])["tiles"]
    assert [(e.head, e.text) for e in finding.evidence] == [
        (0, "correlation 1.00 at 4 of 16 buckets")
    ]
    one.is_causal = True
    assert "tiles" not in kinds([one])


def test_not_finite() -> None:
    broken = layer(heads=2, entropy=[math.nan, 2.0], sink=[math.nan, 0.1])
    finding = kinds([quiet(), broken], [block(mean_abs=math.inf)])["not_finite"]
    assert finding.severity == "critical"
    assert [(e.where, e.head) for e in finding.evidence] == [
        ("layers.0.attention", 0),
        ("layers.0.attention", 0),
        ("layers.0", None),
    ]


def test_thresholds_are_numbers() -> None:
    with pytest.raises(ValueError, match=r"sink_importance: expected a number, got nan"):
        Thresholds(sink_importance=math.nan)
    with pytest.raises(ValueError, match=r"local_mass: expected a number, got 'much'"):
        Thresholds(local_mass="much")  # type: ignore[arg-type]
