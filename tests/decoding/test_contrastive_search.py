"""Contrastive search, against its formula with a full forward for each candidate."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attending.decoding.contrastive_search import ContrastiveSearch, contrastive_scores


@torch.no_grad()
def by_definition(model, ids, alpha, top_k, steps):
    """The reference: no cache, no batch; every candidate in a forward of its own."""
    for _ in range(steps):
        p, candidates = model(ids).logits[0, -1].softmax(-1).topk(top_k)
        scores = []
        for probability, candidate in zip(p, candidates, strict=True):
            longer = torch.cat([ids, candidate[None, None]], 1)
            states = model(longer, output_hidden_states=True).hidden_states[-1][0]
            cosine = torch.cosine_similarity(states[-1:], states[:-1]).max()
            scores.append((1 - alpha) * probability - alpha * cosine)
        ids = torch.cat([ids, candidates[torch.stack(scores).argmax()][None, None]], 1)
    return ids


@pytest.mark.parametrize(("alpha", "top_k"), [(0.6, 4), (0.3, 2), (1.0, 3)])
def test_by_definition(model, alpha, top_k):
    ids = torch.tensor([[5, 6, 7, 5, 6]])
    method = ContrastiveSearch(alpha, top_k)
    before = dict(vars(model))
    with method(model) as run:
        found = model.generate(ids, max_new_tokens=20)
    assert torch.equal(found, by_definition(model, ids, alpha, top_k, 20))
    assert run.tokens == 20
    assert run.reranked > 0
    custom = model.generate(ids, max_new_tokens=20, custom_generate=method.custom_generate)
    assert torch.equal(custom, found)
    assert vars(model) == before


@pytest.mark.parametrize("limit", [{"alpha": 0.0}, {"top_k": 1}])
def test_greedy_is_a_limit(model, limit):
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    with ContrastiveSearch(**limit)(model) as run:
        found = model.generate(ids, max_new_tokens=20)
    assert torch.equal(found, model.generate(ids, do_sample=False, max_new_tokens=20))
    assert run.reranked == 0


def test_a_batch_is_its_rows_and_they_end(model):
    rows = [[5, 6, 7, 5, 6], [8, 9], [3, 3, 3]]
    ids = torch.tensor([[0] * (5 - len(row)) + row for row in rows])
    with ContrastiveSearch()(model) as run:
        mask = {"attention_mask": (ids > 0).long()}
        found = model.generate(ids, max_new_tokens=20, **mask)
        for row, together in zip(rows, found, strict=True):
            alone = model.generate(torch.tensor([row]), max_new_tokens=20)
            assert torch.equal(alone[0, len(row) :], together[5:])
        assert run.tokens == 120
        end = int(found[0, 9])
        cut = model.generate(
            ids, max_new_tokens=20, eos_token_id=end, return_dict_in_generate=True, **mask
        ).sequences
    for row, whole in zip(cut[:, 5:].tolist(), found[:, 5:].tolist(), strict=True):
        length = whole.index(end) + 1 if end in whole else 20
        assert row[:length] == whole[:length]
        assert not any(row[length:])


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 5), st.floats(0, 1))
def test_scores(batch, candidates, tokens, alpha):
    p = torch.rand(batch, candidates)
    states, context = torch.randn(batch, candidates, 6), torch.randn(batch, tokens, 6)
    found = contrastive_scores(p, states, context, alpha)
    similar = torch.cosine_similarity(states[:, :, None], context[:, None], dim=-1).amax(-1)
    torch.testing.assert_close(found, (1 - alpha) * p - alpha * similar)
    mask = torch.ones(batch, tokens + 2, dtype=torch.bool)
    mask[:, :2] = False
    padded = torch.cat([states[:, :1].expand(-1, 2, -1), context], 1)
    torch.testing.assert_close(contrastive_scores(p, states, padded, alpha, mask), found)


def test_wrong_arguments(model):
    with pytest.raises(ValueError, match="alpha: expected a number from 0 to 1"):
        ContrastiveSearch(alpha=2)
    with pytest.raises(ValueError, match="top_k: expected at least 1"):
        ContrastiveSearch(top_k=0)
    ids = torch.tensor([[5, 6]])
    with ContrastiveSearch()(model) as run:
        with pytest.raises(ValueError, match="expected neither, as contrastive search"):
            model.generate(ids, do_sample=True)
        with pytest.raises(ValueError, match="custom_generate: expected none"):
            model.generate(ids, custom_generate=ContrastiveSearch().custom_generate)
        with pytest.raises(ValueError, match="hidden states and a cache"):
            model.generate(ids, use_cache=False, max_new_tokens=2)
        model.generate(ids, max_new_tokens=1)
    assert str(run) == f"contrastive search: 1 tokens, {run.reranked} not the most probable"
