"""The curve: the golden order, that it orders every grid and stays near; which blocks touch."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attending.sparse.curve_order import block_neighbors, gilbert_order, row_order

GOLDEN = Path(__file__).parent.parent / "golden" / "rectified-spaattn" / "gilbert.npz"

sides = st.integers(1, 9)


def places(order) -> torch.Tensor:
    _, height, width = order.grid
    token = order.forward
    return torch.stack([token // (height * width), token // width % height, token % width], 1)


def test_the_golden_grid() -> None:
    golden = np.load(GOLDEN)
    axes = tuple("twh"[index] for index in golden["axis_order"])
    order = gilbert_order(*(int(golden[side]) for side in "thw"), axes=axes)
    assert axes == ("w", "h", "t")
    assert torch.equal(order.forward, torch.from_numpy(golden["curve_to_linear"]))
    assert torch.equal(order.backward, torch.from_numpy(golden["linear_to_curve"]))
    near = block_neighbors(order, int(golden["block_size"]))
    assert torch.equal(near, torch.from_numpy(golden["block_neighbor"]))


@given(sides, sides, sides, st.permutations(["t", "h", "w"]))
def test_an_order_of_every_grid(frames, height, width, axes) -> None:
    order = gilbert_order(frames, height, width, axes=tuple(axes))
    everything = torch.arange(frames * height * width)
    assert torch.equal(order.forward.sort().values, everything)
    assert torch.equal(order.forward[order.backward], everything)
    moves = places(order).diff(dim=0).abs()
    assert int(moves.sum(1).max() if len(moves) else 0) <= 4
    if all(side % 2 == 0 for side in (frames, height, width)):
        assert bool((moves.sum(1) == 1).all())


def test_most_steps_are_unit_steps_on_an_odd_grid() -> None:
    moves = places(gilbert_order(3, 5, 10)).diff(dim=0).abs().sum(1)
    assert float((moves == 1).float().mean()) == pytest.approx(0.97, abs=0.005)


@given(sides, sides, sides, st.integers(1, 40), st.booleans())
@settings(max_examples=40)
def test_neighbors_by_definition(frames, height, width, block_size, on_curve) -> None:
    order = (gilbert_order if on_curve else row_order)(frames, height, width)
    at = places(order)
    touch = (at[:, None] - at[None]).abs().amax(-1) <= 1
    blocks = -(-len(at) // block_size)
    block = torch.arange(len(at)) // block_size
    expected = torch.zeros(blocks, blocks, dtype=torch.bool)
    pairs = touch.nonzero()
    expected[block[pairs[:, 0]], block[pairs[:, 1]]] = True
    assert torch.equal(block_neighbors(order, block_size), expected)


def test_there_and_back() -> None:
    order = gilbert_order(2, 3, 5)
    tokens = torch.randn(2, 3, 30, 4)
    moved = order.apply(tokens)
    assert torch.equal(moved[:, :, 7], tokens[:, :, order.forward[7]])
    assert torch.equal(order.undo(moved), tokens)


def test_blocks_are_lumps() -> None:
    """A block on the curve touches fewer others than a strip of rows does."""
    grid, size = (8, 16, 16), 64
    on_curve = block_neighbors(gilbert_order(*grid), size).float().mean()
    in_rows = block_neighbors(row_order(*grid), size).float().mean()
    spread = {
        name: float(places(order).float().unflatten(0, (-1, size)).std(1).norm(dim=-1).mean())
        for name, order in (("curve", gilbert_order(*grid)), ("rows", row_order(*grid)))
    }
    assert spread["curve"] < 0.6 * spread["rows"], (spread, on_curve, in_rows)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: gilbert_order(0, 2, 2), "frames"),
        (lambda: gilbert_order(1, 2.5, 2), "height"),
        (lambda: gilbert_order(1, 2, 2, axes=("t", "t", "w")), "axes"),
        (lambda: block_neighbors(gilbert_order(1, 2, 2), 0), "block_size"),
    ],
)
def test_bad_input(call, name) -> None:
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        call()
