"""Padding goes, and with it the masks that were only there for it."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from attending.core import reference
from attending.diagnosis.problems import in_four_dimensions, problems, visible_tokens
from attending.taps import AttentionCall


def call_of(query: Tensor, key: Tensor, **rest: Any) -> AttentionCall:
    return AttentionCall(
        name="a", layer=0, query=query, key=key, value=key, module=nn.Module(), **rest
    )


def lowest(mask: Tensor) -> Tensor:
    """As transformers writes a mask where it is added."""
    return torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)


def infinite(mask: Tensor) -> Tensor:
    return torch.zeros(mask.shape).masked_fill(~mask, -math.inf)


@st.composite
def padded(draw: st.DrawFn) -> tuple[AttentionCall, list[slice], bool]:
    batch, tokens = draw(st.integers(1, 4)), draw(st.integers(1, 20))
    causal = draw(st.booleans())
    left = draw(st.booleans())
    lengths = [draw(st.integers(1, tokens)) for _ in range(batch)]
    parts = [slice(tokens - n, tokens) if left else slice(0, n) for n in lengths]
    seen = torch.zeros(batch, 1, 1, tokens, dtype=torch.bool)
    for row, part in zip(seen, parts, strict=True):
        row[..., part] = True
    mask = seen & torch.ones(tokens, tokens).bool().tril() if causal else seen
    form = draw(st.sampled_from((lambda one: one, lowest, infinite)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    query, key = torch.randn(2, batch, 4, tokens, 3, generator=generator)
    return call_of(query, key[:, :2], attn_mask=form(mask), enable_gqa=True), parts, causal


@given(padded())
def test_a_padded_batch_is_its_sequences(case: tuple[AttentionCall, list[slice], bool]) -> None:
    call, parts, causal = case
    asking, seen = visible_tokens(call)
    assert torch.equal(asking, seen)
    found = {}
    for problem in problems(call, asking, seen):
        length = problem.query.shape[2]
        assert problem.arguments["attn_mask"] is None
        assert problem.arguments["is_causal"] == (causal and length > 1)
        assert problem.arguments["enable_gqa"]
        for place, sequence in enumerate(problem.sequences.tolist()):
            found[sequence] = (problem, place)
    assert sorted(found) == list(range(len(parts)))
    for sequence, part in enumerate(parts):
        problem, place = found[sequence]
        assert torch.equal(problem.query[place], call.query[sequence, :, part])
        assert torch.equal(problem.key[place], call.key[sequence, :, part])
        assert problem.queries.tolist() == list(range(part.start, part.stop))


def test_sequences_without_padding_stay_together() -> None:
    mask = torch.ones(3, 1, 1, 5, dtype=torch.bool)
    mask[1, ..., 4] = False
    call = call_of(torch.randn(3, 2, 5, 4), torch.randn(3, 2, 5, 4), attn_mask=mask)
    found = list(problems(call, *visible_tokens(call)))
    assert [problem.sequences.tolist() for problem in found] == [[0, 2], [1]]


def test_without_padding_nothing_is_copied() -> None:
    query = torch.randn(3, 2, 5, 4)
    mask = torch.ones(1, 1, 5, 5, dtype=torch.bool).tril()
    call = call_of(query, query, attn_mask=mask)
    (problem,) = problems(call, *visible_tokens(call))
    assert problem.query is query
    assert problem.arguments["is_causal"]


def test_a_real_mask_and_a_bias_stay() -> None:
    query = torch.randn(1, 2, 6, 4)
    window = torch.ones(6, 6, dtype=torch.bool).tril().triu(-2)[None, None]
    (problem,) = problems(call := call_of(query, query, attn_mask=window), *visible_tokens(call))
    assert torch.equal(problem.arguments["attn_mask"], window)
    bias = torch.randn(1, 2, 6, 6).masked_fill(~window, torch.finfo(torch.float32).min)
    (problem,) = problems(call := call_of(query, query, attn_mask=bias), *visible_tokens(call))
    kept = problem.arguments["attn_mask"]
    assert kept is not None
    assert torch.equal(kept, bias.masked_fill(~window, -math.inf))
    dense = reference.attention_map(query, query, kept)
    assert torch.equal(dense.visible[0, 0], window[0, 0])


def test_cross_attention_takes_the_padding_of_its_queries_from_the_input() -> None:
    mask = torch.ones(2, 1, 1, 5, dtype=torch.bool)
    mask[0, ..., 3:] = False
    query, key = torch.randn(2, 2, 4, 4), torch.randn(2, 2, 5, 4)
    call = call_of(query, key, attn_mask=mask, is_cross=True)
    asking, seen = visible_tokens(call)
    assert asking.all()
    assert seen.tolist() == mask[:, 0, 0].tolist()
    given_padding = torch.tensor([[True] * 4, [True, True, False, False]])
    asking, seen = visible_tokens(call, given_padding)
    found = list(problems(call, asking, seen))
    assert [(len(p.queries), len(p.keys)) for p in found] == [(4, 3), (2, 5)]


def test_with_a_cache_the_queries_are_the_last_tokens() -> None:
    mask = torch.ones(1, 1, 2, 6, dtype=torch.bool)
    mask[..., 0] = False  # padding on the left
    mask[..., 0, 5] = False
    call = call_of(torch.randn(1, 2, 2, 4), torch.randn(1, 2, 6, 4), attn_mask=mask)
    (problem,) = problems(call, *visible_tokens(call))
    assert (problem.queries.tolist(), problem.keys.tolist()) == ([0, 1], [1, 2, 3, 4, 5])
    kept = problem.arguments["attn_mask"]
    assert kept is not None
    assert kept[0, 0].tolist() == [[True] * 4 + [False], [True] * 5]


def test_the_flag_counts_from_the_top_left() -> None:
    call = call_of(torch.randn(1, 2, 3, 4), torch.randn(1, 2, 5, 4), is_causal=True)
    (problem,) = problems(call, *visible_tokens(call))
    kept = problem.arguments["attn_mask"]
    assert kept is not None
    assert torch.equal(kept[0, 0], torch.ones(3, 5, dtype=torch.bool).tril())


@pytest.mark.parametrize("shape", [(5, 4), (3, 5, 4), (2, 3, 5, 4), (2, 2, 3, 5, 4)])
def test_other_numbers_of_dimensions(shape: tuple[int, ...]) -> None:
    tensor = torch.randn(shape)
    assert in_four_dimensions(tensor).shape[-2:] == shape[-2:]
    assert torch.equal(in_four_dimensions(tensor).flatten(), tensor.flatten())
