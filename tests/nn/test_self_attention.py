"""The layer against the golden vectors of the official code, and its own invariants."""

from pathlib import Path

import numpy
import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from attending.nn.self_attention import SelfAttention

GOLDEN = Path(__file__).parent.parent / "golden" / "systematic-outliers"
VARIANTS = {
    "softmax": "default",
    "fixed_bias": "vbias",
    "additive_bias": "cabias",
    "attention_bias": "attn_bias",
    "context_scale": "ca_softmax",
    "sigmoid": "sigmoid",
}


def make(variant: str, **arguments: object) -> SelfAttention:
    layer = SelfAttention(16, 4, variant=variant, **arguments)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.4)
    return layer


@pytest.mark.parametrize("variant", VARIANTS)
def test_golden(variant: str) -> None:
    with numpy.load(GOLDEN / f"attn_{VARIANTS[variant]}_case1.npz") as file:
        case = {name: torch.as_tensor(file[name]) for name in file}
    heads, dim = int(case["n_head"]), case["x"].shape[-1]
    layer = SelfAttention(dim, heads, variant=variant, bias=False, dtype=torch.float64)
    query, key, value = case["c_attn.weight"].chunk(3)
    state = {
        "q_proj.weight": query,
        "k_proj.weight": key,
        "v_proj.weight": value,
        "out_proj.weight": case["c_proj.weight"],
    }
    if variant == "context_scale":
        state["scale.gate.weight"] = case["context_scale.0.weight"]
        state["scale.gate.bias"] = case["context_scale.0.bias"]
    if "k_bias" in case:
        state["key_bias"] = case["k_bias"].reshape(heads, -1)
        state["value_bias"] = case["v_bias"].reshape(heads, -1)
    elif "v_bias" in case:
        state["value_bias"] = case["v_bias"]
    layer.load_state_dict(state)
    output = layer(case["x"], is_causal=True)
    torch.testing.assert_close(output, case["y"], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("variant", ["softmax", "fixed_bias", "context_scale"])
def test_a_new_layer_is_plain_attention(variant: str) -> None:
    """(b) and (e) start as (a), exactly."""
    plain, other = SelfAttention(16, 4), SelfAttention(16, 4, variant=variant)
    other.load_state_dict(plain.state_dict(), strict=False)
    hidden = torch.randn(2, 7, 16)
    assert torch.equal(other(hidden, is_causal=True), plain(hidden, is_causal=True))


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("variant", VARIANTS)
def test_decoding_with_a_cache_equals_one_forward(variant: str, kv_heads: int) -> None:
    fixed = {"key_length": 11} if variant == "sigmoid" else {}
    layer = make(variant, num_kv_heads=kv_heads, dtype=torch.float64, layer_idx=0, **fixed)
    hidden = torch.randn(2, 11, 16, dtype=torch.float64)
    whole = layer(hidden, is_causal=True)
    cache = DynamicCache()
    # A prompt, two tokens at once, then one by one.
    parts = [
        layer(part, is_causal=True, cache=cache) for part in hidden.split([4, 2, 1, 1, 1, 1, 1], 1)
    ]
    torch.testing.assert_close(torch.cat(parts, 1), whole)


def test_sigmoid_without_a_key_length_decodes_another_function() -> None:
    """The trap: n grows at every step."""
    layer = make("sigmoid", dtype=torch.float64)
    hidden = torch.randn(1, 6, 16, dtype=torch.float64)
    cache = DynamicCache()
    parts = [layer(part, is_causal=True, cache=cache) for part in hidden.split(1, 1)]
    assert (torch.cat(parts, 1) - layer(hidden, is_causal=True)).abs().max() > 1e-3


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_causal_mask_is_the_flag_and_masked_rows_are_finite(variant: str) -> None:
    layer = make(variant)
    hidden = torch.randn(2, 6, 16)
    mask = torch.ones(6, 6, dtype=torch.bool).tril()
    torch.testing.assert_close(layer(hidden, mask), layer(hidden, is_causal=True))
    mask[2] = False
    output = layer(hidden, mask)
    output.sum().backward()
    assert output.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("variant", VARIANTS)
def test_bfloat16_follows_float32(variant: str) -> None:
    layer = make(variant)
    hidden = torch.randn(2, 9, 16)
    exact: Tensor = layer(hidden, is_causal=True)
    output = layer.bfloat16()(hidden.bfloat16(), is_causal=True)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), exact, rtol=0.05, atol=0.1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_heads": 3}, "num_heads: expected a divisor of embed_dim 16, got 3"),
        ({"num_kv_heads": 3}, "num_kv_heads: expected a divisor"),
        ({"variant": "linear"}, "variant: expected one of"),
        ({"key_length": 5}, "key_length: expected None"),
        ({"variant": "context_scale", "max_scale": 1.0}, "max_scale: expected a finite number"),
    ],
)
def test_arguments_that_do_not_fit_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SelfAttention(**({"embed_dim": 16, "num_heads": 4} | arguments))
