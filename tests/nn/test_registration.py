"""Operators as attention implementations of transformers, in real models."""

import copy
import inspect
import subprocess
import sys

import pytest
import torch
import transformers
from torch import Tensor, nn

import attending as at
from attending.core.state import biased_attention_state
from attending.nn._attention_adapter import Adapter, Operator
from attending.nn.combiner_plans import FixedPlan
from attending.nn.registration import OPERATORS, load_operator

LENGTH = 16
# Options for those operators that need some. Every row of the table is tested.
OPTIONS: dict[str, dict[str, object]] = {
    "sigmoid": {"key_length": LENGTH},
    "combiner": {"plan": FixedPlan(4)},
    "hierarchical": {"tree": (3,)},
    "doubly-stochastic": {"normalizer": "birkhoff"},
}
NAMES = sorted(OPERATORS)
CAUSAL = [name for name in NAMES if OPERATORS[name].causal]
BOTH_WAYS = [name for name in NAMES if OPERATORS[name].bidirectional]


def register(name: str) -> str:
    return at.register_attention(name, options=OPTIONS.get(name))


def llama(implementation: str, **changes: object) -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
        **changes,
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation=implementation
    )
    return wide_awake(model)


def bert(implementation: str, **changes: object) -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        hidden_dropout_prob=0.0,
        **{"attention_probs_dropout_prob": 0.0, **changes},
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForMaskedLM.from_config(
        config, attn_implementation=implementation
    )
    return wide_awake(model)


