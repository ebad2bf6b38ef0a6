"""The factors of the logits against golden vectors, diffusers, the theory, and their invariants."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import attending as at
from attending.nn.logit_scale import logit_scale, proportional_attention

GOLDEN = Path(__file__).parents[1] / "golden" / "variable-size-attention-scaling"
COUNTS = st.integers(0, 5000)


def load(case: str) -> dict[str, Tensor]:
    with np.load(GOLDEN / f"{case}.npz") as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


def heads_of(data: dict[str, Tensor]) -> list[Tensor]:
    heads = int(data["num_heads"])
    return [
        (data["x"] @ data[f"w_{name}"].T).unflatten(-1, (heads, -1)).transpose(1, 2)
        for name in "qkv"
    ]


@pytest.mark.parametrize("case", ["scaled_attention_up", "scaled_attention_down"])
def test_golden(case: str) -> None:
    data = load(case)
    query, key, value = heads_of(data)
    factor = logit_scale(query.shape[2], int(data["train_tokens"]))
    scale = factor * query.shape[-1] ** -0.5
    assert scale == pytest.approx(float(data["scale"]), rel=1e-14)
    for suffix, chosen in (("", scale), ("_default", None)):
        output = scaled_dot_product_attention(query, key, value, scale=chosen)
        output = output.transpose(1, 2).flatten(2) @ data["w_out"].T
        torch.testing.assert_close(output, data[f"out{suffix}"], rtol=1e-12, atol=1e-12)
        entropy = at.statistics.entropy(query, key, scale=chosen)
        torch.testing.assert_close(entropy, data[f"entropy{suffix}"], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("n", "n_train", "expected"),
    [
        (784, 4096, 0.895),  # 512 -> 224 pixels, the top level of Stable Diffusion
        (16, 64, 0.816),  # and its middle
        (8192, 4096, 1.041),
        (128, 64, 1.080),
        (9216, 4096, 1.048),
        (144, 64, 1.093),
        (16384, 4096, 1.080),
        (256, 64, 1.155),
    ],
)
def test_stable_diffusion(n: int, n_train: int, expected: float) -> None:
    assert logit_scale(n, n_train) == pytest.approx(expected, abs=5e-4)


@given(COUNTS, COUNTS, COUNTS)
def test_invariants(n: int, more: int, n_train: int) -> None:
    for kind in ("normalized", "log", "constant"):
        variance = 2.0 if kind == "constant" else None

        def factor(count: int, then: int = n_train, kind=kind, variance=variance) -> float:
            return logit_scale(count, then, kind, variance)

        assert factor(n_train) == 1.0
        assert factor(n) <= factor(n + more)
        assert (factor(n) > 1) == (max(n, 2) > max(n_train, 2))
        assert math.isfinite(factor(n))
        tensor = logit_scale(torch.tensor([n, n + more]), n_train, kind, variance)
        expected = torch.tensor([factor(n), factor(n + more)])
        torch.testing.assert_close(tensor, expected, rtol=1e-5, atol=2e-3)
        assert logit_scale(torch.tensor([n_train]), n_train, kind, variance).item() == 1.0
    assert logit_scale(n, n_train, "log") == pytest.approx(logit_scale(n, n_train) ** 2)


def test_of_tensors() -> None:
    counts = torch.tensor([[10, 20], [30, 0]])
    assert logit_scale(counts, 64).dtype == torch.float32
    assert logit_scale(counts.double(), 64).dtype == torch.float64
    assert logit_scale(counts.bfloat16(), 64).dtype == torch.float32
    per_layer = logit_scale(counts, torch.tensor([64, 16]))
    assert per_layer[1, 0] == logit_scale(counts[1, 0], 64)
    assert logit_scale(torch.zeros(0), 64).shape == (0,)
    spread = torch.tensor([1.0, 4.0])
    constant = logit_scale(128, 64, "constant", spread)
    torch.testing.assert_close(constant, (1 + 2 * math.log(2) / spread).sqrt())


def test_the_theory_with_gaussian_logits() -> None:
    """`entropy = ln N - v / 2`; normalized keeps entropy / ln N, constant the entropy."""
    generator = torch.Generator().manual_seed(0)
    n_train, variance, dim = 256, 1.5, 64
    entropies: dict[str, list[float]] = {"plain": [], "normalized": [], "constant": []}
    sizes = (256, 1024, 4096, 16384)
    for n in sizes:
        query = torch.randn(1, 1, 128, dim, generator=generator, dtype=torch.float64)
        query = query / query.norm(dim=-1, keepdim=True) * variance**0.5
        key = torch.randn(1, 1, n, dim, generator=generator, dtype=torch.float64)
        for kind, found in entropies.items():
            spread = variance if kind == "constant" else None
            factor = 1.0 if kind == "plain" else logit_scale(n, n_train, kind, spread)
            found.append(float(at.statistics.entropy(query, key, scale=factor).mean()))
    for n, plain, normalized, constant in zip(sizes, *entropies.values(), strict=True):
        assert plain == pytest.approx(math.log(n) - variance / 2, abs=0.02)
        assert normalized / math.log(n) == pytest.approx(1 - variance / 2 / math.log(256), abs=3e-3)
        # Its logits come to spread so far that few keys hold the mass: no longer quite true.
        moved = abs(constant - entropies["constant"][0])
        assert moved <= 0.15 * math.log(n / 256) + 0.02


def test_uniform_rows_stay_uniform_and_entropy_falls_with_the_factor() -> None:
    key = torch.randn(1, 2, 50, 8, dtype=torch.float64)
    query = torch.randn(1, 2, 5, 8, dtype=torch.float64)
    scales = [logit_scale(n, 50) for n in (2, 10, 50, 500, 50_000)]
    entropies = torch.stack([at.statistics.entropy(query, key, scale=scale) for scale in scales])
    assert bool((entropies.diff(dim=0) < 0).all())
    flat = at.statistics.entropy(query * 0, key, scale=scales[-1])
    torch.testing.assert_close(flat, torch.full_like(flat, math.log(50)))
    value = torch.randn_like(key)
    by_scale = scaled_dot_product_attention(query, key, value, scale=scales[-1] * 8**-0.5)
    by_query = scaled_dot_product_attention(query * scales[-1], key, value)
    torch.testing.assert_close(by_scale, by_query, rtol=1e-12, atol=1e-12)


def test_lumina_of_diffusers() -> None:
    """Its processors, which apply the same rule where they are given a base length."""
    pytest.importorskip("diffusers")
    from diffusers.models.attention_processor import Attention
    from diffusers.models.transformers.transformer_lumina2 import Lumina2AttnProcessor2_0

    attention = Attention(
        query_dim=32, heads=4, kv_heads=2, dim_head=8, bias=False, processor=None
    ).double()
    attention.set_processor(Lumina2AttnProcessor2_0())
    hidden = torch.randn(2, 50, 32, dtype=torch.float64)
    arguments = {"encoder_hidden_states": hidden, "attention_mask": None}
    theirs = attention(hidden, **arguments, base_sequence_length=16)
    scale = attention.scale
    attention.scale = scale * logit_scale(50, 16)
    torch.testing.assert_close(attention(hidden, **arguments), theirs, rtol=1e-12, atol=1e-12)


def repeated(key: Tensor, sizes: Tensor) -> Tensor:
    return torch.stack([one.repeat_interleave(n, 1) for one, n in zip(key, sizes, strict=True)])


@given(st.integers(1, 5), st.booleans(), st.integers(0, 100))
def test_a_merged_token_counts_as_what_it_stands_for(keys: int, grouped: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(2, 4, 3, 8, generator=generator, dtype=torch.float64)
    key, value = torch.randn(
        2, 2, 2 if grouped else 4, keys, 8, generator=generator, dtype=torch.float64
    )
    sizes = torch.randint(1, 4, (1, keys), generator=generator).expand(2, keys)
    merged = proportional_attention(query, key, value, sizes, enable_gqa=grouped)
    whole = scaled_dot_product_attention(
        query, repeated(key, sizes), repeated(value, sizes), enable_gqa=grouped
    )
    torch.testing.assert_close(merged, whole, rtol=1e-10, atol=1e-10)
    ones = proportional_attention(query, key, value, torch.ones(2, keys), enable_gqa=grouped)
    plain = scaled_dot_product_attention(query, key, value, enable_gqa=grouped)
    torch.testing.assert_close(ones, plain, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sizes_that_hide_and_under_a_causal_mask(dtype: torch.dtype) -> None:
    query, key, value = torch.randn(3, 1, 2, 6, 8, dtype=torch.float64).unbind(0)
    sizes = torch.tensor([[2.0, 0.0, 1.0, 3.0, 1.0, 1.5]])
    mask = torch.ones(6, 6, dtype=torch.bool).tril() & (sizes > 0)
    bias = sizes.double().log().expand(6, 6).masked_fill(~mask, -math.inf)
    expected = scaled_dot_product_attention(query, key, value, attn_mask=bias)
    half = [tensor.to(dtype) for tensor in (query, key, value)]
    ours = proportional_attention(*half, sizes, is_causal=True)
    assert ours.dtype == dtype
    tolerance = 5e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(ours.double(), expected, rtol=tolerance, atol=tolerance)


def test_gradient_of_proportional_attention() -> None:
    tensors = [torch.randn(1, 2, 4, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    sizes = torch.tensor([[1.0, 2.0, 3.0, 0.5]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(proportional_attention, (*tensors, sizes))


def test_refusals() -> None:
    with pytest.raises(ValueError, match="kind: expected one of normalized, log, constant, got 'e"):
        logit_scale(4, 4, "entropy")
    with pytest.raises(ValueError, match="variance: expected a number"):
        logit_scale(4, 4, "constant")
    with pytest.raises(ValueError, match="variance: expected None for 'log', got 1"):
        logit_scale(4, 4, "log", 1.0)
    with pytest.raises(ValueError, match="variance: expected finite numbers above 0, got 0"):
        logit_scale(4, 4, "constant", 0.0)
    with pytest.raises(ValueError, match="n: expected finite numbers at least 0, got a tensor"):
        logit_scale(torch.tensor([-1, 4]), 4)
    with pytest.raises(ValueError, match="n_train: expected finite numbers at least 0, got inf"):
        logit_scale(4, math.inf)
    with pytest.raises(ValueError, match="n: expected finite numbers at least 0, got nan"):
        logit_scale(math.nan, 4)
    tensors = [torch.randn(1, 2, 4, 3) for _ in range(3)]
    with pytest.raises(ValueError, match=r"sizes: expected \[batch, keys\] = \[1, 4\], got \[4\]"):
        proportional_attention(*tensors, torch.ones(4))
    with pytest.raises(ValueError, match="sizes: expected finite numbers at least 0"):
        proportional_attention(*tensors, torch.tensor([[1.0, -1.0, 1.0, 1.0]]))
