"""Differential layers in real decoders: training, caches, saving, DiffLlama, growth."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

from attending.conversion.differential import (
    convert_differential,
    convert_diffllama,
    differential_layers,
    load_differential,
)
from attending.conversion.grow_heads import grow_heads, grow_signal_heads
from attending.nn.grouped_differential_attention import GroupedDifferentialAttention

GOLDEN = Path(__file__).parents[1] / "golden" / "grouped-differential-attention"
SIZES = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
    "attention_dropout": 0.0,
}


def build(kind: str = "Llama", attention: str = "sdpa", **changes: object) -> nn.Module:
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **changes})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    return awake(model)


def awake(model: nn.Module) -> nn.Module:
    """Weights so large that the maps are not even."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.mul_(20.0 if "embed" in name else 6.0)
    return model.eval()


def converted(kind: str = "Llama", **options: object) -> nn.Module:
    model = build(kind)
    before = dict(model.named_parameters())
    convert_differential(model, 6, 2, num_kv_pairs=1, **options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name not in before and parameter.dim() == 2:
                parameter.mul_(6.0)
    return model.eval()


def tokens(batch: int, length: int, seed: int = 1) -> Tensor:
    return torch.randint(2, 32, (batch, length), generator=torch.Generator().manual_seed(seed))


def close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kv_heads", [8, 4, 2])
def test_diffllama_computes_the_same(attention: str, kv_heads: int) -> None:
    model = build("DiffLlama", attention, num_key_value_heads=kv_heads)
    words, mask = tokens(2, 11), torch.ones(2, 11, dtype=torch.long)
    mask[1, :4] = 0
    call = {"input_ids": words, "attention_mask": mask}
    with torch.no_grad():
        before = model(**call).logits
        after = convert_diffllama(copy.deepcopy(model))(**call).logits
    close(after[0], before[0], 2e-5)
    close(after[1, 4:], before[1, 4:], 2e-5)
    assert not torch.allclose(before[0], model(words.flip(1)).logits[0])


def test_gradients_are_those_of_diffllama() -> None:
    model = build("DiffLlama").double()
    ours = convert_diffllama(copy.deepcopy(model))
    words = tokens(2, 9)  # DiffLlama sums its lambdas in float32, whence the tolerance
    for one in (model, ours):
        one(input_ids=words, labels=words).loss.backward()
    old, new = model.model.layers[0].self_attn, differential_layers(ours)[0].attention
    close(new.out_proj.weight.grad, old.o_proj.weight.grad, 1e-6)
    close(new.lambda_q1.grad, old.lambda_q1.grad, 1e-6)
    theirs = old.q_proj.weight.grad.unflatten(0, (8, -1))
    close(new.q_proj.weight.grad.unflatten(0, (8, -1))[0::2], theirs[:4], 1e-6)
    close(new.q_proj.weight.grad.unflatten(0, (8, -1))[1::2], theirs[4:], 1e-6)


@pytest.mark.parametrize("kind", ["Llama", "Mistral", "Qwen2"])
def test_training_saving_and_loading(kind: str, tmp_path: Path) -> None:
    model = converted(kind)
    assert isinstance(differential_layers(model)[1].attention, GroupedDifferentialAttention)
    words = tokens(4, 12)
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=3e-3)
    losses = []
    for _ in range(8):
        loss = model(input_ids=words, labels=words).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
    model.eval().save_pretrained(tmp_path)
    again = load_differential(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(words).logits, model(words).logits)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generating_with_a_cache_is_generating_without(cache: str) -> None:
    model = converted()
    words = tokens(2, 7)
    mask = torch.ones_like(words)
    mask[1, :3] = 0
    call = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    whole = model.generate(words, use_cache=False, **call)
    with_cache = model.generate(words, cache_implementation=cache, disable_compile=True, **call)
    assert torch.equal(whole, with_cache)


def test_padding_does_not_matter_and_no_token_sees_later_ones() -> None:
    model = converted()
    words = tokens(2, 10)
    mask = torch.ones_like(words)
    mask[1, :4] = 0
    with torch.no_grad():
        padded = model(words, attention_mask=mask).logits
        alone = model(words[1:, 4:]).logits
        close(padded[1:, 4:], alone)
        changed = words.clone()
        changed[:, 7:] = 3
        close(model(changed).logits[:, :7], model(words).logits[:, :7])


def test_some_layers_and_other_lambdas(tmp_path: Path) -> None:
    model = converted(layers=[1], lambda_mode="token", lambda_index="motif")
    (layer,) = differential_layers(model)
    assert layer.layer_idx == 1
    assert type(model.model.layers[0].self_attn).__name__ == "LlamaAttention"
    model.save_pretrained(tmp_path)
    words = tokens(2, 6)
    assert torch.equal(load_differential(tmp_path)(words).logits, model(words).logits)


