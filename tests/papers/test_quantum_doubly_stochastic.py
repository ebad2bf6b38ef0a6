"""The experiment of QDSFormer: its models, what it measures, and its rule."""

import math
from pathlib import Path

import pytest
import torch

from attending import papers
from attending.nn.quantum_circuit import CircuitMap
from attending.papers import _quantum_doubly_stochastic_training as training
from attending.papers.quantum_doubly_stochastic import RULE, settings

SETTINGS = settings("smoke")
NAMES = SETTINGS["variants"]["1"]


@pytest.mark.parametrize("name", NAMES)
def test_the_maps_that_are_measured_are_those_of_the_model(name: str) -> None:
    torch.manual_seed(0)
    blocks = [training.Block(16, *training.normalizer(name, 16, 1)) for _ in range(2)]
    model = training.Classifier(16, blocks)
    images = torch.randn(5, 8, 8)
    with torch.no_grad():
        before = model(images)
        maps = training.maps_of(model, images)
        torch.testing.assert_close(model(images), before)
        # Of the first block, by hand.
        attention = blocks[0].attention
        hidden = blocks[0].first(model.embed(images) + model.positions)
        raw = attention.q_proj(hidden) @ attention.k_proj(hidden).mT
        function, scale = training.normalizer(name, 16, 1)
        if isinstance(function, CircuitMap):
            return  # its theta is random, so this is another circuit
        torch.testing.assert_close(maps[:5, 0], function(raw * scale).double())
    assert maps.shape == (10, 1, 8, 8)
    torch.testing.assert_close(maps.sum(-1), torch.ones(10, 1, 8).double(), atol=1e-5, rtol=0)


def test_models_differ_in_their_normalizer_only() -> None:
    states = []
    for name in NAMES:
        function, scale = training.normalizer(name, 16, 1)
        torch.manual_seed(1)
        model = training.Classifier(16, [training.Block(16, function, scale)])
        states.append(dict(model.named_parameters()))
    for state in states[1:]:
        assert state.keys() == states[0].keys()
        assert all(torch.equal(tensor, states[0][key]) for key, tensor in state.items())


def test_distinct_maps_by_hand() -> None:
    found = training.distinct_maps({"grid_entries": 4, "grid_layers": 2}, seed=0)
    # Of the 16 first rows, all 1 and all -1 are the same to softmax.
    assert found["softmax"] == 15 / 16
    assert 1 / 16 < found["circuit"] <= 1.0
    assert found["qr"] < found["sinkhorn"] <= 1.0


def test_the_digits() -> None:
    images, labels = training.digits()
    assert images.shape == (1797, 8, 8)
    assert abs(float(images.mean())) < 1e-5
    assert set(labels.tolist()) == set(range(10))


def numbers(**changes: object) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {
        "distinct_circuit": [1.0] * 3,
        "distinct_sinkhorn": [0.5] * 3,
        "distinct_qr": [0.1] * 3,
        "accuracy_1_circuit_4": [90.0, 90.0, 90.0],
        "accuracy_1_softmax": [80.0, 90.0, 90.0],
        "accuracy_2_circuit_4": [95.0] * 3,
        "accuracy_2_softmax": [94.0] * 3,
        "accuracy_2_sinkhorn_21": [94.0] * 3,
    }
    for name, value in changes.items():
        found[name] = value if isinstance(value, list) else [float(str(value))] * 3
    return found


def test_the_rule() -> None:
    judge = RULE.judge
    assert judge(numbers()) == "held"
    assert judge(numbers(accuracy_2_sinkhorn_21=96.0)) == "held in direction"
    assert judge(numbers(accuracy_1_circuit_4=[80.0, 70.0, 90.0])) == "held in direction"
    assert judge(numbers(accuracy_2_softmax=[94.0, 94.0, 95.0])) == "held in direction"
    assert judge(numbers(accuracy_2_softmax=95.5)) == "did not hold"
    assert judge(numbers(distinct_sinkhorn=[0.5, 1.0, 0.5])) == "did not hold"
    assert judge(numbers(distinct_circuit=0.99)) == "did not hold"
    assert judge(numbers(accuracy_2_circuit_4=[math.nan, 95.0, 95.0])) == "did not hold"


def test_smoke(tmp_path: Path) -> None:
    state = torch.random.get_rng_state()
    summary = papers.reproduce("quantum-doubly-stochastic", out_dir=tmp_path, picture=False)
    assert torch.equal(torch.random.get_rng_state(), state)
    measured = summary.measurements
    for name in NAMES:
        assert 10 < measured[f"accuracy_1_{name}"].mean < 90
    assert measured["distance_circuit_4"].mean < 1e-4 < measured["distance_softmax"].mean
    assert measured["distance_sinkhorn_21"].mean < measured["distance_sinkhorn_3"].mean
