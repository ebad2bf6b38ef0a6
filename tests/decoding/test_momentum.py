"""Momentum decoding, against golden walks, its limits, and other ways to run it."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LogitsProcessorList, NoRepeatNGramLogitsProcessor

from attending.decoding.generating import DecodingWarning
from attending.decoding.momentum import MomentumDecoding, MomentumLogitsProcessor, MomentumRun
from attending.decoding.resistance import RESISTANCES
from attending.decoding.walk import circular_depth

GOLDEN = Path(__file__).parents[1] / "golden" / "momentum-decoding"
PROMPT = torch.tensor([[5, 6, 7, 5, 6, 7, 5]])


class Bigrams:
    """The stub language model of the golden vectors: the last two tokens say what comes."""

    def __init__(self, last, before_last):
        self.last, self.before_last = last, before_last

    def __call__(self, ids):
        logits = self.last[ids[:, -1]]
        return logits + self.before_last[ids[:, -2]] if ids.shape[1] > 1 else logits


def bigrams(vocabulary=11, scale=3.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tables = torch.randn(2, vocabulary, vocabulary, generator=generator)
    return Bigrams(scale * tables[0], tables[1])


def walk_on(model, processor, prompt, steps):
    ids = prompt
    for _ in range(steps):
        scores = processor(ids, model(ids))
        ids = torch.cat([ids, scores.argmax(-1, keepdim=True)], 1)
    return ids


@pytest.mark.parametrize("table", ["dec2022", "gpt2xl_head"])
def test_golden(table):
    with np.load(GOLDEN / f"decode_{table}.npz") as arrays:
        golden = {name: torch.from_numpy(np.asarray(arrays[name])) for name in arrays}
    assert golden["table"].tolist() == list(RESISTANCES[table])
    stub, ids = Bigrams(golden["W1"], golden["W2"]), golden["prompt"][None]
    processor = MomentumLogitsProcessor(
        float(golden["alpha"]), int(golden["k"]), table, int(golden["max_depth"])
    )
    labels = []
    for step in range(len(golden["cand"])):
        before = MomentumRun(**processor.run.stats)
        scores = processor(ids, stub(ids))
        candidates = golden["cand"][step]
        expected = golden["prob"][step] - 0.2 * golden["table"][golden["depth"][step]]
        torch.testing.assert_close(scores[0, candidates], expected, atol=1e-12, rtol=0)
        assert int((scores > -math.inf).sum()) == len(candidates)
        depths = circular_depth(ids, candidates[None], 5)
        assert torch.equal(depths[0], golden["depth"][step])
        after = processor.run
        labels.append((after.returned - before.returned) + 2 * (after.reranked - before.reranked))
        ids = torch.cat([ids, scores.argmax(-1, keepdim=True)], 1)
    assert torch.equal(ids[0], golden["output"])
    assert labels == golden["labels"].tolist()
    assert processor.run.tokens == len(labels)
    assert f"{len(labels)} tokens" in str(processor.run)


@pytest.mark.parametrize("limit", [{"alpha": 0.0}, {"top_k": 1}, {"resistance": (0.0, 0.0)}])
def test_greedy_is_a_limit(limit):
    stub = bigrams()
    processor = MomentumLogitsProcessor(**limit)
    found = walk_on(stub, processor, PROMPT, 40)
    assert torch.equal(found, walk_on(stub, lambda ids, scores: scores, PROMPT, 40))
    assert processor.run.reranked == 0


@given(st.integers(1, 4), st.integers(0, 20), st.integers(1, 12))
@settings(max_examples=20)
def test_blocking_ngrams_is_a_limit(n, seed, length):
    vocabulary = 31
    stub = bigrams(vocabulary, seed=seed)
    prompt = torch.randint(0, 5, (2, length), generator=torch.Generator().manual_seed(seed))
    table = (0.0,) * n + (math.inf,)
    processor = MomentumLogitsProcessor(top_k=vocabulary, resistance=table)
    found = walk_on(stub, processor, prompt, 18)
    assert torch.equal(found, walk_on(stub, NoRepeatNGramLogitsProcessor(n), prompt, 18))


@given(st.integers(0, 30), st.integers(2, 11))
@settings(max_examples=10)
def test_long_passages_come_twice_only_where_no_candidate_is_new(seed, top_k):
    stub = bigrams(25, scale=6.0, seed=seed)
    text = walk_on(stub, MomentumLogitsProcessor(top_k=top_k), PROMPT, 60)
    free = 0
    for length in range(7, 67):
        context = text[:, :length]
        candidates = stub(context).topk(top_k).indices
        if (circular_depth(context, candidates) == 0).any():
            assert circular_depth(context, text[:, length : length + 1]) < 4  # alpha f(4) = 1
            free += 1
    assert free


@given(st.integers(0, 30))
@settings(max_examples=10)
def test_new_most_probable_tokens_win_and_prefixes_agree(seed):
    stub = bigrams(40, seed=seed)
    prompt = torch.tensor([[1, 2]])
    long = walk_on(stub, MomentumLogitsProcessor(alpha=0.4), prompt, 25)
    assert torch.equal(long[:, :12], walk_on(stub, MomentumLogitsProcessor(alpha=0.4), prompt, 10))
    for length in range(2, 27):
        likeliest = stub(long[:, :length]).argmax(-1)
        if likeliest not in long[0, :length]:
            assert long[0, length] == likeliest


def test_states_of_one_processor():
    """It starts afresh for another sequence, and for rows that changed places."""
    stub, processor = bigrams(), MomentumLogitsProcessor()
    first = walk_on(stub, processor, PROMPT, 15)
    walk_on(stub, processor, PROMPT[:, :3], 7)
    assert torch.equal(walk_on(stub, processor, PROMPT, 15), first)
    both = torch.cat([first, first.flip(1)])
    fresh = [MomentumLogitsProcessor()(both, stub(both)), processor(both, stub(both))]
    torch.testing.assert_close(*fresh)
    turned = torch.cat([both.flip(0), torch.tensor([[1], [2]])], 1)
    fresh = [MomentumLogitsProcessor()(turned, stub(turned)), processor(turned, stub(turned))]
    torch.testing.assert_close(*fresh)
    skipping = MomentumLogitsProcessor(ignore_prompt=True)
    walk_on(stub, skipping, PROMPT, 3)
    skipping.reset()
    assert torch.equal(
        walk_on(stub, skipping, PROMPT, 9),
        walk_on(stub, MomentumLogitsProcessor(ignore_prompt=True), PROMPT, 9),
    )


def test_candidates_and_ties():
    ids = torch.tensor([[4, 4, 4, 4, 4, 4]])
    scores = torch.tensor([[0.0, -math.inf, 3.0, -math.inf, 5.0]])
    found = MomentumLogitsProcessor(top_k=4)(ids, scores)
    p = scores.softmax(-1)
    expected = torch.tensor([[p[0, 0], -math.inf, p[0, 2], -math.inf, p[0, 4] - 1]])
    torch.testing.assert_close(found, expected)
    # All forbidden: the most probable one. One candidate with probability 0 in float32 is new.
    forbidden = MomentumLogitsProcessor(top_k=2, resistance=(math.inf, math.inf))
    assert int(forbidden(ids, scores).argmax()) == 4
    sure = torch.tensor([[-500.0, 0.0]])
    assert int(MomentumLogitsProcessor()(torch.ones(1, 9, dtype=torch.long), sure).argmax()) == 0
    even = torch.zeros(1, 5, dtype=torch.bfloat16)
    assert int(MomentumLogitsProcessor(top_k=1)(ids, even).argmax()) == 0
    deep = MomentumLogitsProcessor(resistance=(0, 1), max_depth=9)
    assert deep.penalties == (0, *[0.2] * 9)


def test_ignored_prompt():
    scores = torch.tensor([[0.0, 1.0, 2.0]])
    ids = torch.tensor([[0, 1, 2, 0, 1]])
    free = MomentumLogitsProcessor(ignore_prompt=True)
    torch.testing.assert_close(free(ids, scores), scores.softmax(-1))
    free(torch.cat([ids, torch.tensor([[2]])], 1), scores)
    found = free(torch.cat([ids, torch.tensor([[2, 0]])], 1), scores)
    torch.testing.assert_close(found, scores.softmax(-1) - 0.2 * torch.tensor([[1, 0, 1]]))


@pytest.mark.parametrize("told", ["mask", "pad"])
@pytest.mark.parametrize("ignore_prompt", [False, True])
def test_a_batch_is_its_rows(model, told, ignore_prompt):
    method = MomentumDecoding(ignore_prompt=ignore_prompt)
    rows = [[5, 6, 7, 5, 6], [8, 9], [3, 3, 3, 3, 3, 3, 3]]
    ids = torch.tensor([[0] * (7 - len(row)) + row for row in rows])
    mask = {"attention_mask": (ids > 0).long()} if told == "mask" else {}
    with method(model) as run:
        found = model.generate(ids, max_new_tokens=30, **mask)
        assert run.tokens == 90
        for row, together in zip(rows, found, strict=True):
            alone = model.generate(torch.tensor([row]), max_new_tokens=30)
            assert torch.equal(alone[0, len(row) :], together[7:])
    again = model.generate(ids, max_new_tokens=30, custom_generate=method.custom_generate, **mask)
    assert torch.equal(again, found)
    assert run.reranked > 0


def test_forms_agree_and_leave_no_trace(model):
    ids, length = PROMPT, {"max_new_tokens": 25}
    before, state = dict(vars(model)), {k: v.clone() for k, v in model.state_dict().items()}
    plain = model.generate(ids, do_sample=False, **length)
    method = MomentumDecoding(alpha=0.3, resistance="gpt2xl_head")
    block = method(model)
    with block as run:
        inside = model.generate(ids, **length)
    with block as other:  # once more
        assert torch.equal(model.generate(ids, None, LogitsProcessorList(), **length), inside)
    assert run == other
    processor = MomentumLogitsProcessor(0.3, resistance="gpt2xl_head")
    found = model.generate(ids, do_sample=False, logits_processor=[processor], **length)
    assert torch.equal(found, inside)
    assert processor.run == run
    custom = model.generate(ids, custom_generate=method.custom_generate, **length)
    assert torch.equal(custom, inside)
    assert vars(model) == before
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(model.generate(ids, do_sample=False, **length), plain)
    assert not torch.equal(plain, inside)


def test_the_configuration_of_the_model_may_sample(model):
    custom, length = MomentumDecoding().custom_generate, {"max_new_tokens": 20}
    expected = model.generate(PROMPT, custom_generate=custom, **length)
    model.generation_config.do_sample = True
    try:
        with MomentumDecoding()(model):
            assert torch.equal(model.generate(PROMPT, **length), expected)
            with pytest.raises(ValueError, match="do_sample, num_beams: expected neither"):
                model.generate(PROMPT, do_sample=True)
            with pytest.raises(ValueError, match="do_sample, num_beams: expected neither"):
                model.generate(PROMPT, num_beams=2)
        with pytest.raises(ValueError, match="do_sample, num_beams: expected neither"):
            model.generate(PROMPT, custom_generate=custom, **length)
    finally:
        model.generation_config.do_sample = False


def test_processors_of_the_call_come_first(model):
    method = MomentumDecoding()
    with method(model) as run:
        found = model.generate(PROMPT, max_new_tokens=12, bad_words_ids=[[i] for i in range(20)])
        assert found[0, 7:].min() >= 20
        twice = method(model)
        with pytest.warns(DecodingWarning, match="no token was generated"), twice:
            pass
    assert run.tokens == 12


def test_finished_rows_are_left_alone(model):
    ids = torch.tensor([[5, 6], [8, 9]])
    with MomentumDecoding()(model) as run:
        free = model.generate(ids, max_new_tokens=20)
        end = int(free[0, 5])
        cut = model.generate(ids, max_new_tokens=20, eos_token_id=end, pad_token_id=0)
    lengths = [row[2:].tolist().index(end) + 1 if end in row[2:] else 20 for row in free]
    for row, length in enumerate(lengths):
        assert torch.equal(cut[row, : 2 + length], free[row, : 2 + length])
        assert int(cut[row, 2 + length :].sum()) == 0
    assert run.tokens == 40 + sum(lengths)


def test_embeddings_as_prompt(model):
    embedded = model.get_input_embeddings()(PROMPT)
    length = {"max_new_tokens": 15}
    processor = MomentumLogitsProcessor(ignore_prompt=True)
    expected = model.generate(PROMPT, do_sample=False, logits_processor=[processor], **length)
    given = {"inputs_embeds": embedded, "attention_mask": torch.ones_like(PROMPT)}
    with MomentumDecoding()(model):
        assert torch.equal(model.generate(**given, **length), expected[:, 7:])
    custom = model.generate(**given, **length, custom_generate=MomentumDecoding().custom_generate)
    assert torch.equal(custom, expected[:, 7:])


def test_encoder_and_decoder():
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(
        vocab_size=29,
        d_model=16,
        d_kv=8,
        d_ff=16,
        num_layers=1,
        num_heads=2,
        decoder_start_token_id=0,
    )
    t5 = T5ForConditionalGeneration(config).eval()
    ids = torch.tensor([[5, 6, 7, 8], [0, 0, 9, 10]])  # masked for the encoder alone
    given = {"input_ids": ids, "attention_mask": (ids > 0).long(), "max_new_tokens": 12}
    method = MomentumDecoding(alpha=0.5)
    with method(t5) as run:
        inside = t5.generate(**given, suppress_tokens=[1])
    custom = t5.generate(**given, suppress_tokens=[1], custom_generate=method.custom_generate)
    assert torch.equal(custom, inside)
    processor = MomentumLogitsProcessor(alpha=0.5, pad_token_id=0)
    found = t5.generate(**given, suppress_tokens=[1], logits_processor=[processor])
    assert torch.equal(found, inside)
    assert run.tokens == 24


def test_wrong_arguments(model):
    with pytest.raises(ValueError, match="alpha: expected a finite number from 0"):
        MomentumDecoding(alpha=-1)
    with pytest.raises(ValueError, match="top_k: expected at least 1"):
        MomentumDecoding(top_k=0)
    with pytest.raises(ValueError, match="resistance: expected one of dec2022"):
        MomentumDecoding(resistance="ours")
    with pytest.raises(ValueError, match="resistance: expected one of dec2022"):
        MomentumLogitsProcessor(resistance=(0, -1))
    with pytest.raises(ValueError, match="max_depth: expected at least 1"):
        MomentumDecoding(max_depth=0)
    with pytest.raises(ValueError, match="model: expected one with generate"):
        MomentumDecoding()(torch.nn.Linear(1, 1))
    mask = torch.ones(1, 9, dtype=torch.long)
    with pytest.raises(ValueError, match="attention_mask: expected one for the prompt"):
        MomentumLogitsProcessor(attention_mask=mask)(PROMPT, torch.zeros(1, 29))
