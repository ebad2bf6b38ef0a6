from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from attending.sparse.axis_order import (
    VIDEO_ORDERS,
    axis_orders,
    head_token_index,
    inverse_index,
    permute_tokens,
    token_index,
)
from tests.sparse import reference_paro as reference

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "paro-attention" / "permute.npz")
grids = st.one_of(
    st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 4)),
    st.tuples(st.integers(1, 6), st.integers(1, 6)),
)


def test_golden() -> None:
    grid = tuple(int(GOLDEN[axis]) for axis in "FHW")
    index = head_token_index(grid, GOLDEN["order"].tolist(), text_tokens=int(GOLDEN["text_tokens"]))
    np.testing.assert_array_equal(index.numpy(), GOLDEN["token_index"])
    permuted = []
    for name in ("q", "k", "v"):
        tokens = permute_tokens(torch.from_numpy(GOLDEN[name]), index)
        np.testing.assert_array_equal(tokens.numpy(), GOLDEN[f"{name}_perm"])
        permuted.append(tokens)
    output = permute_tokens(scaled_dot_product_attention(*permuted), inverse_index(index))
    np.testing.assert_allclose(output.numpy(), GOLDEN["out"], rtol=0, atol=1e-12)


@given(grid=grids, text=st.integers(0, 3), first=st.booleans())
def test_orders_by_their_definition(grid: tuple[int, ...], text: int, first: bool) -> None:
    for number, name in enumerate(axis_orders(grid)):
        index = token_index(grid, name, text_tokens=text, text_first=first)
        assert torch.equal(index, token_index(grid, number, text_tokens=text, text_first=first))
        walked = reference.token_index(grid, name)
        if first:
            expected = [*range(text), *(text + place for place in walked)]
        else:
            expected = [*walked, *range(len(walked), len(walked) + text)]
        assert index.tolist() == expected


@given(grid=grids, heads=st.integers(1, 4), data=st.data(), half=st.booleans())
def test_there_and_back(grid: tuple[int, ...], heads: int, data: st.DataObject, half: bool) -> None:
    names = axis_orders(grid)
    orders = data.draw(st.lists(st.sampled_from(names), min_size=heads, max_size=heads))
    index = head_token_index(grid, orders, text_tokens=1)
    tokens = torch.randn(2, heads, index.shape[1], 3).to(torch.bfloat16 if half else torch.float64)
    moved = permute_tokens(tokens, index)
    for head in range(heads):
        assert torch.equal(moved[:, head], tokens[:, head, index[head]])
    assert torch.equal(permute_tokens(moved, inverse_index(index)), tokens)
    one = permute_tokens(tokens, index[:1])
    assert torch.equal(one, tokens[:, :, index[0]])


def test_dense_attention_does_not_care() -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 6, 61, 8, dtype=torch.float64)
    index = head_token_index((3, 4, 5), list(VIDEO_ORDERS), text_tokens=1)
    moved = (permute_tokens(one, index) for one in (query, key, value))
    output = permute_tokens(scaled_dot_product_attention(*moved), inverse_index(index))
    torch.testing.assert_close(
        output, scaled_dot_product_attention(query, key, value), rtol=0, atol=1e-14
    )


def test_gradient_goes_the_same_way() -> None:
    index = head_token_index((2, 3, 2), ["WHF", "HWF"])
    tokens = torch.randn(1, 2, 12, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda given: permute_tokens(given, index), (tokens,))


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="grid: expected the tokens"):
        axis_orders((4,))
    with pytest.raises(ValueError, match="grid"):
        axis_orders((4, 0, 2))
    with pytest.raises(ValueError, match="order: expected one of 0 HW, 1 WH"):
        token_index((4, 4), "FHW")
    with pytest.raises(ValueError, match="order"):
        token_index((4, 4, 4), 6)
    with pytest.raises(ValueError, match="text_tokens"):
        token_index((4, 4), 0, text_tokens=-1)
    with pytest.raises(ValueError, match="orders"):
        head_token_index((4, 4), [])
    with pytest.raises(ValueError, match="index: expected"):
        permute_tokens(torch.zeros(1, 2, 16, 1), head_token_index((4, 5), [0, 1]))
