"""The experiment of entropy-aware scaling: what it measures, and its rule."""

import pytest
import torch

from attending import zoo
from attending.papers import _variable_size_attention_scaling_text as text
from attending.papers.variable_size_attention_scaling import RULE


def test_the_text_is_read_as_the_model_reads_it() -> None:
    (found,) = text.run(0, ("none",), (8, 24), texts=2).values()
    loaded = zoo.load("llama-stdlib")
    ids = text._texts(0, loaded, 24, 2)
    assert ids.shape == (2, 24)
    with torch.no_grad():
        log = loaded.model(ids).logits.log_softmax(-1)[:, :-1]
    nats = -log.gather(-1, ids[:, 1:, None]).squeeze(-1)
    assert found.nats[0] == pytest.approx(float(nats[:, :7].mean()), rel=1e-4)
    assert found.nats[1] == pytest.approx(float(nats[:, 7:].mean()), rel=1e-4)
    assert not torch.equal(text._texts(1, loaded, 24, 2), ids)
    with pytest.raises(ValueError, match="texts: expected at most"):
        text._texts(0, loaded, 24, 1000)


def numbers(**changes: float) -> dict[str, list[float]]:
    plain = {
        "drift_none": 0.04,
        "drift_normalized": 0.01,
        "accuracy_off_size_none": 0.7,
        "accuracy_off_size_normalized": 0.75,
        "nats_beyond_none": 2.5,
        "nats_beyond_normalized": 2.4,
    }
    return {name: [value] * 3 for name, value in (plain | changes).items()}


def test_the_rule() -> None:
    judge = RULE.judge
    assert judge(numbers()) == "held"
    mixed = numbers()
    mixed["accuracy_off_size_normalized"] = [0.6, 0.8, 0.8]
    assert judge(mixed) == "held in direction"
    assert judge(numbers(accuracy_off_size_normalized=0.6)) == "did not hold"
    assert judge(numbers(nats_beyond_normalized=2.6)) == "did not hold"
    assert judge(numbers(drift_normalized=0.03)) == "did not hold"
    assert judge(numbers(drift_normalized=float("nan"))) == "did not hold"
