"""The softmax-only block: golden vectors, folding, decoding with a cache, its parts."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention
from transformers import DynamicCache

from attending.core import statistics
from attending.nn.query_temperature import QueryScale, QueryTemperature
from attending.nn.softmax_only import ScaledFeedForward, SoftmaxOnlyAttention, SoftmaxOnlyBlock

GOLDEN = Path(__file__).parent.parent / "golden" / "entropy-guided-attention"


def randomised(block: SoftmaxOnlyBlock) -> SoftmaxOnlyBlock:
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            if "alpha" in name or "beta" in name:
                parameter.add_(torch.randn(()) * 0.3)
            elif "log_temperature" in name:
                parameter.add_(torch.randn_like(parameter) * 0.5)
    return block


def test_golden() -> None:
    data = {
        name: torch.from_numpy(np.asarray(value))
        for name, value in np.load(GOLDEN / "softmax_only_block_case1.npz").items()
    }
    x = data["x"]
    heads, context = data["temperature"].shape
    block = SoftmaxOnlyBlock(x.shape[-1], heads, context).double()
    attention, feed_forward = block.attention, block.feed_forward
    with torch.no_grad():
        for name in ("q", "k", "v"):
            getattr(attention, f"{name}_proj").weight.copy_(data[f"w_{name}"].T)
        attention.out_proj.weight.copy_(data["w_o"].T)
        feed_forward.linears[0].weight.copy_(data["w_ffn"].T)
        feed_forward.alpha.copy_(data["alpha"])
        feed_forward.beta.copy_(data["beta"])
        attention.temperature.log_temperature.copy_(data["temperature"].log())
    tight = {"rtol": 1e-10, "atol": 1e-10}
    torch.testing.assert_close(x + attention(x), data["x_sa"], **tight)
    torch.testing.assert_close(block(x), data["out"], **tight)
    torch.testing.assert_close(block.fold()(x), data["out"], **tight)
    query, key = (
        projection(x).unflatten(-1, (heads, -1)).transpose(1, 2)
        for projection in (attention.q_proj, attention.k_proj)
    )
    query = attention.temperature(query)
    one_hot = torch.eye(context, dtype=torch.float64).expand(len(x), heads, -1, -1)
    dense = scaled_dot_product_attention(query, key, one_hot, is_causal=True)
    torch.testing.assert_close(dense, data["attn"], **tight)
    rows = statistics.entropy(query, key, is_causal=True)
    torch.testing.assert_close(rows, data["row_entropy"], **tight)
    torch.testing.assert_close(rows.mean((0, 2)), data["head_entropy"], **tight)


@given(
    hidden_dim=st.sampled_from((None, 5, 24)),
    norm=st.sampled_from((None, "weight", "spectral")),
    scaled=st.booleans(),
    bias=st.booleans(),
    temperature=st.sampled_from((None, "per_head_position")),
    tokens=st.integers(1, 9),
    seed=st.integers(0, 2**31),
)
def test_folded_is_the_same_function(
    hidden_dim, norm, scaled, bias, temperature, tokens, seed
) -> None:
    torch.manual_seed(seed)
    block = SoftmaxOnlyBlock(
        12,
        3,
        9,
        hidden_dim=hidden_dim,
        norm=norm,
        scaled=scaled,
        bias=bias,
        temperature=temperature,
        dtype=torch.float64,
    )
    randomised(block)
    block(torch.randn(1, 9, 12, dtype=torch.float64))  # spectral norm: one step of training mode
    state = {name: value.clone() for name, value in block.state_dict().items()}
    folded = block.fold()
    for name, value in block.state_dict().items():
        assert torch.equal(value, state[name])
    assert block.training
    assert not folded.training
    x = torch.randn(2, tokens, 12, dtype=torch.float64)
    torch.testing.assert_close(folded(x), block.eval()(x), rtol=1e-10, atol=1e-10)
    assert isinstance(folded.feed_forward, torch.nn.Linear)
    assert folded.feed_forward.weight.shape == (12, 12)
    assert not any("log_temperature" in name for name, _ in folded.named_parameters())
    torch.testing.assert_close(folded.fold()(x), folded(x), rtol=1e-12, atol=1e-12)


def test_temperatures_go_into_the_query_matrix_only_if_they_do_not_depend_on_the_position() -> None:
    attention = SoftmaxOnlyAttention(8, 2, 6, bias=True, dtype=torch.float64)
    x = torch.randn(2, 6, 8, dtype=torch.float64)
    with torch.no_grad():
        attention.temperature.log_temperature.copy_(torch.tensor([[0.7], [-1.1]]).expand(2, 6))
    folded = attention.fold()
    assert folded.temperature is None
    torch.testing.assert_close(folded(x), attention(x), rtol=1e-10, atol=1e-10)
    with torch.no_grad():
        attention.temperature.log_temperature[1, 3] = 0.2
    folded = attention.fold()
    assert isinstance(folded.temperature, QueryScale)
    torch.testing.assert_close(folded(x), attention(x), rtol=1e-10, atol=1e-10)


def test_alpha_beta_one_and_no_temperature_is_an_ordinary_residual_block() -> None:
    block = SoftmaxOnlyBlock(8, 2, 5, hidden_dim=32, dtype=torch.float64)
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    attention = block.attention
    query, key, value = (
        p(x).unflatten(-1, (2, 4)).transpose(1, 2)
        for p in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    merged = scaled_dot_product_attention(query, key, value, is_causal=True)
    middle = x + attention.out_proj(merged.transpose(1, 2).flatten(2))
    first, second = block.feed_forward.linears
    torch.testing.assert_close(block(x), middle + second(first(middle)), rtol=1e-10, atol=1e-10)


@given(seed=st.integers(0, 2**31), cut=st.lists(st.integers(1, 4), min_size=2, max_size=4))
def test_decoding_with_a_cache_is_one_forward(seed: int, cut: list[int]) -> None:
    torch.manual_seed(seed)
    total = sum(cut)
    blocks = [
        randomised(SoftmaxOnlyBlock(8, 2, total, layer_idx=index, dtype=torch.float64))
        for index in range(2)
    ]
    x = torch.randn(2, total, 8, dtype=torch.float64)
    whole = blocks[1](blocks[0](x))
    cache = DynamicCache()
    parts = [blocks[1](blocks[0](part, cache), cache) for part in x.split(cut, 1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-10, atol=1e-10)
    with pytest.raises(ValueError, match="positions"):
        blocks[0](x[:, :1], cache)


def test_longer_than_trained_is_refused() -> None:
    block = SoftmaxOnlyBlock(8, 2, 4)
    with pytest.raises(ValueError, match="0 to 3, as temperatures are learned for 4"):
        block(torch.randn(1, 5, 8))
    SoftmaxOnlyBlock(8, 2, 4, temperature=None)(torch.randn(1, 5, 8))


def test_positions_of_left_padded_batches() -> None:
    temperature = QueryTemperature(2, 6, dtype=torch.float64)
    torch.nn.init.normal_(temperature.log_temperature)
    query = torch.randn(2, 2, 3, 4, dtype=torch.float64)
    positions = torch.tensor([[0, 1, 2], [3, 0, 5]])
    got = temperature(query, positions)
    for b in range(2):
        for i in range(3):
            expected = query[b, :, i] / temperature.temperature[:, positions[b, i], None]
            torch.testing.assert_close(got[b, :, i], expected)
    torch.testing.assert_close(temperature(query, positions[:1]), temperature(query))
    torch.testing.assert_close(temperature.fold()(query, positions), got)
    for wrong in (positions - 1, positions + 1, positions[:, :2], -1, 4):
        with pytest.raises(ValueError, match="positions"):
            temperature(query, wrong)
    assert temperature(query[:, :, :0], positions[:, :0]).shape == (2, 2, 0, 4)


@given(
    seed=st.integers(0, 2**31),
    tokens=st.integers(1, 12),
    factor=st.floats(1.01, 10.0),
)
def test_hotter_is_more_even(seed: int, tokens: int, factor: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    query, key = torch.randn(2, 1, 2, tokens, 4, generator=generator, dtype=torch.float64)
    temperature = QueryTemperature(2, tokens, dtype=torch.float64)
    hotter = QueryTemperature(2, tokens, initial=factor, dtype=torch.float64)
    cold = statistics.entropy(temperature(query), key, is_causal=True)
    hot = statistics.entropy(hotter(query), key, is_causal=True)
    assert torch.all(hot >= cold - 1e-12)
    endless = QueryTemperature(2, tokens, initial=1e12, dtype=torch.float64)
    even = statistics.entropy(endless(query), key)
    torch.testing.assert_close(even, torch.full_like(even, math.log(tokens)))


def test_gradients() -> None:
    block = randomised(SoftmaxOnlyBlock(4, 2, 3, hidden_dim=5, bias=True, dtype=torch.float64))
    names = [name for name, _ in block.named_parameters()]
    x = torch.randn(1, 3, 4, dtype=torch.float64, requires_grad=True)

    def run(x, *parameters):
        return torch.func.functional_call(block, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, *block.parameters()))


def test_norms_do_what_they_say() -> None:
    weight = ScaledFeedForward(6, norm="weight").linears[0]
    assert weight.parametrizations.weight.original0.shape == (6, 1)  # one length per row
    spectral = ScaledFeedForward(6, 24, norm="spectral", dtype=torch.float64)
    for _ in range(100):
        spectral(torch.randn(1, 2, 6, dtype=torch.float64))
    spectral.eval()
    for linear in spectral.linears:
        assert float(torch.linalg.matrix_norm(linear.weight.detach(), 2)) == pytest.approx(1, 1e-6)


def test_half_precision() -> None:
    block = SoftmaxOnlyBlock(16, 2, 7, dtype=torch.float64)
    x = torch.randn(2, 7, 16, dtype=torch.float64)
    expected = block(x)
    got = block.bfloat16()(x.bfloat16())
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_heads": 3}, "num_heads"),
        ({"num_heads": 0}, "num_heads"),
        ({"context": 0}, "context"),
        ({"hidden_dim": 0}, "hidden_dim"),
        ({"norm": "layer"}, "norm"),
        ({"temperature": "per_head"}, "temperature"),
        ({"initial_temperature": 0.0}, "initial"),
        ({"initial_temperature": math.inf}, "initial"),
    ],
)
def test_bad_settings_are_named(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SoftmaxOnlyBlock(**({"embed_dim": 8, "num_heads": 2, "context": 4} | settings))


def test_a_zero_alpha_cannot_be_folded() -> None:
    feed_forward = ScaledFeedForward(4)
    torch.nn.init.zeros_(feed_forward.alpha)
    with pytest.raises(ValueError, match="alpha"):
        feed_forward.fold()
    torch.nn.init.constant_(feed_forward.alpha, -0.5)
    x = torch.randn(3, 4)
    torch.testing.assert_close(feed_forward.fold()(x), feed_forward(x))
    with pytest.raises(ValueError, match="query: expected 2 heads"):
        QueryTemperature(2, 3)(torch.randn(1, 4, 3, 8))
