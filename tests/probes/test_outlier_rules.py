"""The rules for outliers against the golden vectors, and their invariants."""

from pathlib import Path

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from attending.core.statistics import column_mass
from attending.probes.outlier_rules import (
    activation_outliers,
    attention_outliers,
    weight_outlier_ratios,
)

GOLDEN = Path(__file__).parent.parent / "golden" / "systematic-outliers" / "detect_case1.npz"
CLOSE = {"rtol": 1e-9, "atol": 1e-9}


@pytest.fixture(scope="module")
def case() -> dict[str, Tensor]:
    with numpy.load(GOLDEN) as file:
        return {name: torch.as_tensor(file[name]) for name in file}


def test_golden_activations(case: dict[str, Tensor]) -> None:
    found = activation_outliers(case["hidden"].double(), tau=float(case["tau"]))
    torch.testing.assert_close(found.threshold[0], case["act_threshold"], **CLOSE)
    assert torch.equal(found.elements[0].nonzero(), case["act_outlier_elements"])
    assert torch.equal(found.tokens[0].nonzero().flatten(), case["act_outlier_tokens"])
    assert found.channels[0].nonzero().flatten().tolist() == [7, 33]
    single = activation_outliers(case["hidden"])
    assert torch.equal(single.elements, found.elements)


def test_golden_weights(case: dict[str, Tensor]) -> None:
    found = weight_outlier_ratios(case["weight"].double())
    torch.testing.assert_close(found.column, case["weight_col_ratio"], **CLOSE)
    torch.testing.assert_close(found.row, case["weight_row_ratio"], **CLOSE)
    assert found.largest == pytest.approx(float(case["weight_max_ratio"]), rel=1e-9)


def test_golden_attention(case: dict[str, Tensor]) -> None:
    attention = case["attn"][None]
    length = attention.shape[-1]
    seen = torch.arange(length, 0, -1).double()[None, None]
    found = attention_outliers(attention.sum(-2), seen, length)
    torch.testing.assert_close(found.received[0], case["attn_received"], **CLOSE)
    assert torch.equal(found.keys[0].nonzero().flatten(), case["attn_outlier_tokens"])
    torch.testing.assert_close(
        found.importance[0], case["attn_received_per_visible_query"], **CLOSE
    )
    share = attention[..., case["attn_outlier_tokens"]].sum((-1, -2)) / length
    torch.testing.assert_close(found.head_share, share, **CLOSE)


@st.composite
def hidden_states(draw: st.DrawFn) -> Tensor:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    shape = (draw(st.integers(1, 3)), draw(st.integers(1, 20)), draw(st.integers(1, 20)))
    hidden = torch.randn(shape, generator=generator, dtype=torch.float64)
    for _ in range(draw(st.integers(0, 3))):
        place = [int(torch.randint(size, (1,), generator=generator)) for size in shape]
        hidden[tuple(place)] = draw(st.sampled_from([-1e5, 300.0, 1e4]))
    return hidden


@given(hidden_states(), st.sampled_from(["mean", "median"]), st.sampled_from([5.0, 100.0]))
def test_permuting_tokens_permutes_outliers(hidden: Tensor, criterion: str, tau: float) -> None:
    tokens, channels = torch.randperm(hidden.shape[1]), torch.randperm(hidden.shape[2])
    found = activation_outliers(hidden, criterion=criterion, tau=tau)
    moved = activation_outliers(hidden[:, tokens][..., channels], criterion=criterion, tau=tau)
    assert torch.equal(moved.elements, found.elements[:, tokens][..., channels])


@given(hidden_states(), st.sampled_from([2.0**-20, 4.0, 2.0**20]))
def test_the_mean_criterion_does_not_see_the_scale(hidden: Tensor, factor: float) -> None:
    found = activation_outliers(hidden, tau=5.0)
    assert torch.equal(activation_outliers(hidden * factor, tau=5.0).elements, found.elements)


@given(hidden_states(), st.sampled_from(["mean", "median", "magnitude"]))
def test_padding_and_the_rest_of_the_batch_do_not_matter(hidden: Tensor, criterion: str) -> None:
    batch, tokens, dim = hidden.shape
    padded = torch.cat([torch.full((batch, 2, dim), 1e9), hidden, torch.zeros(batch, 1, dim)], 1)
    mask = torch.zeros(batch, tokens + 3, dtype=torch.bool)
    mask[:, 2 : tokens + 2] = True
    found = activation_outliers(padded, criterion=criterion, tau=5.0, token_mask=mask)
    assert not found.elements[~mask].any()
    for index in range(batch):
        alone = activation_outliers(hidden[index : index + 1], criterion=criterion, tau=5.0)
        assert torch.equal(found.elements[index, 2:-1], alone.elements[0])
        for name in ("threshold", "largest", "mean", "median"):
            torch.testing.assert_close(getattr(found, name)[index], getattr(alone, name)[0])


def test_the_mean_of_a_small_tensor_is_out_of_reach() -> None:
    """The trap: 24 x 64 values, two of them 2500, and the mean rises with them."""
    hidden = torch.randn(1, 24, 64)
    hidden[0, 0, 3] = hidden[0, 5, 3] = 2500.0
    assert not activation_outliers(hidden).elements.any()
    found = activation_outliers(hidden, criterion="median")
    assert found.elements.nonzero().tolist() == [[0, 0, 3], [0, 5, 3]]