def vit(implementation: str) -> nn.Module:
    config = transformers.ViTConfig(
        image_size=12,
        patch_size=4,
        num_channels=1,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=4,
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForImageClassification.from_config(
        config, attn_implementation=implementation
    )
    return wide_awake(model)


def wide_awake(model: nn.Module) -> nn.Module:
    """With queries and keys large enough that attention is no mean."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "embed" not in name:
                parameter.mul_(6.0)
    return model


def tokens(batch: int = 4, length: int = LENGTH) -> Tensor:
    return torch.randint(2, 32, (batch, length), generator=torch.Generator().manual_seed(1))


def train(model: nn.Module, batch: dict[str, Tensor], steps: int = 8) -> tuple[float, float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    model.train()
    for _ in range(steps):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    model.eval()
    return losses[0], losses[-1]


# Every operator, in three architectures


@pytest.mark.parametrize("name", CAUSAL)
def test_a_llama_trains_and_comes_back_from_disk(name, tmp_path):
    implementation = register(name)
    model = llama(implementation)
    ids = tokens()
    mask = torch.ones_like(ids)
    mask[0, 11:] = 0
    before, after = train(model, {"input_ids": ids, "attention_mask": mask, "labels": ids})
    assert after < 0.9 * before
    model.save_pretrained(tmp_path)
    back = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation=implementation
    )
    assert back.config._attn_implementation == implementation
    with torch.no_grad():
        torch.testing.assert_close(back(ids).logits, model(ids).logits)


@pytest.mark.parametrize("name", BOTH_WAYS)
def test_a_bert_trains(name):
    model = bert(register(name))
    ids = tokens()
    mask = torch.ones_like(ids)
    mask[0, 11:] = 0
    before, after = train(model, {"input_ids": ids, "attention_mask": mask, "labels": ids})
    assert after < 0.9 * before


@pytest.mark.parametrize("name", BOTH_WAYS)
def test_a_vit_trains(name):
    images = torch.randn(8, 1, 12, 12, generator=torch.Generator().manual_seed(2))
    labels = torch.arange(8) % 4
    before, after = train(vit(register(name)), {"pixel_values": images, "labels": labels}, 12)
    assert after < 0.9 * before


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", CAUSAL)
def test_padding_does_not_change_a_causal_sequence(name, side):
    model = llama(register(name)).eval()
    assert_padding_is_nothing(model, side, needs_positions=True)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", BOTH_WAYS)
def test_padding_does_not_change_a_bidirectional_sequence(name, side):
    model = bert(register(name)).eval()
    assert_padding_is_nothing(model, side, needs_positions=True)


@torch.no_grad()
def assert_padding_is_nothing(model: nn.Module, side: str, needs_positions: bool) -> None:
    ids, lengths = tokens(3), [16, 9, 1]
    mask, places = torch.zeros_like(ids), torch.zeros_like(ids)
    alone = []
    for row, length in enumerate(lengths):
        here = slice(0, length) if side == "right" else slice(LENGTH - length, LENGTH)
        mask[row, here], places[row, here] = 1, torch.arange(length)
        alone.append((here, model(ids[row : row + 1, here]).logits[0]))
    together = model(ids, attention_mask=mask, position_ids=places).logits
    for row, (here, expected) in enumerate(alone):
        torch.testing.assert_close(together[row, here], expected, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("name", CAUSAL)
def test_the_future_does_not_leak(name):
    model = llama(register(name)).eval()
    ids = tokens(2)
    changed = ids.clone()
    changed[:, 10:] = tokens(2, 32)[:, 20:26]
    with torch.no_grad():
        first, second = model(ids).logits, model(changed).logits
    torch.testing.assert_close(first[:, :10], second[:, :10], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(first[:, 10:], second[:, 10:], atol=1e-2)


@pytest.mark.parametrize("name", CAUSAL)
def test_generation_with_a_cache_is_that_without_or_is_refused(name):
    model = llama(register(name)).eval()
    ids = tokens(2, 8)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    call = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
    plain = model.generate(**call, use_cache=False)
    assert plain.shape == (2, 13)
    if not OPERATORS[name].decodes:
        with pytest.raises(ValueError, match=f"{name} in LlamaAttention of layer 0.*use_cache"):
            model.generate(**call)
        return
    assert torch.equal(model.generate(**call), plain)
    assert torch.equal(model.generate(**call, cache_implementation="static"), plain)


@pytest.mark.parametrize("name", CAUSAL)
def test_llama_under_bf16_autocast(name):
    model = llama(register(name))
    ids = tokens()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    exact = model(input_ids=ids, labels=ids).loss
    assert abs(float(loss.detach()) - float(exact.detach())) < 0.1
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("name", BOTH_WAYS)
def test_bert_under_bf16_autocast(name):
    model = bert(register(name))
    ids = tokens()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    exact = model(input_ids=ids, labels=ids).loss
    assert abs(float(loss.detach()) - float(exact.detach())) < 0.1


@pytest.mark.parametrize("name", NAMES)
def test_the_table_fits_the_function(name):
    operator, parameters = OPERATORS[name], inspect.signature(load_operator(name)).parameters
    assert ("is_causal" in parameters) or not (operator.causal and operator.bidirectional)
    assert ("attn_mask" in parameters) == (operator.masks != "none")
    assert list(parameters)[:3] == ["query", "key", "value"]


# The adapter against sdpa


@pytest.mark.parametrize("build", [llama, bert])
@pytest.mark.parametrize("padded", [False, True])
def test_softmax_is_sdpa(build, padded):
    ids = tokens()
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :5] = 0
        mask[1, 9:] = 0
    ours, theirs = build(register("softmax")).eval(), build("sdpa").eval()
    results = [model(ids, attention_mask=mask).logits for model in (ours, theirs)]
    real = mask.bool()
    torch.testing.assert_close(results[0][real], results[1][real], atol=1e-4, rtol=1e-4)
    for logits in results:
        logits[real].square().mean().backward()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert (mine.grad is None) == (other.grad is None)
        if mine.grad is not None:
            torch.testing.assert_close(mine.grad, other.grad, atol=1e-3, rtol=1e-3)


@pytest.mark.slow
def test_inference_mode_and_compilation():
    model, ids = llama(register("nonapprox")).eval(), tokens()
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits
        compiled = torch.compile(model, backend="eager")
        torch.testing.assert_close(compiled(ids, attention_mask=mask).logits, expected)
    with torch.inference_mode():
        torch.testing.assert_close(model(ids, attention_mask=mask).logits, expected)


def test_a_mask_is_read_again_when_it_was_changed():
    """The parts of a mask are kept from layer to layer, and only as long as it is the same."""
    attend, layer = adapter("keys"), nn.Identity()
    query, key, value = torch.randn(3, 1, 2, 4, 8).unbind(0)
    mask = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    first, _ = attend(layer, query, key, value, mask, is_causal=False)
    mask[..., 2] = False
    second, _ = attend(layer, query, key, value, mask, is_causal=False)
    expected, _ = adapter("keys")(layer, query, key, value, mask.clone(), is_causal=False)
    torch.testing.assert_close(second, expected)
    assert not torch.allclose(first, second)


@torch.no_grad()
def test_softmax_is_sdpa_in_a_sliding_window():
    config = transformers.MistralConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=5,
    )
    results = []
    for implementation in (register("softmax"), "sdpa"):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(
            copy.deepcopy(config), attn_implementation=implementation
        ).eval()
        results.append(wide_awake(model)(tokens()).logits)
    torch.testing.assert_close(*results, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_softmax_is_sdpa_in_an_encoder_and_decoder():
    config = transformers.BartConfig(
        vocab_size=32,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_position_embeddings=64,
    )
    mask = torch.ones(4, LENGTH, dtype=torch.long)
    mask[0, 9:] = 0
    results = []
    for implementation in (register("softmax"), "sdpa"):
        torch.manual_seed(0)
        model = transformers.AutoModelForSeq2SeqLM.from_config(
            copy.deepcopy(config), attn_implementation=implementation
        ).eval()
        inputs = {"decoder_input_ids": tokens(4, 7), "attention_mask": mask}
        results.append(wide_awake(model)(tokens(), **inputs).logits)
    torch.testing.assert_close(*results, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_the_implementation_of_a_model_can_be_changed():
    model = llama("sdpa").eval()
    expected = model(tokens()).logits
    model.set_attn_implementation(register("softmax-off-by-one"))
    assert not torch.allclose(model(tokens()).logits, expected, atol=1e-2)
    model.set_attn_implementation(register("softmax"))
    torch.testing.assert_close(model(tokens()).logits, expected, atol=1e-4, rtol=1e-4)


# Operators that can do less, with functions for which the right answer is known


def softmax_with_key_mask(query, key, value, *, attn_mask=None, is_causal=False, scale=None):
    """Softmax attention for adapters with `masks="keys"`: padding beside `is_causal`."""
    assert query.shape[1] == key.shape[1]
    bias = None
    if attn_mask is not None:
        assert attn_mask.dtype == torch.bool
        assert attn_mask.shape == (query.shape[0], 1, 1, key.shape[2])
        bias = torch.zeros(attn_mask.shape).masked_fill(~attn_mask, -torch.inf)[:, 0]
    state = biased_attention_state(
        query, key, value, key_bias=bias, is_causal=is_causal, scale=scale
    )
    return state.output


def softmax_without_mask(query, key, value, *, is_causal=False, scale=None):
    return softmax_with_key_mask(query, key, value, is_causal=is_causal, scale=scale)


def adapter(masks, decodes=False, **changes):
    function = softmax_without_mask if masks == "none" else softmax_with_key_mask
    operator = Operator("tests", masks=masks, decodes=decodes, **changes)
    return Adapter("mine", operator, function, {})


@pytest.fixture
def mine():
    """Registers an adapter as `attending:mine` for a test."""
    name = "attending:mine"

    def add(adapter):
        transformers.AttentionInterface.register(name, adapter)
        transformers.AttentionMaskInterface.register(name, transformers.masking_utils.sdpa_mask)
        return name

    yield add
    for interface in (transformers.AttentionInterface, transformers.AttentionMaskInterface):
        interface._global_mapping.pop(name, None)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("masks", ["keys", "none"])
@pytest.mark.parametrize("build", [llama, bert])
def test_padding_and_causality_are_told_apart(mine, masks, build, side):
    model, expected = build(mine(adapter(masks))).eval(), build("sdpa").eval()
    ids = tokens()
    mask = torch.ones_like(ids)
    for row, padding in enumerate([0, 3, 15, 7]):
        mask[row, LENGTH - padding :] = 0
    if side == "left":
        mask = mask.flip(1)
    real = mask.bool()
    torch.testing.assert_close(
        model(ids, attention_mask=mask).logits[real],
        expected(ids, attention_mask=mask).logits[real],
        atol=1e-4,
        rtol=1e-4,
    )


@pytest.mark.parametrize("masks", ["keys", "none"])
@pytest.mark.parametrize("static", [False, True])
def test_decoding_without_masks_of_any_kind(mine, masks, static):
    ids = tokens(2, 8)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    call = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
    if static:
        call["cache_implementation"] = "static"
    model = llama(mine(adapter(masks, decodes=True))).eval()
    assert torch.equal(model.generate(**call), llama("sdpa").eval().generate(**call))


def test_refusals_name_the_layer_and_the_reason(mine):
    ids = tokens()

    def refused(adapter, build, match, batch=None, **changes):
        model = build(mine(adapter), **changes)
        with pytest.raises(ValueError, match=match):
            model(**(batch or {"input_ids": ids}))

    llama_layer, bert_layer = "mine in LlamaAttention of layer 0: ", "mine in BertSelfAttention"
    refused(adapter("keys", causal=False), llama, llama_layer + "it has no causal form")
    refused(adapter("keys", bidirectional=False), bert, bert_layer + ".*only a causal form")
    window = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril().triu(-3)[None, None]
    batch = {"input_ids": ids, "attention_mask": window}
    refused(adapter("keys"), llama, llama_layer + "it takes no mask but padding", batch)
    refused(adapter("none"), llama, llama_layer + "it takes no mask but padding", batch)
    refused(adapter("any"), llama, "no dropout.*asks for 0.25", attention_dropout=0.25)
    refused(adapter("any"), bert, "no dropout.*asks for 0.25", attention_probs_dropout_prob=0.25)
    model = llama(mine(adapter("keys", decodes=True))).eval()
    first = model(ids[:, :8], use_cache=True)
    with pytest.raises(ValueError, match="one token at a time, and got 8 queries for 16 keys"):
        model(ids[:, 8:], past_key_values=first.past_key_values)


def test_arguments_that_would_change_the_result_are_refused():
    layer, tensor = nn.Identity(), torch.randn(1, 2, 4, 8)
    for argument in ({"softcap": 30.0}, {"position_bias": tensor}, {"s_aux": tensor}):
        with pytest.raises(ValueError, match=f"mine in Identity: .*{next(iter(argument))}"):
            adapter("any")(layer, tensor, tensor, tensor, None, **argument)
    with pytest.raises(ValueError, match="returns no map"):
        adapter("any")(layer, tensor, tensor, tensor, None, output_attentions=True)
    short = tensor[:, :, :3]
    with pytest.raises(ValueError, match="no form for cross-attention, and got 4 queries for 3"):
        adapter("any")(layer, tensor, short, short, None, is_causal=False)
    with pytest.raises(ValueError, match="cross: expected False"):
        Operator("tests", masks="none", cross=True)


# Registration


def test_registering_again_changes_nothing_and_other_options_need_another_name():
    name = register("sigmoid")
    assert name == "attending:sigmoid" == register("sigmoid")
    with pytest.raises(ValueError, match=r"already registered.*as_="):
        at.register_attention("sigmoid", options={"key_length": 99})
    other = at.register_attention("sigmoid", options={"key_length": 99}, as_="sigmoid-99")
    assert other == "attending:sigmoid-99"
    with torch.no_grad():
        first, second = llama(name).eval()(tokens()), llama(other).eval()(tokens())
    assert not torch.allclose(first.logits, second.logits, atol=1e-2)


def test_wrong_arguments_of_registration():
    with pytest.raises(ValueError, match="name: expected one of"):
        at.register_attention("hardmax")
    with pytest.raises(ValueError, match="options: 'sigmoid' needs 'key_length'"):
        at.register_attention("sigmoid")
    with pytest.raises(ValueError, match=r"options: 'softmax' has the options none, got 'scale'"):
        at.register_attention("softmax", options={"scale": 1.0})
    for wrong in ("attending:x", "A", "flash", "my-sdpa", ""):
        with pytest.raises(ValueError, match="as_: expected"):
            at.register_attention("softmax", as_=wrong)


def test_importing_registers_nothing():
    """Without transformers nothing can have been written to its tables."""
    code = (
        "import sys, attending as at, attending.nn.registration; at.register_attention; "
        "assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
