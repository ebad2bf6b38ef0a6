"""Coherence and greedy ratio, by the definition, on a real model."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attending.probes.continuations import coherence, greedy_ratio, score_continuations


@pytest.fixture(scope="module")
def model():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=23,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        eos_token_id=None,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).train()


@given(st.integers(1, 4), st.integers(2, 9), st.sampled_from([torch.float32, torch.bfloat16]))
def test_by_definition(texts, tokens, dtype):
    logits = 3 * torch.randn(texts, tokens, 7, dtype=torch.float64).to(dtype)
    ids = torch.randint(0, 7, (texts, tokens))
    scored = torch.rand(texts, tokens) < 0.5
    scored[:, 0] = False
    log_p = logits.double().log_softmax(-1)
    likely, ratio = coherence(logits, ids, scored), greedy_ratio(logits, ids, scored)
    assert likely.dtype == torch.float32
    for row in range(texts):
        where = [t for t in range(1, tokens) if scored[row, t]]
        if not where:
            assert likely[row].isnan()
            assert ratio[row].isnan()
            continue
        mean = sum(float(log_p[row, t - 1, ids[row, t]]) for t in where) / len(where)
        right = sum(int(logits[row, t - 1].argmax()) == int(ids[row, t]) for t in where)
        assert float(likely[row]) == pytest.approx(mean, abs=1e-5)
        assert float(ratio[row]) == pytest.approx(right / len(where))


@pytest.mark.parametrize("bos", [None, 1])
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_padding_and_order_do_not_matter(model, bos, batch_size):
    prompts = [[5, 6, 7], [8], [9, 10, 11, 12], [3, 4]]
    continuations = [[1, 2], [2] * 9, [], torch.tensor([7, 7, 7])]
    found = score_continuations(
        model, prompts, continuations, bos_token_id=bos, batch_size=batch_size
    )
    assert model.training
    model.eval()
    for index, (prompt, continued) in enumerate(zip(prompts, continuations, strict=True)):
        start = ([bos] if bos is not None else []) + prompt
        ids = torch.tensor([start + list(continued)])
        with torch.no_grad():
            logits = model(input_ids=ids).logits
        scored = torch.arange(ids.shape[1])[None] >= len(start)
        expected = coherence(logits, ids, scored)[0]
        torch.testing.assert_close(found.coherence[index], expected, equal_nan=True)
        ratio = greedy_ratio(logits, ids, scored)[0]
        torch.testing.assert_close(found.greedy_ratio[index], ratio, equal_nan=True)
    model.train()


def test_greedy_text_has_ratio_one(model):
    prompt = torch.tensor([[5, 6, 7]])
    written = model.eval().generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=12,
    )[0, 3:]
    greedy = score_continuations(model.train(), [prompt[0]], [written])
    other = score_continuations(model, [prompt[0]], [(written + 1) % 23])
    assert greedy.greedy_ratio.tolist() == [1]
    assert greedy.coherence > other.coherence


def test_wrong_arguments(model):
    logits, ids = torch.rand(1, 3, 5), torch.zeros(1, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match="continuation: expected False for the first token"):
        coherence(logits, ids, torch.ones(1, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="logits, input_ids, continuation: expected"):
        greedy_ratio(logits, ids, torch.ones(1, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="continuations: expected one for each prompt"):
        score_continuations(model, [[1]], [])
    with pytest.raises(ValueError, match="got none in prompt 1"):
        score_continuations(model, [[1], []], [[2], [3]])
