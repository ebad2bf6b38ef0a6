from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from attending.core.block_plan import BlockPlan
from attending.core.blocks import block_sparse_attention
from attending.sparse import quantised_attention
from attending.sparse.quantised_attention import (
    Bits,
    MapGroups,
    integer_product,
    quantise_map,
    quantise_tokens,
    simulate_quantised_attention,
)
from tests.sparse import reference_paro as reference

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "paro-attention" / "quant.npz")


@pytest.mark.parametrize(("name", "group"), [("q", 32), ("k", 64)])
def test_golden_tokens(name: str, group: int) -> None:
    found = quantise_tokens(torch.from_numpy(GOLDEN[name]), group)
    np.testing.assert_array_equal(found.codes.numpy(), GOLDEN[f"{name}_int8"])
    expected = GOLDEN[f"{name}_scale"]
    groups = found.scale.shape[-1]
    np.testing.assert_array_equal(found.scale.numpy(), expected[..., :groups])
    # The kernel's grid has groups for queries that there are not, at the smallest scale.
    np.testing.assert_allclose(expected[..., groups:], 1e-7 / 127, rtol=1e-6)


@pytest.mark.parametrize("bits", [8, 4])
def test_golden_map(bits: Bits) -> None:
    found = quantise_map(torch.from_numpy(GOLDEN["P"]), bits=bits)
    np.testing.assert_allclose(found.numpy(), GOLDEN[f"P_fakequant_int{bits}"], rtol=0, atol=1e-6)


@given(tokens=st.integers(1, 70), group=st.integers(1, 40), bits=st.sampled_from([4, 8]))
def test_tokens_are_half_a_step_away(tokens: int, group: int, bits: Bits) -> None:
    torch.manual_seed(tokens)
    given_tokens = torch.randn(1, 2, tokens, 3, dtype=torch.float64)
    found = quantise_tokens(given_tokens, group, bits=bits)
    error = (found.dequantise() - given_tokens).abs()
    assert bool((error <= found.scale_of_tokens() * 0.5 * (1 + 1e-12)).all())
    levels = 2 ** (bits - 1) - 1
    assert int(found.codes.abs().max()) == levels
    assert not quantise_tokens(torch.zeros(1, 1, tokens, 2), group).dequantise().any()


@given(
    rows=st.integers(1, 20), inner=st.integers(1, 70), columns=st.integers(1, 20),
    seed=st.integers(0, 5),
)  # fmt: skip
def test_integers_are_exact(rows: int, inner: int, columns: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    left, right = (
        torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8)
        for shape in ((2, 3, rows, inner), (2, 3, inner, columns))
    )
    product = integer_product(left, right)
    assert product.dtype == torch.int32
    assert torch.equal(product.double(), left.double() @ right.double())
    assert torch.equal(product.float(), left.float() @ right.float())  # what the simulation does


def test_integers_without_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    left, right = torch.randint(-127, 128, (2, 5, 5), dtype=torch.int8)
    expected = integer_product(left, right)
    monkeypatch.delattr(torch, "_int_mm")
    assert torch.equal(integer_product(left, right), expected)


