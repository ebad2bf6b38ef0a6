"""Rows of an image over ranks: two real processes, and any number of emulated ones."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attending.core.state import AttentionState, attend, merge
from attending.sparse._grid_window import window_shape
from attending.sparse.circular_window import circular_window_attention, grid_window_state
from attending.sparse.halo_exchange import (
    even_slabs,
    exchange_halo,
    halo_window_attention,
    merge_over_ranks,
)
from tests.distributed import Ranks

GOLDEN = Path(__file__).parent.parent / "golden" / "clear" / "text_parallel_and_losses.npz"


def problem(grid: tuple, text: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = math.prod(grid) + text
    return [
        torch.randn(2, heads, tokens, dim, generator=generator, dtype=torch.float64)
        for heads, dim in ((4, 5), (2, 5), (2, 3))
    ]


def slab_of(
    tensor: Tensor, rank: int, slabs: list[int], row: int, text: int, first: bool
) -> Tensor:
    """The text and the rank's rows."""
    start, stop = sum(slabs[:rank]) * row, sum(slabs[: rank + 1]) * row
    if first:
        return torch.cat([tensor[:, :, :text], tensor[:, :, text + start : text + stop]], 2)
    image = tensor[:, :, : tensor.shape[2] - text]
    return torch.cat([image[:, :, start:stop], tensor[:, :, tensor.shape[2] - text :]], 2)


CASES = [
    # grid, radius, text, text first, slabs, frame radius
    ((6, 5), 2, 3, True, None, None),
    ((7, 4), 3, 3, False, None, None),
    ((7, 4), 2.5, 0, True, [2, 5], None),
    ((6, 5), 1, 2, True, [1, 5], None),
    ((5, 4), 9, 1, True, [4, 1], None),
    ((4, 3, 5), 2, 2, True, [3, 1], 2),
    ((4, 3, 5), 2, 2, False, None, None),
    ((3, 3, 5), 2, 0, False, None, 1),
]


def _attend(rank: int, world_size: int, cases: list, text_queries: str) -> list[Tensor]:
    outputs = []
    for grid, radius, text, first, slabs, frame_radius in cases:
        row = math.prod(grid[1:])
        parts = slabs or even_slabs(grid[0], world_size)
        tensors = [slab_of(one, rank, parts, row, text, first) for one in problem(grid, text)]
        outputs.append(
            halo_window_attention(
                *tensors,
                grid,
                radius,
                text_length=text,
                text_first=first,
                slabs=slabs,
                frame_radius=frame_radius,
                text_queries=text_queries,
                scale=0.4,
            )
        )
    return outputs


def test_two_processes_give_the_outputs_of_one(two_processes: Ranks) -> None:
    found = two_processes.run(_attend, CASES, "exact")
    for index, (grid, radius, text, first, slabs, frame_radius) in enumerate(CASES):
        whole = circular_window_attention(
            *problem(grid, text), grid, radius, text_length=text, text_first=first,
            frame_radius=frame_radius, scale=0.4,
        )  # fmt: skip
        for rank in range(2):
            row, parts = math.prod(grid[1:]), slabs or even_slabs(grid[0], 2)
            expected = slab_of(whole, rank, parts, row, text, first)
            torch.testing.assert_close(found[rank][index], expected, rtol=1e-10, atol=1e-10)


