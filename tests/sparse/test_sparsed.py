"""SparseD's planner against the official masks, a reference in loops, and what must always hold."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attending.core.blocks import block_sparse_attention
from attending.sparse.block_scores import block_sums
from attending.sparse.sparsed import (
    _highest,
    first_new_block,
    kept_blocks,
    sparsed_mask,
    sparsed_plan,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "sparsed"


def load(name: str) -> dict[str, torch.Tensor]:
    with np.load(GOLDEN / f"{name}.npz") as file:
        return {key: torch.from_numpy(np.asarray(file[key])) for key in file.files}


@pytest.mark.parametrize("name", ["mask_aligned", "mask_ragged"])
def test_golden_masks(name: str) -> None:
    golden = load(name)
    query, key, value = golden["q"], golden["k"], golden["v"]
    chosen = {"select": float(golden["select"]), "block_size": int(golden["block_size"])}
    new_tokens = int(golden["new_generation"])
    first = first_new_block(query.shape[2], chosen["block_size"], new_tokens)
    assert first == int(golden["first_generation_block"])
    plan = sparsed_plan(query, key, new_tokens, **chosen)
    assert torch.equal(plan.block_mask, golden["mask_head_dim_scale"])
    of_llada = sparsed_mask(query, key, new_tokens, scale=query.shape[1] ** -0.5, **chosen)
    assert torch.equal(of_llada, golden["mask_llada_official_sqrt_heads"])
    output = block_sparse_attention(query, key, value, plan).output
    torch.testing.assert_close(output, golden["out_head_dim_scale"], rtol=0, atol=1e-10)


def test_golden_helper() -> None:
    golden = load("block_topk")
    masses = block_sums(golden["attn_weights"], int(golden["block_size"]))
    everything = torch.ones(1, 1, masses.shape[-1], dtype=torch.bool)
    found = _highest(masses, everything, float(golden["keep_ratio"]), 1.0)
    assert torch.equal(found, golden["block_mask"])


def reference(query, key, new_tokens, select, size, isolated=False, count_real=False, visible=None):
    """The definition, a cell at a time, in float64; `visible` is `[batch, tokens]`."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1).double()
    scores = query.double() @ key.mT / math.sqrt(query.shape[-1])
    batch, heads, tokens, _ = scores.shape
    blocks = math.ceil(tokens / size)
    if visible is None:
        visible = torch.ones(batch, tokens, dtype=torch.bool)
    scores = scores.masked_fill(~visible[:, None, None], -math.inf)
    first = next((i for i in range(blocks) if tokens - i * size <= new_tokens), blocks - 1)
    kept = torch.zeros(batch, heads, blocks, blocks, dtype=torch.bool)

    def choose(b, h, row, start, end, only):
        """Of the blocks from start to end, ranked in their own softmax, note those of `only`."""
        keys = slice(start * size, end * size)
        means = {}
        for block in range(start, end):
            columns = range(block * size, min((block + 1) * size, tokens))
            if not visible[b, columns].any():
                continue
            total = 0.0
            for i in range(row * size, min((row + 1) * size, tokens)):
                if visible[b, i] and visible[b, keys].any():
                    shares = scores[b, h, i, keys].softmax(-1)
                    total += float(shares[[j - start * size for j in columns]].sum())
            means[block] = total / (size * (len(columns) if count_real else size))
        best = sorted(means, key=lambda block: -means[block])
        count = max(1, int(len(means) * select) + 1)
        for block in best[:count]:
            if block in only:
                kept[b, h, row, block] = True

    for b in range(batch):
        for h in range(heads):
            for row in range(blocks):
                if visible[b, row * size : (row + 1) * size].any():
                    choose(b, h, row, 0, first if isolated else blocks, range(first))
                    choose(b, h, row, first, blocks, range(first, blocks))
    return kept


@st.composite
def cases(draw, max_tokens=26):
    torch.manual_seed(draw(st.integers(0, 1000)))
    tokens = draw(st.integers(1, max_tokens))
    batch, heads, kv_heads = draw(st.sampled_from([(1, 1, 1), (2, 2, 1), (1, 4, 2)]))
    query = torch.randn(batch, heads, tokens, 6, dtype=torch.float64) * 2
    key = torch.randn(batch, kv_heads, tokens, 6, dtype=torch.float64)
    return query, key, draw(st.integers(0, tokens + 2)), draw(st.sampled_from([1, 3, 4, 8]))


shares = st.sampled_from([0.0, 0.2, 0.3, 0.5, 0.8, 1.0])


@settings(max_examples=30, deadline=None)
@given(cases(20), shares, st.booleans(), st.booleans())
def test_as_the_reference(case, select, isolated, count_real):
    query, key, new_tokens, size = case
    ways = {"isolated": isolated, "count_real": count_real}
    found = sparsed_mask(query, key, new_tokens, select=select, block_size=size, **ways)
    assert torch.equal(found, reference(query, key, new_tokens, select, size, **ways))


