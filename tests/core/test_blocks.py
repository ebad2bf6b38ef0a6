"""Plans of blocks and attention over them, against dense float64 maps."""

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import attending as at
from attending.core import _block_cells as engine
from attending.core import blocks, reference
from attending.core import partial_gradients as parts
from attending.core.block_plan import BlockPlan
from attending.core.blocks import block_sparse_attention, block_statistics
from tests.core.problems import Problem, assert_close, problems

GOLDEN = Path(__file__).parent.parent / "golden" / "block-sparse-engines"


@pytest.fixture(autouse=True, scope="module")
def gather_small_maps() -> Iterator[None]:
    """Maps as small as those of tests would be masked; what is to be tested is the gathering."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "SMALL_MAP", 0)
        yield


def dense_bias(problem: Problem, plan: BlockPlan) -> Tensor:
    """Everything that is added to the scores, in float64."""
    shape = (*problem.query.shape[:3], problem.key.shape[2])
    bias = torch.zeros(shape, dtype=torch.float64)
    bias = bias.masked_fill(~plan.visible().expand(shape), -math.inf)
    mask = problem.attn_mask
    if mask is None:
        return bias
    if mask.dtype == torch.bool:
        return bias.masked_fill(~mask.expand(shape), -math.inf)
    return bias + mask.double()


def exact(problem: Problem, plan: BlockPlan) -> at.AttentionState:
    return at.AttentionState(
        *reference.attention_state(
            problem.query,
            problem.key,
            problem.value,
            dense_bias(problem, plan),
            scale=problem.scale,
            enable_gqa=True,
        )
    )


@st.composite
def planned(draw: st.DrawFn, **kinds) -> tuple[Problem, BlockPlan]:
    problem = draw(problems(**{"max_tokens": 70, **kinds}))
    queries, keys = problem.query.shape[2], problem.key.shape[2]
    size = draw(st.sampled_from([(1, 1), (4, 4), (16, 16), (7, 3), (5, 16), (64, 64), (128, 32)]))
    shape = (
        draw(st.sampled_from((1, problem.query.shape[0]))),
        draw(st.sampled_from((1, problem.query.shape[1]))),
        -(-queries // size[0]),
        -(-keys // size[1]),
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    density = draw(st.sampled_from((0.0, 0.2, 0.6, 0.85, 1.0)))
    mask = torch.rand(shape, generator=generator) < density
    plan = BlockPlan.from_block_mask(
        mask,
        block_size=size,
        query_length=queries,
        key_length=keys,
        is_causal=problem.is_causal,
    )
    return problem, plan


def run(problem: Problem, plan: BlockPlan) -> at.AttentionState:
    return block_sparse_attention(
        problem.query,
        problem.key,
        problem.value,
        plan,
        bias=problem.attn_mask,
        scale=problem.scale,
    )


@pytest.mark.parametrize(
    ("gather", "masked"),
    [(1, 2.0), (5000, engine.MASKED_SHARE), (engine.GATHER_BYTES, 2.0), (5000, 0.0)],
)
@settings(max_examples=60)
@given(case=planned())
def test_is_the_reference(gather: int, masked: float, case: tuple[Problem, BlockPlan]) -> None:
    problem, plan = case
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "GATHER_BYTES", gather)
        patch.setattr(engine, "MASKED_SHARE", masked)
        ours = run(problem, plan)
    expected = exact(problem, plan)
    assert_close(ours.output, expected.output, problem.query.dtype)
    assert_close(ours.lse, expected.lse, problem.query.dtype)


@settings(max_examples=30)
@given(case=planned())
def test_small_maps_are_masked(case: tuple[Problem, BlockPlan]) -> None:
    problem, plan = case
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "SMALL_MAP", 512 * 512)
        patch.setattr(blocks, "Cells", None)  # nothing is gathered
        ours = run(problem, plan)
    expected = exact(problem, plan)
    assert_close(ours.output, expected.output, problem.query.dtype)
    assert_close(ours.lse, expected.lse, problem.query.dtype)


@settings(max_examples=20)
@given(case=planned(dtypes=(torch.bfloat16, torch.float16), spreads=(1.0,)))
def test_half_precision(case: tuple[Problem, BlockPlan]) -> None:
    problem, plan = case
    ours, expected = run(problem, plan), exact(problem, plan)
    assert ours.output.dtype == problem.query.dtype
    assert ours.lse.dtype == torch.float32
    assert_close(ours.output, expected.output, torch.bfloat16)
    assert_close(ours.lse, expected.lse, torch.bfloat16)


@settings(max_examples=40)
@given(case=planned(dtypes=(torch.float64,), max_tokens=40, spreads=(1.0,)))
def test_gradients_are_those_of_the_reference(case: tuple[Problem, BlockPlan]) -> None:
    problem, plan = case
    leaves = [
        tensor.clone().requires_grad_() for tensor in (problem.query, problem.key, problem.value)
    ]
    generator = torch.Generator().manual_seed(0)

    def gradients(state: at.AttentionState, wanted: tuple[bool, bool]) -> list[Tensor]:
        generator.manual_seed(0)
        total = torch.zeros((), dtype=torch.float64)
        if wanted[0]:
            weights = torch.randn(state.output.shape, generator=generator, dtype=state.output.dtype)
            total = total + (state.output * weights).sum()
        if wanted[1]:
            total = total + state.lse[state.lse > -math.inf].sin().sum()
        if not total.requires_grad:
            return [torch.zeros_like(leaf) for leaf in leaves]
        found = torch.autograd.grad(total, leaves, allow_unused=True, retain_graph=True)
        return [torch.zeros_like(x) if g is None else g for g, x in zip(found, leaves, strict=True)]

    query, key, value = leaves
    ours = block_sparse_attention(
        query, key, value, plan, bias=problem.attn_mask, scale=problem.scale
    )
    scores = query @ key.repeat_interleave(query.shape[1] // key.shape[1], 1).mT
    scores = scores * (query.shape[-1] ** -0.5 if problem.scale is None else problem.scale)
    scores = scores + dense_bias(problem, plan)
    empty = (scores == -math.inf).all(-1, keepdim=True)
    safe = scores.masked_fill(empty, 0.0)
    wide = value.repeat_interleave(query.shape[1] // key.shape[1], 1)
    theirs = at.AttentionState(
        safe.softmax(-1).masked_fill(empty, 0.0) @ wide,
        safe.logsumexp(-1).masked_fill(empty[..., 0], -math.inf),
    )
    for wanted in ((True, False), (True, True), (False, True)):
        pairs = zip(gradients(ours, wanted), gradients(theirs, wanted), strict=True)
        for mine, other in pairs:
            torch.testing.assert_close(mine, other, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("takes_lse", [True, False])
def test_gradients_of_parts_add_up(takes_lse: bool) -> None:
    """With kernels that take an lse that is not their own, and by the way the others take."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, 9, 4, dtype=torch.float64) for _ in range(3))
    bias = torch.zeros(1, 1, 9, 9, dtype=torch.float64)
    bias[..., 0, :] = -math.inf
    leaves = [tensor.requires_grad_() for tensor in (query, key, value)]
    whole = at.attention_state(*leaves, attn_mask=bias)
    of_output, of_lse = torch.randn_like(whole.output), torch.randn_like(whole.lse)
    of_lse[..., 0] = 0.0
    expected = torch.autograd.grad(whole, leaves, (of_output, of_lse))
    found = []
    for keys in (slice(0, 4), slice(4, 9)):
        part = [tensor.detach() for tensor in (query, key[:, :, keys], value[:, :, keys])]
        gradients = parts.partial_gradients if takes_lse else parts.gradients_by_recomputing
        found.append(
            gradients(
                *part,
                bias[..., keys],
                False,
                0.5,
                whole.output.detach(),
                whole.lse.detach(),
                of_output,
                of_lse,
            )
        )
    assert_close(found[0][0] + found[1][0], expected[0], torch.float64)
    for place in (1, 2):
        joined = torch.cat([one[place] for one in found], 2)
        assert_close(joined, expected[place], torch.float64)


