"""Autocast does not reach into statistics: they are the same to the last bit."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import attending as at
from attending.core import statistics

QUERY, KEY = torch.randn(2, 1, 4, 64, 16, generator=torch.Generator().manual_seed(0)).unbind(0)
MAPS: dict[str, Callable[..., Tensor]] = {
    "entropy": statistics.entropy,
    "normalized_entropy": statistics.normalized_entropy,
    "renyi_entropy": statistics.renyi_entropy,
    "participation_ratio": statistics.participation_ratio,
    "second_moment": statistics.second_moment,
    "max_probability": statistics.max_probability,
    "varentropy": statistics.varentropy,
    "column_mass": statistics.column_mass,
    "column_importance": statistics.column_importance,
    "mean_distance": statistics.mean_distance,
    "pooled_map": lambda query, key, **rest: statistics.pooled_map(query, key, 8, **rest),
    "expected_features": lambda query, key, **rest: statistics.expected_features(
        query, key, KEY[0, 0], **rest
    ),
    "map_summary": lambda query, key, **rest: statistics.map_summary(query, key, **rest).mass,
    "attention_state": lambda query, key, **rest: (
        at.attention_state(query, key, key, **rest).output
    ),
}
MASKS = {
    "none": {},
    "causal": {"is_causal": True},
    "bias": {"attn_mask": torch.randn(1, 4, 64, 64, generator=torch.Generator().manual_seed(1))},
}


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", MAPS)
def test_of_maps(name: str, mask: str, gradient: bool) -> None:
    query = QUERY.clone().requires_grad_(gradient)
    expected = MAPS[name](query, KEY, **MASKS[mask])
    with torch.autocast("cpu", torch.bfloat16):
        found = MAPS[name](query, KEY, **MASKS[mask])
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    "function", [statistics.effective_rank, statistics.token_similarity, statistics.head_similarity]
)
def test_of_hidden_states(function: Callable[[Tensor], Tensor]) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        found = function(QUERY[0] * 3)
    assert torch.equal(found, function(QUERY[0] * 3))
