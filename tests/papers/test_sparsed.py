"""The experiment of SparseD: its trajectory, its comparison, its task of recall, its rule."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.modeling_outputs import MaskedLMOutput

import attending as at
from attending.papers import _sparsed_recall as recall
from attending.papers._sparsed_trajectory import VARIANTS, WINDOWS, Setup, compare, trajectory
from attending.papers.sparsed import RULE, reproduce
from attending.sparse.window import window_plan
from attending.taps import AttentionCall, Proceed

SETUP = Setup(prompt=40, answer=24, gaps=10, steps=5, skip=0.2, select=0.3, block_size=8)


def numbers(**changes: list[float]) -> dict[str, list[float]]:
    """Three seeds of a run in which the claim holds, with changes."""
    found = {
        "text_nats_dense": 3.0,
        "text_nats_sparsed": 3.01,
        "text_kl_sparsed": 0.02,
        "text_kl_window": 0.03,
        "recall_right_dense": 1.0,
        "recall_right_sparsed": 0.99,
        "recall_right_window": 0.4,
        "attention_seconds_ratio": 0.7,
    }
    return {name: [value] * 3 for name, value in found.items()} | changes


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, "held"),
        ({"text_nats_sparsed": [3.03, 3.0, 3.0]}, "held in direction"),
        ({"text_kl_sparsed": [0.02, 0.02, 0.04]}, "held in direction"),
        ({"recall_right_sparsed": [0.97, 1.0, 1.0]}, "held in direction"),
        ({"recall_right_window": [0.995, 0.4, 0.4]}, "held in direction"),
        ({"attention_seconds_ratio": [0.8, 0.8, 1.1]}, "held in direction"),
        ({"text_nats_sparsed": [math.nan, 3.0, 3.0]}, "held in direction"),
        ({"attention_seconds_ratio": [1.1, 1.1, 0.9]}, "did not hold"),
        ({"recall_right_sparsed": [0.9, 0.95, 0.99]}, "did not hold"),
        ({"recall_right_window": [1.0] * 3}, "did not hold"),
        ({"recall_right_dense": [0.8, 1.0, 1.0]}, "out of reach here"),
        ({"recall_right_dense": [math.nan, 1.0, 1.0]}, "out of reach here"),
    ],
)
def test_the_rule(changes: dict[str, list[float]], verdict: str) -> None:
    assert RULE.judge(numbers(**changes)) == verdict


@pytest.fixture(scope="module")
def model() -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return recall.build().eval()


def problem(rows: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    text = recall.sequences(rows, SETUP.prompt, SETUP.answer, generator)
    gaps = torch.rand(rows, SETUP.answer, generator=generator).argsort(-1)[:, : SETUP.gaps]
    masked = torch.zeros_like(text, dtype=torch.bool).scatter(1, SETUP.prompt + gaps, True)
    return text, masked


def test_the_text_is_uncovered_surest_first(model: Any) -> None:
    text, masked = problem()
    with torch.no_grad():
        found = trajectory(model, text, masked, SETUP, recall.MASK)
        for step, canvas in enumerate(found.canvases):
            hidden = canvas == recall.MASK
            assert (hidden.sum(1) == 10 - 2 * step).all()
            assert torch.equal(canvas[~hidden], text[~hidden])
            logits = model(input_ids=canvas).logits.double()
            logits[..., recall.MASK] = -math.inf
            log_p = logits.log_softmax(-1)
            torch.testing.assert_close(found.log_p[step], log_p[hidden])
            if step + 1 < len(found.canvases):
                confidence = log_p.amax(-1).masked_fill(~hidden, -math.inf)
                surest = confidence.topk(2, dim=1).indices
                uncovered = hidden & (found.canvases[step + 1] != recall.MASK)
                assert torch.equal(uncovered, torch.zeros_like(hidden).scatter(1, surest, True))


def test_nothing_is_lost_where_everything_is_kept(model: Any) -> None:
    found, kept = compare(model, *problem(), replace(SETUP, select=1.0), recall.MASK)
    assert kept == SETUP.blocks
    for name in (*VARIANTS, *WINDOWS):
        assert found[f"density_{name}"] == 1
        assert found[f"kl_{name}"] == pytest.approx(0, abs=1e-6)
        assert found[f"nats_{name}"] == pytest.approx(found["nats_dense"], abs=1e-4)


def test_the_window_is_that_of_its_mask(model: Any) -> None:
    text, masked = problem()
    found, kept = compare(model, text, masked, SETUP, recall.MASK)
    assert kept == math.ceil(found["density_sparsed"] * SETUP.blocks)
    assert found["density_window"] == kept / SETUP.blocks >= found["density_sparsed"]
    assert found["density_joint"] == pytest.approx(kept / SETUP.blocks)
    plan = window_plan(64, 64, block_size=8, width=kept)

    def hide(call: AttentionCall, proceed: Proceed) -> Tensor:
        return proceed(replace(call, attn_mask=plan.visible()))

    with torch.no_grad():
        dense = trajectory(model, text, masked, SETUP, recall.MASK)
        divergences, nats = [], []
        for step in SETUP.late:
            canvas = dense.canvases[step]
            with at.tap(model, hide):
                logits = model(input_ids=canvas).logits[canvas == recall.MASK].double()
            logits[:, recall.MASK] = -math.inf
            ours, theirs = logits.log_softmax(-1), dense.log_p[step]
            real = slice(0, recall.MASK)
            terms = theirs.exp()[:, real] * (theirs - ours)[:, real]
            divergences.append(terms.sum(-1))
            nats.append(-ours.gather(1, dense.truth[step][:, None]).squeeze(1))
    assert found["kl_window"] == pytest.approx(float(torch.cat(divergences).mean()), rel=1e-3)
    assert found["nats_window"] == pytest.approx(float(torch.cat(nats).mean()), rel=1e-3)


def test_what_is_asked_stands_in_the_prompt() -> None:
    tokens = recall.sequences(3, 112, 16, torch.Generator().manual_seed(1))
    for row in tokens.tolist():
        prompt, answer = row[:112], row[112:]
        for key, value in zip(answer[::2], answer[1::2], strict=True):
            places = [i for i, token in enumerate(prompt) if token == key]
            assert len(places) == 1
            assert prompt[places[0] + 1] == value
        assert len(set(answer[::2])) == 8


def test_training_lowers_the_loss_and_keeps_the_generator() -> None:
    torch.manual_seed(3)
    state = torch.get_rng_state()
    setup = replace(SETUP, prompt=56, answer=8, gaps=4, steps=4)
    short = recall.Training((16,), (20,))
    found = recall.measure(0, setup, 2, short)
    untrained = recall.measure(0, setup, 2, recall.Training((), ()))
    assert torch.equal(torch.get_rng_state(), state)
    assert found["nats_dense"] < untrained["nats_dense"]


def test_a_perfect_guess(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that knows the answer is right in all steps, whatever is hidden from it."""
    text, masked = problem(1)

    class Oracle(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Tensor) -> MaskedLMOutput:
            logits = self.model(input_ids=input_ids).logits
            known = torch.nn.functional.one_hot(text, logits.shape[-1])
            return MaskedLMOutput(logits=0 * logits + 50.0 * known)

    found, _ = compare(Oracle(), text, masked, SETUP, recall.MASK)
    assert all(found[f"right_{name}"] == 1 for name in ("dense", *VARIANTS, *WINDOWS))


def test_smoke_run(tmp_path: Path) -> None:
    torch.manual_seed(4)
    state = torch.get_rng_state()
    found = reproduce("smoke", 0, tmp_path).measurements
    assert torch.equal(torch.get_rng_state(), state)
    for task in ("text", "recall"):
        for name in ("dense", *VARIANTS, *WINDOWS):
            assert 0 <= found[f"{task}_right_{name}"] <= 1
        assert found[f"{task}_kl_sparsed"] > 0
    assert found["text_seconds_ratio"] > 0
    assert found["attention_seconds_ratio"] > 0
    assert 0.3 < found["attention_density"] < found["attention_bound"]
