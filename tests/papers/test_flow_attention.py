"""The experiment of Flow-Attention: its models, what it measures, and its rule."""

from pathlib import Path

import pytest
import torch

from attending import papers
from attending.papers import _flow_attention_training as training
from attending.papers.flow_attention import RULE
from tests.nn import reference_flow_attention as reference


def test_models_differ_in_their_attention_only() -> None:
    states = []
    for operator in training.OPERATORS.values():
        torch.manual_seed(3)
        states.append(training.ByteModel(operator, 16, 8, 2, 1).state_dict())
    for state in states[1:]:
        for name, tensor in state.items():
            assert torch.equal(tensor, states[0][name]), name


@pytest.mark.parametrize("name", list(training.OPERATORS))
def test_models_are_causal(name: str) -> None:
    model = training.ByteModel(training.OPERATORS[name], 16, 8, 2, 2)
    words = torch.randint(1, 256, (2, 16))
    before = model(words)
    words[:, 10:] = 1
    torch.testing.assert_close(model(words)[:, :10], before[:, :10])


def test_flatness_is_that_of_the_map() -> None:
    model = training.ByteModel(training.OPERATORS["flow"], 12, 8, 1, 1)
    words = torch.randint(1, 256, (1, 12))
    with torch.no_grad():
        model.attention[0].q_proj.weight.mul_(20)
        hidden = model.attention_norms[0](model.words(words) + model.places.weight)
        query, key, _ = model.attention[0].project(hidden)
    whole = reference.causal_map(query[0, 0], key[0, 0])
    rows = whole / whole.sum(-1, keepdim=True)
    shares = [
        float(torch.special.entr(rows[i]).sum() / torch.tensor(i + 1.0).log()) for i in range(1, 12)
    ]
    ours = training._flatness(model, words)
    assert ours == pytest.approx(sum(shares) / 11, rel=1e-4)
    assert ours < 0.999


def numbers(**losses: float) -> dict[str, list[float]]:
    plain = {"softmax": 2.0, "linear": 2.0, "no_competition": 2.0, "no_allocation": 2.0}
    return {f"loss_{name}": [loss] * 3 for name, loss in (plain | losses).items()}


def test_the_rule() -> None:
    judge = RULE.judge
    assert judge(numbers(flow=1.9)) == "held"
    for other in ("softmax", "no_competition", "no_allocation"):
        assert judge(numbers(flow=1.9, **{other: 1.8})) == "held in direction"
    assert judge(numbers(flow=1.9, linear=1.8)) == "did not hold"
    one_seed = numbers(flow=1.9)
    one_seed["loss_linear"][1] = 1.8
    assert judge(one_seed) == "did not hold"
    assert judge(numbers(flow=float("nan"))) == "did not hold"


def test_smoke(tmp_path: Path) -> None:
    state = torch.random.get_rng_state()
    summary = papers.reproduce("flow-attention", out_dir=tmp_path, picture=False)
    assert torch.equal(torch.random.get_rng_state(), state)
    for name in training.OPERATORS:
        assert 2 < summary.measurements[f"loss_{name}"].mean < 7
        assert 0 < summary.measurements[f"flatness_{name}"].mean <= 1.0001