def test_golden_growth() -> None:
    with np.load(GOLDEN / "growth_2x_signal.npz") as file:
        data = {name: torch.from_numpy(file[name]) for name in file.files}
    layer = GroupedDifferentialAttention(
        12,
        int(data["num_signal_heads"]),
        int(data["num_noise_heads"]),
        bias=False,
        num_kv_pairs=int(data["num_kv_heads"]) // 2,
        head_dim=int(data["head_dim"]),
        lambda_init=float(data["lambda_init"]),
        dtype=torch.float64,
    )
    with torch.no_grad():  # exp(lq1 . lk1) - exp(0) + lambda_init is the lambda of the vectors
        extra = float(data["lambda_full"]) - float(data["lambda_init"])
        layer.lambda_q1.fill_(float(np.log1p(extra)) / 4)
        layer.lambda_k1.fill_(1.0)
        layer.lambda_q2.zero_()
        for ours, theirs in (("q", "q"), ("k", "k"), ("v", "v"), ("out", "o")):
            layer.get_submodule(f"{ours}_proj").weight.copy_(data[f"W_{theirs}"])
        layer.subln.weight.copy_(data["subln_weight"])
    close(layer(data["x"], is_causal=True), data["out"], 1e-10)
    grown = grow_signal_heads(layer, int(data["replication"]))
    for ours, theirs in (("q", "q"), ("k", "k"), ("v", "v"), ("out", "o")):
        close(grown.get_submodule(f"{ours}_proj").weight, data[f"grown_W_{theirs}"], 1e-12)
    close(grown(data["x"], is_causal=True), data["grown_out"], 1e-10)


@pytest.mark.parametrize("mode", ["scalar", "token"])
@pytest.mark.parametrize(("factor", "hidden_factor"), [(1, 2), (2, 1), (3, 1), (4, 2)])
@pytest.mark.parametrize("noise", [None, 10.0])
def test_growth_changes_nothing(
    mode: str, factor: int, hidden_factor: int, noise: float | None
) -> None:
    if factor == 1 and noise is not None:
        return
    torch.manual_seed(2)
    layer = GroupedDifferentialAttention(
        24, 4, 2, num_kv_pairs=2, head_dim=4, layer_idx=3, lambda_mode=mode, dtype=torch.float64
    )
    hidden = torch.randn(2, 7, 24, dtype=torch.float64)
    grown = grow_signal_heads(layer, factor, hidden_factor=hidden_factor, noise_snr_db=noise)
    assert grown.heads.num_signal == 4 * factor
    assert grown.heads.num_noise == 2
    ours = grown(hidden.repeat(1, 1, hidden_factor), is_causal=True)
    close(ours, layer(hidden, is_causal=True).repeat(1, 1, hidden_factor), 1e-12)


def test_noise_lets_copies_become_different() -> None:
    torch.manual_seed(2)
    layer = GroupedDifferentialAttention(24, 4, 2, head_dim=4, dtype=torch.float64)
    hidden = torch.randn(2, 7, 24, dtype=torch.float64)
    for noise in (None, 20.0):
        grown = grow_signal_heads(layer, 2, noise_snr_db=noise)
        grown(hidden, is_causal=True).sin().sum().backward()
        gradient = grown.q_proj.weight.grad.unflatten(0, (10, 4))
        assert torch.allclose(gradient[0], gradient[1], rtol=1e-9, atol=1e-12) == (noise is None)
    plain = grow_signal_heads(layer, 2).out_proj.weight.detach()
    added = grown.out_proj.weight.detach() - plain
    assert float(plain.std() / added.std()) == pytest.approx(10.0, rel=1e-6)


def test_a_grown_model(tmp_path: Path) -> None:
    model = converted()
    words = tokens(2, 10)
    with torch.no_grad():
        before = model(words).logits
        assert grow_heads(model, 2, noise_snr_db=20.0) is model
        close(model(words).logits, before)
    assert differential_layers(model)[0].attention.heads.num_signal == 12
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(load_differential(tmp_path)(words).logits, model(words).logits)
    loss = model.train()(input_ids=words, labels=words).loss
    loss.backward()
    assert all(one.attention.q_proj.weight.grad is not None for one in differential_layers(model))


def test_diffllama_can_be_grown_and_saved(tmp_path: Path) -> None:
    model = build("DiffLlama")
    words = tokens(2, 10)
    with torch.no_grad():
        before = model(words).logits
        grow_heads(convert_diffllama(model), 3)
        close(model(words).logits, before, 2e-5)
        model.save_pretrained(tmp_path)
        again = load_differential(tmp_path)
        assert torch.equal(again(words).logits, model(words).logits)


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    model = build()
    with pytest.raises(ValueError, match="layers: expected some of the layers 0 to 1"):
        convert_differential(model, 6, 2, layers=[2])
    with pytest.raises(ValueError, match="head_dim: expected 4"):
        convert_differential(model, 6, 2, head_dim=8)
    with pytest.raises(ValueError, match="num_signal_heads: expected a multiple"):
        convert_differential(model, 5, 2)
    with pytest.raises(ValueError, match="model: expected attention_dropout 0"):
        convert_differential(build(attention_dropout=0.1), 6, 2)
    assert type(model.model.layers[0].self_attn).__name__ == "LlamaAttention"
    with pytest.raises(ValueError, match="model: expected one with differential layers"):
        grow_heads(model, 2)
    with pytest.raises(ValueError, match="model: expected attention of DiffLlama"):
        convert_diffllama(model)
    convert_differential(model, 6, 2)
    with pytest.raises(ValueError, match="model: expected attention of one of"):
        convert_differential(model, 6, 2)
    with pytest.raises(ValueError, match="factor, hidden_factor: expected at least 1"):
        grow_heads(model, 0)
    with pytest.raises(ValueError, match="noise_snr_db: expected"):
        grow_heads(model, 1, noise_snr_db=10.0)
    build().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="folder: expected a model of convert_differential"):
        load_differential(tmp_path)
    with pytest.raises(ValueError, match=r"attending:differential in .*layer 0"):
        model(tokens(1, 4), output_attentions=True)
