import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from attending.sparse.axis_order import axis_orders
from attending.sparse.paro import PAROPlan, pack_masks, paro_attention, unpack_masks
from attending.sparse.paro_calibration import PAROCalibration
from tests.sparse import reference_paro as reference

GRID = (3, 4, 5)


def plan_of(
    masks: Tensor, orders: Tensor, grid: tuple[int, ...], block: int, **options: Any
) -> PAROPlan:
    layers = tuple(f"blocks.{number}" for number in range(len(orders)))
    return PAROPlan(grid, layers, orders, pack_masks(masks), block, 4, 4, **options)


def random_plan(
    grid: tuple[int, ...], block: int, text: int, heads: int, seed: int = 0, density: float = 0.5
) -> PAROPlan:
    generator = torch.Generator().manual_seed(seed)
    blocks = -(-(math.prod(grid) + text) // block)
    masks = torch.rand(3, 2, heads, blocks, blocks, generator=generator) < density
    orders = torch.randint(len(axis_orders(grid)), (2, heads), generator=generator)
    return plan_of(masks, orders, grid, block, text_tokens=text)


def by_definition(
    query: Tensor, key: Tensor, value: Tensor, plan: PAROPlan, layer: int, mask: int, full: bool
) -> Tensor:
    """Every cell of the map asks for the block that its tokens stand in."""
    shared = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(shared, 1), value.repeat_interleave(shared, 1)
    output = torch.zeros_like(value).expand(-1, -1, -1, value.shape[-1]).clone()
    for head in range(query.shape[1]):
        name = axis_orders(plan.grid)[int(plan.orders[layer, head])]
        walk = [*range(plan.text_tokens)]
        walk += [plan.text_tokens + place for place in reference.token_index(plan.grid, name)]
        place = torch.empty(len(walk), dtype=torch.long)
        place[torch.tensor(walk)] = torch.arange(len(walk))
        block = place // plan.block_size
        seen = plan.masks()[mask, layer, head][block[:, None], block]
        scores = query[:, head] @ key[:, head].mT * query.shape[-1] ** -0.5
        weights = scores.softmax(-1) * seen
        if not full:
            weights = (weights / weights.sum(-1, keepdim=True)).nan_to_num(0.0)
        output[:, head] = weights @ value[:, head]
    return output


@given(
    blocks=st.integers(1, 7), lead=st.lists(st.integers(1, 3), max_size=2), seed=st.integers(0, 9)
)
def test_masks_are_packed_without_loss(blocks: int, lead: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    masks = torch.rand(*lead, blocks, blocks, generator=generator) < 0.5
    packed = pack_masks(masks)
    assert packed.shape[-1] == -(-(blocks**2) // 8)
    assert torch.equal(unpack_masks(packed, blocks), masks)


@given(
    grid=st.one_of(
        st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4)),
        st.tuples(st.integers(1, 5), st.integers(1, 5)),
    ),
    block=st.integers(1, 12),
    text=st.integers(0, 4),
    shared=st.booleans(),
    renormalize=st.booleans(),
    seed=st.integers(0, 5),
)
def test_attention_by_its_definition(
    grid: tuple[int, ...], block: int, text: int, shared: bool, renormalize: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    plan = random_plan(grid, block, text, 4, seed)
    query = torch.randn(2, 4, plan.tokens, 3, dtype=torch.float64)
    key, value = torch.randn(2, 2, 2 if shared else 4, plan.tokens, 3, dtype=torch.float64)
    state = paro_attention(query, key, value, plan, 1, 2, renormalize=renormalize)
    expected = by_definition(query, key, value, plan, 1, 2, not renormalize)
    torch.testing.assert_close(state.output, expected, rtol=0, atol=1e-12)
    dense = paro_attention(query, key, value, plan.dense(), "blocks.1", 2).output
    exact = scaled_dot_product_attention(query, key, value, enable_gqa=True)
    torch.testing.assert_close(dense, exact, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_and_a_single_token(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    plan = random_plan(GRID, 8, 3, 3, density=0.6)
    given = [one.to(dtype) for one in torch.randn(3, 2, 3, plan.tokens, 8)]
    found = paro_attention(*given, plan, 0, 1).output
    assert found.dtype == dtype
    exact = by_definition(*(one.double() for one in given), plan, 0, 1, False)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=tolerance)
    one = random_plan((1, 1), 4, 0, 2, density=1.0)
    query, key, value = torch.randn(3, 1, 2, 1, 4, dtype=dtype)
    assert torch.equal(paro_attention(query, key, value, one, 0, 0).output, value)


def test_lse_is_in_the_order_of_the_model() -> None:
    torch.manual_seed(0)
    plan = random_plan(GRID, 7, 2, 3)
    query, key, value = torch.randn(3, 1, 3, plan.tokens, 4, dtype=torch.float64)
    lse = (query @ key.mT * 0.5).logsumexp(-1)
    torch.testing.assert_close(paro_attention(query, key, value, plan.dense(), 0, 0).lse, lse)
    literal = paro_attention(query, key, value, plan, 0, 0, renormalize=False)
    torch.testing.assert_close(literal.lse, lse)


@pytest.mark.parametrize("renormalize", [True, False])
def test_gradients(renormalize: bool) -> None:
    torch.manual_seed(0)
    plan = random_plan((2, 2, 2), 3, 1, 2)
    tensors = tuple(
        torch.randn(1, 2, plan.tokens, 2, dtype=torch.float64, requires_grad=True) for _ in range(3)
    )
    assert torch.autograd.gradcheck(
        lambda *given: paro_attention(*given, plan, 0, 1, renormalize=renormalize).output, tensors
    )


def test_keys_that_are_hidden() -> None:
    """Padded text: hidden by a mask of keys, which moves along."""
    torch.manual_seed(0)
    plan = random_plan(GRID, 8, 6, 3, density=0.6)
    query, key, value = torch.randn(3, 2, 3, plan.tokens, 4, dtype=torch.float64)
    visible = torch.ones(2, 1, 1, plan.tokens).bool()
    visible[0, ..., 2:6] = False
    found = paro_attention(query, key, value, plan.dense(), 0, 0, bias=visible).output
    exact = scaled_dot_product_attention(query, key, value, attn_mask=visible)
    torch.testing.assert_close(found, exact)
    junk = value.clone()
    junk[0, :, 2:6] = 1e3
    sparse = paro_attention(query, key, value, plan, 0, 0, bias=visible).output
    torch.testing.assert_close(
        sparse, paro_attention(query, key, junk, plan, 0, 0, bias=visible).output
    )


@pytest.mark.parametrize("renormalize", [True, False])
def test_quantised(renormalize: bool) -> None:
    torch.manual_seed(0)
    plan = random_plan(GRID, 8, 4, 3, density=0.7)
    query, key, value = torch.randn(3, 1, 3, plan.tokens, 16)
    exact = paro_attention(query, key, value, plan, 0, 0, renormalize=renormalize)
    errors = {}
    for quant in ("int8", "int4"):
        found = paro_attention(
            query, key, value, plan, 0, 0, quant=quant, renormalize=renormalize
        ).output
        errors[quant] = float((found - exact.output).norm() / exact.output.norm())
    assert 0 < errors["int8"] < 0.05 < errors["int4"]


def test_the_mask_of_a_step() -> None:
    plan = random_plan(GRID, 8, 0, 2)  # 4 parts of 4 steps, 3 masks
    assert [plan.mask_number(step) for step in range(6)] == [0, 1, 2, 2, 2, 2]
    assert [plan.mask_number(step, 8) for step in range(8)] == [0, 0, 1, 1, 2, 2, 2, 2]
    assert plan.block_plan(1, 3) is plan.block_plan("blocks.1", 2)
    assert torch.equal(plan.block_plan(1, 1).block_mask[0], plan.masks()[1, 1])
    assert plan.density == pytest.approx(float(plan.masks().double().mean()))
    assert "PAROPlan(grid (3, 4, 5)" in repr(plan)


@given(steps=st.integers(1, 30), bins=st.integers(1, 12), shared=st.floats(0, 1))
def test_the_middle_of_every_part_is_seen(steps: int, bins: int, shared: float) -> None:
    calibration = PAROCalibration(
        (2, 2, 2), steps=steps, timestep_bins=bins, shared_from=shared, block_size=4
    )
    query = torch.randn(1, 1, 8, 2)
    for time in range(2):
        for step in range(steps):
            calibration.see("one", step, query, query)
        if time == 0:
            calibration.choose_orders()
    assert sum(map(calibration.wants, range(steps))) == min(bins, steps)
    plan = calibration.plan(0.5)
    assert [plan.mask_number(step) for step in range(steps)] == sorted(
        plan.mask_number(step) for step in range(steps)
    )
    assert plan.mask_number(steps - 1) == len(plan.packed_masks) - 1


def looking(axis: int, grid: tuple[int, ...]) -> Tensor:
    """Queries (= keys) of a head that looks at the tokens that differ only in this axis."""
    places = torch.cartesian_prod(*(torch.arange(size) for size in grid))
    rest = [other for other in range(len(grid)) if other != axis]
    line = torch.zeros(len(places), dtype=torch.long)
    for other in rest:
        line = line * grid[other] + places[:, other]
    return 12 * torch.nn.functional.one_hot(line).double()


@pytest.mark.parametrize("criterion", ["corrected", "mass"])
def test_calibration_finds_the_axis(criterion: Any) -> None:
    """Heads that look along time, rows and columns get what is fastest there; the mask has it."""
    grid = (4, 4, 4)
    query = torch.stack([looking(axis, grid) for axis in range(3)])[None]
    calibration = PAROCalibration(
        grid, steps=1, block_size=4, keep_last=False, criterion=criterion, density=1 / 16
    )
    calibration.see("one", 0, query, query)
    orders = calibration.choose_orders()["one"].tolist()
    assert [axis_orders(grid)[order][-1] for order in orders] == ["F", "H", "W"]
    calibration.see("one", 0, query, query)
    plan = calibration.plan()
    assert plan.names("one") == tuple(axis_orders(grid)[order] for order in orders)
    value = torch.randn(1, 3, 64, 5, dtype=torch.float64)
    exact = scaled_dot_product_attention(query, query, value)
    found = paro_attention(query, query, value, plan, "one", 0).output
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-6)
    fixed = PAROCalibration(grid, steps=1, block_size=4, keep_last=False, candidates=["FHW"])
    fixed.see("one", 0, query, query)
    fixed.choose_orders()
    fixed.see("one", 0, query, query)
    worse = paro_attention(query, query, value, fixed.plan(1 / 16), "one", 0).output
    assert float((worse - exact).norm() / exact.norm()) > 0.2


def test_text_is_always_seen() -> None:
    torch.manual_seed(0)
    calibration = PAROCalibration(GRID, steps=1, block_size=8, text_tokens=9)
    query = torch.randn(2, 2, 69, 4)
    hidden = torch.ones(2, 1, 1, 69).bool()
    hidden[..., 3:9] = False
    calibration.see("one", 0, query, query, bias=hidden)
    calibration.choose_orders()
    calibration.see("one", 0, query, query, bias=hidden)
    masks = calibration.plan(0.6).masks()
    assert bool(masks[..., :2, :].all())
    assert bool(masks[..., :2].all())
    assert bool(masks[..., -1, :].all())
    assert bool(masks[..., -1].all())
    assert int(masks[0, 0, 0].sum()) == round(0.6 * 81)


def test_what_is_refused() -> None:
    plan = random_plan(GRID, 8, 0, 2)
    query = torch.randn(1, 2, 60, 4)
    with pytest.raises(ValueError, match="query: expected"):
        paro_attention(query[:, :, :59], query, query, plan, 0, 0)
    with pytest.raises(ValueError, match="quant"):
        paro_attention(query, query, query, plan, 0, 0, quant="int2")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="layer: expected one of"):
        paro_attention(query, query, query, plan, "blocks.7", 0)
    with pytest.raises(ValueError, match="step"):
        plan.mask_number(-1)
    with pytest.raises(ValueError, match="bias: expected one of keys"):
        paro_attention(query, query, query, plan, 0, 0, bias=torch.ones(1, 1, 60, 60).bool())
    with pytest.raises(ValueError, match="packed_masks"):
        PAROPlan(GRID, ("one",), plan.orders, plan.packed_masks, 8, 4, 4)
    for name, wrong in {
        "candidates": ["HW"], "steps": 0, "timestep_bins": 0, "shared_from": 2.0, "alpha": -1.0,
        "criterion": "best", "density": 0.0,
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=name):
            PAROCalibration(GRID, **{"steps": 2, name: wrong})  # type: ignore[arg-type]
    calibration = PAROCalibration(GRID, steps=4, timestep_bins=2)
    with pytest.raises(ValueError, match="saw none"):
        calibration.choose_orders()
    calibration.see("one", 0, query, query)
    calibration.see("one", 2, query, query)
    calibration.choose_orders()
    with pytest.raises(ValueError, match="the whole sampling once more"):
        calibration.plan(0.5)
    calibration.see("one", 0, query, query)
    with pytest.raises(ValueError, match="missed those of masks"):
        calibration.plan(0.5)
    with pytest.raises(ValueError, match="layer"):
        calibration.see("two", 0, query, query)
