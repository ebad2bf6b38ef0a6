"""The experiment of entropy-guided attention: its models, what it measures, and its rule."""

import math
from pathlib import Path

import pytest
import torch

from attending.core import reference
from attending.papers import _entropy_guided_attention_training as training
from attending.papers.entropy_guided_attention import RULE, VARIANTS, reproduce, settings
from attending.taps import tap


def numbers(**changes: list[float]) -> dict[str, list[float]]:
    """Three seeds of a run in which the claim holds, with changes."""
    perplexity = {
        "baseline": 5.0,
        "softmax_only": math.nan,
        "scaled": 8.0,
        "tempered": 7.9,
        "regularised": 7.0,
        "as_printed": 7.9,
    }
    top = dict.fromkeys(VARIANTS, 0.5) | {"regularised": 0.1}
    found = {f"perplexity_{name}": [perplexity[name]] * 3 for name in VARIANTS}
    return found | {f"top_quartile_{name}": [top[name]] * 3 for name in VARIANTS} | changes


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, "held"),
        ({"perplexity_softmax_only": [9.0] * 3}, "held"),
        ({"perplexity_softmax_only": [7.5] * 3}, "held in direction"),
        ({"perplexity_tempered": [7.05, 7.9, 7.9]}, "held in direction"),
        ({"top_quartile_tempered": [0.1, 0.5, 0.5]}, "held in direction"),
        ({"perplexity_regularised": [7.0, 7.0, 8.1]}, "held in direction"),
        ({"perplexity_regularised": [8.1] * 3}, "did not hold"),
        ({"perplexity_regularised": [7.0, 7.0, math.nan]}, "did not hold"),
        ({"perplexity_scaled": [math.nan] * 3}, "did not hold"),
        ({"perplexity_scaled": [math.inf, 8.0, 8.0]}, "held in direction"),
        ({"top_quartile_regularised": [0.6] * 3}, "did not hold"),
        ({"top_quartile_regularised": [math.nan] * 3}, "did not hold"),
    ],
)
def test_the_rule(changes: dict[str, list[float]], verdict: str) -> None:
    assert RULE.judge(numbers(**changes)) == verdict


def test_smoke_run_measures_everything_and_leaves_the_generator_alone(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    found = reproduce("smoke", 0, tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    for name in VARIANTS:
        assert 1 < found.measurements[f"perplexity_{name}"] < 1000
        assert 0 <= found.measurements[f"top_quartile_{name}"] <= 1
    assert found.measurements["communication_regularised"] == pytest.approx(6.43, abs=0.01)
    again = reproduce("smoke", 0, tmp_path)
    assert again.measurements == found.measurements
    assert reproduce("smoke", 1, tmp_path).measurements != found.measurements


def test_what_is_measured_is_of_the_dense_maps_and_of_the_whole_text() -> None:
    chosen = settings("smoke")
    model = training.build("tempered", chosen)
    _, held_out = training.corpus()
    perplexity, entropies = training.measure(model, held_out, chosen)
    batch = training.PackedTokens(held_out, training.BEGIN, seed=0).batch(
        0, training.EVALUATE_ROWS, chosen["context"]
    )
    with torch.no_grad(), tap(model) as calls:
        logits = model(batch[:, :-1]).logits
    logs = logits.double().log_softmax(-1).gather(-1, batch[:, 1:, None])
    assert perplexity == pytest.approx(float(logs.mean().neg().exp()), rel=1e-5)
    for layer, call in zip(entropies, calls, strict=True):
        dense = reference.attention_map(call.query, call.key, is_causal=True, scale=call.scale)
        expected = reference.entropy(dense).mean((0, 2))
        torch.testing.assert_close(layer.double(), expected, rtol=1e-4, atol=1e-5)


def test_models_differ_in_what_they_should_and_start_alike() -> None:
    chosen = settings("smoke")
    models = {}
    for name in VARIANTS:
        torch.manual_seed(3)
        models[name] = training.build(name, chosen)
    start = models["baseline"].state_dict()
    for name, model in models.items():
        state = model.state_dict()
        assert torch.equal(state["transformer.wte.weight"], start["transformer.wte.weight"])
        (query,) = (value for key, value in state.items() if "h.1" in key and "c_attn" in key
                    and key.endswith("weight"))  # fmt: skip
        assert torch.equal(query, start["transformer.h.1.attn.c_attn.weight"])
        nonlinear = [
            m for m in model.modules() if type(m).__name__ in ("LayerNorm", "NewGELUActivation")
        ]
        assert bool(nonlinear) == (name == "baseline")


def test_a_model_that_breaks_is_reported_as_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    real = training.build

    def broken(name, chosen):
        model = real(name, chosen)
        torch.nn.init.constant_(model.transformer.wte.weight, math.inf)
        return model

    monkeypatch.setattr(training, "build", broken)
    found = training.train("softmax_only", settings("smoke"), 0)
    assert math.isnan(found.perplexity)
    assert math.isnan(found.mean_entropy)
    assert all(math.isnan(share) for share in found.quartiles)
    assert math.isnan(found.near_even(16))
    assert found.entropy_by_layer == []


def test_near_even_is_measured_against_an_even_look() -> None:
    even = sum(math.log(i) for i in range(1, 17)) / 16
    entropies = torch.tensor([[even, 0.76 * even], [0.74 * even, 0.1]])
    found = training.Trained(perplexity=2.0, entropies=entropies)
    assert found.near_even(16) == 0.5
    assert found.quartiles == [0.25, 0.0, 0.25, 0.5]
