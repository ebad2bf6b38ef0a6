"""Plans run by flex_attention: what its eager form says here, and the traps that it has."""

import math
import shutil

import pytest
import torch
from hypothesis import given, settings
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from attending.core._flex import block_mask_of
from attending.core.block_plan import BlockPlan
from attending.core.blocks import block_sparse_attention
from tests.core.problems import Problem, assert_close
from tests.core.test_blocks import exact, planned

QUIET = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


@QUIET
@settings(max_examples=30)
@given(case=planned(dtypes=(torch.float32, torch.float64)))
def test_is_the_reference(case: tuple[Problem, BlockPlan]) -> None:
    problem, plan = case
    if problem.value.shape[-1] != problem.query.shape[-1]:
        return  # eager flex takes one dim
    ours = block_sparse_attention(
        problem.query,
        problem.key,
        problem.value,
        plan,
        bias=problem.attn_mask,
        scale=problem.scale,
        backend="flex",
    )
    expected = exact(problem, plan)
    assert_close(ours.output, expected.output, torch.float32)
    assert_close(ours.lse, expected.lse, torch.float32)


def half_a_plan() -> tuple[torch.Tensor, BlockPlan]:
    torch.manual_seed(0)
    mask = torch.tensor([[True, False], [False, False]])
    plan = BlockPlan.from_block_mask(mask, block_size=16, query_length=32, key_length=32)
    return torch.randn(3, 1, 1, 32, 16), plan


@QUIET
def test_lists_alone_are_ignored_by_eager_flex_so_we_always_say_a_mask_too() -> None:
    (query, key, value), plan = half_a_plan()
    ours = block_mask_of(plan)
    counts, order = ours.full_kv_num_blocks, ours.full_kv_indices
    careless = BlockMask.from_kv_blocks(counts, order, BLOCK_SIZE=16)
    dense = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    trapped = flex_attention(query, key, value, block_mask=careless)
    torch.testing.assert_close(trapped, dense)  # if this fails, torch has mended the trap
    state = block_sparse_attention(query, key, value, plan, backend="flex")
    assert not torch.allclose(state.output[:, :, :16], dense[:, :, :16])
    assert state.output[:, :, 16:].eq(0).all()
    assert state.lse[:, :, 16:].eq(-math.inf).all()


@QUIET
def test_the_block_mask_has_the_plan_s_blocks_and_is_kept() -> None:
    plan = BlockPlan.from_block_mask(
        torch.ones(4, 4, dtype=torch.bool),
        block_size=8,
        query_length=32,
        key_length=32,
        is_causal=True,
    )
    made = block_mask_of(plan)
    assert made.full_kv_num_blocks.flatten().tolist() == [0, 1, 2, 3]
    assert made.kv_num_blocks.flatten().tolist() == [1, 1, 1, 1]
    assert block_mask_of(plan) is made


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_flex_agrees_on_a_cpu() -> None:
    """The lists, which only the compiled form reads. It has no lse on a CPU."""
    torch.manual_seed(0)
    mask = torch.rand(1, 2, 5, 5) < 0.4
    mask[..., 0] = True
    plan = BlockPlan.from_block_mask(mask, block_size=32, query_length=150, key_length=150)
    query, key, value = torch.randn(3, 1, 2, 150, 16)
    compiled = torch.compile(flex_attention)
    found = compiled(query, key, value, block_mask=block_mask_of(plan))
    expected = block_sparse_attention(query, key, value, plan, backend="gather").output
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_an_unknown_backend_is_refused() -> None:
    (query, key, value), plan = half_a_plan()
    with pytest.raises(ValueError, match="backend: expected one of"):
        block_sparse_attention(query, key, value, plan, backend="triton")  # type: ignore[arg-type]
