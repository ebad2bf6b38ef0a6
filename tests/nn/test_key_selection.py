"""Which keys are kept: official masks, ties, and lifetimes against a top-w for each row."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attending.nn.key_selection import (
    keep_largest,
    keep_positive,
    key_lifetimes,
    smooth_blocks,
)
from tests.nn.reference_dynamic_mask import keep_mask

GOLDEN = Path(__file__).parents[1] / "golden" / "dynamic-mask-attention" / "mask_utils_case1.npz"


def test_golden_of_the_official_masks() -> None:
    with np.load(GOLDEN) as file:
        data = {name: torch.from_numpy(file[name]) for name in file.files}
    scores = data["bias"].masked_fill(~data["causal"], -torch.inf)
    kept = keep_largest(scores, int(data["window"]))
    assert torch.equal(kept, data["topk_mask"])
    smoothed = smooth_blocks(kept, int(data["block_size"]))
    assert torch.equal(smoothed, data["topk_mask_block_smoothed"])
    assert torch.equal(keep_positive(scores), data["relu_mask"])
    assert bool((smoothed & ~data["causal"]).any())  # as the docstring warns


@st.composite
def scored(draw: st.DrawFn) -> tuple[torch.Tensor, int]:
    """Scores with many ties, some keys hidden, and a window that may be larger than all."""
    keys = draw(st.integers(1, 40))
    values = st.sampled_from([0.0, 1.0, 2.0, -1.5, float("-inf")])
    numbers = draw(st.lists(values, min_size=2 * keys, max_size=2 * keys))
    return torch.tensor(numbers).view(1, 2, keys), draw(st.integers(1, keys + 3))


@given(scored())
@settings(max_examples=80, deadline=None)
def test_lifetimes_are_the_best_of_every_prefix(case: tuple[torch.Tensor, int]) -> None:
    delta, window = case
    keys = delta.shape[-1]
    row = torch.arange(keys)
    visible = (row <= row[:, None]) & (delta > -torch.inf)[:, :, None]
    expected = keep_mask(delta, visible, window)
    ends = key_lifetimes(delta, window)[:, :, None]
    assert torch.equal((row <= row[:, None]) & (row[:, None] < ends), expected)
    scores = delta[:, :, None].masked_fill(~visible, -torch.inf)
    assert torch.equal(keep_largest(scores, window), expected)
    assert torch.equal(expected.sum(-1), visible.sum(-1).clamp_max(window))


def test_ties_keep_the_most_recent_whatever_the_device_sorts() -> None:
    assert keep_largest(torch.zeros(1000), 3).nonzero().flatten().tolist() == [997, 998, 999]
    assert torch.equal(key_lifetimes(torch.zeros(1000), 3)[:5], torch.arange(3, 8))


def test_no_keys_and_one_key() -> None:
    assert key_lifetimes(torch.zeros(2, 0), 3).shape == (2, 0)
    assert keep_largest(torch.zeros(2, 0), 3).shape == (2, 0)
    assert key_lifetimes(torch.zeros(1), 1).tolist() == [1]


@pytest.mark.parametrize("window", [0, -1, 2.0, True])
def test_windows_that_are_none(window: int) -> None:
    with pytest.raises(ValueError, match=r"window: expected a number of keys of at least 1"):
        keep_largest(torch.zeros(3), window)
    with pytest.raises(ValueError, match=r"block_size: expected at least 1"):
        smooth_blocks(torch.ones(3, dtype=torch.bool), 0)