def test_the_median_criterion_also_asks_for_a_magnitude_of_100() -> None:
    hidden = torch.full((1, 4, 8), 1e-3)
    hidden[0, 1, 2] = 50.0  # fifty thousand times the median
    assert not activation_outliers(hidden, criterion="median").elements.any()
    hidden[0, 1, 2] = -101.0
    assert activation_outliers(hidden, criterion="median").tokens.tolist() == [
        [False, True] + [False] * 2
    ]


def test_the_magnitude_criterion_asks_for_six_per_cent_of_the_tokens() -> None:
    hidden = torch.zeros(1, 100, 3)
    hidden[0, :5, 0] = 7.0  # five tokens of a hundred
    hidden[0, :6, 1] = -6.0
    found = activation_outliers(hidden, criterion="magnitude")
    assert found.channels.tolist() == [[False, True, False]]
    assert int(found.elements.sum()) == 6


def test_half_precision_is_computed_in_float32() -> None:
    hidden = torch.randn(1, 64, 64).bfloat16()
    hidden[0, 3, 5] = 3e4
    exact = activation_outliers(hidden.double(), tau=100.0)
    found = activation_outliers(hidden, tau=100.0)
    assert found.mean.dtype == torch.float32
    torch.testing.assert_close(found.mean.double(), exact.mean, rtol=1e-5, atol=0)
    assert torch.equal(found.elements, exact.elements)
    tiny = torch.full((4, 4), 1e-7, dtype=torch.float16)
    # 1e-8 is zero in half precision; a row of zeros would then be 0 / 0.
    assert weight_outlier_ratios(tiny * 0).column.isfinite().all()
    assert weight_outlier_ratios(tiny).largest == pytest.approx(1 / 1.1, rel=0.1)


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**31))
def test_weight_ratios_are_at_most_the_number_of_entries(
    rows: int, columns: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) ** 5
    found = weight_outlier_ratios(weight)
    assert (found.column <= rows * 1.0001).all()
    assert (found.row <= columns * 1.0001).all()
    turned = weight_outlier_ratios(weight.T)
    torch.testing.assert_close(turned.row, found.column)
    torch.testing.assert_close(turned.column, found.row)


def test_the_columns_need_no_map() -> None:
    """From `column_mass` as from the map itself, with a sequence that is shorter."""
    query, key = torch.randn(2, 3, 20, 8), torch.randn(2, 3, 20, 8)
    key[:, :, 0] = query.mean((0, 2)) * 20
    real = torch.ones(2, 20, dtype=torch.bool)
    real[1, 15:] = False
    mask = torch.ones(20, 20, dtype=torch.bool).tril() & real[:, None, None]
    scores = (query @ key.transpose(-1, -2) / 8**0.5).masked_fill(~mask, -torch.inf)
    attention = scores.softmax(-1) * real[:, None, :, None]
    seen = (mask & real[:, None, :, None]).sum(-2)
    mass = column_mass(query, key, query_weights=real[:, None].float(), attn_mask=mask)
    count = real.sum(-1)
    ours = attention_outliers(mass, seen, count)
    dense = attention_outliers(attention.sum(-2), seen, count)
    torch.testing.assert_close(ours.received, dense.received)
    torch.testing.assert_close(ours.head_share, dense.head_share)
    assert torch.equal(ours.keys, dense.keys)
    assert not ours.keys[1, 15:].any()


def test_late_keys_are_found_by_the_fair_rule_alone() -> None:
    length = 40
    attention = torch.zeros(1, 1, length, length)
    attention[..., 0] = 1.0
    attention[..., 38:, 0], attention[..., 38:, 38] = 0.5, 0.5
    seen = torch.arange(length, 0, -1).float()[None, None]
    found = attention_outliers(attention.sum(-2), seen, length)
    assert found.keys[0].nonzero().flatten().tolist() == [0]
    assert found.fair_keys[0].nonzero().flatten().tolist() == [0, 38]


def test_arguments_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match="hidden: expected a float tensor"):
        activation_outliers(torch.zeros(3, 4))
    with pytest.raises(ValueError, match="criterion: expected one of"):
        activation_outliers(torch.zeros(1, 3, 4), criterion="max")
    with pytest.raises(ValueError, match="tau: expected"):
        activation_outliers(torch.zeros(1, 3, 4), tau=0.0)
    with pytest.raises(ValueError, match="token_mask: expected"):
        activation_outliers(torch.zeros(1, 3, 4), token_mask=torch.ones(1, 4))
    with pytest.raises(ValueError, match="weight: expected"):
        weight_outlier_ratios(torch.zeros(3))
    with pytest.raises(ValueError, match="column_mass: expected"):
        attention_outliers(torch.zeros(3), torch.zeros(1, 1, 3), 3)
    with pytest.raises(ValueError, match="visible_queries: expected"):
        attention_outliers(torch.zeros(1, 1, 3), torch.zeros(1, 1, 2), 3)
    with pytest.raises(ValueError, match="share: expected"):
        attention_outliers(torch.zeros(1, 1, 3), torch.ones(1, 1, 3), 3, share=0.0)