@settings(max_examples=30, deadline=None)
@given(cases(20), shares, st.booleans(), st.data())
def test_padding_on_the_left_as_the_reference(case, select, isolated, data):
    query, key, new_tokens, size = case
    tokens = query.shape[2]
    padded = torch.tensor([[data.draw(st.integers(0, tokens - 1))] for _ in query])
    visible = torch.arange(tokens) >= padded
    found = sparsed_mask(
        query,
        key,
        new_tokens,
        select=select,
        block_size=size,
        isolated=isolated,
        attn_mask=visible[:, None, None],
    )
    expected = reference(query, key, new_tokens, select, size, isolated, visible=visible)
    assert torch.equal(found, expected)


@settings(max_examples=60, deadline=None)
@given(cases(), shares, st.booleans())
def test_what_every_row_keeps(case, select, isolated):
    query, key, new_tokens, size = case
    mask = sparsed_mask(query, key, new_tokens, select=select, block_size=size, isolated=isolated)
    blocks = mask.shape[-1]
    first = first_new_block(query.shape[2], size, new_tokens)
    whole = kept_blocks(first if isolated else blocks, select)
    own = kept_blocks(blocks - first, select)
    prompt, answer = mask[..., :first].sum(-1), mask[..., first:].sum(-1)
    assert own >= 1
    assert (answer == own).all()
    assert (prompt == whole).all() if isolated and first else (prompt <= whole).all()
    if select == 1:
        assert mask.all()


@settings(max_examples=40, deadline=None)
@given(cases(), shares, st.integers(0, 100))
def test_order_within_a_block_does_not_matter(case, select, seed):
    query, key, new_tokens, size = case
    torch.manual_seed(seed)
    tokens = query.shape[2]
    order = torch.cat(
        [start + torch.randperm(min(size, tokens - start)) for start in range(0, tokens, size)]
    )
    ways = {"select": select, "block_size": size}
    before = sparsed_mask(query, key, new_tokens, **ways)
    after = sparsed_mask(query[:, :, order], key[:, :, order], new_tokens, **ways)
    assert torch.equal(before, after)


@settings(max_examples=30, deadline=None)
@given(cases(), shares)
def test_grouped_heads_as_repeated_ones(case, select):
    query, key, new_tokens, size = case
    ways = {"select": select, "block_size": size}
    repeated = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    found = sparsed_mask(query, key, new_tokens, **ways)
    assert torch.equal(found, sparsed_mask(query, repeated, new_tokens, **ways))


def test_the_answer_keeps_its_share_where_the_prompt_outshines_it():
    query = torch.ones(1, 1, 64, 1)
    key = torch.cat([torch.full((1, 1, 32, 1), 200.0), torch.arange(32.0).view(1, 1, 32, 1)], 2)
    mask = sparsed_mask(query, key, 32, select=0.3, block_size=8)
    assert mask[0, 0, 0].tolist() == [True, True, True, False, False, False, True, True]


def test_the_answer_takes_places_from_the_prompt_unless_isolated():
    query = torch.ones(1, 1, 64, 1)
    key = torch.cat([torch.zeros(1, 1, 32, 1), torch.full((1, 1, 32, 1), 9.0)], 2)
    ways = {"select": 0.3, "block_size": 8}
    assert not sparsed_mask(query, key, 32, **ways)[..., :4].any()
    assert (sparsed_mask(query, key, 32, isolated=True, **ways)[..., :4].sum(-1) == 2).all()


def test_a_short_last_block_counts_by_its_tokens():
    query, key = torch.ones(1, 1, 17, 1), torch.zeros(1, 1, 17, 1)
    key[:, :, 16:] = 1.0  # one token, more likely than any other
    ways = {"select": 0.0, "block_size": 8}
    assert sparsed_mask(query, key, **ways)[0, 0, 0].tolist() == [True, False, False]
    found = sparsed_mask(query, key, count_real=True, **ways)
    assert found[0, 0, 0].tolist() == [False, False, True]


def test_without_a_prompt_all_blocks_are_ranked_together():
    query, key = torch.randn(1, 2, 40, 8), torch.randn(1, 2, 40, 8)
    ways = {"select": 0.4, "block_size": 8}
    joint = sparsed_mask(query, key, **ways)
    assert torch.equal(joint, sparsed_mask(query, key, 40, **ways))
    assert (joint.sum(-1) == 3).all()


def test_half_precision_is_pooled_in_float32():
    query, key = (torch.randn(1, 2, 96, 16).bfloat16() for _ in range(2))
    ways = {"select": 0.3, "block_size": 16}
    expected = sparsed_mask(query.float(), key.float(), 32, **ways)
    assert torch.equal(sparsed_mask(query, key, 32, **ways), expected)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"select": 1.2}, "select: expected a share"),
        ({"select": -0.1}, "select: expected a share"),
        ({"block_size": 0}, "block_size: expected at least 1 token"),
        ({"new_tokens": -1}, "new_tokens: expected the length"),
        ({"key": torch.ones(1, 1, 9, 4)}, "key: expected the 8 tokens of query"),
        ({"scale": math.inf}, "scale: expected a finite number"),
    ],
)
def test_bad_arguments(change, named):
    query = torch.ones(1, 1, 8, 4)
    with pytest.raises(ValueError, match=named):
        sparsed_mask(**{"query": query, "key": query, "new_tokens": 4, **change})