@pytest.mark.parametrize("case", ["ragged_gqa", "causal"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_golden(case: str, dtype: torch.dtype) -> None:
    data = np.load(GOLDEN / f"{case}.npz")
    query, key, value = (torch.from_numpy(data[name]).to(dtype) for name in "qkv")
    plan = BlockPlan.from_block_mask(
        torch.from_numpy(data["block_mask"]),
        block_size=(int(data["block_q"]), int(data["block_k"])),
        query_length=query.shape[2],
        key_length=key.shape[2],
        is_causal=bool(data["causal"]),
    )
    scale = float(data["scale"])
    state = block_sparse_attention(query, key, value, plan, scale=scale)
    found = block_statistics(query, key, plan, state.lse, scale=scale)
    tolerance = {"rtol": 0.0, "atol": 1e-10 if dtype == torch.float64 else 2e-6}
    for ours, name in (
        (state.output, "out"),
        (state.lse, "lse"),
        (found.mass, "row_block_mass"),
        (found.maximum, "block_max"),
    ):
        expected = torch.from_numpy(data[name])
        torch.testing.assert_close(ours.double(), expected, **tolerance)


def test_golden_merge() -> None:
    data = np.load(GOLDEN / "lse_merge.npz")
    parts = [
        at.AttentionState(torch.from_numpy(out), torch.from_numpy(lse))
        for out, lse in zip(data["part_out"], data["part_lse"], strict=True)
    ]
    whole = at.merge(*parts)
    torch.testing.assert_close(whole.output, torch.from_numpy(data["out"]), rtol=0, atol=1e-12)
    torch.testing.assert_close(whole.lse, torch.from_numpy(data["lse"]), rtol=0, atol=1e-12)


@settings(max_examples=25)
@given(case=planned(masks=("none", "causal", "keys"), spreads=(1.0,)))
def test_statistics_of_blocks(case: tuple[Problem, BlockPlan]) -> None:
    problem, plan = case
    state = run(problem, plan)
    found = block_statistics(
        problem.query, problem.key, plan, state.lse, bias=problem.attn_mask, scale=problem.scale
    )
    seen = state.lse > -math.inf
    torch.testing.assert_close(found.mass.sum(-1), seen.to(found.mass), rtol=1e-4, atol=1e-4)
    kept = plan.block_mask.expand(*found.maximum.shape)
    assert bool((found.maximum[~kept] == -math.inf).all())


def test_a_partition_of_the_blocks_merges_to_the_whole() -> None:
    torch.manual_seed(1)
    query, key, value = (torch.randn(2, 3, 50, 8, dtype=torch.float64) for _ in range(3))
    label = torch.randint(0, 3, (2, 3, 7, 7))
    plans = [
        BlockPlan.from_block_mask(label == n, block_size=8, query_length=50, key_length=50)
        for n in range(3)
    ]
    whole = at.merge(*(block_sparse_attention(query, key, value, plan) for plan in plans))
    expected = at.attention_state(query, key, value)
    torch.testing.assert_close(whole.output, expected.output)
    torch.testing.assert_close(whole.lse, expected.lse)
    union = plans[0] | plans[1] | plans[2]
    assert union.is_dense
    assert union.density == 1.0
    assert (plans[0] & plans[1]).density == 0.0


def test_rules() -> None:
    scores = torch.tensor([[0.5, 0.3, 0.2, 0.0], [0.1, 0.1, 0.1, 0.7], [0.0, 0.0, 0.0, 0.0]])
    lengths = {"block_size": 2, "query_length": 6, "key_length": 8}
    top = BlockPlan.from_scores(scores, top_k=2, **lengths).block_mask[0, 0]
    assert top.long().tolist() == [[1, 1, 0, 0], [1, 0, 0, 1], [1, 1, 0, 0]]
    share = BlockPlan.from_scores(scores, top_p=0.75, **lengths).block_mask[0, 0]
    assert share.tolist() == [[True, True, False, False], [True, False, False, True], [False] * 4]
    above = BlockPlan.from_scores(scores, threshold=0.3, **lengths).block_mask[0, 0]
    assert above.sum(-1).tolist() == [2, 1, 0]
    near = BlockPlan.from_rule(lambda q, k: (q - k).abs() <= 1, **lengths)
    assert near.picture() == "##..\n###.\n.###"
    causal = BlockPlan.from_scores(scores, top_k=1, is_causal=True, **lengths)
    assert causal.causal_offset == 2
    assert causal.block_mask[0, 0].long().argmax(-1).tolist() == [0, 0, 0]
    full = BlockPlan.from_rule(lambda q, k: q == q, is_causal=True, **(lengths | {"key_length": 6}))
    assert full.picture() == "+..\n#+.\n##+"
    assert full.is_dense
    assert full.density == 1.0


@settings(max_examples=25)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 9), st.integers(0, 2**31))
def test_a_mask_of_tokens_in_blocks(queries: int, keys: int, size: int, seed: int) -> None:
    mask = torch.rand(2, 1, queries, keys, generator=torch.Generator().manual_seed(seed)) < 0.1
    plan = BlockPlan.from_mask(mask, block_size=size)
    assert bool((plan.visible() | ~mask).all())
    query, key = torch.randn(2, 3, queries, 4), torch.randn(2, 3, keys, 4)
    ours = block_sparse_attention(query, key, key, plan, bias=mask)
    expected = at.attention_state(query, key, key, attn_mask=mask)
    torch.testing.assert_close(ours.output, expected.output)
    torch.testing.assert_close(ours.lse, expected.lse)


