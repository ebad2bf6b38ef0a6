"""The experiment of systematic outliers: its task, what it measures, and its rule."""

from pathlib import Path

import pytest
import torch

from attending import papers
from attending.core import reference
from attending.papers import _systematic_outliers_experiment as experiment
from attending.papers.systematic_outliers import EXPLICIT, IMPLICIT, RULE, VARIANTS


@pytest.fixture
def task() -> experiment.Task:
    return experiment.make_task(12, 2, 30, torch.Generator().manual_seed(0))


def test_the_task_copies_at_triggers_and_follows_the_table_elsewhere(
    task: experiment.Task,
) -> None:
    words = task.sample(4000, torch.Generator().manual_seed(1))
    assert words.shape == (4000, 31)
    assert (words[:, 0] == experiment.FIRST).all()
    assert (words[:, 1:] != experiment.FIRST).all()
    before, last, following = words[:, :-2], words[:, 1:-1], words[:, 2:]
    copies = task.triggers[last] & (before != experiment.FIRST)
    assert 0.05 < copies.float().mean() < 0.5
    assert torch.equal(following[copies], before[copies])
    counts = torch.zeros(12, 12)
    pairs = (last[~copies], following[~copies])
    counts.index_put_(pairs, torch.ones(len(pairs[0])), accumulate=True)
    share = counts / counts.sum(1, keepdim=True)
    # About 7000 draws for each word that is no trigger.
    torch.testing.assert_close(share[3:], task.bigram[3:], atol=0.03, rtol=0)


def test_nobody_is_better_than_the_least_loss(task: experiment.Task) -> None:
    """Who knows the tables and the triggers has exactly the least loss."""
    words = task.sample(50, torch.Generator().manual_seed(1))
    total = 0.0
    for sequence in words.tolist():
        for place in range(1, 31):
            if place == 1:
                chance = 1 / 11
            elif task.triggers[sequence[place - 1]] and place > 2:
                chance = float(sequence[place] == sequence[place - 2])
            else:
                chance = float(task.bigram[sequence[place - 1], sequence[place]])
            total -= torch.tensor(chance).log().item()
    assert experiment._least_loss(task, words) == pytest.approx(total / 1500, rel=1e-5)


@pytest.mark.parametrize("variant", ["softmax", "attention_bias"])
def test_first_token_mass_is_that_of_the_map(task: experiment.Task, variant: str) -> None:
    model = experiment.LanguageModel(12, 30, 16, 2, 1, variant)
    layer = model.blocks[0].attention
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(10)
    hidden, idle = torch.randn(3, 30, 16), torch.rand(3, 30) > 0.3
    idle[:, 0] = False
    query, key, _ = layer.project(hidden)
    mask = torch.ones(30, 30, dtype=torch.bool).tril()
    whole = reference.attention_map(query, key, attn_mask=mask).probabilities
    probability = whole[..., 0]
    if variant == "attention_bias":  # one more key, that every query sees
        scores = (query @ key.transpose(-1, -2) / 8**0.5).masked_fill(~mask, -torch.inf)
        extra = (query * layer.key_bias[:, None]).sum(-1, keepdim=True) / 8**0.5
        probability = torch.cat([scores, extra], -1).softmax(-1)[..., 0]
    weights = idle[:, None].expand_as(probability)
    expected = torch.stack([probability[:, h][weights[:, h]].mean() for h in range(2)]).max()
    with torch.no_grad():
        ours = experiment._first_token_mass(layer, hidden, idle)
    assert ours == pytest.approx(expected.item(), rel=1e-5)


def numbers(implicit: float, explicit: float, ratio: float, gap: float) -> dict[str, list[float]]:
    found = {f"first_token_{v}": [implicit] * 3 for v in IMPLICIT}
    found |= {f"first_token_{v}": [explicit] * 3 for v in EXPLICIT}
    found |= {"ratio_softmax": [ratio] * 3, "ratio_context_scale": [10.0] * 3}
    return found | {"gap_w8_softmax": [gap] * 3, "gap_w8_context_scale": [0.0] * 3}


def test_the_rule() -> None:
    judge = RULE.judge
    assert judge(numbers(0.9, 0.1, 200.0, 0.5)) == "held"
    assert judge(numbers(0.9, 0.1, 90.0, 0.5)) == "held in direction"
    assert judge(numbers(0.9, 0.1, 200.0, -0.5)) == "held in direction"
    assert judge(numbers(0.9, 0.5, 200.0, 0.5)) == "did not hold"
    assert judge(numbers(0.4, 0.1, 200.0, 0.5)) == "did not hold"
    one_seed = numbers(0.9, 0.1, 200.0, 0.5)
    one_seed["first_token_additive_bias"][1] = 0.2
    assert judge(one_seed) == "did not hold"
    assert judge(numbers(float("nan"), 0.1, 200.0, 0.5)) == "did not hold"


def test_smoke(tmp_path: Path) -> None:
    state = torch.random.get_rng_state()
    summary = papers.reproduce("systematic-outliers", out_dir=tmp_path, picture=False)
    assert torch.equal(torch.random.get_rng_state(), state)
    for variant in VARIANTS:
        assert 0 < summary.measurements[f"first_token_{variant}"].mean < 1
        assert summary.measurements[f"ratio_{variant}"].mean > 1
    again = papers.reproduce("systematic-outliers", out_dir=tmp_path, picture=False, fresh=True)
    assert again.measurements == summary.measurements