@given(
    queries=st.integers(1, 40),
    keys=st.integers(1, 40),
    block=st.integers(1, 17),
    bits=st.sampled_from([4, 8]),
    groups=st.sampled_from(get_args(MapGroups)),
    hidden=st.booleans(),
)
def test_attention_by_its_definition(
    queries: int, keys: int, block: int, bits: Bits, groups: MapGroups, hidden: bool
) -> None:
    torch.manual_seed(queries + keys)
    query = torch.randn(1, 2, queries, 5, dtype=torch.float64)
    key, value = torch.randn(2, 1, 1, keys, 5, dtype=torch.float64)  # shared by both heads
    visible = torch.rand(1, 1, queries, keys) > 0.3 if hidden else None
    found = simulate_quantised_attention(
        query, key, value, bits=bits, groups=groups, block_size=block, bias=visible
    )
    seen = torch.ones(queries, keys).bool() if visible is None else visible[0, 0]
    for head in range(2):
        expected = reference.quantised_attention(
            query[0, head], key[0, 0], value[0, 0], bits, groups, block, seen
        )
        torch.testing.assert_close(found.output[0, head], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("groups", get_args(MapGroups))
def test_integer_scores_and_slabs(groups: MapGroups, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 2, 150, 16)
    whole = simulate_quantised_attention(query, key, value, groups=groups)
    monkeypatch.setattr(quantised_attention, "SLAB_SCORES", 1)
    exact = simulate_quantised_attention(query, key, value, groups=groups, integers=True)
    torch.testing.assert_close(exact.output, whole.output, rtol=0, atol=1e-6)
    torch.testing.assert_close(exact.lse, whole.lse, rtol=0, atol=1e-5)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("bits", [None, 8])
def test_over_a_plan(bits: Bits | None, is_causal: bool) -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, 2, 90, 16)
    plan = BlockPlan.from_block_mask(
        torch.rand(2, 9, 9) < 0.4, block_size=10, query_length=90, key_length=90,
        is_causal=is_causal,
    )  # fmt: skip
    found = simulate_quantised_attention(query, key, value, bits=bits, plan=plan)
    state = block_sparse_attention(query, key, value, plan)
    tolerance = 1e-5 if bits is None else 0.05
    torch.testing.assert_close(found.output, state.output, rtol=0, atol=tolerance)
    torch.testing.assert_close(found.lse, state.lse, rtol=0, atol=tolerance)


def test_small_groups_where_attention_is_local() -> None:
    """A map with one large block and much that is small: a row's scale loses the small ones."""
    torch.manual_seed(0)
    maps = torch.rand(1, 1, 64, 512) * 0.004
    maps[..., :64] += 0.05 * torch.eye(64)
    error = {
        groups: float((quantise_map(maps, groups=groups) - maps).norm())
        for groups in ("block", "row")
    }
    assert error["block"] < error["row"] / 2


def test_more_bits_are_better_and_none_is_exact() -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, 2, 80, 16, dtype=torch.bfloat16)
    exact = scaled_dot_product_attention(query.double(), key.double(), value.double())
    errors = []
    for bits in (4, 8, None):
        found = simulate_quantised_attention(query, key, value, bits=bits).output
        assert found.dtype == torch.bfloat16
        errors.append(float((found.double() - exact).norm() / exact.norm()))
    assert errors[0] > 3 * errors[1] > 3 * errors[2]
    half = simulate_quantised_attention(query, key, value, bits=8, map_bits=None).output
    assert float((half.double() - exact).norm() / exact.norm()) < errors[1]


def test_nothing_to_see() -> None:
    query = torch.randn(1, 1, 3, 4)
    hidden = torch.tensor([True, False, True])[None, None, :, None].expand(1, 1, 3, 3)
    for groups in get_args(MapGroups):
        state = simulate_quantised_attention(query, query, query, groups=groups, bias=hidden)
        assert not state.output[0, 0, 1].any()
        assert state.lse[0, 0, 1] == -torch.inf
    empty = simulate_quantised_attention(query[:, :, :0], query, query)
    assert empty.output.shape == (1, 1, 0, 4)


def test_what_is_refused() -> None:
    query = torch.randn(1, 1, 4, 4)
    with pytest.raises(ValueError, match="bits: expected 8 or 4"):
        quantise_tokens(query, 2, bits=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="group_size"):
        quantise_tokens(query, 0)
    with pytest.raises(ValueError, match="groups"):
        quantise_map(query, groups="column")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="groups"):
        simulate_quantised_attention(query, query, query, groups="tile")  # type: ignore[arg-type]
    plan = BlockPlan.from_block_mask(
        torch.ones(1, 1).bool(), block_size=8, query_length=5, key_length=5
    )
    with pytest.raises(ValueError, match="plan: expected one for 4 queries"):
        simulate_quantised_attention(query, query, query, plan=plan)
