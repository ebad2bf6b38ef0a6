"""Partial attention in pretrained decoders: nothing at first, the right place, caches, beams."""

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from attending.conversion.partial_attention import add_partial_attention
from attending.nn.source_target_layout import source_target_layout

SIZES = {
    "vocab_size": 30,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
KINDS = ["Llama", "Mistral", "Qwen2", "Qwen3"]


def model_of(kind: str) -> Any:
    config = getattr(transformers, f"{kind}Config")(**SIZES, pad_token_id=0)
    torch.manual_seed(0)
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


def ids_of(*shape: int) -> Tensor:
    return torch.randint(1, 30, shape, generator=torch.Generator().manual_seed(1))


def disturb(handle: Any) -> None:
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))


@pytest.mark.parametrize("init", ["zero", "gate"])
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_changes_at_first_and_it_can_be_trained(kind: str, init: str) -> None:
    model, ids = model_of(kind), ids_of(2, 9)
    before = model(ids).logits.detach()
    names = set(model.state_dict())
    handle = add_partial_attention(model, init=init)
    mask = torch.arange(4) < torch.tensor([[4], [2]])
    assert torch.equal(model(ids).logits, before)
    with handle.source(mask):
        output = model(ids, labels=ids)
        assert torch.equal(output.logits, before)
        output.loss.backward()
    assert any(bool(p.grad.any()) for p in handle.parameters() if p.grad is not None)
    assert "model.layers.1.partial_attention.attention.k_proj.weight" in model.state_dict()
    with torch.no_grad():
        for parameter in handle.parameters():
            if parameter.grad is not None:
                parameter.sub_(parameter.grad)
    with handle.source(mask):
        assert not torch.equal(model(ids).logits, before)
    assert torch.equal(model(ids).logits, before)  # without a block it is not there
    handle.remove()
    assert set(model.state_dict()) == names
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_it_is_between_attention_and_feed_forward(kind: str) -> None:
    model, ids = model_of(kind), ids_of(2, 9)
    handle = add_partial_attention(model, init="random")
    layer = model.model.layers[0]
    seen: dict[str, Tensor] = {}
    hooks = [
        layer.register_forward_pre_hook(lambda _, args: seen.update(start=args[0])),
        layer.self_attn.o_proj.register_forward_hook(lambda *a: seen.update(attended=a[2])),
        layer.post_attention_layernorm.register_forward_pre_hook(
            lambda _, args: seen.update(stream=args[0])
        ),
    ]
    with handle.source(torch.ones(2, 4, dtype=torch.bool)):
        model(ids)
    for hook in hooks:
        hook.remove()
    states = seen["start"] + seen["attended"]
    path = layer.partial_attention
    expected = states + path.attention(path.norm(states), path.norm(states[:, :4]))
    torch.testing.assert_close(seen["stream"], expected)