def test_average_of_two_processes(two_processes: Ranks) -> None:
    grid, radius, text, first, *_ = case = CASES[0]
    found = [outputs[0] for outputs in two_processes.run(_attend, [case], "average")]
    query, key, value = problem(grid, text)
    whole = circular_window_attention(query, key, value, grid, radius, text_length=text, scale=0.4)
    mean = torch.zeros_like(whole[:, :, :text])
    for rank in range(2):
        keys, values = (slab_of(one, rank, [3, 3], 5, text, first) for one in (key, value))
        mean += attend(query[:, :, :text], keys, values, scale=0.4).output / 2
    for rank in range(2):
        torch.testing.assert_close(found[rank][:, :, :text], mean, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(
            found[rank][:, :, text:], slab_of(whole, rank, [3, 3], 5, text, first)[:, :, text:]
        )
    assert not torch.allclose(mean, whole[:, :, :text])


def _traffic(rank: int, world_size: int) -> tuple[list[int], Tensor, int]:
    sent: list[int] = []
    real = dist.P2POp

    def counting(operation, tensor, peer, group=None):
        if operation is dist.isend:
            sent.append(tensor.shape[2])
        return real(operation, tensor, peer, group)

    dist.P2POp = counting
    try:
        tensor = torch.full((1, 1, 8 * 4, 2), float(rank))
        around, before = exchange_halo(tensor, [8, 8], 3, 4)
    finally:
        dist.P2POp = real
    return sent, around, before


def test_only_rows_within_reach_travel(two_processes: Ranks) -> None:
    (sent, around, before), (_, other, other_before) = two_processes.run(_traffic)
    assert sent == [3 * 4]
    assert (before, other_before) == (0, 3)
    assert around[0, 0, :, 0].tolist() == [0.0] * 32 + [1.0] * 12
    assert other[0, 0, :, 0].tolist() == [0.0] * 12 + [1.0] * 32


def _merge(rank: int, world_size: int, path: str, average: bool) -> Tensor:
    with np.load(path) as stored:
        found = {key: torch.from_numpy(stored[key]) for key in stored.files}
    half = found["k_img"].shape[2] // 2
    mine = slice(rank * half, (rank + 1) * half)
    state = attend(found["q_text"], found["k_img"][:, :, mine], found["v_img"][:, :, mine],
                   scale=0.5)  # fmt: skip
    empty = AttentionState(torch.zeros_like(state.output), torch.full_like(state.lse, -math.inf))
    nothing = merge_over_ranks(empty)
    assert nothing.output.eq(0).all()
    assert nothing.lse.eq(-math.inf).all()
    text = attend(found["q_text"], found["k_text"], found["v_text"], scale=0.5)
    return merge(text, merge_over_ranks(state)).output


def test_exact_merge_is_the_golden_one(two_processes: Ranks) -> None:
    with np.load(GOLDEN) as stored:
        wanted = torch.from_numpy(stored["lse_merge"])
        torch.testing.assert_close(torch.from_numpy(stored["full"]), wanted)
    for output in two_processes.run(_merge, str(GOLDEN), False):
        torch.testing.assert_close(output, wanted, rtol=1e-10, atol=1e-10)


def test_golden_average_over_patches() -> None:
    """Three patches, one after another: what `text_queries="average"` reduces over ranks."""
    with np.load(GOLDEN) as stored:
        found = {key: torch.from_numpy(stored[key]) for key in stored.files}
    patches = int(found["num_patches"])
    mean = torch.zeros_like(found["full"])
    for keys, values in zip(
        found["k_img"].chunk(patches, 2), found["v_img"].chunk(patches, 2), strict=True
    ):
        seen = [torch.cat(pair, 2) for pair in ((found["k_text"], keys), (found["v_text"], values))]
        mean += attend(found["q_text"], *seen, scale=0.5).output / patches
    torch.testing.assert_close(mean, found["patch_average_text_in_each"], rtol=1e-10, atol=1e-10)


@settings(max_examples=30)
@given(
    height=st.integers(1, 12),
    width=st.integers(1, 5),
    ranks=st.integers(1, 5),
    radius=st.sampled_from((1, 1.5, 2, 3, 8)),
)
def test_rows_within_reach_are_enough(height: int, width: int, ranks: int, radius: float) -> None:
    """Any number of slabs, cut by hand."""
    grid = (height, width)
    slabs = even_slabs(height, min(ranks, height))
    tensors = problem(grid, 0)
    whole = circular_window_attention(*tensors, grid, radius, scale=0.4)
    _, window = window_shape(grid, radius, None)
    reach = math.ceil(radius) - 1
    start, outputs = 0, []
    for rows in slabs:
        low, high = max(0, start - reach), min(height, start + rows + reach)
        query = tensors[0][:, :, start * width : (start + rows) * width]
        key, value = (one[:, :, low * width : high * width] for one in tensors[1:])
        state = grid_window_state(
            query, key, value, (1, rows, width), window, 0.4, (1, high - low, width),
            (0, start - low, 0),
        )  # fmt: skip
        outputs.append(state.output)
        start += rows
    torch.testing.assert_close(torch.cat(outputs, 2), whole, rtol=1e-10, atol=1e-10)


def _errors(rank: int, world_size: int) -> list[str]:
    tensors = [torch.zeros(1, 1, 12, 2)] * 3
    words = []
    for options in (
        {"slabs": [1, 1]},
        {"slabs": [6]},
        {"text_queries": "roughly"},
        {"grid": (8, 4)},
    ):
        try:
            halo_window_attention(*tensors, **{"grid": (6, 4), "radius": 2} | options)
        except ValueError as error:
            words.append(str(error).split(":")[0])
    return words


def test_errors(two_processes: Ranks) -> None:
    assert two_processes.run(_errors) == [["slabs", "slabs", "text_queries", "query"]] * 2
    with pytest.raises(ValueError, match="ranks"):
        even_slabs(2, 3)
    tensor = torch.zeros(1, 1, 24, 2)
    with pytest.raises(RuntimeError, match="init_process_group"):
        halo_window_attention(tensor, tensor, tensor, (6, 4), 2)
