"""Statistics of heads, summed up over calls, against the definitions on dense maps."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from attending.core import reference
from attending.diagnosis.heads import HeadStatistics
from attending.diagnosis.problems import problems, visible_tokens
from attending.diagnosis.record import STATISTICS, LayerRecord
from attending.diagnosis.tokens import TokenReader
from attending.taps import AttentionCall

CLASSES = {"even": {0, 2, 4, 6, 8}, "odd": {1, 3, 5, 7}}


def collect(calls: list[tuple[AttentionCall, Tensor | None]], size: int = 4) -> LayerRecord:
    reader = TokenReader(None, CLASSES)
    kind = "cross" if calls[0][0].is_cross else "self"
    heads = HeadStatistics("a", 0, kind, frozenset(STATISTICS), size, reader)
    first = 0
    for call, ids in calls:
        for problem in problems(call, *visible_tokens(call)):
            chosen = None if ids is None else ids[problem.sequences][:, problem.keys]
            heads.add(problem, chosen, first)
            outputs = torch.randn(
                len(problem.sequences), call.query.shape[1], len(problem.queries), 2
            )
            heads.add_outputs(outputs)
        first += len(call.query)
    return heads.record()


def call_of(query: Tensor, key: Tensor, **rest: Any) -> AttentionCall:
    return AttentionCall(
        name="a", layer=0, query=query, key=key, value=key, module=nn.Module(), **rest
    )


@st.composite
def calls(draw: st.DrawFn) -> list[AttentionCall]:
    """Several calls of one module, of sequences as long as you like."""
    kind = draw(st.sampled_from(("full", "causal", "window", "bias", "cross")))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    found = []
    for _ in range(draw(st.integers(1, 3))):
        batch, tokens = draw(st.integers(1, 2)), draw(st.integers(4, 24))
        query, key = torch.randn(2, batch, 4, tokens, 6, generator=generator, dtype=torch.float64)
        rest: dict[str, Any] = {}
        if kind == "causal":
            rest["is_causal"] = True
        elif kind == "window":
            rest["attn_mask"] = torch.ones(tokens, tokens).bool().tril(1).triu(-2)[None, None]
        elif kind == "bias":
            rest["attn_mask"] = torch.randn(1, 4, tokens, tokens, generator=generator).double()
        elif kind == "cross":
            rest["is_cross"] = True
            key = key[:, :, : max(4, tokens // 2)]
        found.append(call_of(query * 2, key[:, :2], enable_gqa=True, **rest))
    return found


@given(calls())
def test_means_are_those_of_the_dense_maps(found: list[AttentionCall]) -> None:
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(0, 9, (c.key.shape[0], c.key_length), generator=generator) for c in found]
    record = collect(list(zip(found, ids, strict=True)))
    dense = [
        reference.attention_map(c.query, c.key, c.attn_mask, c.is_causal, None, True) for c in found
    ]
    rows = sum(m.lse.shape[0] * m.lse.shape[2] for m in dense)

    def mean_over_rows(values: list[Tensor]) -> list[float]:
        return (sum(value.sum((0, 2)) for value in values) / rows).tolist()  # type: ignore[union-attr]

    expected = {
        "entropy": mean_over_rows([reference.entropy(m) for m in dense]),
        "effective_keys": mean_over_rows([reference.participation_ratio(m) for m in dense]),
        "max_probability": mean_over_rows([reference.max_probability(m) for m in dense]),
        "first_token": mean_over_rows([m.probabilities[..., 0] for m in dense]),
    }
    several = [(m.visible.sum(-1) > 1) for m in dense]
    normalized = [
        reference.normalized_entropy(m).where(s, 0.0) for m, s in zip(dense, several, strict=True)
    ]
    count = sum(s[:, 0].sum() for s in several)
    expected["normalized_entropy"] = (sum(n.sum((0, 2)) for n in normalized) / count).tolist()
    if record.kind == "self":
        expected["mean_distance"] = mean_over_rows([reference.mean_distance(m) for m in dense])
    strongest, sequences = torch.zeros(4, dtype=torch.float64), 0
    for m in dense:
        seen = m.visible.sum(-2)
        importance = reference.column_importance(m).where(seen >= max(1, m.lse.shape[2] / 4), 0.0)
        strongest += importance.amax(-1).sum(0)
        sequences += len(seen)
    expected["sink"] = (strongest / sequences).tolist()
    for name, values in expected.items():
        assert record.statistics[name] == pytest.approx(values, abs=1e-8), name
    assert ("mean_distance" in record.statistics) == (record.kind == "self")
    for name, members in CLASSES.items():
        masses = []
        for m, tokens in zip(dense, ids, strict=True):
            chosen = torch.tensor([[t in members for t in row] for row in tokens.tolist()])
            masses.append((m.probabilities * chosen[:, None, None]).sum(-1))
        assert record.class_mass.get(name, [0.0] * 4) == pytest.approx(mean_over_rows(masses))


@given(calls())
def test_pooled_maps_and_what_follows_from_them(found: list[AttentionCall]) -> None:
    record = collect([(call, None) for call in found])
    pooled = torch.zeros(4, 4, 4, dtype=torch.float64)
    for c in found:
        dense = reference.attention_map(c.query, c.key, c.attn_mask, c.is_causal, None, True)
        pooled += reference.pooled_map(dense, 4).sum(0)
    pooled /= sum(len(c.query) for c in found)
    torch.testing.assert_close(torch.tensor(record.pooled).double(), pooled, rtol=1e-6, atol=1e-8)
    near = (torch.arange(4)[:, None] - torch.arange(4)).abs() <= 1
    assert record.statistics["local_mass"] == pytest.approx(
        (pooled * near).sum((1, 2)).div(4).tolist()
    )
    visible = 10 if record.is_causal else 16
    for head, density in zip(pooled, record.statistics["block_density"], strict=True):
        mass = head.flatten().sort(descending=True).values
        needed = round(density * visible)
        assert mass[:needed].sum() >= 0.95 * mass.sum() - 1e-9 or needed == visible
        assert mass[: needed - 1].sum() < 0.95 * mass.sum() + 1e-9


def planted(place: int, tokens: int = 20) -> AttentionCall:
    """Head 0 looks at one key only, head 1 at all alike."""
    query, key = torch.zeros(2, 1, 2, tokens, 4)
    query[:, 0, :, 0], key[:, 0, place, 0] = 20.0, 20.0
    return call_of(query, key)


def test_the_strongest_key_is_named() -> None:
    ids = torch.arange(20)[None] % 9
    record = collect([(planted(5), ids), (planted(5), ids), (planted(0), ids)], size=20)
    first = record.top_keys[0][0]
    assert (first.token, first.position, first.importance) == ("#5", 5, pytest.approx(1.0))
    assert [key.position for key in record.top_keys[0][:2]] == [5, 0]
    assert record.strong_keys["#5"][0] == pytest.approx(2 / 3)
    assert record.strong_keys["#0 (first)"][0] == pytest.approx(1 / 3)
    assert record.statistics["sink"] == pytest.approx([1.0, 0.05])
    assert record.longest == 20


def test_without_tokens_a_key_is_called_by_its_place() -> None:
    record = collect([(planted(5), None), (planted(0), None)], size=20)
    assert record.top_keys[0][0].token in ("position 5", "position 0")
    assert record.strong_keys["position 5"][0] == pytest.approx(0.5)
    assert record.class_mass == {}


def test_outputs_are_compared_once_there_are_enough() -> None:
    reader = TokenReader(None, None)
    heads = HeadStatistics("a", 0, "self", frozenset(STATISTICS), 4, reader)
    one = torch.randn(1, 1, 300, 8)
    alike = torch.cat([one, one * 3, torch.randn(1, 1, 300, 8)], 1)
    heads.add_outputs(alike[:, :, :12])
    assert heads.similarity is None
    heads.add_outputs(alike)
    heads.add_outputs(alike)
    similarity = heads.similarity
    assert similarity is not None
    assert similarity[0, 1] == pytest.approx(1.0, abs=1e-3)
    assert similarity[0, 2] < 0.5
    few = HeadStatistics("a", 0, "self", frozenset(STATISTICS), 4, reader)
    few.add_outputs(alike[:, :, :12])
    assert "similarity" not in few.record().statistics  # 12 samples of 8 numbers tell nothing


def test_short_sequences_leave_no_holes_in_the_map() -> None:
    long, short = torch.randn(2, 1, 2, 16, 4), torch.randn(2, 1, 2, 3, 4)
    alone = collect([(call_of(*long), None)], size=8)
    both = collect([(call_of(*long), None), (call_of(*short), None)], size=8)
    assert both.pooled == alone.pooled
    assert both.statistics["entropy"] != alone.statistics["entropy"]
    only = collect([(call_of(*short), None)], size=8)
    assert len(only.pooled[0]) == 3
