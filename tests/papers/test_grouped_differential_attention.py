"""The experiment of grouped differential attention: its models, what it measures, and its rule."""

from pathlib import Path

import pytest
import torch

from attending import papers
from attending.nn.grouped_differential_attention import GroupedDifferentialAttention
from attending.papers import _grouped_differential_attention_recall as recall
from attending.papers.grouped_differential_attention import RULE, settings

SETTINGS = settings("smoke")


def test_models_are_of_one_size_and_see_no_later_token() -> None:
    task = recall.Task(0, SETTINGS)
    batch = task.batch(2, torch.Generator().manual_seed(1))
    hidden = task.hidden(batch)
    later = hidden.clone()
    later[:, 36:] = 0.0
    sizes = []
    for name in (*recall.HEADS, "small"):
        model = recall.Recall(name, SETTINGS)
        sizes.append(sum(parameter.numel() for parameter in model.parameters()))
        with torch.no_grad():
            torch.testing.assert_close(model(later)[:, :36], model(hidden)[:, :36])
    assert max(sizes) < 1.002 * min(sizes)


def test_answers_are_where_the_batch_says() -> None:
    task = recall.Task(0, SETTINGS)
    batch = task.batch(3, torch.Generator().manual_seed(1))
    pairs, count = SETTINGS["pairs"], SETTINGS["vocabulary"]
    for row in range(3):
        for question in range(SETTINGS["queries"]):
            place = batch.places[row, question]
            key, value = batch.tokens[row, place]
            assert batch.tokens[row, pairs + question, 0] == key
            assert batch.answers[row, question] == value - count
    clean = task.hidden(batch) - batch.noise
    torch.testing.assert_close(clean[1, 2], task.vectors[batch.tokens[1, 2]].sum(0))


def test_who_is_not_subtracted_has_no_lambda() -> None:
    model = recall.Recall("unsubtracted", SETTINGS)
    task = recall.Task(0, SETTINGS)
    recall.train(model, task, 0, 2)
    for layer in model.attention:
        assert isinstance(layer, GroupedDifferentialAttention)
        assert float(layer.noise_weight(torch.zeros(1, 1, 80))) == 0.0
        assert layer.lambda_init == 0.0


def test_the_share_of_the_target_is_that_of_the_map() -> None:
    task = recall.Task(0, SETTINGS)
    model = recall.Recall("softmax", SETTINGS)
    with torch.no_grad():  # a head that looks everywhere alike, in all heads
        for layer in model.attention:
            layer.q_proj.weight.zero_()
    share = recall.target_share(model, task)
    pairs, queries = SETTINGS["pairs"], SETTINGS["queries"]
    even = sum(1 / (pairs + question + 1) for question in range(queries)) / queries
    assert share == pytest.approx(even, rel=1e-5)


def test_new_random_heads_stand_where_the_copies_would() -> None:
    layer = GroupedDifferentialAttention(24, 4, 2, False, 1, 4)
    copied = recall.grow_signal_heads(layer, 2)
    renewed = recall.grow_signal_heads(layer, 2)
    recall._renew_copies(renewed, layer)
    ours, theirs = (one.q_proj.weight.unflatten(0, (10, 4)) for one in (renewed, copied))
    same = [bool(torch.equal(a, b)) for a, b in zip(ours, theirs, strict=True)]
    assert same == [True, False, True, False, True] * 2
    columns = renewed.out_proj.weight.unflatten(1, (4, 2, -1))
    assert torch.equal(columns[:, :, 0], layer.out_proj.weight.unflatten(1, (4, -1)))


def numbers(**losses: float) -> dict[str, list[float]]:
    plain = {"softmax": 2.0, "diff_1to1": 1.5, "grouped_4to1": 1.4}
    return {f"loss_{name}": [loss] * 3 for name, loss in (plain | losses).items()}


def test_the_rule() -> None:
    judge = RULE.judge
    assert judge(numbers()) == "held"
    assert judge(numbers(diff_1to1=1.3)) == "held in direction"
    assert judge(numbers(softmax=1.3)) == "did not hold"
    one_seed = numbers()
    one_seed["loss_diff_1to1"][2] = 1.3
    assert judge(one_seed) == "held in direction"
    assert judge(numbers(grouped_4to1=float("nan"))) == "did not hold"


def test_smoke(tmp_path: Path) -> None:
    state = torch.random.get_rng_state()
    summary = papers.reproduce("grouped-differential-attention", out_dir=tmp_path, picture=False)
    assert torch.equal(torch.random.get_rng_state(), state)
    for name in (*recall.HEADS, "small", "grown_copied", "grown_random"):
        assert 2 < summary.measurements[f"loss_{name}"].mean < 8
        assert 0 < summary.measurements[f"target_{name}"].mean < 1
    assert summary.measurements["growth_changes_loss_by"].mean < 1e-5
