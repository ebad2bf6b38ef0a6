"""How alike the rows of a map are, against the map."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from attending.core import reference
from attending.probes.oversmoothing import linear_row_similarity, softmax_row_similarity
from tests.core.problems import Problem, problems


def by_pairs(rows: Tensor) -> Tensor:
    """[..., queries, keys]: the mean over pairs of different rows that are not 0."""
    similarity = torch.zeros(rows.shape[:-2], dtype=torch.float64)
    for index in range(similarity.numel()):
        here = rows.double().flatten(0, -3)[index]
        here = here[here.norm(dim=-1) > 0]
        unit = here / here.norm(dim=-1, keepdim=True)
        count = len(here)
        if count > 1:
            cosines = unit @ unit.T
            off = cosines.sum() - cosines.diagonal().sum()
            similarity.view(-1)[index] = off / (count * (count - 1))
    return similarity


@given(st.integers(1, 12), st.integers(1, 12), st.booleans(), st.integers(0, 2**31))
def test_linear(queries: int, keys: int, relu: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(2, 4, queries, 3, generator=generator, dtype=torch.float64)
    key = torch.randn(2, 2, keys, 3, generator=generator, dtype=torch.float64)
    if relu:
        query, key = query.relu(), key.relu()
    rows = query @ key.repeat_interleave(2, 1).transpose(-1, -2)
    ours = linear_row_similarity(query, key, enable_gqa=True)
    torch.testing.assert_close(ours, by_pairs(rows), rtol=1e-6, atol=1e-6)


@given(problems(dtypes=(torch.float64,), max_tokens=20, spreads=(0.01, 1.0)))
def test_softmax(problem: Problem) -> None:
    whole = reference.attention_map(problem.query, problem.key, **problem.call).probabilities
    ours = softmax_row_similarity(problem.query, problem.key, **problem.call)
    torch.testing.assert_close(ours, by_pairs(whole), rtol=1e-6, atol=1e-6)


def test_what_it_says() -> None:
    same = torch.ones(1, 1, 6, 4)
    assert linear_row_similarity(same, same).item() == pytest.approx(1)
    assert softmax_row_similarity(same, same).item() == pytest.approx(1)
    own = torch.eye(6)[None, None]
    assert linear_row_similarity(own, own).item() == pytest.approx(0)
    assert softmax_row_similarity(100 * own, own).item() == pytest.approx(0, abs=1e-6)
