from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attending.sparse import order_scores
from attending.sparse.axis_order import axis_orders, head_token_index, permute_tokens, token_index
from attending.sparse.block_scores import block_sums
from attending.sparse.order_scores import (
    combined_score,
    order_statistics,
    order_statistics_of_map,
)
from attending.sparse.static_mask import always_kept, static_block_mask
from tests.sparse import reference_paro as reference

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "paro-attention" / "metrics.npz")


def test_golden() -> None:
    grid = tuple(int(GOLDEN[axis]) for axis in "FHW")
    block = int(GOLDEN["block"])
    maps = torch.from_numpy(GOLDEN["P"]).double()[None]  # stored in float32
    found = order_statistics_of_map(maps, grid, block_size=block, eps=float(GOLDEN["eps"]))
    sparsity = found.sparsity(float(GOLDEN["sigma"]))
    np.testing.assert_array_equal(sparsity[0].numpy(), GOLDEN["M_sparse"])
    np.testing.assert_allclose(found.quantisation()[0].numpy(), GOLDEN["M_quant"], rtol=1e-5)
    np.testing.assert_allclose(found.total[0].numpy(), GOLDEN["block_sum"], rtol=1e-5, atol=1e-6)
    for literal, name in ((True, "score_paper_literal"), (False, "score_corrected")):
        score = combined_score(
            sparsity, found.quantisation(), alpha=float(GOLDEN["alpha"]), literal=literal
        )
        np.testing.assert_allclose(score[0].numpy(), GOLDEN[name], rtol=1e-5)
    order = combined_score(sparsity, found.quantisation()).argmin(-1)[0]
    np.testing.assert_array_equal(order.numpy(), GOLDEN["best_order"])
    index = head_token_index(grid, order.tolist())
    moved = permute_tokens(permute_tokens(maps, index).mT, index).mT
    mask = static_block_mask(block_sums(moved, block), float(GOLDEN["density"]))
    np.testing.assert_array_equal(mask[0].numpy(), GOLDEN["static_mask"])


