"""Head importance against gates that are really there, on real models."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    SwinConfig,
    SwinForImageClassification,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from attending.probes.head_importance import head_importance

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.3,
}
HEADS = 4


def llama() -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**SMALL, num_key_value_heads=2, vocab_size=50)).double()


def bert() -> BertForSequenceClassification:
    return BertForSequenceClassification(BertConfig(**SMALL, vocab_size=50, num_labels=3)).double()


def ids(*shape: int) -> torch.Tensor:
    return torch.randint(0, 50, shape)


def gated(model: nn.Module, projections: dict[str, nn.Linear], inputs: dict, samples: int) -> dict:
    """|dL/dxi| by autograd: gates before the projections that take the heads, without any tap."""
    gates = {
        name: torch.ones(samples, HEADS, dtype=torch.float64, requires_grad=True)
        for name in projections
    }

    def gate(name: str):
        def hook(module, args):
            heads = args[0].unflatten(-1, (HEADS, -1))
            return ((heads * gates[name][:, None, :, None]).flatten(-2),)

        return hook

    handles = [part.register_forward_pre_hook(gate(name)) for name, part in projections.items()]
    loss = model.eval()(**inputs).loss
    found = torch.autograd.grad(loss, list(gates.values()))
    for handle in handles:
        handle.remove()
    # The loss is a mean over samples; that of one sample weighs 1 / samples in it.
    return {name: (one.abs() * samples).mean(0) for name, one in zip(gates, found, strict=True)}


def test_llama_against_gates() -> None:
    model, tokens = llama(), ids(3, 9)
    inputs = {"input_ids": tokens, "labels": tokens}
    projections = {
        f"model.layers.{index}.self_attn": layer.self_attn.o_proj
        for index, layer in enumerate(model.model.layers)
    }
    expected = gated(model, projections, inputs, 3)
    raw = head_importance(model, inputs, normalize=False)
    assert list(raw) == list(expected)
    for name, scores in raw.items():
        torch.testing.assert_close(scores, expected[name], rtol=1e-9, atol=1e-12)
        assert (scores > 0).all()
    for name, scores in head_importance(model, inputs).items():
        torch.testing.assert_close(scores, expected[name] / expected[name].norm())


def test_bert_with_padding_against_gates_and_finite_differences() -> None:
    model = bert()
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[1, 5:] = 0
    inputs = {"input_ids": ids(2, 8), "attention_mask": mask, "labels": torch.tensor([0, 2])}
    projections = {
        f"bert.encoder.layer.{index}.attention.self": layer.attention.output.dense
        for index, layer in enumerate(model.bert.encoder.layer)
    }
    expected = gated(model, projections, inputs, 2)
    raw = head_importance(model, inputs, normalize=False)
    assert list(raw) == list(expected)
    for name, scores in raw.items():
        torch.testing.assert_close(scores, expected[name], rtol=1e-9, atol=1e-12)

    # And by no autograd at all: one sample, head 1 of layer 0 turned up and down a little.
    one = {key: value[:1] for key, value in inputs.items()}
    weight = projections["bert.encoder.layer.0.attention.self"].weight
    columns, step = slice(8, 16), 1e-5
    losses = []
    for factor in (1 + step, 1 - step):
        kept = weight.data.clone()
        weight.data[:, columns] *= factor
        with torch.no_grad():
            losses.append(model(**one).loss.item())
        weight.data.copy_(kept)
    slope = abs(losses[0] - losses[1]) / (2 * step)
    alone = head_importance(model, one, normalize=False)
    assert alone["bert.encoder.layer.0.attention.self"][1].item() == pytest.approx(slope, rel=1e-5)


@settings(max_examples=10)
@given(samples=st.integers(1, 5), cut=st.integers(1, 5), tokens=st.integers(2, 9))
def test_it_does_not_matter_how_samples_are_cut_into_batches(
    samples: int, cut: int, tokens: int
) -> None:
    torch.manual_seed(0)
    model, every = llama(), ids(samples, tokens)
    whole = head_importance(model, {"input_ids": every, "labels": every}, normalize=False)
    parts = ({"input_ids": part, "labels": part} for part in every.split(cut))
    for name, scores in head_importance(model, parts, normalize=False).items():
        torch.testing.assert_close(scores, whole[name], rtol=1e-5, atol=1e-9)  # the loss is float32
    for scores in head_importance(model, {"input_ids": every, "labels": every}).values():
        assert scores.norm().item() == pytest.approx(1)


def test_nothing_of_the_model_is_touched() -> None:
    model = llama().train()
    model.model.layers[0].eval()
    marked = model.model.norm.weight
    marked.grad = torch.full_like(marked, 7.0)
    for parameter in model.model.embed_tokens.parameters():
        parameter.requires_grad_(False)
    modes = {name: module.training for name, module in model.named_modules()}
    frozen = {name: one.requires_grad for name, one in model.named_parameters()}
    tokens = ids(2, 6)
    with torch.no_grad():
        scores = head_importance(model, {"input_ids": tokens, "labels": tokens})
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert {name: one.requires_grad for name, one in model.named_parameters()} == frozen
    assert (marked.grad == 7).all()
    others = [one for one in model.parameters() if one is not marked]
    assert all(one.grad is None for one in others)
    assert not any(module._forward_hooks for module in model.modules())
    assert not any(one.requires_grad for one in scores.values())


def test_frozen_parameters_and_a_loss_of_ones_own() -> None:
    model, tokens = llama(), ids(2, 6)
    expected = head_importance(model, {"input_ids": tokens, "labels": tokens})
    model.requires_grad_(False)

    def next_token(outputs, batch):
        logits = outputs.logits[:, :-1].flatten(0, 1)
        return nn.functional.cross_entropy(logits, batch[:, 1:].flatten())

    scores = head_importance(model, tokens, next_token)
    for name, one in scores.items():
        torch.testing.assert_close(one, expected[name], rtol=1e-6, atol=1e-8)


def test_modules_that_are_called_several_times_have_one_gate() -> None:
    config = AlbertConfig(**SMALL, embedding_size=16, vocab_size=50)
    model, tokens = AlbertForMaskedLM(config).double(), ids(2, 7)
    inputs = {"input_ids": tokens, "labels": tokens}
    name = "albert.encoder.albert_layer_groups.0.albert_layers.0.attention"
    projection = model.get_submodule(name).dense
    scores = head_importance(model, inputs, normalize=False)
    assert list(scores) == [name]
    torch.testing.assert_close(scores[name], gated(model, {name: projection}, inputs, 2)[name])


def test_windows_of_an_image_count_as_that_image() -> None:
    config = SwinConfig(
        image_size=32,
        patch_size=4,
        embed_dim=16,
        depths=[1, 1],
        num_heads=[4, 4],
        window_size=4,
        num_labels=3,
        initializer_range=0.3,
    )
    model = SwinForImageClassification(config).double()
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    labels = torch.tensor([0, 1, 2])
    whole = head_importance(model, {"pixel_values": images, "labels": labels}, normalize=False)
    single = [
        {"pixel_values": image[None], "labels": label[None]}
        for image, label in zip(images, labels, strict=True)
    ]
    for name, scores in head_importance(model, single, normalize=False).items():
        torch.testing.assert_close(scores, whole[name], rtol=1e-5, atol=1e-9)


def test_encoder_decoder_and_vision() -> None:
    t5 = T5ForConditionalGeneration(
        T5Config(
            vocab_size=50,
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=2,
            num_heads=4,
            decoder_start_token_id=0,
        )
    )
    scores = head_importance(t5, {"input_ids": ids(2, 6), "labels": ids(2, 5)})
    assert len(scores) == 6  # two layers: of the encoder, the decoder, and between them
    assert all(one.shape == (4,) and one.dtype == torch.float32 for one in scores.values())
    vit = ViTForImageClassification(ViTConfig(**SMALL, image_size=16, patch_size=8, num_labels=3))
    image = torch.randn(2, 3, 16, 16)
    scores = head_importance(vit, {"pixel_values": image, "labels": torch.tensor([1, 2])})
    assert len(scores) == 2
    half = vit.to(torch.bfloat16)
    inputs = {"pixel_values": image.bfloat16(), "labels": torch.tensor([1, 2])}
    assert {one.dtype for one in head_importance(half, inputs).values()} == {torch.float32}


BAD = {
    "loss: expected a function": lambda m: head_importance(m, {"input_ids": ids(1, 4)}),
    "loss: expected a scalar tensor": lambda m: head_importance(m, ids(1, 4), lambda o, b: o[0]),
    "loss: expected a scalar with": lambda m: head_importance(
        m, ids(1, 4), lambda o, b: o.logits.detach().mean()
    ),
    "inputs: expected at least one batch": lambda m: head_importance(m, []),
    "inputs: expected a mapping": lambda m: head_importance(m, "text"),
    "inputs: expected a batch with a tensor": lambda m: head_importance(m, {"labels": 3}),
    "inputs: expected the attention of": lambda m: head_importance(
        m, {"num_items_in_batch": torch.ones(2), "input_ids": ids(3, 3)}
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments_are_named(message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        BAD[message](llama())
