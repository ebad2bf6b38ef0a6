"""Rollout without a map against the product of the maps that transformers itself reports."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AlbertConfig,
    AlbertModel,
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5Model,
    ViTConfig,
    ViTModel,
)

from attending.core import reference
from attending.probes.rollout import attention_rollout, rollout_of_calls
from attending.taps import tap

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}


def bert() -> BertModel:
    config = BertConfig(**SMALL, vocab_size=50, initializer_range=0.4)
    return BertModel(config, add_pooling_layer=False).eval()


def vit() -> ViTModel:
    config = ViTConfig(**SMALL, image_size=24, patch_size=8, initializer_range=0.4)
    return ViTModel(config, add_pooling_layer=False).eval()


def llama() -> LlamaForCausalLM:
    config = LlamaConfig(**SMALL, num_key_value_heads=2, vocab_size=50, initializer_range=0.4)
    return LlamaForCausalLM(config).eval()


def dense_rollout(model, inputs, dtype: torch.dtype) -> torch.Tensor:
    """In float32 from the maps of the eager implementation; that has no other precision."""
    if dtype == torch.float32:
        model.set_attn_implementation("eager")
        with torch.no_grad():
            maps = model(**inputs, output_attentions=True).attentions
        model.set_attn_implementation("sdpa")
        return reference.attention_rollout(list(maps))
    with tap(model) as calls, torch.no_grad():
        model(**inputs)
    return dense_rollout_of(calls)


def dense_rollout_of(calls) -> torch.Tensor:
    return reference.attention_rollout(
        [
            reference.attention_map(
                call.query, call.key, call.attn_mask, call.is_causal, call.scale, call.enable_gqa
            ).probabilities
            for call in calls
        ]
    )


def text(*lengths: int, left: bool = False) -> dict[str, torch.Tensor]:
    longest = max(lengths)
    mask = torch.zeros(len(lengths), longest, dtype=torch.long)
    for row, length in zip(mask, lengths, strict=True):
        row[longest - length if left else 0 : None if left else length] = 1
    return {"input_ids": torch.randint(0, 50, mask.shape), "attention_mask": mask}


CASES = {
    "bert": (bert, lambda: text(11, 11)),
    "bert padded": (bert, lambda: text(11, 7)),
    "llama": (llama, lambda: text(9)),
    "llama left-padded": (llama, lambda: text(9, 5, left=True)),
    "vit": (vit, lambda: {"pixel_values": torch.randn(2, 3, 24, 24)}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rollout_is_the_product_of_the_maps(case: str, dtype: torch.dtype) -> None:
    make, make_inputs = CASES[case]
    model, inputs = make().to(dtype), make_inputs()
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    expected = dense_rollout(model, inputs, dtype)
    rollout = attention_rollout(model, inputs)
    visible = inputs.get("attention_mask", torch.ones(expected.shape[:2])).bool()
    tight = {"rtol": 0, "atol": 1e-10 if dtype == torch.float64 else 2e-6}
    assert rollout.dtype == dtype
    # What a padded query looks at is the implementation's choice.
    torch.testing.assert_close(rollout[visible].double(), expected[visible], **tight)
    torch.testing.assert_close(rollout.sum(-1), torch.ones_like(rollout[..., 0]))
    assert (rollout[visible[:, :, None] & ~visible[:, None]] == 0).all()
    some = attention_rollout(model, inputs, queries=[-1, 0])
    torch.testing.assert_close(some, rollout[:, [-1, 0]])
    last = visible.shape[1] - 1 - visible.flip(1).int().argmax(1)
    own = attention_rollout(model, inputs, queries=last[:, None])
    torch.testing.assert_close(own[:, 0], rollout[torch.arange(len(last)), last])
    torch.testing.assert_close(attention_rollout(model, inputs, queries=0), rollout[:, :1])


@settings(max_examples=25)
@given(
    tokens=st.integers(1, 40),
    spread=st.sampled_from((0.05, 1.0, 6.0)),
    residual=st.sampled_from((0.0, 0.3, 0.5)),
    causal=st.booleans(),
)
def test_rows_are_distributions(tokens: int, spread: float, residual: float, causal: bool) -> None:
    torch.manual_seed(tokens)
    model = llama() if causal else bert()
    for parameter in model.parameters():
        parameter.data *= spread
    ids = torch.randint(0, 50, (2, tokens))
    rollout = attention_rollout(model, {"input_ids": ids}, residual=residual)
    assert rollout.shape == (2, tokens, tokens)
    assert (rollout >= 0).all()
    torch.testing.assert_close(rollout.sum(-1), torch.ones(2, tokens))
    if causal:
        assert (rollout.triu(1) == 0).all()  # nothing comes from the future
        torch.testing.assert_close(rollout[:, 0, 0], torch.ones(2))
    assert (rollout.diagonal(dim1=1, dim2=2) >= residual**3 - 1e-6).all()


@pytest.mark.parametrize("residual", [0.5, 0.0])
def test_a_row_that_sees_nothing_keeps_itself(residual: float) -> None:
    model = bert()
    with tap(model) as calls, torch.no_grad():
        model(**text(6))
    mask = torch.ones(1, 4, 6, 6, dtype=torch.bool)
    mask[:, :, 2] = False  # in no head
    mask[:, :2, 4] = False  # in half of them
    masked = [dataclasses.replace(call, attn_mask=mask) for call in calls]
    rollout = rollout_of_calls(masked, residual=residual)
    torch.testing.assert_close(rollout.sum(-1), torch.ones(1, 6))
    assert rollout[0, 2].tolist() == pytest.approx([0, 0, 1, 0, 0, 0])
    if residual:
        expected = dense_rollout_of(masked)
        torch.testing.assert_close(rollout.double(), expected, rtol=0, atol=1e-6)


def test_the_last_layers_alone_and_many_queries() -> None:
    # More queries than a head has dimensions, so that they go in several passes.
    model, inputs = bert(), text(29)
    with tap(model) as calls, torch.no_grad():
        model(**inputs)
    late = rollout_of_calls(calls[1:])
    assert late.shape[1] > calls[0].query.shape[-1]
    torch.testing.assert_close(late.double(), dense_rollout_of(calls[1:]), rtol=0, atol=1e-6)


def test_the_model_is_as_it_was() -> None:
    model = bert().train()
    model.encoder.layer[1].eval()
    before = {name: module.training for name, module in model.named_modules()}
    inputs = text(8)
    first = attention_rollout(model, inputs)
    assert {name: module.training for name, module in model.named_modules()} == before
    torch.testing.assert_close(attention_rollout(model, inputs), first)  # so without dropout
    assert not first.requires_grad
    assert not any(module._forward_hooks for module in model.modules())


def test_shared_layers_count_once_for_each_call() -> None:
    config = AlbertConfig(**SMALL, embedding_size=16, vocab_size=50, initializer_range=0.4)
    model, inputs = AlbertModel(config).eval(), text(7)
    rollout = attention_rollout(model, inputs)
    expected = dense_rollout(model, inputs, torch.float32)
    torch.testing.assert_close(rollout.double(), expected, rtol=0, atol=2e-6)


BAD_ARGUMENTS = {
    "head_fusion": {"head_fusion": "max"},
    "residual": {"residual": 1.0},
    "queries": {"queries": 7},
    "queries: expected an index": {"queries": torch.zeros(3, 1, dtype=torch.long)},
    "queries: expected an index, a list of indices, or integers": {"queries": [0.5]},
}


@pytest.mark.parametrize("message", BAD_ARGUMENTS)
def test_bad_arguments_are_named(message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        attention_rollout(bert(), text(7), **BAD_ARGUMENTS[message])


def test_models_without_a_rollout_are_refused_in_words() -> None:
    t5 = T5Model(T5Config(vocab_size=50, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4))
    ids = torch.randint(0, 50, (1, 6))
    with pytest.raises(
        ValueError, match=r"expected (self-attention|one stack).*get_encoder\(\)|one"
    ):
        attention_rollout(t5, {"input_ids": ids, "decoder_input_ids": ids})
    towers = CLIPModel(
        CLIPConfig(
            text_config=SMALL | {"vocab_size": 50, "max_position_embeddings": 12},
            vision_config=SMALL | {"image_size": 24, "patch_size": 8},
        )
    )
    image = torch.randn(1, 3, 24, 24)
    for tokens in (6, 10):  # 10 is as long as the image
        with pytest.raises(ValueError, match=r"rollout_of_calls"):
            attention_rollout(
                towers, {"input_ids": torch.randint(0, 50, (1, tokens)), "pixel_values": image}
            )
    vision = attention_rollout(towers.vision_model, {"pixel_values": image}, queries=0)
    assert vision.shape == (1, 1, 10)
    with pytest.raises(ValueError, match="at least one"):
        rollout_of_calls([])
