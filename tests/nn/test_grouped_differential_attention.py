"""The layer of grouped differential attention: official vectors, caches, masks, token lambdas."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from attending.nn.differential_attention import differential_maps
from attending.nn.grouped_differential_attention import (
    GroupedDifferentialAttention,
    lambda_schedule,
)
from attending.nn.rotary import rotate

GOLDEN = Path(__file__).parents[1] / "golden" / "grouped-differential-attention"
LAMBDAS = ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2")


def load(case: str) -> dict[str, Tensor]:
    with np.load(GOLDEN / f"{case}.npz") as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


def close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def official(data: dict[str, Tensor]) -> GroupedDifferentialAttention:
    """The layer of the Differential Transformer, with the official state dict as it is."""
    layer = GroupedDifferentialAttention(
        data["x"].shape[-1],
        int(data["num_heads"]),
        bias=False,
        num_kv_pairs=int(data["num_kv_heads"]),
        head_dim=int(data["head_dim"]),
        layer_idx=int(data["depth"]),
        interleaved=True,
        dtype=torch.float64,
    )
    weights = {name.replace("__", "."): one for name, one in data.items() if "__weight" in name}
    layer.load_state_dict(weights | {name: data[name] for name in LAMBDAS})
    return layer


def grouped(data: dict[str, Tensor]) -> GroupedDifferentialAttention:
    layer = GroupedDifferentialAttention(
        data["x"].shape[-1],
        int(data["num_signal_heads"]),
        int(data["num_noise_heads"]),
        bias=False,
        num_kv_pairs=int(data["num_kv_heads"]) // 2,
        head_dim=int(data["head_dim"]),
        layer_idx=int(data["layer_idx_zero_based"]),
        lambda_index="motif",
        dtype=torch.float64,
    )
    weights = {name: data[name] for name in LAMBDAS} | {"subln.weight": data["subln_weight"]}
    for ours, theirs in (("q", "q"), ("k", "k"), ("v", "v"), ("out", "o")):
        weights[f"{ours}_proj.weight"] = data[f"W_{theirs}"]
    layer.load_state_dict(weights)
    return layer


@pytest.mark.parametrize("case", ["diff_attention_mha", "diff_attention_gqa"])
def test_golden_of_the_differential_transformer(case: str) -> None:
    data = load(case)
    layer = official(data)
    rotation = tuple(torch.cat([data[name]] * 2, -1)[None] for name in ("cos", "sin"))
    ours = layer(data["x"], is_causal=True, position_embeddings=rotation)
    close(ours, data["out"])
    close(ours, data["out_official"], 1e-6)
    close(layer.noise_weight(data["x"]), data["lambda_full"])
    query, key, _ = layer.project(data["x"], position_embeddings=rotation)
    signal, noise = differential_maps(query, key, is_causal=True, enable_gqa=True)
    close(signal, data["map_signal"])
    close(noise, data["map_noise"])


@pytest.mark.parametrize("case", ["gda_4to1", "gda_3to1_sharedkv_bidir"])
def test_golden_of_grouped_ratios(case: str) -> None:
    data = load(case)
    layer, is_causal = grouped(data), bool(data["causal"])
    close(layer(data["x"], is_causal=is_causal), data["out"])
    close(layer.noise_weight(data["x"]), data["lambda_full"])
    query, key, value = layer.project(data["x"])
    close(query.transpose(1, 2), data["q"])
    close(key.transpose(1, 2), data["k"])
    close(value.transpose(1, 2).flatten(2), data["v"].flatten(2))
    signal, noise = differential_maps(
        query, key, ratio=layer.heads.ratio, is_causal=is_causal, enable_gqa=True
    )
    close(signal, data["map_signal"])
    close(noise, data["map_noise"])


def test_the_schedule_of_lambda() -> None:
    data = load("gda_4to1")
    assert lambda_schedule(1, "motif") == pytest.approx(float(data["lambda_init"]), abs=1e-12)
    assert lambda_schedule(0) == pytest.approx(0.2)
    assert lambda_schedule(0, "motif") == pytest.approx(0.8 - 0.6 * math.exp(0.3))
    assert lambda_schedule(2) == lambda_schedule(3, "motif")
    with pytest.raises(ValueError, match="layer_idx: expected"):
        lambda_schedule(-1)
    with pytest.raises(ValueError, match="lambda_index: expected one of"):
        lambda_schedule(0, "one_based")


def test_the_two_layouts_of_rotation_are_a_permutation_apart() -> None:
    tensor = torch.randn(1, 2, 5, 8, dtype=torch.float64)
    angles = torch.outer(torch.arange(5.0), torch.tensor([1.0, 0.5, 0.2, 0.1])).double()
    rotation = tuple(torch.cat([one, one], -1)[None] for one in (angles.cos(), angles.sin()))
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    close(
        rotate(tensor, *rotation, interleaved=True)[..., order],
        rotate(tensor[..., order], *rotation),
    )
    part = tuple(torch.cat([one[..., :2]] * 2, -1) for one in rotation)
    for interleaved in (False, True):
        turned = rotate(tensor, *part, interleaved)
        close(turned[..., 4:], tensor[..., 4:])
        close(turned.norm(dim=-1), tensor.norm(dim=-1))


def make(**options: object) -> GroupedDifferentialAttention:
    torch.manual_seed(1)
    layer = GroupedDifferentialAttention(
        24, 6, 2, num_kv_pairs=1, head_dim=4, layer_idx=1, dtype=torch.float64, **options
    )
    with torch.no_grad():
        for weight in (layer.q_proj.weight, layer.k_proj.weight):
            weight.mul_(4)
    return layer


@pytest.mark.parametrize("mode", ["scalar", "token"])
def test_a_cache_gives_what_one_forward_gives(mode: str) -> None:
    layer = make(lambda_mode=mode)
    hidden = torch.randn(2, 9, 24, dtype=torch.float64)
    whole = layer(hidden, is_causal=True)
    cache = DynamicCache()
    parts = []
    for start, stop in ((0, 4), (4, 5), (5, 8), (8, 9)):
        parts.append(layer(hidden[:, start:stop], is_causal=True, cache=cache))
    close(torch.cat(parts, 1), whole)
    assert cache.layers[1].keys.shape == (2, 2, 9, 4)
    assert cache.layers[1].values.shape == (2, 2, 9, 4)


def test_without_noise_and_factor_it_is_normed_softmax_attention() -> None:
    layer = make(lambda_init=0.0)
    with torch.no_grad():
        layer.lambda_q1.zero_()
        layer.lambda_q2.zero_()
    hidden = torch.randn(2, 7, 24, dtype=torch.float64)
    query, key, value = layer.project(hidden)
    signal, _ = differential_maps(query, key, ratio=3, enable_gqa=True)
    heads = signal @ value
    heads = heads / (heads.square().mean(-1, keepdim=True) + layer.eps).sqrt()
    close(layer(hidden), layer.out_proj(heads.transpose(1, 2).flatten(2)))


def test_lambda_of_each_token_and_head() -> None:
    layer = make(lambda_mode="token")
    hidden = torch.randn(2, 7, 24, dtype=torch.float64)
    weight = layer.noise_weight(hidden)
    assert weight.shape == (2, 6, 7)
    query, key, value = layer.project(hidden)
    signal, noise = differential_maps(query, key, ratio=3, enable_gqa=True)
    heads = (signal - weight[..., None] * noise.repeat_interleave(3, 1)) @ value
    close(layer(hidden), layer.out_proj(heads.transpose(1, 2).flatten(2)))
    layer(hidden).sin().sum().backward()
    assert all(float(one.grad.abs().max()) > 0 for one in layer.lambda_proj.parameters())


def test_cross_attention_and_padding() -> None:
    layer = make(kdim=10, vdim=12)
    hidden, key, value = (
        torch.randn(2, length, width, dtype=torch.float64)
        for length, width in ((5, 24), (8, 10), (8, 12))
    )
    mask = torch.ones(2, 1, 1, 8, dtype=torch.bool)
    mask[1, ..., 5:] = False
    padded = layer(hidden, key, value, attn_mask=mask)
    close(padded[1], layer(hidden[1:], key[1:, :5], value[1:, :5])[0])
    mask[0] = False
    blind = layer(hidden, key, value, attn_mask=mask)[0]
    close(blind, layer.out_proj.bias.expand_as(blind))


def test_it_learns_every_parameter_and_works_in_bfloat16() -> None:
    layer = make()
    hidden = torch.randn(2, 7, 24, dtype=torch.float64)
    exact = layer(hidden, is_causal=True)
    exact.sin().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        if name != "k_proj.bias":  # a bias of the key shifts all scores of a row alike
            assert float(parameter.grad.abs().max()) > 0, name
    half = make().bfloat16()
    ours = half(hidden.bfloat16(), is_causal=True).detach()
    assert ours.dtype == torch.bfloat16
    assert (ours.double() - exact.detach()).abs().max() < 0.1
    with torch.autocast("cpu", torch.bfloat16):
        auto = make().float()(hidden.float(), is_causal=True).detach()
    assert (auto.double() - exact.detach()).abs().max() < 0.1


def test_gradients_of_all_parameters_by_differences() -> None:
    layer = make()
    hidden = torch.randn(1, 4, 24, dtype=torch.float64)
    names = [name for name, _ in layer.named_parameters() if "lambda" in name or "subln" in name]

    def output(*values: Tensor) -> Tensor:
        state = dict(zip(names, values, strict=True))
        return torch.func.functional_call(layer, state, (hidden,), {"is_causal": True})

    values = tuple(layer.get_parameter(name).detach().requires_grad_() for name in names)
    assert torch.autograd.gradcheck(output, values)


def test_a_new_one_has_the_official_start() -> None:
    torch.manual_seed(0)
    layer = GroupedDifferentialAttention(4096, 16, 4, num_kv_pairs=2, device="cpu")
    assert layer.head_dim == 128
    vectors = torch.cat([layer.get_parameter(name).detach() for name in LAMBDAS])
    assert vectors.std() == pytest.approx(0.1, rel=0.2)
    assert (layer.subln.weight == 1).all()
    assert "signal_heads=16, noise_heads=4" in repr(layer)
    assert (
        GroupedDifferentialAttention(32, 2, dtype=torch.bfloat16).lambda_q1.dtype == torch.float32
    )


def test_sizes_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match="head_dim: expected a number"):
        GroupedDifferentialAttention(30, 8, 2)
    with pytest.raises(ValueError, match="num_signal_heads: expected a multiple"):
        GroupedDifferentialAttention(32, 8, 3)
    with pytest.raises(ValueError, match="num_kv_pairs: expected a divisor"):
        GroupedDifferentialAttention(32, 8, 4, num_kv_pairs=3)
    with pytest.raises(ValueError, match="lambda_mode: expected one of"):
        GroupedDifferentialAttention(32, 8, 4, lambda_mode="head")
    with pytest.raises(ValueError, match="embed_dim, head_dim: expected at least 1"):
        GroupedDifferentialAttention(32, 8, 4, head_dim=0)
