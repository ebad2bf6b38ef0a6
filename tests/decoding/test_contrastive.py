"""Contrastive decoding: golden vectors, what holds, `generate` against loops without a cache."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from attending.decoding.contrastive import (
    ContrastiveLogitsProcessor,
    contrast_first,
    contrastive_logits,
    plausible_tokens,
)
from tests.decoding.models import PAD, VOCAB, llama

GOLDEN = Path(__file__).parents[1] / "golden" / "damro"


@pytest.mark.parametrize("case", ["a", "b"])
def test_golden(case: str) -> None:
    data = np.load(GOLDEN / f"contrastive_{case}.npz")
    ours = contrastive_logits(
        torch.from_numpy(data["logits"]),
        torch.from_numpy(data["logits_outlier"]),
        float(data["alpha"]),
        float(data["beta"]),
    )
    torch.testing.assert_close(ours, torch.from_numpy(data["scores"]), rtol=0, atol=1e-12)
    assert ours.argmax(-1).equal(torch.from_numpy(data["greedy_tokens"]))


@st.composite
def branches(draw: st.DrawFn) -> tuple[Tensor, Tensor, float, float]:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    shape = (draw(st.integers(1, 3)), draw(st.integers(1, 30)))
    positive, negative = (
        3 * torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    return positive, negative, draw(st.floats(0, 4)), draw(st.floats(0, 1))


@given(branches())
def test_equals_the_formula(problem: tuple[Tensor, Tensor, float, float]) -> None:
    positive, negative, alpha, beta = problem
    ours = contrastive_logits(positive, negative, alpha, beta)
    probability = positive.softmax(-1)
    kept = probability >= beta * probability.amax(-1, keepdim=True) * (1 + 1e-12)
    lost = probability < beta * probability.amax(-1, keepdim=True) * (1 - 1e-12)
    assert ours[lost].isneginf().all()
    exact = (1 + alpha) * positive - alpha * negative
    torch.testing.assert_close(ours[kept], exact[kept])


@given(branches(), st.floats(-50, 50), st.floats(-50, 50))
def test_what_holds(problem: tuple[Tensor, Tensor, float, float], up: float, down: float) -> None:
    positive, negative, alpha, beta = problem
    ours = contrastive_logits(positive, negative, alpha, beta)
    # Without contrast, the base distribution, cut; with beta=1, greedy.
    cut = positive.masked_fill(~plausible_tokens(positive, beta), -math.inf)
    assert contrastive_logits(positive, negative, 0.0, beta).equal(cut)
    assert contrastive_logits(positive, negative, 0.0, 0.0).equal(positive)
    greedy = contrastive_logits(positive, negative, alpha, 1.0)
    assert (greedy > -math.inf).sum(-1).eq(1).all()
    assert greedy.argmax(-1).equal(positive.argmax(-1))
    # Equal branches say what they say; what is kept is up to the positive branch.
    assert contrastive_logits(positive, positive, alpha, beta).equal(cut)
    assert ours.isneginf().equal(cut.isneginf())
    assert (ours > -math.inf).any(-1).all()
    shifted = contrastive_logits(positive + up, negative + down, alpha, beta)
    near = (positive - positive.amax(-1, keepdim=True) - math.log(beta or 1)).abs() < 1e-9
    if not near.any():
        torch.testing.assert_close(shifted.softmax(-1), ours.softmax(-1))


def test_half_precision_and_hidden_tokens() -> None:
    positive = torch.tensor([[1.0, 2.0, -math.inf, 0.5]])
    negative = torch.tensor([[1.0, 1.0, 5.0, 0.0]])
    for beta in (0.0, 0.1):
        ours = contrastive_logits(positive.bfloat16(), negative.bfloat16(), 2.0, beta)
        assert ours.dtype == torch.float32
        assert ours[0, 2] == -math.inf
        assert ours[0, :2].tolist() == [1.0, 4.0]
        # With alpha 0, -inf - x must not become nan.
        assert contrastive_logits(positive, negative, 0.0, beta)[0, 2] == -math.inf
    tied = contrastive_logits(torch.tensor([[1.0, 1.0, 0.0]]), torch.zeros(1, 3), 1.0, 1.0)
    assert tied.tolist() == [[2.0, 2.0, -math.inf]]


def test_refusals() -> None:
    zeros = torch.zeros(1, 3)
    for arguments, message in (
        ({"alpha": -1.0}, "alpha: expected a finite number"),
        ({"alpha": math.nan}, "alpha: expected a finite number"),
        ({"beta": 1.5}, r"beta: expected a number in \[0, 1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            contrastive_logits(zeros, zeros, **arguments)
    with pytest.raises(ValueError, match="negative: expected the shape of positive"):
        contrastive_logits(zeros, torch.zeros(1, 4))
    model = llama()
    ids = torch.tensor([[2, 3]])
    with pytest.raises(ValueError, match="expected input_ids"):
        ContrastiveLogitsProcessor(model, {})
    mask = torch.tensor([[1, 0]])
    with pytest.raises(ValueError, match="left padding"):
        ContrastiveLogitsProcessor(model, {"input_ids": ids, "attention_mask": mask})
    with pytest.raises(ValueError, match="expected an attention_mask"):
        ContrastiveLogitsProcessor(model, {"input_ids": ids, "attention_mask": mask[:, :1]})
    with pytest.raises(ValueError, match="alpha: expected"):
        ContrastiveLogitsProcessor(model, {"input_ids": ids}, alpha=lambda step: step - 1.0)
    contrast = ContrastiveLogitsProcessor(model, {"input_ids": ids.repeat(2, 1)})
    with pytest.raises(ValueError, match="input_ids: expected 2 rows"):
        model.generate(ids, max_new_tokens=1, logits_processor=[contrast])
    contrast = ContrastiveLogitsProcessor(model, {"input_ids": ids})
    with pytest.raises(ValueError, match="greedy decoding, sampling or beams"):
        model.generate(
            ids,
            max_new_tokens=2,
            prompt_lookup_num_tokens=2,
            logits_processor=[contrast],
            custom_generate=contrast_first,
        )


# --- generate -------------------------------------------------------------------------------------

ROWS = [[2, 5, 6, 7, 8], [2, 9, 10]]
OTHERS = [[2, 5], [2, 9, 11, 12]]  # what the second branch is told
EXACT = {"rtol": 1e-4, "atol": 2e-4}


def padded(rows: list[list[int]]) -> dict[str, Tensor]:
    length = max(map(len, rows))
    ids = torch.tensor([[PAD] * (length - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def next_logits(model: Any, tokens: list[int]) -> Tensor:
    """Of one sequence, without cache, padding or batch."""
    with torch.no_grad():
        return model(torch.tensor([tokens]), use_cache=False).logits[0, -1]


def expected_scores(
    model: Any, row: int, written: list[int], alpha: float, beta: float, other: Any = None
) -> Tensor:
    positive = next_logits(model, ROWS[row] + written).double()
    negative = next_logits(other or model, OTHERS[row] + written).double()
    scores = (1 + alpha) * positive - alpha * negative
    return scores.masked_fill(positive < positive.max() + math.log(beta), -math.inf)


def generate(model: Any, contrast: Any, rows: Any = ROWS, **settings: Any) -> Any:
    return model.generate(
        **padded(rows),
        logits_processor=[contrast],
        return_dict_in_generate=True,
        output_scores=True,
        **{"max_new_tokens": 8, "do_sample": False, "custom_generate": contrast_first, **settings},
    )


def test_greedy_equals_a_loop_without_cache() -> None:
    model = llama(eos_token_id=None)
    contrast = ContrastiveLogitsProcessor(model, padded(OTHERS), alpha=1.5, beta=0.05)
    found = generate(model, contrast)
    for row in range(2):
        written: list[int] = []
        for scores in found.scores:
            exact = expected_scores(model, row, written, 1.5, 0.05)
            torch.testing.assert_close(scores[row].double(), exact, **EXACT)
            written.append(int(exact.argmax()))
        assert found.sequences[row, -8:].tolist() == written
    assert contrast.counts.steps == 8
    assert contrast.counts.tokens == 16
    assert contrast.counts.changed > 0
    assert generate(model, contrast).sequences.equal(found.sequences)  # afresh
    # A batch with padding is each row on its own.
    for row in range(2):
        alone = ContrastiveLogitsProcessor(model, padded(OTHERS[row : row + 1]), 1.5, 0.05)
        one = generate(model, alone, ROWS[row : row + 1])
        assert one.sequences[0, -8:].equal(found.sequences[row, -8:])
    with pytest.raises(ValueError, match="another prompt"):
        generate(model, contrast, ROWS[::-1])


def test_a_second_model_and_a_growing_alpha() -> None:
    model, amateur = llama(eos_token_id=None), llama(num_hidden_layers=1, eos_token_id=None)
    contrast = ContrastiveLogitsProcessor(amateur, padded(OTHERS), lambda step: 0.5 * step, 0.1)
    found = generate(model, contrast, max_new_tokens=4)
    for step, scores in enumerate(found.scores):
        written = found.sequences[1, -4:][:step].tolist()
        exact = expected_scores(model, 1, written, 0.5 * step, 0.1, amateur)
        torch.testing.assert_close(scores[1].double(), exact, **EXACT)


def test_embeddings_as_the_second_prompt() -> None:
    model = llama()
    other = padded(OTHERS)
    embedded = {
        "inputs_embeds": model.get_input_embeddings()(other["input_ids"]),
        "attention_mask": other["attention_mask"],
    }
    found = [
        generate(model, ContrastiveLogitsProcessor(model, inputs)).sequences
        for inputs in (other, embedded)
    ]
    assert found[0].equal(found[1])


def test_everything_else_applies_after_the_contrast() -> None:
    model = llama(eos_token_id=None)
    contrast = ContrastiveLogitsProcessor(model, padded(OTHERS), alpha=1.5, beta=0.01)
    settings = {"repetition_penalty": 1.7, "temperature": 0.6, "top_k": 3, "top_p": 0.95}
    found = generate(model, contrast, do_sample=True, num_return_sequences=2, **settings)
    penalty = RepetitionPenaltyLogitsProcessor(1.7)
    warpers = LogitsProcessorList(
        [TemperatureLogitsWarper(0.6), TopKLogitsWarper(3), TopPLogitsWarper(0.95)]
    )
    length = padded(ROWS)["input_ids"].shape[1]
    for sample in range(4):
        for step, scores in enumerate(found.scores):
            ids = found.sequences[sample : sample + 1, : length + step]
            exact = expected_scores(model, sample // 2, ids[0, length:].tolist(), 1.5, 0.01)
            unpadded = ids[:, length - len(ROWS[sample // 2]) :]
            exact = warpers(ids, penalty(unpadded, exact[None].clone()))[0]
            torch.testing.assert_close(scores[sample].double(), exact, **EXACT)
    # On its own the processor comes after the penalty, and before what sampling adds.
    plain = generate(model, contrast, repetition_penalty=1.7, custom_generate=None)
    assert not torch.allclose(plain.scores[0], found.scores[0][::2], atol=1e-3)


def test_beams_equal_beams_without_cache() -> None:
    class Uncached(ContrastiveLogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            rows = [self.one(row, ids) for row, ids in enumerate(input_ids)]
            return contrastive_logits(scores, torch.stack(rows), 1.5, 0.05).log_softmax(-1)

        def one(self, row: int, ids: Tensor) -> Tensor:
            return next_logits(model, OTHERS[row // 3] + ids[5:].tolist())

    model = llama()
    beams = {"num_beams": 3, "length_penalty": 0.0, "max_new_tokens": 7}
    ours = ContrastiveLogitsProcessor(
        model, padded(OTHERS), alpha=1.5, beta=0.05, log_probabilities=True
    )
    exact = Uncached(model, padded(OTHERS), log_probabilities=True)
    found, expected = generate(model, ours, **beams), generate(model, exact, **beams)
    assert found.sequences.equal(expected.sequences)
    torch.testing.assert_close(found.sequences_scores, expected.sequences_scores, **EXACT)
    with pytest.raises(ValueError, match="log_probabilities"):
        generate(model, ContrastiveLogitsProcessor(model, padded(OTHERS)), **beams)
    plain = ContrastiveLogitsProcessor(model, padded(OTHERS), alpha=1.5, beta=0.05)
    with pytest.raises(ValueError, match="rows changed places"):
        generate(model, plain, custom_generate=None, **beams)


def test_tokens_that_do_not_go_on_start_again() -> None:
    model = llama()
    contrast = ContrastiveLogitsProcessor(model, padded(OTHERS[:1]), alpha=1.0, beta=0.0)
    prompt = torch.tensor(ROWS[:1])
    zeros = torch.zeros(1, VOCAB)
    for written in ([], [7, 8, 9], [7, 8], [7, 8], [7, 9, 4, 4]):
        ids = torch.cat([prompt, torch.tensor([written], dtype=torch.long)], 1)
        exact = -next_logits(model, OTHERS[0] + written)
        torch.testing.assert_close(contrast(ids, zeros)[0], exact, **EXACT)


def test_candidates_are_counted() -> None:
    model = llama()
    for beta, mean in ((0.0, VOCAB), (1.0, 1)):
        contrast = ContrastiveLogitsProcessor(model, padded(OTHERS), 1.0, beta)
        generate(model, contrast, max_new_tokens=3)
        assert contrast.counts.stats["candidates"] == mean