def test_dense_plans_are_dense_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "Cells", None)  # nothing is gathered
    query = torch.randn(1, 2, 20, 4)
    for is_causal in (False, True):
        plan = BlockPlan.from_rule(
            lambda q, k: q >= k if is_causal else q == q,  # noqa: B023 - called at once
            block_size=8,
            query_length=20,
            key_length=20,
            is_causal=is_causal,
        )
        ours = block_sparse_attention(query, query, query, plan)
        assert torch.equal(
            ours.output, at.attention_state(query, query, query, is_causal=is_causal).output
        )


def test_arguments_that_do_not_fit_are_named() -> None:
    query, key = torch.randn(1, 2, 20, 4), torch.randn(1, 2, 30, 4)
    mask = torch.ones(3, 4, dtype=torch.bool)
    lengths = {"block_size": 8, "query_length": 20, "key_length": 30}
    plan = BlockPlan.from_block_mask(mask, **lengths)
    with pytest.raises(ValueError, match="plan: expected one for 30 queries"):
        block_sparse_attention(key, query, query, plan)
    other = BlockPlan.from_block_mask(mask.expand(1, 3, 3, 4), **lengths)
    with pytest.raises(ValueError, match="plan: expected batch and heads of 1 or"):
        block_sparse_attention(query, key, key, other)
    with pytest.raises(ValueError, match="block_mask: expected booleans"):
        BlockPlan.from_block_mask(mask.float(), **lengths)
    with pytest.raises(ValueError, match="3 x 4 blocks"):
        BlockPlan.from_block_mask(mask.T, **lengths)
    with pytest.raises(ValueError, match="block_size: expected"):
        BlockPlan.from_block_mask(mask, **(lengths | {"block_size": 0}))
    with pytest.raises(ValueError, match="exactly one"):
        BlockPlan.from_scores(mask.float(), **lengths)
    with pytest.raises(ValueError, match="top_p: expected a share"):
        BlockPlan.from_scores(mask.float(), top_p=1.5, **lengths)
    with pytest.raises(ValueError, match="not negative"):
        BlockPlan.from_scores(-mask.float(), top_p=0.5, **lengths)
    bias = torch.zeros(20, 30, requires_grad=True)
    with pytest.raises(ValueError, match="bias: expected one without a gradient"):
        block_sparse_attention(query, key, key, plan, bias=bias)
    with pytest.raises(ValueError, match="plan: expected two plans"):
        plan | BlockPlan.from_block_mask(mask, **(lengths | {"key_length": 29}))
