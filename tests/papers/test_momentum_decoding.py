"""The experiment of momentum decoding: its prompts, its ways, and its rule."""

from pathlib import Path

import pytest
import torch

from attending.papers import _momentum_decoding_experiment as experiment
from attending.papers.momentum_decoding import RULE, reproduce
from attending.zoo import load


def ours(**changes: float) -> dict[str, list[float]]:
    numbers = {
        "diversity_greedy": 0.1,
        "diversity_nucleus": 0.9,
        "diversity_momentum": 0.8,
        "diversity_contrastive": 0.8,
        "coherence_momentum": -1.0,
        "coherence_contrastive": -1.0,
        "coherence_nucleus": -2.0,
        "cost_momentum": 1.03,
        "cost_contrastive": 1.5,
    } | changes
    return {name: [number, number] for name, number in numbers.items()}


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, "held"),
        ({"diversity_momentum": 0.7}, "held in direction"),
        ({"coherence_momentum": -1.1}, "held in direction"),
        ({"cost_momentum": 1.2}, "held in direction"),
        ({"diversity_momentum": 0.4}, "did not hold"),
        ({"coherence_momentum": -2.1}, "did not hold"),
        ({"cost_momentum": 1.3}, "did not hold"),
        ({"cost_contrastive": 1.02}, "did not hold"),
        ({"coherence_momentum": float("nan")}, "did not hold"),
    ],
)
def test_rule(changes: dict[str, float], verdict: str) -> None:
    assert RULE.judge(ours(**changes)) == verdict


def test_one_seed_can_spoil_it() -> None:
    numbers = ours()
    numbers["diversity_momentum"][1] = 0.75
    assert RULE.judge(numbers) == "held in direction"


def test_passages_are_held_out_and_those_of_the_seed() -> None:
    tokenizer = load("llama-stdlib").tokenizer
    one, again, other = (experiment.passages(tokenizer, seed, 20, 64) for seed in (0, 0, 1))
    assert one.shape == (20, 64)
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert len({tuple(row) for row in one.tolist()}) == 20
    assert int(one.min()) > 2  # no special tokens


def test_smoke_run_measures_everything_and_leaves_the_generator_alone(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    found = reproduce("smoke", 0, tmp_path).measurements
    assert torch.equal(torch.get_rng_state(), before)
    assert found["greedy_ratio_greedy"] == 1
    for name in ("greedy", "momentum", "contrastive", "top_k", "nucleus", "ngram4", "people"):
        assert 0 <= found[f"diversity_{name}"] <= 1
        assert found[f"coherence_{name}"] < 0
    assert found["cost_contrastive"] > 1
