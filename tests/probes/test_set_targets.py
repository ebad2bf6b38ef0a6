"""The target functions on sets, by hand and by their invariants."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attending.probes.set_targets import (
    correlation_power,
    correlation_relu,
    key_power,
    mixed_power,
    random_sets,
)

QUERY = torch.tensor([[1.0, 0.0]])
KEY = torch.tensor([[[2.0, 3.0], [-1.0, 5.0]]])
DIRECTION = torch.tensor([0.0, 1.0])


def test_by_hand() -> None:
    assert key_power(KEY, DIRECTION, 2).tolist() == [(9 + 25) / 2]
    assert correlation_power(QUERY, KEY, DIRECTION, 2).tolist() == [(4 * 3 + 1 * 5) / 2]
    assert correlation_power(QUERY, KEY, DIRECTION, 3).tolist() == [(8 * 3 - 1 * 5) / 2]
    assert correlation_relu(QUERY, KEY, DIRECTION).tolist() == [2 * 3 / 2]
    assert mixed_power(QUERY, KEY, DIRECTION, 2, 0.25).tolist() == [0.25 * 8.5 + 0.75 * 17]


@given(keys=st.integers(1, 6), dim=st.integers(1, 5), seed=st.integers(0, 99))
def test_order_of_keys_does_not_matter(keys: int, dim: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    query, key = random_sets(3, keys, dim, generator=generator, dtype=torch.float64)
    assert query.shape == (3, dim)
    assert key.shape == (3, keys, dim)
    for points in (query, key):
        torch.testing.assert_close(points.norm(dim=-1), torch.ones(points.shape[:-1]).double())
    direction = key[0, 0]
    order = torch.randperm(keys, generator=generator)
    for power in (1, 4):
        found = mixed_power(query, key, direction, power, 0.5)
        torch.testing.assert_close(mixed_power(query, key[:, order], direction, power, 0.5), found)
    torch.testing.assert_close(
        correlation_relu(query, key[:, order], direction), correlation_relu(query, key, direction)
    )


def test_refusals() -> None:
    with pytest.raises(ValueError, match="count, num_keys, dim"):
        random_sets(1, 0, 2)
    with pytest.raises(ValueError, match="power"):
        key_power(KEY, DIRECTION, 0)
    with pytest.raises(ValueError, match="gamma"):
        mixed_power(QUERY, KEY, DIRECTION, 1, 1.5)
    with pytest.raises(ValueError, match="key, direction"):
        key_power(KEY, torch.ones(3), 1)
    with pytest.raises(ValueError, match="at least one key"):
        key_power(KEY[:, :0], DIRECTION, 1)
    with pytest.raises(ValueError, match="query"):
        correlation_relu(QUERY.expand(3, 2), KEY, DIRECTION)
