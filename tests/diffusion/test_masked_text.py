"""Iterative unmasking against a naive sampler, exact distributions and its own promises."""

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM, EuroBertConfig, EuroBertForMaskedLM

from attending.diffusion import UnmaskingStep, sample_masked_text

MASK, VOCABULARY = 10, 11


def mixing_model(input_ids: Tensor) -> Tensor:
    """Logits in float64 that depend on the place and on every token of the row."""
    place = torch.arange(input_ids.shape[1], dtype=torch.float64)
    token = torch.arange(VOCABULARY, dtype=torch.float64)
    context = (input_ids.double() * torch.cos(3 * place)).sum(1)
    return 3 * torch.sin(context[:, None, None] + 1.7 * place[:, None] * token + 0.3 * token)


@pytest.fixture(scope="module")
def eurobert() -> Any:
    config = EuroBertConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.5,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        mask_token_id=MASK,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return EuroBertForMaskedLM(config).double().eval()


def naive(row: list[int], new: int, steps: int, block: int, order: str) -> list[int]:
    """One row, greedy, in plain Python; the blocks get equal steps and divide what is new."""
    canvas, first = [*row, *[MASK] * new], len(row)
    for start in range(first, first + new, block):
        per_block = steps // (new // block)
        open_places = [i for i in range(start + block) if canvas[i] == MASK]
        total = len(open_places)
        for step in range(per_block):
            logits = mixing_model(torch.tensor([canvas]))[0].tolist()
            ranked = []
            for i in [i for i in range(start + block) if canvas[i] == MASK]:
                exps = [math.exp(value) for value in logits[i][:MASK]]
                p = sorted(((e / sum(exps), -t) for t, e in enumerate(exps)), reverse=True)
                surety = {
                    "confidence": p[0][0],
                    "margin": p[0][0] - p[1][0],
                    "entropy": sum(q * math.log(q) for q, _ in p),
                }[order]
                ranked.append((-surety, i, -p[0][1]))
            for _, i, token in sorted(ranked)[: total // per_block + (step < total % per_block)]:
                canvas[i] = token
    return canvas


@pytest.mark.parametrize("order", ["confidence", "margin", "entropy"])
@pytest.mark.parametrize(
    ("new", "steps", "block"), [(6, 6, 6), (6, 4, 6), (6, 1, 6), (8, 8, 4), (8, 6, 4), (3, 3, 1)]
)
def test_against_a_naive_sampler(order: Any, new: int, steps: int, block: int) -> None:
    prompts = [[1, 2, 3], [4, MASK, 5], [9, 9, 0]]
    got = sample_masked_text(
        mixing_model,
        torch.tensor(prompts),
        new_tokens=new,
        mask_token=MASK,
        steps=steps,
        block_length=block,
        order=order,
    )
    for row, prompt in enumerate(prompts):
        assert got[row].tolist() == naive(prompt, new, steps, block, order)
    assert not (got == MASK).any()


@settings(max_examples=60, deadline=None)
@given(
    prompt=st.lists(st.integers(0, MASK), max_size=5),
    new=st.integers(0, 7),
    block=st.one_of(st.none(), st.integers(1, 9)),
    temperature=st.sampled_from([0.0, 0.5, 2.0]),
    order=st.sampled_from(["confidence", "margin", "entropy", "random"]),
    data=st.data(),
)
def test_promises(
    prompt: list[int],
    new: int,
    block: int | None,
    temperature: float,
    order: Any,
    data: st.DataObject,
) -> None:
    if not prompt and not new:
        return
    masks = prompt.count(MASK) + new
    blocks = max(1, math.ceil(new / (block or max(1, new))))
    steps = data.draw(st.one_of(st.none(), st.integers(blocks, max(blocks, masks))))
    seen: list[UnmaskingStep] = []
    tokens = torch.tensor([prompt], dtype=torch.long)

    def sample() -> Tensor:
        return sample_masked_text(
            mixing_model,
            tokens,
            new_tokens=new,
            mask_token=MASK,
            steps=steps,
            block_length=block,
            temperature=temperature,
            order=order,
            seed=5,
            banned_tokens=[0, 3],
            on_step=seen.append,
        )

    written = sample()
    assert written.shape == (1, len(prompt) + new)
    kept = tokens[0] != MASK
    assert torch.equal(written[0, : len(prompt)][kept], tokens[0][kept])
    fresh = torch.cat([written[0, : len(prompt)][~kept], written[0, len(prompt) :]])
    assert not {MASK, 0, 3} & set(fresh.tolist())
    assert [step.index for step in seen] == list(range(len(seen)))
    assert all(step.steps == len(seen) for step in seen)
    assert len(seen) <= (masks if steps is None else steps)
    if steps is None:
        assert len(seen) == masks
    if block is None and steps is not None and masks:
        assert len(seen) == steps
    assert sum(int(step.unmasked) for step in seen) == masks
    left = [int(step.masked.sum()) for step in seen] + [0]
    assert [a - b for a, b in itertools.pairwise(left)] == [int(s.unmasked) for s in seen]
    assert torch.equal(sample(), written)


def test_blocks_are_finished_from_left_to_right() -> None:
    seen: list[UnmaskingStep] = []
    sample_masked_text(
        mixing_model,
        torch.tensor([[1, MASK]]),
        new_tokens=7,
        mask_token=MASK,
        block_length=3,
        steps=5,
        on_step=seen.append,
    )
    assert [step.block for step in seen] == [0, 0, 1, 1, 2]
    assert {step.blocks for step in seen} == {3}
    masked = [step.masked[0].nonzero().flatten().tolist() for step in seen]
    assert masked[0] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert masked[2] == [5, 6, 7, 8]
    assert masked[4] == [8]


def test_what_on_step_gets_is_a_copy() -> None:
    def meddle(step: UnmaskingStep) -> None:
        step.tokens.fill_(7)
        step.masked.fill_(False)

    arguments: dict[str, Any] = {"new_tokens": 4, "mask_token": MASK}
    prompt = torch.tensor([[1, 2]])
    plain = sample_masked_text(mixing_model, prompt, **arguments)
    assert torch.equal(plain, sample_masked_text(mixing_model, prompt, on_step=meddle, **arguments))
    assert prompt.tolist() == [[1, 2]]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("order", ["confidence", "random"])
@pytest.mark.parametrize("block", [None, 4])
def test_a_batch_is_its_rows(eurobert: Any, temperature: float, order: Any, block: Any) -> None:
    prompts = [[5, 6, 7, 8, 9], [3], [4, MASK, 4]]
    width = max(map(len, prompts))
    padded = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    real = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    arguments: dict[str, Any] = {
        "new_tokens": 8,
        "mask_token": MASK,
        "temperature": temperature,
        "order": order,
        "block_length": block,
    }
    together = sample_masked_text(
        eurobert, padded, attention_mask=real, seed=[3, 4, 8], steps=4, **arguments
    )
    for row, (prompt, seed) in enumerate(zip(prompts, (3, 4, 8), strict=True)):
        alone = sample_masked_text(
            eurobert, torch.tensor([prompt]), seed=seed, steps=4, **arguments
        )
        assert torch.equal(together[row, width - len(prompt) :], alone[0])
        assert (together[row, : width - len(prompt)] == 0).all()


def test_absolute_positions_begin_with_each_prompt() -> None:
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        initializer_range=0.5,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        bert = BertForMaskedLM(config).double().eval()
    padded = torch.tensor([[0, 0, 5, 6], [1, 2, 3, 4]])
    together = sample_masked_text(
        bert, padded, attention_mask=padded > 0, new_tokens=6, mask_token=MASK
    )
    alone = sample_masked_text(bert, padded[:1, 2:], new_tokens=6, mask_token=MASK)
    assert torch.equal(together[0, 2:], alone[0])


def test_one_token_a_step_draws_from_the_joint_distribution() -> None:
    """With true conditionals, orders that no draw decides give the joint.

    All at once gives only the marginals, and to prefer likely draws gives neither.
    """
    joint = torch.tensor([[0.30, 0.02], [0.08, 0.60]], dtype=torch.float64)
    mask, rows = 2, 5_000

    def conditionals(input_ids: Tensor) -> Tensor:
        logits = torch.zeros(*input_ids.shape, 3, dtype=torch.float64)
        table = joint.log()
        for place in (0, 1):
            other = input_ids[:, 1 - place]
            by_other = table if place == 1 else table.T
            known = by_other[other.clamp(max=1)].log_softmax(-1)
            marginal = joint.sum(1 - place).log()
            logits[:, place, :2] = torch.where((other == mask)[:, None], marginal, known)
        return logits

    def frequencies(order: Any, steps: int, temperature: float = 1.0) -> Tensor:
        written = sample_masked_text(
            conditionals,
            torch.full((rows, 2), mask),
            new_tokens=0,
            mask_token=mask,
            temperature=temperature,
            order=order,
            steps=steps,
        )
        return torch.bincount(2 * written[:, 0] + written[:, 1], minlength=4).view(2, 2) / rows

    def far(found: Tensor, expected: Tensor) -> float:
        """In standard errors."""
        return ((found - expected).abs() / (expected * (1 - expected) / rows).sqrt()).max().item()

    product = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
    assert far(frequencies("random", 2), joint) < 4.5
    assert far(frequencies("entropy", 2), joint) < 4.5
    assert far(frequencies("random", 1), product) < 4.5
    assert far(frequencies("confidence", 2), joint) > 5
    assert far(product, joint) > 25
    sharper = product.sqrt() / product.sqrt().sum()
    assert far(frequencies("random", 1, temperature=2.0), sharper) < 4.5


def test_small_temperatures_approach_the_likeliest_token() -> None:
    arguments: dict[str, Any] = {"new_tokens": 5, "mask_token": MASK}
    prompt = torch.tensor([[1, 2, 3]] * 3)
    greedy = sample_masked_text(mixing_model, prompt, **arguments)
    assert torch.equal(
        sample_masked_text(mixing_model, prompt, temperature=1e-9, **arguments), greedy
    )
    hot = sample_masked_text(mixing_model, prompt, temperature=3.0, **arguments)
    assert len({tuple(row) for row in hot.tolist()}) > 1


def test_logits_that_speak_of_the_next_token() -> None:
    def shifted_model(input_ids: Tensor) -> Tensor:
        logits = mixing_model(input_ids)
        return torch.cat([logits[:, 1:], logits[:, :1]], dim=1)

    prompt = torch.tensor([[1, 2, 3]])
    arguments: dict[str, Any] = {"new_tokens": 5, "mask_token": MASK}
    assert torch.equal(
        sample_masked_text(shifted_model, prompt, shifted=True, **arguments),
        sample_masked_text(mixing_model, prompt, **arguments),
    )


def test_half_precision_logits() -> None:
    written = sample_masked_text(
        lambda input_ids: mixing_model(input_ids).bfloat16(),
        torch.tensor([[1, 2, 3]]),
        new_tokens=5,
        mask_token=MASK,
        temperature=1.0,
    )
    assert not (written == MASK).any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_ids": torch.tensor([1, 2])}, r"shape \[batch, prompt\].*\[2\]"),
        ({"new_tokens": -1}, "new_tokens of at least 0, got -1"),
        ({"block_length": 0}, "block_length of at least 1"),
        ({"temperature": -0.1}, "temperature of at least 0"),
        ({"order": "left"}, "confidence, margin, entropy, random, got 'left'"),
        ({"steps": 0}, r"steps from 1 .* to 4 .*got 0"),
        ({"steps": 5}, r"steps from 1 .* to 4 .*got 5"),
        ({"steps": 1, "block_length": 2}, "steps from 2"),
        ({"seed": [1, 2]}, "one seed for each of the 1 rows, got 2"),
        ({"attention_mask": torch.ones(1, 3)}, r"\[1, 2\], got \[1, 3\]"),
        ({"attention_mask": torch.tensor([[1, 0]])}, "padding on the left"),
        ({"attention_mask": torch.tensor([[0, 0]])}, "at least one token"),
        ({"attention_mask": torch.tensor([[0, 1]])}, "takes attention_mask"),
        ({"mask_token": 11}, "within the vocabulary of 11"),
        ({"banned_tokens": [-1]}, "within the vocabulary of 11"),
        ({"model": lambda input_ids: torch.zeros(1, 2)}, "expected logits of shape"),
    ],
)
def test_what_cannot_work(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "model": mixing_model,
        "input_ids": torch.tensor([[1, 2]]),
        "new_tokens": 4,
        "mask_token": MASK,
    }
    with pytest.raises(ValueError, match=message):
        sample_masked_text(**{**arguments, **changes})


def test_a_model_that_is_still_training(eurobert: Any) -> None:
    eurobert.train()
    try:
        with pytest.raises(ValueError, match=r"model\.eval\(\)"):
            sample_masked_text(eurobert, torch.tensor([[1]]), new_tokens=1, mask_token=MASK)
    finally:
        eurobert.eval()
