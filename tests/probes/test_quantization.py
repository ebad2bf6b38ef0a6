"""Simulated int8: the numbers, that outliers cost, and that nothing stays."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from attending.probes.quantization import (
    absmax_int8,
    absmax_quantized,
    next_token_loss,
    quantization_probe,
)

WORDS = torch.arange(60).reshape(3, 20) * 7 % 31


def llama(tied: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=31,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config)


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=31, n_embd=24, n_layer=2, n_head=3))


@given(st.integers(0, 2**31), st.integers(0, 30), st.sampled_from([1e-6, 1.0, 1e6]))
def test_absmax_is_within_half_a_step_on_a_grid_of_255(seed: int, size: int, unit: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(size, generator=generator, dtype=torch.float64) * unit
    rounded = absmax_int8(values)
    step = values.abs().max() / 127 if size else torch.tensor(1.0)
    assert ((rounded - values).abs() <= step / 2 * (1 + 1e-9)).all()
    assert (rounded / step).round().abs().le(127).all()
    torch.testing.assert_close(rounded / step, (rounded / step).round())
    torch.testing.assert_close(absmax_int8(rounded), rounded)


def test_absmax_of_zeros_and_of_half_precision() -> None:
    assert (absmax_int8(torch.zeros(3)) == 0).all()
    values = torch.randn(50).bfloat16()
    assert absmax_int8(values).dtype == torch.bfloat16
    torch.testing.assert_close(absmax_int8(values), absmax_int8(values.float()).bfloat16())


@pytest.mark.parametrize("make", [llama, gpt2])
def test_the_loss_is_that_of_a_model_with_rounded_weights(make) -> None:
    model, copy = make().train(), make().eval()
    report = quantization_probe(model, {"input_ids": WORDS})
    with torch.no_grad():
        loss = copy(WORDS, labels=WORDS).loss
        layers = 0
        for name, module in copy.named_modules():
            if type(module).__name__ in ("Linear", "Conv1D") and name != "lm_head":
                module.weight.copy_(absmax_int8(module.weight))
                layers += 1
        quantized = copy(WORDS, labels=WORDS).loss
    assert report.layers == layers
    assert report.targets == 57
    assert report.loss == pytest.approx(float(loss), rel=1e-5)
    assert report.quantized_loss == pytest.approx(float(quantized), rel=1e-5)
    assert report.perplexity == pytest.approx(math.exp(report.loss))
    assert report.gap == report.quantized_loss - report.loss
    assert "absmax_w8" in str(report)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("scheme", ["absmax_w8", "absmax_w8a8"])
@pytest.mark.parametrize("tied", [False, True])
def test_undone_exactly_also_after_an_error(scheme: str, tied: bool) -> None:
    model = llama(tied)
    own = dict(model.named_parameters(remove_duplicate=False))
    before = {name: value.detach().clone() for name, value in own.items()}
    embedding = model.model.embed_tokens.weight

    def fail() -> None:
        with absmax_quantized(model, scheme, skip=()) as layers:
            assert len(layers) == 15
            assert model.model.embed_tokens.weight is embedding
            assert torch.equal(embedding, before["model.embed_tokens.weight"])
            assert not torch.equal(model.lm_head.weight, before["lm_head.weight"])
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    after = dict(model.named_parameters(remove_duplicate=False))
    assert all(after[name] is own[name] for name in own)
    assert all(torch.equal(after[name], before[name]) for name in own)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_activations_are_rounded_with_one_scale_for_each_call() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 2))
    values = torch.randn(4, 6)
    with torch.no_grad(), absmax_quantized(model, "absmax_w8a8"):
        ours = model(values)
    first, second = model[0], model[2]
    with torch.no_grad():
        hidden = absmax_int8(values) @ absmax_int8(first.weight).T + first.bias
        hidden = absmax_int8(nn.functional.gelu(hidden))
        expected = hidden @ absmax_int8(second.weight).T + second.bias
    torch.testing.assert_close(ours, expected)


def test_one_large_weight_costs_the_rest_its_precision() -> None:
    """The reason for the probe."""
    model = llama().eval()
    # A loss that is about something: the model's own most likely words.
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
        words = model(WORDS).logits.argmax(-1)

    def loss(model: nn.Module, batch: Tensor) -> tuple[Tensor, int]:
        logits = model(batch).logits
        total = nn.functional.cross_entropy(logits.flatten(0, 1), words.flatten(), reduction="sum")
        return total, words.numel()

    plain = quantization_probe(model, [WORDS], loss_function=loss)
    with torch.no_grad():
        for layer in model.model.layers:
            # Unit 0 never fires, so that the function stays the same; its weight is huge.
            layer.mlp.up_proj.weight[0] = 0.0
            layer.mlp.down_proj.weight[:, 0] = 0.0
            quiet = quantization_probe(model, [WORDS], loss_function=loss)
            layer.mlp.down_proj.weight[3, 0] = 50.0
    spiked = quantization_probe(model, [WORDS], loss_function=loss)
    assert spiked.loss == pytest.approx(quiet.loss, rel=1e-4)
    assert abs(spiked.gap) > 5 * abs(plain.gap)


def test_padding_has_no_part_in_the_loss() -> None:
    model = llama().eval()
    alone, count = next_token_loss(model, {"input_ids": WORDS[:1, :12]})
    for side in (0, 8):
        mask = torch.zeros(1, 20, dtype=torch.long)
        words = torch.zeros(1, 20, dtype=torch.long)
        mask[:, side : side + 12] = 1
        words[:, side : side + 12] = WORDS[:1, :12]
        padded, targets = next_token_loss(model, {"input_ids": words, "attention_mask": mask})
        assert targets == count == 11
        torch.testing.assert_close(padded, alone)


def test_arguments_that_do_not_fit_are_named() -> None:
    model = llama()
    with pytest.raises(ValueError, match="scheme: expected"):
        quantization_probe(model, WORDS, "int4")
    with (
        pytest.raises(ValueError, match="skip: expected several names"),
        absmax_quantized(model, skip="lm_head"),
    ):
        pass
    with (
        pytest.raises(ValueError, match=r"model: expected nn\.Linear"),
        absmax_quantized(nn.Sequential(nn.GELU())),
    ):
        pass
    with pytest.raises(ValueError, match="batches: expected input_ids"):
        quantization_probe(model, {"pixel_values": WORDS})
    with pytest.raises(ValueError, match="at least one target"):
        quantization_probe(model, WORDS[:, :1])
    layer = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)))
    with pytest.raises(ValueError, match="parametrized"), absmax_quantized(layer):
        pass
