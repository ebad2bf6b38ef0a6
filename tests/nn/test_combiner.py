"""Combiner against golden vectors and against its definition, row by row."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from attending.nn import _combiner_axial, _combiner_sequence
from attending.nn.combiner import CombinerAttention, combiner_attention, combiner_map
from attending.nn.combiner_plans import AxialPlan, FixedPlan, LogsparsePlan, Plan, RoutingPlan
from tests.nn import reference_combiner

GOLDEN = Path(__file__).parents[1] / "golden" / "combiner"
COLUMNS = 4
PLANS: dict[str, Plan] = {
    "fixed": FixedPlan(COLUMNS),
    "logsparse": LogsparsePlan(),
    "axial_vertical": AxialPlan(COLUMNS, "vertical"),
    "axial_horizontal": AxialPlan(COLUMNS, "horizontal"),
    "axial_horizontal_split": AxialPlan(COLUMNS, "horizontal"),
    "axial_horizontal_single": AxialPlan(COLUMNS, "horizontal", split=False),
    "mixture_joint": AxialPlan(COLUMNS, "mixture"),
    "mixture_average": AxialPlan(COLUMNS, "mixture", mixture="average"),
    "axial_rowmajor_none": AxialPlan(COLUMNS, "rowmajor"),
    "axial_rowmajor_wsum": AxialPlan(COLUMNS, "rowmajor", row_key="wsum"),
}
EXACT_PARTITION = [name for name in PLANS if name != "mixture_joint"]


def inputs(*shape: int, seed: int = 0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(*shape, dtype=torch.float64, generator=generator) for _ in range(3))


def every_plan(tokens: int, columns: int = COLUMNS, seed: int = 0) -> dict[str, Plan]:
    generator = torch.Generator().manual_seed(seed)
    assign = torch.randint(0, 3, (tokens,), generator=generator)
    plans: dict[str, Plan] = {"logsparse": LogsparsePlan(), "fixed": FixedPlan(columns)}
    plans["routing"] = RoutingPlan(assign)
    plans["vertical"] = AxialPlan(columns, "vertical")
    plans["horizontal"] = AxialPlan(columns, "horizontal")
    plans["single"] = AxialPlan(columns, "horizontal", split=False)
    plans["mixture"] = AxialPlan(columns, "mixture")
    plans["average"] = AxialPlan(columns, "mixture", mixture="average", split=False)
    plans["rowmajor"] = AxialPlan(columns)
    plans["wsum"] = AxialPlan(columns, row_key="wsum")
    return plans


def cases() -> list[tuple[str, str, bool]]:
    found = []
    for name in ("attn_4x3.npz", "bidir_and_routing_4x3.npz"):
        for vector in np.load(GOLDEN / name).files:
            stem, _, end = vector.rpartition("_")
            if end in ("causal", "bidir"):
                found.append((name, stem, end == "causal"))
    return found


@pytest.mark.parametrize(("file", "name", "is_causal"), cases())
def test_golden(file: str, name: str, is_causal: bool) -> None:
    vectors = {key: torch.tensor(found) for key, found in np.load(GOLDEN / file).items()}
    assert int(vectors["seg_len"]) == COLUMNS
    plan = RoutingPlan(vectors["assign"]) if name == "routing" else PLANS[name]
    expected = vectors[f"{name}_{'causal' if is_causal else 'bidir'}"].transpose(1, 2)
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 2e-5)):
        query, key, value = (vectors[letter].transpose(1, 2).to(dtype) for letter in "qkv")
        found = combiner_attention(query, key, value, is_causal=is_causal, plan=plan)
        torch.testing.assert_close(found, expected.to(dtype), atol=tolerance, rtol=0.0)
    whole = f"{name}_{'causal' if is_causal else 'bidir'}_attn"
    if whole in vectors:
        query, key = (vectors[letter].transpose(1, 2) for letter in "qk")
        found = combiner_map(query, key, is_causal=is_causal, plan=plan)
        torch.testing.assert_close(found, vectors[whole], atol=1e-10, rtol=0.0)


@settings(max_examples=60)
@given(
    st.sampled_from(sorted(every_plan(1))),
    st.integers(1, 18),
    st.integers(1, 6),
    st.booleans(),
    st.sampled_from(["max", "mean"]),
    st.integers(0, 99),
)
def test_the_map_is_the_definition(
    name: str, tokens: int, columns: int, is_causal: bool, pool: str, seed: int
) -> None:
    plan = every_plan(tokens, columns, seed)[name]
    query, key, _ = inputs(1, 1, tokens, 3, seed=seed)
    found = combiner_map(query, key, is_causal=is_causal, plan=plan, pool=pool)[0, 0]
    expected = reference_combiner.combiner_map(query[0, 0], key[0, 0], plan, is_causal, pool=pool)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-9)
    torch.testing.assert_close(found.sum(-1), torch.ones(tokens, dtype=torch.float64))
    full = torch.ones(tokens, tokens, dtype=torch.bool)
    if name in ("rowmajor", "wsum") and not is_causal and tokens % columns:
        return  # the last row is seen from its own columns only
    assert torch.equal(found > 0, full.tril() if is_causal else full)


@settings(max_examples=60)
@given(
    st.sampled_from(sorted(every_plan(1))),
    st.lists(st.booleans(), min_size=1, max_size=14),
    st.booleans(),
    st.sampled_from(["max", "mean"]),
    st.integers(0, 99),
)
def test_hidden_tokens_have_no_part(
    name: str, visible: list[bool], is_causal: bool, pool: str, seed: int
) -> None:
    tokens = len(visible)
    plan = every_plan(tokens, 3, seed)[name]
    query, key, _ = inputs(1, 1, tokens, 3, seed=seed)
    mask = torch.tensor(visible)
    found = combiner_map(
        query, key, mask[None, None, None], is_causal=is_causal, plan=plan, pool=pool
    )[0, 0]
    expected = reference_combiner.combiner_map(
        query[0, 0], key[0, 0], plan, is_causal, visible, pool
    )
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-9)
    assert not bool(found[~mask].any())
    assert not bool(found[:, ~mask].any())


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("tokens", [*range(2, 41), 65])
def test_logsparse_reaches_all_at_every_length(tokens: int, is_causal: bool) -> None:
    """The official code loses tokens at lengths 2^k + 1, and fails at 2."""
    query, key, _ = inputs(1, 1, tokens, 4)
    found = combiner_map(query, key, is_causal=is_causal, plan=LogsparsePlan())[0, 0]
    assert torch.equal(found > 0, torch.ones_like(found).tril() > 0 if is_causal else found >= 0)


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("size", [1, 9, 20])
def test_segments_of_one_token_or_of_all_are_softmax(size: int, is_causal: bool) -> None:
    query, key, value = inputs(2, 2, 9, 4)
    found = combiner_attention(query, key, value, is_causal=is_causal, plan=FixedPlan(size))
    expected = scaled_dot_product_attention(query, key, value, is_causal=is_causal)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", sorted(every_plan(1)))
def test_the_future_does_not_leak(name: str) -> None:
    plan = every_plan(14)[name]
    query, key, value = inputs(1, 2, 14, 4)
    first = combiner_attention(query, key, value, is_causal=True, plan=plan)
    for tensor in (query, key, value):
        tensor[:, :, 9:] = torch.randn(1, 2, 5, 4, dtype=torch.float64)
    second = combiner_attention(query, key, value, is_causal=True, plan=plan)
    torch.testing.assert_close(second[:, :, :9], first[:, :, :9])
    assert not torch.allclose(second[:, :, 9:], first[:, :, 9:])


def test_blocks_of_a_region_have_rank_one_and_no_order() -> None:
    query, key, value = inputs(1, 1, 12, 4)
    found = combiner_map(query, key, is_causal=True, plan=FixedPlan(4))[0, 0]
    assert int(torch.linalg.matrix_rank(found[4:8, :4])) == 1
    assert int(torch.linalg.matrix_rank(found[8:, :8])) == 2
    assert int(torch.linalg.matrix_rank(found[4:8, 4:8])) == 4
    order = torch.tensor([2, 0, 3, 1, *range(4, 12)])
    moved = [tensor[:, :, order] for tensor in (query, key, value)]
    plain = combiner_attention(query, key, value, is_causal=True, plan=FixedPlan(4))
    mixed = combiner_attention(*moved, is_causal=True, plan=FixedPlan(4))
    torch.testing.assert_close(mixed[:, :, 4:], plain[:, :, 4:])


def test_a_region_counts_like_one_token() -> None:
    query, key, _ = inputs(1, 1, 10, 4)
    found = combiner_map(query, torch.zeros_like(key), is_causal=True, plan=FixedPlan(4))[0, 0]
    expected = torch.tensor([1 / 16] * 8 + [1 / 4] * 2, dtype=torch.float64)
    torch.testing.assert_close(found[9], expected)


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("name", sorted(every_plan(1)))
def test_gradients(name: str, is_causal: bool) -> None:
    tensors = [tensor.requires_grad_() for tensor in inputs(1, 1, 6, 2)]
    plan = every_plan(6, 2)[name]
    mask = torch.ones(1, 1, 1, 6, dtype=torch.bool)
    mask[..., 2] = False

    def attend(*args: Tensor) -> Tensor:
        return combiner_attention(*args, mask, is_causal, plan=plan)

    assert torch.autograd.gradcheck(attend, tensors, fast_mode=True)


@pytest.mark.parametrize("name", sorted(every_plan(1)))
def test_grouped_heads_scale_and_half_precision(name: str) -> None:
    plan = every_plan(11)[name]
    query = inputs(2, 6, 11, 4)[0]
    key, value = inputs(2, 2, 11, 4, seed=1)[:2]
    value = torch.cat([value, value[..., :2]], -1)
    call = {"is_causal": True, "plan": plan}
    found = combiner_attention(query, key, value, scale=0.3, enable_gqa=True, **call)
    repeated = [tensor.repeat_interleave(3, 1) for tensor in (key, value)]
    torch.testing.assert_close(found, combiner_attention(query * 0.6, *repeated, **call))
    assert found.shape == (2, 6, 11, 6)
    half = [tensor.bfloat16() for tensor in (query, key, value)]
    low = combiner_attention(*half, enable_gqa=True, **call)
    exact = combiner_attention(*(tensor.double() for tensor in half), enable_gqa=True, **call)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.double(), exact, atol=3e-2, rtol=3e-2)


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("name", ["fixed", "rowmajor", "wsum"])
def test_large_blocks_take_the_fused_kernel_to_the_same_end(
    name: str, is_causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = every_plan(14)[name]
    query, key, value = inputs(2, 2, 14, 4)
    mask = torch.rand(2, 1, 1, 14) < 0.7
    for hidden in (None, mask):
        call = {"attn_mask": hidden, "is_causal": is_causal, "plan": plan}
        small = combiner_attention(query, key, value, **call)
        for module in (_combiner_axial, _combiner_sequence):
            monkeypatch.setattr(module, "SMALL", 0)
        large = combiner_attention(query, key, value, **call)
        monkeypatch.undo()
        torch.testing.assert_close(small, large)


def test_clusters_of_each_head_and_sequence() -> None:
    query, key, value = inputs(2, 3, 8, 4)
    assign = torch.randint(0, 4, (2, 3, 8))
    for is_causal in (True, False):
        found = combiner_attention(query, key, value, is_causal=is_causal, plan=RoutingPlan(assign))
        for b in range(2):
            for h in range(3):
                one = (slice(b, b + 1), slice(h, h + 1))
                alone = combiner_attention(
                    *(tensor[one] for tensor in (query, key, value)),
                    is_causal=is_causal,
                    plan=RoutingPlan(assign[b, h]),
                )
                torch.testing.assert_close(found[one], alone)


def test_nearest_centroid_judges_each_token_alone() -> None:
    features = torch.tensor([[5.0, 0.1], [0.1, 1.0], [-1.0, 0.0]])[None, None]
    centroids = torch.tensor([[100.0, 100.0], [0.0, 1.0], [1.0, 0.0], [-3.0, 0.0]])
    assert RoutingPlan.nearest(features, centroids).assign.tolist() == [[[2, 1, 3]]]


def test_the_projected_row_keys_of_the_module() -> None:
    torch.manual_seed(0)
    for row_key in ("proj", "wsum_proj"):
        layer = CombinerAttention(8, 2, AxialPlan(3, row_key=row_key)).double()
        hidden = torch.randn(1, 7, 8, dtype=torch.float64)
        output = layer(hidden, is_causal=True)
        q, k, v = (
            p(hidden)[0].unflatten(-1, (2, 4)) for p in (layer.q_proj, layer.k_proj, layer.v_proj)
        )
        means, maps = torch.zeros(7, 2, 4).double(), torch.zeros(7, 2, 7).double()
        for i in range(7):
            row = torch.arange(i // 3 * 3, min(i // 3 * 3 + 3, 7))
            weights = torch.einsum("hd,jhd->hj", q[i], k[row]).mul(0.5).softmax(-1)
            maps[i, :, row] = weights
            means[i] = torch.einsum("hj,jhd->hd", weights, (v if row_key == "proj" else k)[row])
        mixed = hidden[0] + layer.summary_in(means.flatten(1))
        keys = layer.summary_out(layer.summary_norm(mixed)).unflatten(-1, (2, 4))
        merged = torch.zeros(7, 2, 4).double()
        for i in range(7):
            near = torch.arange(i // 3 * 3, i + 1)
            far = torch.arange(i % 3, i, 3)
            answers = torch.einsum("thj,jhd->thd", maps[far], v)
            all_keys, all_values = torch.cat([k[near], keys[far]]), torch.cat([v[near], answers])
            weights = torch.einsum("hd,jhd->hj", q[i], all_keys).mul(0.5).softmax(-1)
            merged[i] = torch.einsum("hj,jhd->hd", weights, all_values)
        torch.testing.assert_close(output[0], layer.out_proj(merged.flatten(1)))
        layer(hidden, is_causal=True).sum().backward()
        assert all(bool(p.grad.any()) for p in layer.parameters())


@pytest.mark.parametrize("name", sorted(every_plan(1)))
def test_the_module_is_the_function(name: str) -> None:
    layer = CombinerAttention(8, 2, every_plan(9)[name], bias=True)
    hidden = torch.randn(2, 9, 8)
    q, k, v = (
        p(hidden).unflatten(-1, (2, 4)).transpose(1, 2)
        for p in (layer.q_proj, layer.k_proj, layer.v_proj)
    )
    mask = torch.ones(2, 1, 1, 9, dtype=torch.bool)
    mask[0, ..., 6:] = False
    merged = combiner_attention(q, k, v, mask, True, plan=layer.plan)
    expected = layer.out_proj(merged.transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(hidden, mask, is_causal=True), expected)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: FixedPlan(0), "segment_length: expected a whole number of at least 1, got 0"),
        (lambda: AxialPlan(2.0), "columns: expected a whole number"),
        (lambda: AxialPlan(2, "diagonal"), "kind: expected one of"),
        (lambda: AxialPlan(2, mixture="sum"), "mixture: expected one of"),
        (lambda: AxialPlan(2, row_key="max"), "row_key: expected one of"),
        (lambda: RoutingPlan(torch.ones(3)), "assign: expected whole numbers.*float32"),
        (lambda: RoutingPlan(torch.tensor([0, -1])), "assign: expected whole numbers from 0"),
        (lambda: CombinerAttention(8, 3, LogsparsePlan()), "num_heads: expected a divisor"),
    ],
)
def test_refusals_of_plans(build, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"plan": 4}, "plan: expected one of FixedPlan, LogsparsePlan, AxialPlan, RoutingPlan"),
        ({"plan": AxialPlan(2, row_key="proj")}, "plan: row_key='proj' has parameters"),
        (
            {"plan": RoutingPlan(torch.zeros(5, dtype=torch.long))},
            r"plan: .*\[2, 1, 6\], got \[5\]",
        ),
        ({"pool": "sum"}, "pool: expected one of"),
        ({"attn_mask": torch.ones(6, 6, dtype=torch.bool)}, "attn_mask: expected one mask for all"),
        ({name: torch.zeros(2, 1, 5, 4) for name in ("key", "value")}, "key: expected as many"),
    ],
)
def test_refusals(change: dict, message: str) -> None:
    call = {name: torch.zeros(2, 1, 6, 4) for name in ("query", "key", "value")}
    with pytest.raises(ValueError, match=message):
        combiner_attention(**{**call, "plan": FixedPlan(2), **change})
