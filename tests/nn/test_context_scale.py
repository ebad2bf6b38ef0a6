"""The gate by itself, and on real classes of transformers."""

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from attending.nn.context_scale import ContextScale, add_context_scale

WORDS = torch.arange(24).reshape(2, 12) % 31


def llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=31,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config).eval()


def gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=31, n_embd=24, n_layer=2, n_head=3)).eval()


MODELS = {"llama": llama, "gpt2": gpt2}


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(WORDS, use_cache=False).logits


def set_gates(model: nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "context_scale" in name:
                parameter.copy_(torch.randn_like(parameter))


@pytest.mark.parametrize("max_scale", [2.0, 1.5, 8.0])
def test_starts_as_one_and_stays_in_its_range(max_scale: float) -> None:
    scale = ContextScale(6, 3, max_scale)
    torch.testing.assert_close(scale(torch.randn(2, 5, 6) * 10), torch.ones(2, 5, 3))
    nn.init.normal_(scale.gate.weight, std=10.0)
    factor = scale(torch.randn(2, 50, 6))
    assert factor.min() >= 0
    assert max_scale * 0.9 < factor.max() <= max_scale


def test_the_formula() -> None:
    scale = ContextScale(4, 2).double()
    nn.init.normal_(scale.gate.weight)
    hidden = torch.randn(5, 4, dtype=torch.float64)
    expected = 2 / (1 + torch.exp(-(hidden @ scale.gate.weight.T + scale.gate.bias)))
    torch.testing.assert_close(scale(hidden), expected)


@pytest.mark.parametrize("name", MODELS)
def test_changes_nothing_at_first_and_leaves_no_trace(name: str) -> None:
    model = MODELS[name]()
    before, state = logits(model), set(model.state_dict())
    hooks = sum(len(m._forward_pre_hooks) for m in model.modules())
    with add_context_scale(model) as gates:
        assert torch.equal(logits(model), before)
        assert len(gates.scales) == model.config.num_hidden_layers
        assert len(gates.parameters()) == 2 * len(gates.scales)
        assert len(set(model.state_dict()) - state) == 2 * len(gates.scales)
        set_gates(model)
        assert not torch.allclose(logits(model), before)
    assert torch.equal(logits(model), before)
    assert set(model.state_dict()) == state
    assert sum(len(m._forward_pre_hooks) for m in model.modules()) == hooks


def test_scales_the_heads_of_llama() -> None:
    """Gate 0 for one head is that head taken out of o_proj; gate 2 doubles it."""
    model = llama()
    gates = add_context_scale(model, select=lambda name, _: ".1." in name)
    assert list(gates.scales) == ["model.layers.1.self_attn"]
    scale = gates.scales["model.layers.1.self_attn"]
    with torch.no_grad():
        scale.gate.bias.copy_(torch.tensor([-1e4, 0.0, 1e4, 0.0]))
    gated = logits(model)
    gates.remove()
    weight = model.model.layers[1].self_attn.o_proj.weight
    with torch.no_grad():
        weight[:, :6] = 0
        weight[:, 12:18] *= 2
    torch.testing.assert_close(gated, logits(model))


@pytest.mark.parametrize("name", MODELS)
def test_a_saved_state_loads_into_a_new_model(name: str) -> None:
    model = MODELS[name]()
    add_context_scale(model)
    set_gates(model)
    other = MODELS[name]()
    add_context_scale(other)
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other), logits(model))


def test_a_copy_has_gates_of_its_own() -> None:
    model = llama()
    add_context_scale(model)
    set_gates(model)
    before = logits(model)
    other = copy.deepcopy(model)
    assert torch.equal(logits(other), before)
    set_gates(other)
    assert torch.equal(logits(model), before)
    assert not torch.allclose(logits(other), before)


def test_a_projection_by_itself_is_not_gated_and_nothing_is_kept() -> None:
    model = llama()
    add_context_scale(model)
    set_gates(model)
    model(WORDS, use_cache=False)  # with a graph, which a copy could not take along
    copy.deepcopy(model)
    projection = model.model.layers[0].self_attn.o_proj
    merged = torch.randn(2, 12, 24)
    torch.testing.assert_close(projection(merged), merged @ projection.weight.T)


def test_the_gates_alone_can_be_trained_also_under_checkpointing() -> None:
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(1)
        model = llama().train()
        gates = add_context_scale(model)
        set_gates(model)
        if checkpointing:
            model.activation_checkpointing_enable()
        model(WORDS, labels=WORDS, use_cache=False).loss.backward()
        gradients.append([parameter.grad for parameter in gates.parameters()])
        assert all(grad.abs().max() > 0 for grad in gradients[-1])
    torch.testing.assert_close(*gradients)


def test_generation_with_a_cache_equals_one_forward() -> None:
    model = llama()
    add_context_scale(model)
    set_gates(model)
    out = model.generate(
        WORDS, max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    with torch.no_grad():
        whole = model(out.sequences, use_cache=False).logits[:, 11:-1]
    torch.testing.assert_close(torch.stack(out.logits, 1), whole, rtol=1e-4, atol=1e-4)


def test_t5_has_gates_in_self_and_cross_attention() -> None:
    config = T5Config(vocab_size=31, d_model=24, d_kv=5, d_ff=32, num_layers=2, num_heads=4)
    config.decoder_start_token_id = 0
    model = T5ForConditionalGeneration(config).eval()
    with torch.no_grad():
        before = model(WORDS, labels=WORDS).logits
        with add_context_scale(model) as gates:
            assert len(gates.scales) == 6
            assert torch.equal(model(WORDS, labels=WORDS).logits, before)
            set_gates(model)
            assert not torch.allclose(model(WORDS, labels=WORDS).logits, before)


def test_models_that_cannot_be_gated_are_refused() -> None:
    with pytest.raises(ValueError, match=r"never calls its projection"):
        add_context_scale(nn.TransformerEncoderLayer(8, 2))
    model = llama()
    add_context_scale(model)
    with pytest.raises(ValueError, match=r"got one in 'model.layers.0.self_attn' already"):
        add_context_scale(model)
    with pytest.raises(ValueError, match="that `select` accepts"):
        add_context_scale(llama(), select=lambda *_: False)
