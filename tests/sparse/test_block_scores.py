"""Block sums of attention maps against the maps themselves."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attending.core.block_plan import BlockPlan
from attending.core.blocks import block_statistics
from attending.sparse import block_scores
from attending.sparse.block_scores import (
    block_lse_slabs,
    block_probabilities,
    block_shares,
    block_sums,
)


def whole_map(query, key, *, hidden=None, scale=None):
    """The softmax of all scores, rows that see nothing as zeros."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1).double()
    scores = query.double() @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if hidden is not None:
        scores = scores.masked_fill(hidden, -math.inf)
    return scores.softmax(-1).nan_to_num(0.0)


def cell_by_cell(weights, height, width):
    """The definition, one block at a time."""
    rows, columns = (
        range(0, n, side) for n, side in zip(weights.shape[2:], (height, width), strict=True)
    )
    return torch.stack(
        [
            torch.stack(
                [weights[:, :, i : i + height, j : j + width].sum((2, 3)) for j in columns], -1
            )
            for i in rows
        ],
        2,
    )


@st.composite
def cases(draw):
    torch.manual_seed(draw(st.integers(0, 1000)))
    kv_heads, groups, batch = draw(st.sampled_from([(1, 1, 1), (2, 1, 2), (2, 3, 1), (1, 4, 2)]))
    queries, keys = draw(st.integers(1, 23)), draw(st.integers(1, 23))
    block_size = draw(st.sampled_from([1, 3, 8, 50, (4, 7), (7, 2)]))
    query = torch.randn(batch, kv_heads * groups, queries, 5, dtype=torch.float64) * 3
    return query, torch.randn(batch, kv_heads, keys, 5, dtype=torch.float64), block_size


@settings(max_examples=60, deadline=None)
@given(cases(), st.booleans(), st.sampled_from([None, 0.3]), st.sampled_from([1, 200, 2**20]))
def test_sums_of_the_map(case, is_causal, scale, slab):
    query, key, block_size = case
    sides = (block_size, block_size) if isinstance(block_size, int) else block_size
    rows, columns = query.shape[2], key.shape[2]
    hidden = None
    if is_causal:
        hidden = torch.arange(columns) > torch.arange(rows)[:, None] + columns - rows
    expected = cell_by_cell(whole_map(query, key, hidden=hidden, scale=scale), *sides)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block_scores, "SLAB_SCORES", slab)
        found = block_probabilities(query, key, block_size, is_causal=is_causal, scale=scale)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(cases(), st.booleans())
def test_masks_and_rows_that_see_nothing(case, is_float):
    query, key, block_size = case
    visible = torch.rand(query.shape[0], 1, query.shape[2], key.shape[2]) < 0.5
    visible[:, :, 0] = False
    mask = visible if not is_float else torch.zeros(visible.shape).masked_fill(~visible, -math.inf)
    sides = (block_size, block_size) if isinstance(block_size, int) else block_size
    expected = cell_by_cell(whole_map(query, key, hidden=~visible), *sides)
    found = block_probabilities(query, key, block_size, attn_mask=mask)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_as_the_statistics_of_a_dense_plan():
    query, key = torch.randn(2, 4, 100, 8), torch.randn(2, 2, 130, 8)
    plan = BlockPlan.from_block_mask(
        torch.ones(4, 5, dtype=torch.bool), block_size=(32, 32), query_length=100, key_length=130
    )
    scores = query @ key.repeat_interleave(2, 1).mT / math.sqrt(8)
    mass = block_statistics(query, key, plan, scores.logsumexp(-1)).mass
    found = block_probabilities(query, key, 32)
    torch.testing.assert_close(found, block_scores.sum_rows(mass, 32), rtol=1e-5, atol=1e-5)


def test_the_softmax_of_a_part_does_not_underflow():
    query = torch.ones(1, 1, 4, 1)
    key = torch.tensor([300.0, 300, 300, 300, 0, 1, 2, 3])[None, None, :, None]
    (lse,) = block_lse_slabs(query, key, 2, scale=1.0)
    expected = torch.tensor([0.0, 1, 2, 3]).softmax(0).view(2, 2).sum(-1)
    torch.testing.assert_close(block_shares(lse[..., 2:])[0, 0, 0], expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_float32(dtype):
    query, key = torch.randn(1, 2, 40, 8).to(dtype), torch.randn(1, 2, 40, 8).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = block_probabilities(query, key, 16)
    assert found.dtype == torch.float32
    expected = block_sums(whole_map(query, key), 16).float()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_no_queries_and_no_keys():
    assert block_probabilities(torch.ones(1, 2, 0, 4), torch.ones(1, 2, 9, 4), 4).shape == (
        (1, 2, 0, 3)
    )
    assert block_probabilities(torch.ones(1, 2, 9, 4), torch.ones(1, 2, 0, 4), 4).shape == (
        (1, 2, 3, 0)
    )


def test_leaves_no_graph():
    query = torch.randn(1, 1, 8, 4, requires_grad=True)
    assert not block_probabilities(query, query, 4).requires_grad
    assert not next(block_lse_slabs(query, query, 4)).requires_grad


def test_bad_block_size():
    query = torch.randn(1, 1, 8, 4)
    for size in (0, (4, -1), (4, 4, 4)):
        with pytest.raises(ValueError, match="block_size: expected"):
            block_probabilities(query, query, size)
