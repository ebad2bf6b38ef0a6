import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from attending.sparse.language_tokens import (
    attention_from,
    density_clusters,
    recycle,
    relevant_text,
    sparse_vlm_schedule,
)


@given(
    queries=st.integers(1, 9),
    groups=st.sampled_from([1, 2]),
    masked=st.sampled_from(["none", "causal", "bool", "float"]),
)
def test_attention_from(queries: int, groups: int, masked: str) -> None:
    generator = torch.Generator().manual_seed(queries)
    query = torch.randn(2, 4, queries, 8, generator=generator).double()
    key = torch.randn(2, 4 // groups, queries, 8, generator=generator).double()
    visible = torch.ones(queries, queries, dtype=torch.bool).tril().expand(2, 1, -1, -1).clone()
    visible[1, :, 1:, 0] = False
    bias = torch.zeros(visible.shape).double().masked_fill(~visible, -torch.inf)
    mask = {"none": None, "causal": None, "bool": visible, "float": bias}[masked]
    weights = torch.rand(2, queries, generator=generator).double()
    found = attention_from(
        query, key, weights, attn_mask=mask, is_causal=masked == "causal", enable_gqa=groups == 2
    )
    eye = torch.eye(queries).double().expand(2, 4 // groups, -1, -1)
    probabilities = scaled_dot_product_attention(
        query, key, eye, attn_mask=mask, is_causal=masked == "causal", enable_gqa=groups == 2
    )
    torch.testing.assert_close(found, torch.einsum("bhqk,bq->bk", probabilities, weights) / 4)


def test_relevant_text() -> None:
    text = torch.eye(4)[None] * 5
    visual = torch.stack([text[0, 1], text[0, 1], text[0, 3]])[None]
    assert relevant_text(visual, text)[0].tolist() == [False, True, False, True]
    mask = torch.tensor([[True, False, True, False]])
    rated = relevant_text(visual, text, mask)
    assert rated.any()
    assert not (rated & ~mask).any()
    with pytest.raises(ValueError, match="text_mask: expected at least one"):
        relevant_text(visual, text, torch.zeros(1, 4, dtype=torch.bool))


def test_schedule() -> None:
    assert sparse_vlm_schedule(32, 64, 576) == {2: 66, 6: 30, 15: 17}
    assert sparse_vlm_schedule(32, 128, 576) == {2: 303, 6: 110, 15: 36}
    # With the merged tokens the mean over the layers is about the budget.
    total, last, tokens = 0, 0, 576
    for layer, count in (*sparse_vlm_schedule(32, 64, 576).items(), (32, 0)):
        total += (layer - last) * tokens
        tokens, last = count + int(0.3 * (tokens - count)) // 10 + 1, layer
    assert total / 32 == pytest.approx(64, abs=3)
    for layers in range(2, 40):
        for keep in (1, 16, 63):
            schedule = sparse_vlm_schedule(layers, keep, 64)
            assert schedule
            assert all(0 < layer < layers for layer in schedule)
            counts = list(schedule.values())
            assert counts == sorted(counts, reverse=True)
            assert min(counts) >= 1
            assert max(counts) < 64
    assert sparse_vlm_schedule(6, 200, 64) == {}
    with pytest.raises(ValueError, match="num_layers: expected at least 2"):
        sparse_vlm_schedule(1, 4, 64)


@given(tokens=st.integers(1, 40), keep=st.integers(1, 40), share=st.floats(0, 1))
def test_recycle(tokens: int, keep: int, share: float) -> None:
    generator = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(2, tokens, 3, generator=generator).double()
    scores = torch.rand(2, tokens, generator=generator)
    found = recycle(hidden, scores, keep, share=share)
    keep = min(keep, tokens)
    recycled = int(share * (tokens - keep))
    clusters = min(recycled // 10 + 1, recycled)
    assert found.index.shape == (2, keep + clusters)
    assert bool((found.index.diff(dim=-1) > 0).all())
    assert found.merged.sum(-1).tolist() == [clusters, clusters]
    for item in range(2):
        order = scores[item].argsort(descending=True).tolist()
        index, merged = found.index[item], found.merged[item]
        assert sorted(order[:keep]) == index[~merged].tolist()
        torch.testing.assert_close(found.tokens[item, ~merged], hidden[item, index[~merged]])
        assert set(index[merged].tolist()) <= set(order[keep : keep + recycled])
        if clusters == 1:
            mean = hidden[item, order[keep : keep + recycled]].mean(0, keepdim=True)
            torch.testing.assert_close(found.tokens[item, merged], mean)


def test_clusters_are_found() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = 20 * torch.eye(4)[:3]
    truth = torch.tensor([0] * 9 + [1] * 7 + [2] * 8)
    for spread in (0.1, 1.0):
        points = centres[truth] + spread * torch.randn(24, 4, generator=generator)
        chosen, cluster = density_clusters(points[None], 3)
        assert sorted(truth[chosen[0]].tolist()) == [0, 1, 2]
        for group in range(3):
            assert len(set(cluster[0, truth == group].tolist())) == 1
        assert cluster[0, chosen[0]].tolist() == [0, 1, 2]
        # Of large states all densities would be 0; then the densest count, not the first.
        chosen, _ = density_clusters(1e4 * points[None], 3)
        assert chosen[0].tolist() != [0, 1, 2]
        assert len(set(chosen[0].tolist())) == 3
    equal, cluster = density_clusters(torch.ones(1, 5, 2), 3)
    assert sorted(set(cluster[0].tolist())) == [0, 1, 2]
    assert len(set(equal[0].tolist())) == 3


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="keep: expected a whole number"):
        recycle(torch.ones(1, 4, 2), torch.ones(1, 4), 0)
    with pytest.raises(ValueError, match="share: expected a number from 0 to 1"):
        recycle(torch.ones(1, 4, 2), torch.ones(1, 4), 2, share=2.0)
