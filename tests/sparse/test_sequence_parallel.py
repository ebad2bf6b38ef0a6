"""Two processes with half of the tokens each compute what one computes with all of them."""

from typing import Any

import pytest
import torch

from attending.core.block_plan import BlockPlan
from attending.core.blocks import block_sparse_attention
from attending.sparse.frame_masks import expand_frame_mask, frame_reference_mask
from attending.sparse.sequence_parallel import head_parallel_attention, key_parallel_attention
from tests.distributed import Ranks

Parts = list[torch.Tensor]


def _share(tensor: torch.Tensor, rank: int, ranks: int) -> torch.Tensor:
    return tensor.chunk(ranks, 2)[rank].clone()


def _keys(rank: int, ranks: int, tensors: Parts, plan: BlockPlan, cotangents: Parts) -> Parts:
    leaves = [_share(one, rank, ranks).requires_grad_() for one in tensors]
    state = key_parallel_attention(*leaves, plan)
    weights = [cotangent.chunk(ranks, 2)[rank] for cotangent in cotangents]
    total = (state.output * weights[0]).sum() + (state.lse * weights[1]).nan_to_num(neginf=0).sum()
    return [state.output.detach(), state.lse.detach(), *torch.autograd.grad(total, leaves)]


def _heads(rank: int, ranks: int, tensors: Parts, plan: BlockPlan, cotangents: Parts) -> Parts:
    leaves = [_share(one, rank, ranks).requires_grad_() for one in tensors]
    output = head_parallel_attention(*leaves, plan, scale=0.3)
    total = (output * cotangents[0].chunk(ranks, 2)[rank]).sum()
    return [output.detach(), *torch.autograd.grad(total, leaves)]


def _together(found: list[Parts]) -> Parts:
    return [torch.cat(parts, 2) for parts in zip(*found, strict=True)]


def problem(kv_heads: int, plan: BlockPlan, dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(0)
    tokens = plan.query_length
    query = torch.randn(2, 4, tokens, 6, dtype=dtype)
    key = torch.randn(2, kv_heads, tokens, 6, dtype=dtype)
    value = torch.randn(2, kv_heads, tokens, 5, dtype=dtype)
    cotangents = [torch.randn(2, 4, tokens, 5, dtype=dtype), torch.randn(2, 4, tokens)]
    return [query, key, value], cotangents


def plans() -> dict[str, BlockPlan]:
    torch.manual_seed(1)
    sizes = {"query_length": 24, "key_length": 24}
    mask = torch.rand(1, 4, 6, 8) < 0.4
    mask[:, :, 0] = False  # four queries that see nothing
    return {
        "frames": expand_frame_mask(frame_reference_mask(6, 2), 4),
        "heads": BlockPlan.from_block_mask(mask, block_size=(4, 3), **sizes),
        "causal": BlockPlan.from_block_mask(
            torch.ones(6, 6, dtype=torch.bool), block_size=4, is_causal=True, **sizes
        ),
        # More than the engine runs as a mask: it gathers.
        "large": expand_frame_mask(frame_reference_mask(8, 1), 128),
    }


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("name", ["frames", "heads", "causal", "large"])
def test_keys_on_their_ranks(two_processes: Ranks, name: str, kv_heads: int) -> None:
    plan = plans()[name]
    tensors, cotangents = problem(kv_heads, plan)
    found = _together(two_processes.run(_keys, tensors, plan, cotangents))
    leaves = [one.clone().requires_grad_() for one in tensors]
    state = block_sparse_attention(*leaves, plan)
    seen = (state.lse * cotangents[1]).nan_to_num(neginf=0)
    total = (state.output * cotangents[0]).sum() + seen.sum()
    wanted = [state.output, state.lse, *torch.autograd.grad(total, leaves)]
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other.detach(), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("name", ["frames", "heads", "causal", "large"])
def test_heads_on_their_ranks(two_processes: Ranks, name: str, kv_heads: int) -> None:
    plan = plans()[name]
    tensors, cotangents = problem(kv_heads, plan)
    found = _together(two_processes.run(_heads, tensors, plan, cotangents))
    leaves = [one.clone().requires_grad_() for one in tensors]
    output = block_sparse_attention(*leaves, plan, scale=0.3).output
    wanted = [output, *torch.autograd.grad((output * cotangents[0]).sum(), leaves)]
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other.detach(), rtol=1e-9, atol=1e-10)


def _outputs(rank: int, ranks: int, tensors: Parts, plan: BlockPlan) -> Parts:
    shares = [_share(one, rank, ranks) for one in tensors]
    return [key_parallel_attention(*shares, plan).output, head_parallel_attention(*shares, plan)]


def test_half_precision(two_processes: Ranks) -> None:
    plan = plans()["frames"]
    tensors, _ = problem(4, plan, torch.bfloat16)
    by_keys, by_heads = _together(two_processes.run(_outputs, tensors, plan))
    wanted = block_sparse_attention(*tensors, plan).output
    assert by_keys.dtype == by_heads.dtype == torch.bfloat16
    torch.testing.assert_close(by_keys, wanted, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(by_heads, wanted, rtol=2e-2, atol=2e-2)


def _refusals(rank: int, ranks: int) -> list[str]:
    said = []
    tensors = torch.randn(3, 1, 3, 12, 4).unbind(0)
    mask = torch.ones(6, 5, dtype=torch.bool)
    cut = BlockPlan.from_block_mask(mask, block_size=(4, 5), query_length=24, key_length=24)
    half = expand_frame_mask(frame_reference_mask(3, 1), 4)
    for function, plan in (
        (key_parallel_attention, cut),
        (key_parallel_attention, half),
        (head_parallel_attention, cut),
    ):
        try:
            function(*tensors, plan)
        except ValueError as error:
            said.append(str(error))
    return said


def test_what_does_not_fit_is_named_before_anything_is_sent(two_processes: Ranks) -> None:
    for said in two_processes.run(_refusals):
        assert "blocks of keys that divide the 12 tokens" in said[0]
        assert "the whole sequence" in said[1]
        assert "query: expected heads that divide among 2 ranks" in said[2]
    plan = plans()["frames"]
    with pytest.raises(RuntimeError, match="torchrun"):
        key_parallel_attention(*problem(4, plan)[0], plan)