@torch.no_grad()
def test_each_sample_by_itself_and_decoding_with_a_cache() -> None:
    model = model_of("Llama")
    handle = add_partial_attention(model, init="random")
    disturb(handle)
    ids = ids_of(2, 9)
    mask = torch.arange(5) < torch.tensor([[5], [3]])
    with handle.source(mask):
        whole = model(ids).logits
    for row in range(2):
        with handle.source(mask[row : row + 1]):
            alone = model(ids[row : row + 1]).logits
        torch.testing.assert_close(alone[0], whole[row], rtol=1e-4, atol=1e-5)
    changed = ids.clone()
    changed[1, 3] = changed[1, 3] % 29 + 1  # a target token of the shorter sample
    with handle.source(mask):
        again = model(changed).logits
    torch.testing.assert_close(again[1, :3], whole[1, :3], rtol=1e-4, atol=1e-5)
    with handle.source(mask):
        output = model(ids[:, :6], use_cache=True)
        parts = [output.logits]
        cache = getattr(output, "past_key_values", None) or output.cache
        for token in range(6, 9):
            parts.append(model(ids[:, token : token + 1], past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="whose first tokens were read"), handle.source(mask):
        model(ids[:, 8:], past_key_values=cache)


@torch.no_grad()
def test_generate_with_padding_and_beams() -> None:
    model = model_of("Llama")
    handle = add_partial_attention(model, init="random")
    disturb(handle)
    prompt = ids_of(2, 5)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    prompt = prompt * mask
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    with handle.source(mask.bool()):
        made = model.generate(prompt, attention_mask=mask, **options)
        beams = model.generate(prompt, attention_mask=mask, num_beams=3, **options)
    with handle.source(torch.ones(1, 3, dtype=torch.bool)):
        alone = model.generate(prompt[:1, 2:], **options)
        alone_beams = model.generate(prompt[:1, 2:], num_beams=3, **options)
    assert torch.equal(made[0, 2:], alone[0])
    assert torch.equal(beams[0, 2:], alone_beams[0])
    plain = model.generate(prompt, attention_mask=mask, **options)
    assert not torch.equal(plain, made)


@torch.no_grad()
def test_with_a_prefix_mask_and_restarted_positions() -> None:
    """What the layout gives goes into a model of transformers as it is."""
    model = model_of("Llama")
    ids = ids_of(2, 9)
    layout = source_target_layout([4, 4], 9)
    arguments = {
        "attention_mask": layout.attend_mask[:, None],
        "position_ids": layout.position_ids,
    }
    before = model(ids, **arguments).logits
    changed = ids.clone()
    changed[:, 3] = changed[:, 3] % 29 + 1
    after = model(changed, **arguments).logits
    assert not torch.allclose(after[:, 0], before[:, 0], atol=1e-5)  # the source sees all of it
    changed = ids.clone()
    changed[:, 8] = changed[:, 8] % 29 + 1
    torch.testing.assert_close(model(changed, **arguments).logits[:, :8], before[:, :8])


def test_weights_are_saved_with_the_model_and_copies_are_their_own() -> None:
    model, ids = model_of("Qwen2"), ids_of(1, 6)
    handle = add_partial_attention(model)
    disturb(handle)
    mask = torch.ones(1, 3, dtype=torch.bool)
    with handle.source(mask), torch.no_grad():
        expected = model(ids).logits
    other = model_of("Qwen2")
    loaded = add_partial_attention(other)
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    with loaded.source(mask), torch.no_grad():
        torch.testing.assert_close(other(ids).logits, expected)


def test_refusals() -> None:
    bert = transformers.BertConfig(hidden_size=16, num_attention_heads=2, num_hidden_layers=1)
    with pytest.raises(ValueError, match="model: expected decoder layers with input_layernorm"):
        add_partial_attention(transformers.BertModel(bert))
    gemma = transformers.Gemma2Config(**SIZES, head_dim=4)
    with pytest.raises(ValueError, match="as it is, got Gemma2DecoderLayer with pre_feedforward"):
        add_partial_attention(transformers.Gemma2ForCausalLM(gemma))
    granite = transformers.GraniteConfig(**SIZES, residual_multiplier=0.5)
    with pytest.raises(ValueError, match="GraniteDecoderLayer with a residual_multiplier"):
        add_partial_attention(transformers.GraniteForCausalLM(granite))
    model = model_of("Llama")
    with add_partial_attention(model) as handle:
        with pytest.raises(ValueError, match=r"got one in 'model.layers.0' already"):
            add_partial_attention(model)
        block = handle.source(torch.ones(1, 3, dtype=torch.long))
        with pytest.raises(ValueError, match=r"source_mask: expected a boolean .*int64 \[1, 3\]"):
            block.__enter__()  # not typed
        block = handle.source(torch.ones(1, 8, dtype=torch.bool))
        with pytest.raises(ValueError, match=r"source_mask: .*has to be in the first"), block:
            model(ids_of(1, 4))
        inner = handle.source(torch.ones(1, 3, dtype=torch.bool))
        outer = handle.source(torch.ones(1, 3, dtype=torch.bool))
        with outer, pytest.raises(RuntimeError, match="open already"):
            inner.__enter__()
    assert not hasattr(model.model.layers[0], "partial_attention")
