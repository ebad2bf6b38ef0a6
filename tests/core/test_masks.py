"""Masks taken apart: what is said of a mask is true of each of its entries."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from attending.core.masks import (
    hiding_bias,
    key_counts,
    mask_parts,
    seen_keys,
    simplest_mask,
    visible_entries,
)


def as_float(mask: Tensor, lowest: bool) -> Tensor:
    hidden = torch.finfo(torch.float32).min if lowest else -torch.inf
    return torch.zeros(mask.shape).masked_fill(~mask, hidden)


kinds = st.sampled_from(["bool", "lowest", "infinite"])
sizes = st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 5))


@given(sizes, kinds, st.booleans(), st.booleans(), st.integers(0, 10**6))
def test_padding_and_causality_are_found(size, kind, is_causal, padded, seed):
    batch, queries, keys = size
    keys = max(queries, keys)
    generator = torch.Generator().manual_seed(seed)
    real = torch.ones(batch, keys, dtype=torch.bool)
    if padded:
        real = torch.rand(batch, keys, generator=generator) > 0.3
    mask = real[:, None, None].expand(batch, 1, queries, keys)
    if is_causal:
        mask = mask & torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    found = mask_parts(
        mask if kind == "bool" else as_float(mask, kind == "lowest"), batch, queries, keys
    )
    assert found.is_causal if is_causal else found.is_full
    seen = mask.any((1, 2))
    assert torch.equal(seen, torch.ones_like(seen) if found.key_visible is None else found[0])


@given(sizes, st.integers(0, 10**6))
def test_no_mask_is_taken_for_what_it_is_not(size, seed):
    """Of every small mask: what is left out of it changes no query that counts."""
    batch, queries, keys = size
    mask = torch.rand(batch, 1, queries, keys, generator=torch.Generator().manual_seed(seed)) > 0.3
    found = mask_parts(mask, batch, queries, keys)
    seen = seen_keys(mask, batch, keys)
    counts = seen if queries == keys else torch.ones(batch, queries, dtype=torch.bool)
    past = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    columns = seen[:, None].expand(batch, queries, keys)
    for claimed, meant in ((found.is_full, columns), (found.is_causal, columns & past)):
        assert claimed == torch.equal(mask[:, 0][counts], meant[counts])


@given(sizes, kinds, st.sampled_from(["full", "causal", "random"]), st.integers(0, 10**6))
def test_the_simplest_mask_hides_the_same(size, kind, pattern, seed):
    batch, queries, keys = size
    mask = torch.ones(batch, 1, queries, keys, dtype=torch.bool)
    if pattern == "causal":
        mask = mask.tril()
    elif pattern == "random":
        mask = torch.rand(mask.shape, generator=torch.Generator().manual_seed(seed)) > 0.3
    given_mask = mask if kind == "bool" else as_float(mask, kind == "lowest")
    simple, is_causal = simplest_mask(given_mask, queries, keys)
    shown = torch.ones_like(mask) if simple is None else visible_entries(simple).expand_as(mask)
    assert torch.equal(shown.tril() if is_causal else shown, mask)
    assert not (is_causal and simple is not None)


def test_a_bias_is_no_mask():
    bias = torch.zeros(1, 1, 3, 3)
    bias[..., 1] = 0.5
    assert mask_parts(bias, 2, 3, 3) == (None, False, False)
    simple, is_causal = simplest_mask(bias, 3, 3)
    assert simple is not None
    assert torch.equal(simple, bias)
    assert not is_causal
    with pytest.raises(ValueError, match="attn_mask: expected a mask that only hides"):
        hiding_bias(bias)
    assert hiding_bias(None) is None
    lowest = as_float(torch.eye(3, dtype=torch.bool)[None, None], lowest=True)
    hidden = hiding_bias(lowest)
    assert hidden is not None
    assert (hidden == -torch.inf).sum() == 6


@pytest.mark.parametrize("is_causal", [False, True])
def test_key_counts(is_causal: bool) -> None:
    mask = torch.rand(2, 1, 5, 7, generator=torch.Generator().manual_seed(0)) < 0.6
    past = torch.ones(5, 7, dtype=torch.bool).tril() if is_causal else torch.tensor(True)
    expected = (mask & past).sum(-1)
    assert torch.equal(key_counts(mask, is_causal, 5, 7), expected)
    bias = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    assert torch.equal(key_counts(bias, is_causal, 5, 7), expected)
    rows = key_counts(mask[:, :, :1], is_causal, 5, 7)
    assert torch.equal(rows, (mask[:, :, :1] & past).expand(2, 1, 5, 7).sum(-1))
    assert torch.equal(
        key_counts(None, is_causal, 5, 3).flatten(),
        torch.tensor([1, 2, 3, 3, 3] if is_causal else [3] * 5),
    )
    assert key_counts(mask[..., :1], False, 5, 7).max() == 7
