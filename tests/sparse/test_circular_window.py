"""Circles on a grid of image tokens: against masks in float64, and the official processors."""

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from attending.core.blocks import block_sparse_attention
from attending.sparse import _window_tiles as tiles
from attending.sparse import circular_window as circles
from attending.sparse._grid_window import window_shape
from attending.sparse.circular_window import (
    circular_window_attention,
    circular_window_mask,
    log_length_scale,
    pool_tokens,
)
from attending.sparse.square_tiles import circular_window_plan, square_tile_order

GOLDEN = Path(__file__).parent.parent / "golden" / "clear"
KERNELS = pytest.mark.parametrize("small_map", [0, 512 * 512], ids=["tiles", "mask"])


@pytest.fixture
def kernel(small_map: int) -> Iterator[None]:
    """Small maps are masked; the tiles are to be tested too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(circles, "SMALL_MAP", small_map)
        yield


def naive_mask(grid, radius, text_length, text_first, frame_radius, down_factor) -> Tensor:
    """The definition, token by token."""
    frames, height, width = (1, *grid) if len(grid) == 2 else grid
    image = [(t, y, x) for t in range(frames) for y in range(height) for x in range(width)]
    text = [None] * text_length
    tokens = text + image if text_first else image + text
    rows = []
    for a in tokens:
        row = []
        for b in tokens:
            if a is None or b is None:
                row.append(True)
                continue
            near = (a[1] - b[1]) ** 2 + (a[2] - b[2]) ** 2 < radius**2
            row.append(near and (frame_radius is None or abs(a[0] - b[0]) < frame_radius))
        if down_factor is not None:
            row += [a is not None] * (len(image) // down_factor**2)
        rows.append(row)
    return torch.tensor(rows)


def naive_pool(tokens: Tensor, grid, factor: int, weight: Tensor) -> Tensor:
    frames, height, width = (1, *grid) if len(grid) == 2 else grid
    volume = tokens.unflatten(2, (frames, height, width))
    found = []
    for t in range(frames):
        for y in range(0, height, factor):
            for x in range(0, width, factor):
                block = volume[:, :, t, y : y + factor, x : x + factor]
                found.append((block * weight[..., None]).sum((2, 3)))
    return torch.stack(found, 2)


def masked(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    groups = query.shape[1] // key.shape[1]
    key, value = (one.double().repeat_interleave(groups, 1) for one in (key, value))
    scores = (query.double() @ key.mT * scale).masked_fill(~mask, -math.inf)
    return scores.softmax(-1) @ value


def naive(query, key, value, grid, radius, *, text_length, text_first, frame_radius, down_factor,
          pool_weight, scale) -> Tensor:  # fmt: skip
    if down_factor is not None:
        first = text_length if text_first else 0
        image = slice(first, first + math.prod(grid))
        key, value = (
            torch.cat([one, naive_pool(one[:, :, image], grid, down_factor, pool_weight)], 2)
            for one in (key, value)
        )
    mask = naive_mask(grid, radius, text_length, text_first, frame_radius, down_factor)
    return masked(query, key, value, mask, scale)


@st.composite
def windows(draw: st.DrawFn, dtypes=(torch.float64, torch.float32)) -> tuple[tuple, dict]:
    dtype = draw(st.sampled_from(dtypes))
    factor = draw(st.sampled_from((None, None, 1, 2, 3)))
    sides = [draw(st.integers(1, 12)) * (factor or 1) for _ in range(2)]
    sides = [min(side, 12) for side in sides]
    frames = draw(st.sampled_from((None, 1, 2, 3)))
    grid = tuple(sides) if frames is None else (frames, *sides)
    frame_radius = None if frames is None else draw(st.sampled_from((None, 1, 2, 5)))
    text_length = draw(st.sampled_from((0, 1, 5)))
    kv_heads, groups = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    tokens = math.prod(grid) + text_length
    dim, value_dim = draw(st.integers(1, 9)), draw(st.integers(1, 9))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    tensors = (
        normal(2, kv_heads * groups, tokens, dim),
        normal(2, kv_heads, tokens, dim),
        normal(2, kv_heads, tokens, value_dim),
    )
    weight = None if factor is None else normal(factor, factor)
    options = {
        "text_length": text_length,
        "text_first": draw(st.booleans()),
        "frame_radius": frame_radius,
        "down_factor": factor,
        "pool_weight": weight,
        "scale": draw(st.sampled_from((0.3, dim**-0.5))),
    }
    radius = draw(st.sampled_from((1, 1.5, 2, 3, 4.2, 8, 40, math.inf)))
    return (*tensors, grid, radius), options


@KERNELS
@settings(max_examples=60)
@given(case=windows())
def test_is_the_masked_definition(small_map: int, case: tuple[tuple, dict]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(circles, "SMALL_MAP", small_map)
        ours = circular_window_attention(*case[0], **case[1])
    exact = naive(*(one.double() if isinstance(one, Tensor) else one for one in case[0]), **case[1])
    tolerance = 1e-10 if ours.dtype == torch.float64 else 2e-4
    torch.testing.assert_close(ours.double(), exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("gather", [1, 3000, tiles.GATHER_BYTES])
@settings(max_examples=25)
@given(case=windows(dtypes=(torch.float64,)))
def test_gradients(gather: int, case: tuple[tuple, dict]) -> None:
    (query, key, value, grid, radius), options = case
    leaves = [query, key, value]
    if options["pool_weight"] is not None:
        leaves.append(options["pool_weight"])
    leaves = [one.detach().requires_grad_() for one in leaves]
    options = options | {"pool_weight": leaves[3] if len(leaves) == 4 else None}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(circles, "SMALL_MAP", 0)
        patch.setattr(tiles, "GATHER_BYTES", gather)
        ours = circular_window_attention(*leaves[:3], grid, radius, **options)
        weights = torch.randn_like(ours)
        found = torch.autograd.grad((ours * weights).sum(), leaves)
    exact = naive(*leaves[:3], grid, radius, **options)
    wanted = torch.autograd.grad((exact * weights).sum(), leaves)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@KERNELS
def test_half_precision(kernel: None, dtype: torch.dtype) -> None:
    tensors = [torch.randn(1, 2, 30 + 4, 8).to(dtype) for _ in range(3)]
    ours = circular_window_attention(*tensors, (5, 6), 2.5, text_length=4, down_factor=1)
    exact = naive(
        *(one.double() for one in tensors), (5, 6), 2.5, text_length=4, text_first=True,
        frame_radius=None, down_factor=1, pool_weight=torch.ones(1, 1), scale=8**-0.5,
    )  # fmt: skip
    assert ours.dtype == dtype
    torch.testing.assert_close(ours.double(), exact, rtol=2e-2, atol=2e-2)


@KERNELS
@pytest.mark.parametrize("name", ["local_joint", "local_single", "down2_text512"])
def test_is_the_official_processor(kernel: None, name: str) -> None:
    with np.load(GOLDEN / f"{name}.npz") as stored:
        found = {key: torch.from_numpy(stored[key]) for key in stored.files}
    grid = (int(found["height"]), int(found["width"]))
    radius, text = int(found["window_size"]), int(found["text_length"])
    factor = int(found["down_factor"])
    options: dict = {}
    if factor > 1:
        options = {"down_factor": factor, "pool_weight": found["spatial_weight"].squeeze()}
    else:
        mask = circular_window_mask(grid, radius, text_length=text)
        assert torch.equal(mask, found["mask"])
    ours = circular_window_attention(
        found["q"], found["k"], found["v"], grid, radius,
        text_length=text, scale=float(found["scale"]), **options,
    )  # fmt: skip
    torch.testing.assert_close(ours, found["core"], rtol=1e-10, atol=1e-10)


def test_scales_of_the_official_processor() -> None:
    with np.load(GOLDEN / "local_single.npz") as stored:
        scale, tokens = float(stored["scale"]), stored["q"].shape[2]
    assert log_length_scale(8, tokens) == pytest.approx(scale, rel=1e-12)
    assert log_length_scale(64, 64**2 + 512) == 64**-0.5
    assert log_length_scale(64, 100, factor=10) == log_length_scale(64, 1000)


def test_circles_as_the_card_counts_them() -> None:
    for radius, tokens in ((1, 1), (8, 193), (16, 793), (32, 3205)):
        mask = circular_window_mask((2 * radius + 1, 2 * radius + 1), radius)
        assert int(mask[len(mask) // 2].sum()) == tokens


@given(case=windows(dtypes=(torch.float64,)))
def test_mask_is_the_definition_and_symmetric(case: tuple[tuple, dict]) -> None:
    (_, _, _, grid, radius), options = case
    options = {
        key: options[key] for key in ("text_length", "text_first", "frame_radius", "down_factor")
    }
    mask = circular_window_mask(grid, radius, **options)
    assert torch.equal(mask, naive_mask(grid, radius, **options))
    square = mask[:, : len(mask)]
    assert torch.equal(square, square.mT)
    shape, window = window_shape(grid, radius, options["frame_radius"])
    alone = circular_window_mask(grid, radius, frame_radius=options["frame_radius"])
    assert circles.window_entries(shape, window) == int(alone.sum())


@settings(max_examples=30)
@given(case=windows(dtypes=(torch.float64,)))
def test_large_radius_is_full_attention_and_radius_one_is_alone(case: tuple[tuple, dict]) -> None:
    (query, key, value, grid, _), options = case
    options = options | {"down_factor": None, "pool_weight": None, "frame_radius": None}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(circles, "SMALL_MAP", 0)
        everything = circular_window_attention(
            query, key, value, grid, math.hypot(*grid[-2:]), **options
        )
        full = torch.ones(query.shape[2], query.shape[2], dtype=torch.bool)
        torch.testing.assert_close(everything, masked(query, key, value, full, options["scale"]))
        alone = circular_window_attention(
            query, key, value, grid, 1, **options | {"frame_radius": None if len(grid) == 2 else 1}
        )
    if options["text_length"] == 0:
        groups = query.shape[1] // key.shape[1]
        torch.testing.assert_close(alone, value.repeat_interleave(groups, 1))


def test_shapes_do_not_remember_each_other() -> None:
    """The official code goes on with the mask of another size (trap 1 of the card)."""

    def run(height: int, width: int) -> Tensor:
        torch.manual_seed(height)
        tensors = [torch.randn(1, 1, height * width, 4) for _ in range(3)]
        return circular_window_attention(*tensors, (height, width), 1.5)

    first = run(4, 4)
    circular_window_mask((4, 4), 1.5)[:] = False  # what is given away is the caller's
    run(2, 8)
    run(2, 2)
    assert torch.equal(run(4, 4), first)


def test_equal_neighbourhoods_give_equal_outputs() -> None:
    """Shifted by a token, all that lies away from the edges is shifted and no more."""
    tensors = [torch.randn(1, 2, 20, 21, 4, dtype=torch.float64) for _ in range(3)]

    def run(cut: slice) -> Tensor:
        parts = [one[:, :, :, cut].flatten(2, 3) for one in tensors]
        return circular_window_attention(*parts, (20, 20), 4).unflatten(2, (20, 20))

    before, after = run(slice(0, 20)), run(slice(1, 21))
    torch.testing.assert_close(before[:, :, :, 4:17], after[:, :, :, 3:16])


@settings(max_examples=25)
@given(
    tile=st.sampled_from((1, 2, 4)),
    height=st.integers(1, 4),
    width=st.integers(1, 4),
    frames=st.sampled_from((None, 2)),
    radius=st.sampled_from((1, 2, 3.5, 6, 30)),
)
@example(tile=4, height=4, width=4, frames=None, radius=3.5)
def test_plan_has_the_blocks_of_the_mask(
    tile: int, height: int, width: int, frames: int | None, radius: float
) -> None:
    grid = (
        (height * tile, width * tile) if frames is None else (frames, height * tile, width * tile)
    )
    frame_radius = None if frames is None else 1
    order = square_tile_order(grid, tile)
    plan = circular_window_plan(grid, radius, frame_radius=frame_radius, tile=tile)
    mask = circular_window_mask(grid, radius, frame_radius=frame_radius)[order][:, order]
    cut = mask.unflatten(1, (-1, tile**2)).unflatten(0, (-1, tile**2))
    assert torch.equal(plan.block_mask[0, 0], cut.any(3).any(1))
    query, key, value = (torch.randn(1, 2, len(order), 3, dtype=torch.float64) for _ in range(3))
    state = block_sparse_attention(
        query[:, :, order], key[:, :, order], value[:, :, order], plan, bias=mask
    )
    ours = circular_window_attention(query, key, value, grid, radius, frame_radius=frame_radius)
    torch.testing.assert_close(state.output[:, :, order.argsort()], ours)


def test_tiles_of_a_large_image_are_few_kinds() -> None:
    shape, window = window_shape((64, 64), 8, None)
    kinds = tiles.tile_kinds(shape, window, (1, 8, 8), shape, (0, 0, 0))
    assert len(kinds) == 9
    assert sum(len(kind.starts) for kind in kinds) == 64
    assert max(len(kind.keys) for kind in kinds) < 22 * 22


def test_default_down_sampling_is_the_mean() -> None:
    tokens = torch.randn(1, 1, 24, 3, dtype=torch.float64)
    found = pool_tokens(tokens, (4, 6), 2)
    mean = torch.nn.functional.avg_pool2d(tokens.view(1, 4, 6, 3).permute(0, 3, 1, 2), 2)
    torch.testing.assert_close(found[0, 0], mean[0].flatten(1).mT)


def test_errors() -> None:
    query = torch.randn(1, 2, 12, 4)
    for options, words in (
        ({"grid": (3, 5), "radius": 2}, "query: expected 0 text tokens and 15 of the grid"),
        ({"grid": (3, 4), "radius": 0}, "radius"),
        ({"grid": (3, 4), "radius": math.nan}, "radius"),
        ({"grid": (3,), "radius": 2}, "grid"),
        ({"grid": (0, 4), "radius": 2}, "grid"),
        ({"grid": (3, 4), "radius": 2, "frame_radius": 1}, "frame_radius"),
        ({"grid": (3, 4), "radius": 2, "text_length": -1}, "text_length"),
        ({"grid": (3, 4), "radius": 2, "down_factor": 2}, "down_factor"),
        ({"grid": (3, 4), "radius": 2, "pool_weight": torch.ones(1, 1)}, "down_factor"),
        ({"grid": (3, 4), "radius": 2, "down_factor": 1, "pool_weight": torch.ones(2)}, "weight"),
    ):
        with pytest.raises(ValueError, match=words):
            circular_window_attention(query, query, query, **options)
    with pytest.raises(ValueError, match="tile"):
        circular_window_plan((3, 4), 2, tile=2)
    with pytest.raises(ValueError, match="tile"):
        square_tile_order((3, 4), 2)
    with pytest.raises(ValueError, match="base_length"):
        log_length_scale(4, 100, base_length=1)


@pytest.mark.parametrize(("radius", "step"), [(1, 0), (2, 1), (2.5, 2), (4, 3)])
def test_the_receptive_field_grows_by_less_than_the_radius_a_layer(
    radius: float, step: int
) -> None:
    mask = circular_window_mask((1, 40), radius).double()
    seen = torch.eye(40, dtype=torch.float64)
    for layer in range(1, 4):
        seen = (mask @ seen).clamp(max=1)
        assert seen[0].nonzero().max() == layer * step


@given(case=windows(dtypes=(torch.float64,)))
def test_rows_sum_to_one(case: tuple[tuple, dict]) -> None:
    (query, key, value, grid, radius), options = case
    weight = options["pool_weight"]
    if weight is not None:  # down-sampled ones are ones only if the weights sum to 1
        options = options | {"pool_weight": weight.abs() / weight.abs().sum()}
    ones = torch.ones_like(value)
    output = circular_window_attention(query, key, ones, grid, radius, **options)
    torch.testing.assert_close(output, torch.ones_like(output))
