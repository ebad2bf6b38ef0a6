"""The window of blocks."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attending.sparse.window import window_plan

LENGTH = st.integers(1, 70)


@given(LENGTH, LENGTH, st.integers(1, 9), st.integers(1, 9))
def test_every_row_keeps_its_width(queries: int, keys: int, size: int, width: int) -> None:
    plan = window_plan(queries, keys, block_size=size, width=width)
    columns = plan.block_mask.shape[3]
    assert plan.block_mask.sum(-1).eq(min(width, columns)).all()
    assert plan.density == pytest.approx(min(width, columns) / columns)


def test_pictures() -> None:
    assert window_plan(5, 5, block_size=1, width=3).picture() == "\n".join(
        ["###..", "###..", ".###.", "..###", "..###"]
    )
    assert window_plan(2, 8, block_size=1, width=2).picture() == "..##....\n......##"
    assert window_plan(4, 4, block_size=1, width=2, sinks=1, is_causal=True).picture() == (
        "#...\n##..\n###.\n#.##"
    )


@given(LENGTH, st.integers(1, 9), st.integers(1, 9))
def test_causal_rows_keep_their_own_block(length: int, size: int, width: int) -> None:
    plan = window_plan(length, length, block_size=size, width=width, is_causal=True)
    assert plan.block_mask[0, 0].diagonal().all()


def test_errors() -> None:
    with pytest.raises(ValueError, match="width, sinks"):
        window_plan(4, 4, block_size=1, width=0)