@given(
    grid=st.one_of(
        st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(2, 4)),
        st.tuples(st.integers(2, 5), st.integers(2, 6)),
    ),
    block=st.integers(1, 9),
    text=st.integers(0, 4),
    first=st.booleans(),
    shared=st.integers(1, 2),
)
def test_statistics_by_their_definition(
    grid: tuple[int, ...], block: int, text: int, first: bool, shared: int
) -> None:
    torch.manual_seed(block)
    tokens = int(np.prod(grid)) + text
    start = -(-text // block) * block if first else 0
    stop = tokens if first or not text else (tokens - text) // block * block
    if start >= stop:
        return
    query = 2 * torch.randn(2, 2, tokens, 3, dtype=torch.float64)
    key = torch.randn(2, 2 // shared, tokens, 3, dtype=torch.float64)
    eps, sigma = 0.02, 0.6
    options = {"block_size": block, "eps": eps, "text_tokens": text, "text_first": first}
    found = order_statistics(query, key, grid, **options)
    maps = reference.attention_map(query, key.repeat_interleave(shared, 1))
    of_map = order_statistics_of_map(maps, grid, **options)
    for one, other in zip(found, of_map, strict=True):
        torch.testing.assert_close(one, other)
    sparsity, quantisation = found.sparsity(sigma), found.quantisation()
    assert bool((quantisation >= 1 - 1e-12).all())
    for number, name in enumerate(axis_orders(grid)):
        walk = token_index(grid, name, text_tokens=text, text_first=first)[start:stop]
        expected = reference.block_scores(maps[1, 1][walk][:, walk], block, eps, sigma)
        assert float(sparsity[1, 1, number]) == pytest.approx(expected[0])
        assert float(quantisation[1, 1, number]) == pytest.approx(expected[1])


def test_slabs_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    query, key = torch.randn(2, 1, 3, 70, 4, dtype=torch.float64)
    whole = order_statistics(query, key, (2, 5, 7), block_size=8)
    monkeypatch.setattr(order_scores, "SLAB_SCORES", 1)
    for one, other in zip(
        whole, order_statistics(query, key, (2, 5, 7), block_size=8), strict=True
    ):
        torch.testing.assert_close(one, other)


def test_a_constant_map_has_no_best_order() -> None:
    query = torch.zeros(1, 1, 24, 4)
    found = order_statistics(query, query, (2, 3, 4), block_size=6)
    torch.testing.assert_close(found.quantisation(), torch.ones(1, 1, 6))
    assert not found.sparsity().any()
    assert bool(
        (order_statistics_of_map(torch.zeros(1, 1, 24, 24), (2, 3, 4)).quantisation() == 1).all()
    )


def test_a_head_that_looks_along_time() -> None:
    """Same row and column in all frames: time has to run fastest."""
    frames, height, width = 4, 4, 4
    place = torch.arange(64) % 16
    maps = (place[:, None] == place).double()[None, None] / frames
    found = order_statistics_of_map(maps, (frames, height, width), block_size=4)
    score = combined_score(found.sparsity(), found.quantisation())[0, 0]
    assert axis_orders((4, 4, 4))[int(score.argmin())] in ("HWF", "WHF")
    literal = combined_score(found.sparsity(), found.quantisation(), alpha=1.0, literal=True)
    assert int(literal.argmin()) == int(found.sparsity().argmin())  # the worst, as written
    kept = found.kept_mass(1 / 16)[0, 0]
    assert float(kept[2]) == pytest.approx(1.0)  # HWF: a sixteenth of the blocks has it all
    assert float(kept[0]) < 0.3


def test_thin_lines_mislead_the_scores() -> None:
    """As the docstring of the module says: each block is nearly empty in the bad order."""
    place = torch.arange(4 * 64) % 64
    maps = (place[:, None] == place).double()[None, None] / 4
    found = order_statistics_of_map(maps, (4, 8, 8), block_size=64)
    assert float(found.sparsity(0.9)[0, 0, 0]) == 1.0  # FHW: one cell in 64 of every block
    assert float(found.sparsity(0.9)[0, 0, 2]) == 1.0  # HWF: four in 64 of those on the diagonal
    assert float(found.sparsity(1.0)[0, 0, 0]) == 0.0
    assert float(found.sparsity(1.0)[0, 0, 2]) == 0.75
    assert found.kept_mass(0.25)[0, 0, [0, 2]].tolist() == pytest.approx([0.25, 1.0])


@given(
    blocks=st.integers(1, 12),
    density=st.floats(0.01, 1.0),
    text=st.integers(0, 3),
    keep_last=st.booleans(),
    seed=st.integers(0, 9),
)
def test_masks_meet_the_density(
    blocks: int, density: float, text: int, keep_last: bool, seed: int
) -> None:
    sums = torch.rand(2, blocks, blocks, generator=torch.Generator().manual_seed(seed))
    text = min(text, blocks)
    always = always_kept(4 * blocks, 4, text_tokens=4 * text, keep_last=keep_last)
    mask = static_block_mask(sums, density, always=always)
    assert bool(mask[:, always].all())
    count = max(round(density * blocks**2), int(always.sum()))
    assert mask.sum((-1, -2)).tolist() == [count, count]
    free = ~always
    for one, kept in zip(sums, mask, strict=True):
        if bool((kept & free).any()) and bool((~kept).any()):
            assert float(one[kept & free].min()) >= float(one[~kept].max())


def test_always_kept() -> None:
    first = always_kept(10, 3, text_tokens=4)  # blocks of 3, 3, 3, 1
    assert first[0].tolist() == [True] * 4
    assert first.sum() == 16 - 1  # only block 2 with itself is free
    last = always_kept(10, 3, text_tokens=2, text_first=False, keep_last=False)
    assert last.diagonal().tolist() == [False, False, True, True]
    assert not always_kept(10, 3, keep_last=False).any()


def test_ties_go_to_the_earlier_block() -> None:
    assert static_block_mask(torch.ones(2, 2), 0.5).tolist() == [[True, True], [False, False]]


def test_what_is_refused() -> None:
    query = torch.randn(1, 1, 24, 4)
    with pytest.raises(ValueError, match="grid: expected one of 24 tokens"):
        order_statistics(query, query, (2, 3, 5))
    with pytest.raises(ValueError, match="block_size: expected blocks of which"):
        order_statistics(query, query, (2, 3, 3), text_tokens=6, block_size=24)
    with pytest.raises(ValueError, match="block_size"):
        order_statistics(query, query, (2, 3, 4), block_size=0)
    with pytest.raises(ValueError, match="attention: expected maps"):
        order_statistics_of_map(torch.zeros(1, 1, 4, 5), (2, 2))
    found = order_statistics(query, query, (2, 3, 4))
    with pytest.raises(ValueError, match="sigma"):
        found.sparsity(0.0)
    with pytest.raises(ValueError, match="alpha"):
        combined_score(found.sparsity(), found.quantisation(), alpha=2.0)
    with pytest.raises(ValueError, match="density"):
        static_block_mask(torch.ones(2, 2), 0.0)
