"""Frozen-QK attention against vectors, its definition, and its invariants."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from attending.nn.frozen_attention import (
    FrozenAttention,
    frozen_attention_features,
    frozen_attention_kernel,
)
from attending.nn.random_feature_mlp import RandomFeatureMLP
from attending.nn.ridge import ridge_solution
from attending.probes.set_targets import random_sets
from tests.nn import reference_frozen_attention as reference

GOLDEN = Path(__file__).parents[1] / "golden" / "random-feature-attention-theory"
EXACT = {"rtol": 1e-9, "atol": 1e-9}


def sets(count: int, keys: int, dim: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return random_sets(count, keys, dim, generator=generator, dtype=torch.float64)


def layer(dim: int, heads: int, **options: Any) -> FrozenAttention:
    return FrozenAttention(dim, heads, dtype=torch.float64, **options)


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    with np.load(GOLDEN / "rfa_ridge.npz") as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


@pytest.mark.parametrize("name", ["rfa", "brfa"])
def test_golden(golden: dict[str, Tensor], name: str) -> None:
    weight = golden["W_zero_mean"]
    if name == "brfa":
        weight = weight + golden["W_bias_mean"]
    query, key, train = golden["x0"], golden["x"], int(golden["n_train"])
    for bias, suffix in ((True, ""), (False, "_no_value_bias")):
        found = frozen_attention_features(query, key, weight, value_bias=bias)
        torch.testing.assert_close(found, golden[f"features_{name}{suffix}"], **EXACT)
    model = layer(query.shape[1], len(weight))
    model.qk_weight.copy_(weight)
    model.fit(query[:train], key[:train], golden["y"][:train], ridge=float(golden["ridge_lambda"]))
    torch.testing.assert_close(model.value.data, golden[f"values_{name}"], rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(model(query, key).detach(), golden[f"pred_{name}"], **EXACT)


def test_the_mean_of_the_biased_heads(golden: dict[str, Tensor]) -> None:
    zero, identity = (layer(4, 6, qk_mean=mean, seed=3) for mean in ("zero", "identity"))
    difference = identity.qk_weight - zero.qk_weight
    expected = golden["W_bias_mean"].expand(6, 5, 5)
    torch.testing.assert_close(difference, expected, rtol=0, atol=1e-15)


@given(
    batch=st.integers(1, 3),
    keys=st.integers(0, 7),
    dim=st.integers(1, 5),
    heads=st.integers(1, 4),
    masked=st.booleans(),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_definition(
    batch: int, keys: int, dim: int, heads: int, masked: bool, bias: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, dim, dtype=torch.float64, generator=generator)
    key = torch.randn(batch, keys, dim, dtype=torch.float64, generator=generator)
    mask = torch.rand(batch, keys, generator=generator) < 0.5 if masked else None
    model = layer(dim, heads, value_bias=bias, seed=seed)
    model.value.data.normal_(generator=generator)
    expected = reference.features(query, key, model.qk_weight, mask, bias)
    if mask is not None:
        key = key.masked_fill(~mask[..., None], math.nan)
        expected_empty = expected[~mask.any(1)]
        assert not bool(expected_empty.any())
    torch.testing.assert_close(model.features(query, key, mask), expected, **EXACT)
    output = (expected * model.value).sum((-2, -1))
    torch.testing.assert_close(model(query, key, mask), output, **EXACT)


@given(keys=st.integers(1, 7), dim=st.integers(1, 5), seed=st.integers(0, 99))
def test_invariants(keys: int, dim: int, seed: int) -> None:
    query, key = sets(2, keys, dim, seed)
    model = layer(dim, 4, qk_mean="identity", seed=seed)
    model.value.data.normal_(generator=torch.Generator().manual_seed(seed))
    found = model.features(query, key)
    order = torch.randperm(keys, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(model.features(query, key[:, order]), found, **EXACT)
    torch.testing.assert_close(model.features(query, torch.cat([key, key], 1)), found, **EXACT)
    if keys == 1:  # an ordinary random-feature model of (x_0, x_1)
        one = torch.ones(2, 1, dtype=torch.float64)
        outer = torch.einsum(
            "bi,bj->bij", torch.cat([query, one], 1), torch.cat([key[:, 0], one], 1)
        )
        hidden = (outer.flatten(1) @ model.qk_weight.flatten(1).T).relu()
        expected = hidden[..., None] * torch.cat([key[:, 0], one], 1)[:, None]
        torch.testing.assert_close(found, expected, **EXACT)
    # Another order of heads, with their values, gives the same predictions.
    other = layer(dim, 4)
    other.qk_weight.copy_(model.qk_weight.flip(0))
    other.value.data.copy_(model.value.data.flip(0))
    torch.testing.assert_close(other(query, key), model(query, key), **EXACT)


@given(
    query_scale=st.floats(0.0, 9.0), key_scale=st.floats(0.0, 9.0), seed=st.integers(0, 99)
)  # fmt: skip
def test_features_are_homogeneous_without_the_ones(
    query_scale: float, key_scale: float, seed: int
) -> None:
    query, key = sets(2, 5, 3, seed)
    weight = layer(3, 4, seed=seed).qk_weight.clone()
    weight[:, -1] = 0.0
    weight[:, :, -1] = 0.0
    found = frozen_attention_features(query, key, weight, value_bias=False)
    scaled = frozen_attention_features(
        query_scale * query, key_scale * key, weight, value_bias=False
    )
    torch.testing.assert_close(scaled, query_scale * key_scale**2 * found, **EXACT)


@given(keys=st.integers(1, 6), dim=st.integers(1, 5), seed=st.integers(0, 99))
def test_without_noise_the_biased_head_is_a_relu_of_correlations(
    keys: int, dim: int, seed: int
) -> None:
    query, key = sets(2, keys, dim, seed)
    found = layer(dim, 2, qk_mean="identity", qk_std=0.0).features(query, key)
    one = torch.ones(2, keys, 1, dtype=torch.float64)
    expected = (query[:, None] @ key.mT).relu() @ torch.cat([key, one], -1) / keys
    torch.testing.assert_close(found, expected.expand(2, 2, dim + 1), **EXACT)


def test_scores_have_variance_one_on_the_sphere() -> None:
    query, key = sets(1, 1, 6)
    gathered = layer(6, 40_000, seed=1).features(query, key)[0, :, -1]  # relu of the score
    assert float(gathered.square().mean()) == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("bias", [True, False])
def test_kernel_is_the_limit_of_many_heads(bias: bool) -> None:
    query, key = sets(3, 4, 3)
    other_query, other_key = sets(2, 5, 3, seed=1)
    exact = frozen_attention_kernel(query, key, other_query, other_key, value_bias=bias)
    errors = []
    for heads in (100, 10_000):
        squared = 0.0
        for seed in range(64):
            model = layer(3, heads, value_bias=bias, seed=seed)
            first = model.features(query, key).flatten(1)
            second = model.features(other_query, other_key).flatten(1)
            squared += float((first @ second.T / heads - exact).square().mean()) / 64
        errors.append(squared**0.5)
    assert errors[1] < 1e-2
    assert 7 < errors[0] / errors[1] < 14  # heads^-1/2 makes it 10


def test_kernel_is_that_of_a_gram_matrix() -> None:
    query, key = sets(12, 3, 4)
    gram = frozen_attention_kernel(query, key, query, key)
    torch.testing.assert_close(gram, gram.T, **EXACT)
    assert float(torch.linalg.eigvalsh(gram)[0]) > 0
    shuffled = frozen_attention_kernel(query, key.flip(1), query, key)
    torch.testing.assert_close(shuffled, gram, **EXACT)
    twice = frozen_attention_kernel(query, key, query, key, qk_std=1.0)
    torch.testing.assert_close(twice, 4 * gram, **EXACT)
    # Of a set of one key with itself: |x~_0|^2 |x~_1|^2 / 8 times |x~_1|^2, all of them 2.
    alone = frozen_attention_kernel(query, key[:, :1], query, key[:, :1])
    torch.testing.assert_close(
        alone.diagonal(), torch.ones(12, dtype=torch.float64), rtol=1e-7, atol=1e-7
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gradients(dtype: torch.dtype) -> None:
    query, key = (one.to(dtype) for one in sets(2, 5, 3))
    mask = torch.tensor([[True, True, False, True, True], [False] * 5])
    model = FrozenAttention(3, 4, qk_mean="identity", dtype=dtype)
    model.value.data.normal_(generator=torch.Generator().manual_seed(0))
    wide = [one.double().requires_grad_() for one in (query, key, model.value.detach())]
    expected = reference.features(wide[0], wide[1], model.qk_weight, mask)
    expected = (expected * wide[2]).sum((-2, -1))
    inputs = [query.requires_grad_(), key.requires_grad_(), model.value]
    found = model(query, key, mask)
    assert found.dtype == dtype
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    close = {"rtol": tolerance, "atol": tolerance, "check_dtype": False}
    torch.testing.assert_close(found, expected, **close)
    for got, want in zip(
        torch.autograd.grad(found.sum(), inputs),
        torch.autograd.grad(expected.sum(), wide),
        strict=True,
    ):
        torch.testing.assert_close(got, want, **close)


def test_autocast_changes_nothing() -> None:
    query, key = (one.float() for one in sets(2, 5, 3))
    model = FrozenAttention(3, 4)
    model.value.data.fill_(1.0)
    expected = model(query, key)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model(query, key), expected)
        assert torch.equal(model.features(query, key).sum((1, 2)), expected) or torch.allclose(
            model.features(query, key).sum((1, 2)), expected, rtol=1e-5
        )


@given(
    samples=st.integers(1, 12),
    width=st.integers(1, 12),
    strength=st.sampled_from([1e-6, 1e-2, 1.0]),
    seed=st.integers(0, 99),
)
def test_ridge_is_least_squares_with_more_rows(
    samples: int, width: int, strength: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(samples, width, dtype=torch.float64, generator=generator)
    targets = torch.randn(samples, 2, dtype=torch.float64, generator=generator)
    found = ridge_solution(features, targets, [0.5, strength])[1]
    for output in range(2):
        expected = reference.ridge(features, targets[:, output], strength)
        torch.testing.assert_close(found[:, output], expected, rtol=1e-6, atol=1e-7)


def test_dual_and_primal_agree() -> None:
    query, key = sets(40, 5, 4)
    features = layer(4, 6).features(query, key).flatten(1)  # 40 samples of 30 features
    targets = torch.randn(40, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (found,) = ridge_solution(features, targets, [1e-2])
    gram = features @ features.T + 1e-2 * 40 * torch.eye(40, dtype=torch.float64)
    torch.testing.assert_close(found, features.T @ torch.linalg.solve(gram, targets), **EXACT)


def test_without_ridge_the_solution_is_the_shortest() -> None:
    features = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    features = torch.cat([features, features], 1)  # of rank 4
    targets = torch.arange(6, dtype=torch.float64)[:, None]
    for rows in (features, features[:3]):
        (found,) = ridge_solution(rows, targets[: len(rows)], [0.0])
        expected = torch.linalg.pinv(rows) @ targets[: len(rows)]
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


def test_fit_learns_what_it_can_compute() -> None:
    query, key = (one.float() for one in sets(400, 5, 3))
    truth = FrozenAttention(3, 8, seed=5)
    truth.value.data.normal_(generator=torch.Generator().manual_seed(0))
    targets = truth(query, key).detach()
    model = FrozenAttention(3, 8, seed=5)
    assert model.fit(query[:300], key[:300], targets[:300], ridge=1e-9) is model
    torch.testing.assert_close(
        model(query[300:], key[300:]).detach(), targets[300:], rtol=1e-3, atol=1e-3
    )


def test_seeds_and_state() -> None:
    state = torch.random.get_rng_state()
    first, same, other = (FrozenAttention(3, 4, seed=seed) for seed in (1, 1, 2))
    RandomFeatureMLP(3, 4, 5)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(first.qk_weight, same.qk_weight)
    assert not torch.equal(first.qk_weight, other.qk_weight)
    assert [name for name, _ in first.named_parameters()] == ["value"]
    other.load_state_dict(first.state_dict())
    assert torch.equal(first.qk_weight, other.qk_weight)
    assert "heads=4" in repr(first)


def test_the_network_by_hand() -> None:
    query, key = sets(50, 3, 2)
    network = RandomFeatureMLP(2, 3, 20_000, dtype=torch.float64)
    inputs = torch.cat(
        [query, key[:, 0], key[:, 1], key[:, 2], torch.ones(50, 1, dtype=torch.float64)], 1
    )
    found = network.features(query, key)
    torch.testing.assert_close(found, (inputs @ network.weight.T).clamp(min=0), **EXACT)
    assert float(found.square().mean()) == pytest.approx(0.5, abs=0.02)
    small = RandomFeatureMLP(2, 3, 10, dtype=torch.float64)
    targets = query[:, 0]
    small.fit(query, key, targets, ridge=1e-3)
    features = small.features(query, key)
    expected = features @ reference.ridge(features, targets, 1e-3)
    torch.testing.assert_close(small(query, key).detach(), expected, rtol=1e-6, atol=1e-7)


def refused(words: str, function: Any, *args: Any, **options: Any) -> None:
    with pytest.raises(ValueError, match=words):
        function(*args, **options)


def test_refusals() -> None:  # not typed: refused on purpose
    query, key = sets(2, 3, 4)
    model = layer(4, 2)
    refused("one query for each set", model, query[:1], key)
    refused("one query for each set", model, query[:, :3], key)
    refused("same floating dtype", model, query, key.float())
    refused("query: expected torch.float64", model, query.float(), key.float())
    refused("fit the query-key matrices", model, query[:, :3], key[..., :3])
    refused("attn_mask: expected a boolean", model, query, key, torch.ones(2, 3))
    refused("attn_mask: expected a boolean", model, query, key, torch.ones(2, 4).bool())
    refused("targets: expected one", model.fit, query, key, torch.ones(3))
    refused("ridge", model.fit, query, key, torch.ones(2), ridge=-1.0)
    refused("finite numbers", model.fit, query, key, torch.tensor([1.0, math.nan]))
    refused("at least one sample", model.fit, query[:0], key[:0], torch.ones(0))
    refused("ridge", ridge_solution, query, torch.ones(2, 1), [])
    refused("features, targets", ridge_solution, query, torch.ones(3, 1), [1.0])
    refused("dim, num_heads", FrozenAttention, 0, 2)
    refused("qk_mean", FrozenAttention, 2, 2, qk_mean="one")
    refused("qk_std", FrozenAttention, 2, 2, qk_std=-1.0)
    refused("other_query", frozen_attention_kernel, query, key, query[:, :3], key[..., :3])
    refused("at least one key", frozen_attention_kernel, query, key[:, :0], query, key)
    refused("qk_std", frozen_attention_kernel, query, key, query, key, qk_std=0.0)
    network = RandomFeatureMLP(4, 3, 5, dtype=torch.float64)
    refused("size of the sets is fixed", network, query, key[:, :2])
    refused("expected torch.float64", network, query.float(), key.float())
    refused("targets: expected one", network.fit, query, key, torch.ones(2, 1))
    refused("num_units", RandomFeatureMLP, 4, 3, 0)
