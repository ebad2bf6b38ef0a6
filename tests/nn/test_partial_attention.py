"""The partial path against golden vectors, and what must hold of it whatever its weights."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import attending as at
from attending.nn.partial_attention import PartialAttention, crop_source

GOLDEN = Path(__file__).parents[1] / "golden" / "partial-attention-lm"
NAMES = {
    "query": "q_proj",
    "key": "k_proj",
    "value": "v_proj",
    "dense": "out_proj",
    "Fp_linear1": "source_in",
    "Fp_linear2": "source_out",
}


def load() -> tuple[PartialAttention, dict[str, Tensor]]:
    with np.load(GOLDEN / "partial_attention_case1.npz") as file:
        data = {name: torch.from_numpy(file[name]) for name in file.files}
    layer = PartialAttention(data["hidden"].shape[-1], int(data["num_heads"])).double()
    weights = {}
    for name, tensor in data.items():
        theirs, _, kind = name.partition(".")
        if kind:
            weights[f"{NAMES[theirs]}.{kind}"] = tensor
    layer.load_state_dict(weights)
    return layer, data


def angles(positions: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    frequencies = 10_000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angle = positions[..., None].double() * frequencies
    angle = torch.cat([angle, angle], -1)
    return angle.cos(), angle.sin()


def test_golden() -> None:
    layer, data = load()
    hidden, source = data["hidden"], data["source"]
    output = layer(hidden, source)
    torch.testing.assert_close(output, data["out_no_rope"], rtol=1e-10, atol=1e-10)
    rotary = {
        "query_rotary": angles(data["position_ids"], layer.head_dim),
        "source_rotary": angles(data["source_position_ids"], layer.head_dim),
    }
    turned = layer(hidden, source, **rotary)
    torch.testing.assert_close(turned, data["out_with_rope"], rtol=1e-6, atol=1e-6)
    with at.tap(layer) as calls:
        layer(hidden, source)
    (call,) = calls
    assert call.is_cross
    attention = (call.query @ call.key.mT * call.softmax_scale).softmax(-1)
    torch.testing.assert_close(attention, data["attn_no_rope"], rtol=1e-10, atol=1e-10)


def layer_of(kv_heads: int = 2, **changes: Any) -> PartialAttention:
    torch.manual_seed(1)
    return PartialAttention(8, 4, kv_heads, **changes).double()


MAPS = st.sampled_from(["silu_residual", "tanh", "residual", "identity"])


@given(st.integers(1, 5), st.integers(0, 5), st.integers(0, 4), MAPS, st.sampled_from([1, 2, 4]))
@torch.no_grad()
def test_each_sample_sees_its_own_source_only(
    first: int, second: int, target: int, source_map: str, kv_heads: int
) -> None:
    layer = layer_of(kv_heads, source_map=source_map)
    tokens = max(first, second) + target
    hidden = torch.randn(2, tokens, 8, dtype=torch.float64)
    source_mask = torch.arange(tokens) < torch.tensor([[first], [second]])
    source, cropped = crop_source(hidden, source_mask)
    output = layer(hidden, source, cropped)
    for row, length in enumerate((first, second)):
        alone = layer(hidden[row : row + 1], hidden[row : row + 1, :length])
        torch.testing.assert_close(output[row : row + 1], alone, rtol=1e-10, atol=1e-10)
    if second == 0:
        assert not bool(output[1].any())
    # No target token, and no token of padding, reaches anybody else.
    changed = hidden.where(source_mask[..., None], torch.randn_like(hidden))
    again = layer(changed, *crop_source(changed, source_mask))
    torch.testing.assert_close(again[source_mask], output[source_mask], rtol=1e-10, atol=1e-10)
    # One by one, from what was kept of the source, and in another order of the batch.
    memory = layer.encode(source, cropped)
    steps = [layer(hidden[:, i : i + 1], memory) for i in range(tokens)]
    torch.testing.assert_close(torch.cat(steps, 1), output, rtol=1e-10, atol=1e-10)
    flipped = layer(hidden.flip(0), source.flip(0), cropped.flip(0))
    torch.testing.assert_close(flipped.flip(0), output, rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_the_output_forgets_how_long_the_target_is() -> None:
    layer = layer_of()
    hidden = torch.randn(1, 40, 8, dtype=torch.float64)
    whole = layer(hidden, hidden[:, :4])
    short = layer(hidden[:, :9], hidden[:, :4])
    torch.testing.assert_close(whole[:, :9], short, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("init", ["zero", "gate"])
def test_starts_as_nothing_and_learns(init: str) -> None:
    layer = layer_of(init=init, bias=True)
    hidden = torch.randn(2, 5, 8, dtype=torch.float64)
    output = layer(hidden, hidden[:, :3])
    assert not bool(output.any())
    output.sum().backward()
    moved = layer.gate if init == "gate" else layer.out_proj.weight
    assert moved is not None
    assert moved.grad is not None
    assert bool(moved.grad.any())
    with torch.no_grad():
        moved.sub_(0.1 * moved.grad)
    assert bool(layer(hidden, hidden[:, :3]).any())


def test_the_residual_source_map_starts_as_the_identity() -> None:
    plain, mapped = layer_of(source_map="identity"), layer_of(source_map="residual")
    weights = {name: mapped.state_dict()[name] for name in plain.state_dict()}
    plain.load_state_dict(weights)
    hidden = torch.randn(2, 5, 8, dtype=torch.float64)
    torch.testing.assert_close(plain(hidden, hidden), mapped(hidden, hidden))


@pytest.mark.parametrize("source_map", ["silu_residual", "tanh", "residual"])
def test_gradients(source_map: str) -> None:
    layer = layer_of(source_map=source_map)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.4)
    hidden = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True, True], [True, False]])

    def output(hidden: Tensor, *parameters: Tensor) -> Tensor:
        return layer(hidden, hidden[:, :2], mask)

    assert torch.autograd.gradcheck(output, (hidden, *layer.parameters()), fast_mode=True)


def test_half_precision_and_head_dim() -> None:
    layer = PartialAttention(12, 2, 1, head_dim=4)
    assert layer.out_proj.in_features == 8
    hidden = torch.randn(2, 5, 12)
    exact = layer(hidden, hidden[:, :3])
    half = layer.bfloat16()(hidden.bfloat16(), hidden[:, :3].bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), exact, atol=5e-2, rtol=5e-2)


def test_refusals() -> None:
    layer, states = PartialAttention(8, 2), torch.randn(1, 4, 8)
    with pytest.raises(ValueError, match="source_mask, source_rotary: expected None beside a Sour"):
        layer(states, layer.encode(states), torch.ones(1, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"source_map: expected one of silu_residual, .*'relu'"):
        PartialAttention(8, 2, source_map="relu")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="init: expected one of random, zero, gate, got 'clone'"):
        PartialAttention(8, 2, init="clone")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_heads: expected a divisor of embed_dim 8, got 3"):
        PartialAttention(8, 3)
    hidden = torch.randn(1, 4, 8)
    with pytest.raises(ValueError, match=r"source_mask: expected \[batch, source\] = \[1, 2\]"):
        PartialAttention(8, 2)(hidden, hidden[:, :2], torch.ones(1, 4, dtype=torch.bool))
