"""The circular depth, of tensors and token by token, against golden vectors and brute force."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attending.decoding.walk import Walk, circular_depth

GOLDEN = Path(__file__).parents[1] / "golden" / "momentum-decoding" / "depth.npz"


def by_definition(context, candidate, max_depth):
    """The reference: look for each n-gram everywhere."""
    found = 0
    for n in range(1, min(max_depth, len(context)) + 1):
        gram = [*context[len(context) - n + 1 :], candidate]
        if any(context[i : i + n] == gram for i in range(len(context) - n + 1)):
            found = n
    return found


def test_golden():
    with np.load(GOLDEN) as arrays:
        golden = {name: torch.from_numpy(np.asarray(arrays[name])) for name in arrays}
    contexts, max_depth = golden["ctx"], int(golden["max_depth"])
    candidates = torch.arange(int(golden["vocab"]))[None].expand(len(contexts), -1)
    for row, length in enumerate(golden["lengths"].tolist()):
        context = contexts[row : row + 1, :length]
        found = circular_depth(context, candidates[:1], max_depth)
        assert torch.equal(found[0], golden["depth"][row])
        walk = Walk(max_depth, context[0].tolist())
        assert walk.depths(candidates[0].tolist()) == golden["depth"][row].tolist()
    # The same as one batch, its padding moved to the left.
    moved = torch.stack(
        [row.roll(-int(n)) for row, n in zip(contexts, golden["lengths"], strict=True)]
    )
    found = circular_depth(moved, candidates, max_depth, (moved >= 0).long())
    assert torch.equal(found, golden["depth"])


@given(
    st.lists(st.integers(0, 3), max_size=25),
    st.integers(1, 7),
    st.integers(0, 4),
    st.integers(0, 3),
)
def test_by_brute_force(context, max_depth, padding, common):
    candidates = [common, 0, 1, 2, 3, 9]
    expected = [by_definition(context, candidate, max_depth) for candidate in candidates]
    walk = Walk(max_depth)
    walk.extend(context)
    assert walk.depths(candidates) == expected
    # Padding is made of a token that occurs, too.
    ids = torch.tensor([[common] * padding + context], dtype=torch.int64)
    mask = (torch.arange(ids.shape[1]) >= padding)[None]
    found = circular_depth(ids, torch.tensor([candidates]), max_depth, mask)
    assert found.tolist() == [expected]


def test_where_the_text_goes_round():
    text = [1, 2, 3, 4, 1, 2, 3, 4, 5, 6]
    depths = [Walk(5, text[:i]).depths([token])[0] for i, token in enumerate(text)]
    assert depths == [0, 0, 0, 0, 1, 2, 3, 4, 0, 0]


def test_nothing_yet():
    assert Walk(5).depths([1, 2]) == [0, 0]
    empty = torch.zeros(2, 0, dtype=torch.int64)
    assert circular_depth(empty, torch.tensor([[1], [2]])).tolist() == [[0], [0]]


def test_wrong_arguments():
    ids = torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match="max_depth: expected at least 1, got 0"):
        Walk(0)
    with pytest.raises(ValueError, match="max_depth: expected at least 1, got 0"):
        circular_depth(ids, ids, 0)
    with pytest.raises(ValueError, match="input_ids, candidates: expected"):
        circular_depth(ids, ids[:1])
    with pytest.raises(ValueError, match="input_ids, candidates: expected"):
        circular_depth(ids.float(), ids)
    with pytest.raises(ValueError, match="attention_mask: expected"):
        circular_depth(ids, ids, attention_mask=ids[:, :2])
