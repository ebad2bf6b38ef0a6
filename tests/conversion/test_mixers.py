"""Mixers in real models: what they compute, and that everything goes on working."""

import copy
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

import attending as at
from attending.conversion.mixers import (
    convert_mixers,
    frozen_stream,
    load_mixers,
    skipped_mixers,
    standard_layers,
)
from attending.nn.gated_mlp import GatedMLP, matched_width

GOLDEN = Path(__file__).parents[1] / "golden" / "deconstructing-attention" / "variants.npz"
FAMILIES = ["llama", "qwen3", "gpt2", "gpt_neox"]
STREAMS = ["random_qk", "fixed_qk"]
VARIANTS = ["mlp", "taylor", "nonapprox", "random_qk", "fixed_qk", "static_qk"]
COMMON = {"vocab_size": 32, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}


def build(family: str, layers: int = 2, **changes: object) -> nn.Module:
    if family == "gpt2":
        sizes = {"n_embd": 32, "n_layer": layers, "n_head": 4, "n_positions": 64}
        sizes |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    else:
        sizes = {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
        }
    if family in ("llama", "qwen3"):
        sizes |= {"num_key_value_heads": 2}
    if family == "qwen3":
        sizes |= {"head_dim": 8}
    config_class = {
        "llama": transformers.LlamaConfig,
        "qwen3": transformers.Qwen3Config,
        "gpt2": transformers.GPT2Config,
        "gpt_neox": transformers.GPTNeoXConfig,
    }[family]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        config_class(**{**COMMON, **sizes, **changes})
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.mul_(6.0 if "embed" not in name and "wte" not in name else 20.0)
    return model.eval()


def converted(family: str, variant: str, **options: object) -> nn.Module:
    if variant == "fixed_qk":
        options["token_ids"] = tokens(1, 40)[0]
    model = build(family, **options.pop("model", {}))
    model = convert_mixers(model, variant, **options)
    if variant == "mlp":  # as wide awake as the rest
        for module in model.modules():
            if isinstance(module, GatedMLP):
                for parameter in module.parameters():
                    parameter.data.mul_(6.0)
    return model


def tokens(batch: int, length: int, seed: int = 1) -> Tensor:
    return torch.randint(2, 32, (batch, length), generator=torch.Generator().manual_seed(seed))


def mixers(model: nn.Module) -> list[nn.Module]:
    return [one for one in model.modules() if type(one).__name__ in ("AttentionMixer", "MLPMixer")]


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_the_standard_mixer_is_the_attention_of_the_model(family, implementation):
    model, ids = build(family), tokens(2, 10)
    model.set_attn_implementation(implementation)
    mask = torch.ones_like(ids)
    mask[0, 7:] = 0
    expected = model(ids, attention_mask=mask).logits
    names = set(model.state_dict())
    convert_mixers(model, "standard", layout="uniform")
    assert len(mixers(model)) == 2
    assert set(model.state_dict()) == names
    ours = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(ours[mask.bool()], expected[mask.bool()], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_training_lowers_the_loss_and_the_future_does_not_leak(family, variant):
    model, ids = converted(family, variant), tokens(4, 12)
    with torch.no_grad():
        changed = ids.clone()
        changed[:, 8:] = tokens(4, 4, seed=9)
        first, second = model(ids).logits, model(changed).logits
        torch.testing.assert_close(first[:, :8], second[:, :8], atol=1e-4, rtol=1e-4)
        assert not torch.allclose(first[:, 8:], second[:, 8:], atol=1e-2)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(10):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
    used = {name for name, p in model.named_parameters() if p.grad is not None}
    assert used == {name for name, _ in model.named_parameters()}


@torch.no_grad()
@pytest.mark.parametrize("variant", [*VARIANTS, "standard", "taylor_per_order"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_decoding_with_a_cache_is_decoding_without(family, variant):
    model = converted(family, variant)
    ids = tokens(2, 8)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0  # on the left, as for generation
    call = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
    plain = model.generate(**call, use_cache=False)
    assert torch.equal(model.generate(**call), plain)
    if family == "llama":
        static = model.generate(**call, cache_implementation="static")
        assert torch.equal(static, plain)
    step = model(ids[:, :5], use_cache=True)
    rest = model(ids[:, 5:], cache=step.cache).logits
    torch.testing.assert_close(rest, model(ids).logits[:, 5:], atol=2e-3, rtol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_padding_changes_nothing(variant, side):
    model = converted("llama", variant)
    ids, lengths = tokens(3, 12), [12, 7, 1]
    mask = torch.zeros_like(ids)
    alone = []
    for row, length in enumerate(lengths):
        here = slice(0, length) if side == "right" else slice(12 - length, 12)
        mask[row, here] = 1
        alone.append((here, model(ids[row : row + 1, here]).logits[0]))
    # No position_ids: the rotation is relative, and the mixers find the places in the mask.
    together = model(ids, attention_mask=mask).logits
    for row, (here, expected) in enumerate(alone):
        torch.testing.assert_close(together[row, here], expected, atol=2e-3, rtol=1e-3)


# What each variant is


@torch.no_grad()
def test_without_mixing_a_token_is_alone():
    """Uniform MLP: the output at a place depends on its token and on nothing else."""
    model = converted("llama", "mlp", layout="uniform")
    ids = tokens(1, 12)
    logits = model(ids).logits[0]
    for place in range(12):
        alone = model(ids[:, place : place + 1]).logits[0, 0]
        torch.testing.assert_close(logits[place], alone, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("variant", [*STREAMS, "static_qk", "standard"])
def test_which_maps_depend_on_the_input(variant):
    model = converted("llama", variant, layout="uniform", model={"num_key_value_heads": 4})
    maps = []
    for seed in (1, 2):
        with frozen_stream(model) if variant in STREAMS else nullcontext(), at.tap(model) as calls:
            model(tokens(1, 9, seed=seed))
        assert len(calls) == 2
        scores = [call.query @ call.key.transpose(-1, -2) for call in calls]
        maps.append(torch.stack(scores).tril())
    assert torch.allclose(*maps, atol=1e-6) == (variant in STREAMS)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_static_queries_and_keys_are_standard_in_the_first_layer_alone(family):
    ids, standard = tokens(2, 9), build(family)
    for layout, same in (([1], True), ([0], False)):  # layers that stay standard
        model = converted(family, "static_qk", layout=layout)
        assert torch.allclose(model(ids).logits, standard(ids).logits, atol=1e-4) == same


@torch.no_grad()
@pytest.mark.parametrize("variant", STREAMS)
def test_the_stream_is_the_model_on_the_fixed_sequence(variant):
    """On the fixed sequence itself, queries and keys are the model's own: standard attention."""
    model, standard = converted("llama", variant), build("llama")
    if variant == "fixed_qk":
        ids = tokens(1, 40)
        torch.testing.assert_close(model(ids).logits, standard(ids).logits, atol=1e-4, rtol=1e-4)
    else:
        noise = model.model.mixer_source.noise
        assert noise.shape == (64, 32)
        assert float(noise.std()) == pytest.approx(0.02, rel=0.1)
        torch.testing.assert_close(
            model(inputs_embeds=noise[None]).logits,
            standard(inputs_embeds=noise[None]).logits,
            atol=1e-4,
            rtol=1e-4,
        )


@torch.no_grad()
def test_golden_queries_and_keys_from_elsewhere():
    """One Llama layer without norm and rotation: the card's static and fixed variants."""
    with np.load(GOLDEN) as arrays:
        golden = {name: torch.from_numpy(arrays[name]) for name in arrays}
    config = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
    )
    for variant in ("static_qk", "random_qk"):
        model = transformers.LlamaForCausalLM(config).double()
        convert_mixers(model, variant, layout="uniform")
        source = model.model.mixer_source
        mixer = model.model.layers[0].self_attn
        mixer._shared = (nn.Identity(), source)
        mixer.o_proj = nn.Identity()
        for name in "qkv":
            getattr(mixer, f"{name}_proj").weight.copy_(golden[f"w_{name}"].T)
        still = torch.ones(1, 7, 4).double(), torch.zeros(1, 7, 4).double()
        source.embedding = golden["src_static_embed"]
        if variant == "random_qk":
            source.recording = True
            stream = golden["src_fixed_stream"][:, :7]
            mixer(stream, position_embeddings=still)
            source.recording = False
        output, _ = mixer(golden["src_hidden"], position_embeddings=still)
        expected = golden["static_qk_out" if variant == "static_qk" else "fixed_qk_out"]
        torch.testing.assert_close(
            output, expected.transpose(1, 2).flatten(2), atol=1e-10, rtol=1e-10
        )


def test_golden_mlp():
    with np.load(GOLDEN) as arrays:
        hidden, gate, up, down, expected = (
            torch.from_numpy(arrays[f"mlp_{name}"]) for name in ("h", "wg", "wu", "wd", "out")
        )
    mlp = GatedMLP(8, 11, dtype=torch.float64)
    mlp.gate.weight.data, mlp.up.weight.data, mlp.down.weight.data = gate.T, up.T, down.T
    torch.testing.assert_close(mlp(hidden), expected, atol=1e-10, rtol=1e-10)
    assert matched_width(4 * 96 * 96, 96) == 4 * 96 // 3
    with pytest.raises(ValueError, match="dim, hidden_dim: expected"):
        GatedMLP(8, 0)


@torch.no_grad()
def test_rotation_cancels_in_the_nonapproximate_form():
    """Other rotary frequencies change nothing, as in a model without any."""
    ids = tokens(2, 9)
    outputs = [
        converted(
            "llama",
            "nonapprox",
            layout="uniform",
            model={"rope_parameters": {"rope_type": "default", "rope_theta": theta}},
        )(ids).logits
        for theta in (10.0, 10000.0)
    ]
    torch.testing.assert_close(*outputs)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama"])
def test_the_number_of_parameters_is_kept(family):
    size = build(family).num_parameters()
    for variant in VARIANTS:
        changed = converted(family, variant, layout="uniform").num_parameters()
        assert changed == size if variant != "mlp" else abs(changed / size - 1) < 0.02


# Layouts


def test_layouts_are_those_of_the_table():
    """Table 11, counted from 1, of 24 layers."""
    table = {
        "uniform": set(),
        "even": set(range(2, 25, 2)),
        "odd": set(range(1, 24, 2)),
        "top": set(range(1, 13)),
        "middle": {*range(1, 7), *range(19, 25)},
        "bottom": set(range(13, 25)),
        "quarter": {4, 8, 12, 16, 20, 24},
        "first": {1},
        "last": {24},
        "bilateral": {1, 24},
    }
    for layout, expected in table.items():
        assert {layer + 1 for layer in standard_layers(layout, 24)} == expected
    assert standard_layers("bilateral", 1) == (0,)


def test_a_layout_chooses_the_layers():
    model = build("llama", layers=4)
    convert_mixers(model, "nonapprox", layout="last")
    kinds = [type(layer.self_attn).__name__ for layer in model.model.layers]
    assert kinds == ["AttentionMixer"] * 3 + ["LlamaAttention"]


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_skipping_leaves_out_blocks_or_mixers(family):
    model, ids = converted(family, "static_qk", layout=[1]), tokens(2, 9)
    before = model(ids).logits
    shorter = copy.deepcopy(model)
    body = shorter.base_model
    blocks = body.h if family == "gpt2" else body.layers
    del blocks[0]
    with skipped_mixers(model):
        torch.testing.assert_close(model(ids).logits, shorter(ids).logits)
    with skipped_mixers(model, "mixer"):
        assert not torch.allclose(model(ids).logits, shorter(ids).logits, atol=1e-3)
    assert torch.equal(model(ids).logits, before)


# Saving, copying, freezing


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_saving_and_loading(variant, tmp_path):
    model, ids = converted("llama", variant), tokens(2, 9)
    expected = model(ids).logits
    model.save_pretrained(tmp_path)
    back = load_mixers(tmp_path)
    torch.testing.assert_close(back(ids).logits, expected)
    again = copy.deepcopy(model)
    model.model.embed_tokens.weight.mul_(2.0)  # the copy has parts of its own
    torch.testing.assert_close(again(ids).logits, expected)


def test_a_model_can_be_copied_after_a_forward_with_gradients():
    for variant in ("static_qk", "random_qk"):
        model = converted("llama", variant)
        expected = model(tokens(2, 9)).logits
        torch.testing.assert_close(copy.deepcopy(model)(tokens(2, 9)).logits, expected)


@torch.no_grad()
@pytest.mark.parametrize("variant", STREAMS)
def test_a_frozen_stream_gives_the_same_and_runs_once(variant, monkeypatch):
    model, ids = converted("llama", variant), tokens(2, 9)
    expected = model(ids).logits
    call = {"input_ids": ids, "max_new_tokens": 4, "do_sample": False}
    answer = model.generate(**call)
    source = model.model.mixer_source
    runs, run = [], source._run
    monkeypatch.setattr(source, "_run", lambda *args: (runs.append(args), run(*args)))
    with frozen_stream(model):
        torch.testing.assert_close(model(ids).logits, expected, atol=1e-4, rtol=1e-4)
        assert torch.equal(model.generate(**call), answer)
    assert len(runs) == 1
    torch.testing.assert_close(model(ids).logits, expected)
    assert len(runs) == 2


def test_static_mixers_train_under_gradient_checkpointing_and_streams_refuse_it():
    ids = tokens(2, 9)
    grads = []
    for checkpointing in (False, True):
        model = converted("llama", "static_qk").train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        model(ids, labels=ids).loss.backward()
        grads.append([p.grad for p in model.parameters()])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)
    model = converted("llama", "random_qk").train()
    model.activation_checkpointing_enable({"use_reentrant": False})
    with pytest.raises(ValueError, match="expected no gradient checkpointing"):
        model(ids)


@pytest.mark.parametrize("variant", VARIANTS)
def test_bf16_autocast(variant):
    model, ids = converted("llama", variant), tokens(2, 9)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(ids, labels=ids).loss
    loss.backward()
    exact = model(ids, labels=ids).loss
    assert abs(float(loss.detach()) - float(exact.detach())) < 0.05 * float(exact.detach())


# Refusals


def test_wrong_arguments_change_nothing():
    model = build("llama")
    wrong = [
        ({"variant": "linear"}, "variant: expected one of"),
        ({"variant": "mlp", "layout": "sides"}, "layout: expected one of"),
        ({"variant": "mlp", "layout": [2]}, "layout: expected layers from 0 to 1"),
        ({"variant": "mlp", "layout": [0, 1]}, "layout: expected one that replaces"),
        ({"variant": "fixed_qk"}, "token_ids: expected"),
        ({"variant": "fixed_qk", "token_ids": torch.rand(3)}, "token_ids: expected a row"),
        ({"variant": "mlp", "token_ids": torch.zeros(3).long()}, "token_ids: expected with"),
        ({"variant": "mlp", "max_length": 3}, "max_length, noise_std: expected only"),
        ({"variant": "random_qk", "max_length": 65}, "expected from 1 to 64"),
        ({"variant": "random_qk", "noise_std": 0.0}, "and more than 0"),
    ]
    for arguments, message in wrong:
        with pytest.raises(ValueError, match=message):
            convert_mixers(model, **arguments)
    assert not mixers(model)
    with pytest.raises(ValueError, match="expected one with mixers"), skipped_mixers(model):
        pass
    with pytest.raises(ValueError, match="random_qk or fixed_qk"), frozen_stream(model):
        pass
    convert_mixers(model, "mlp", layout=[0])
    with pytest.raises(ValueError, match="not converted before"):
        convert_mixers(model, "mlp", layout=[1])
    with pytest.raises(ValueError, match="what: expected"), skipped_mixers(model, "all"):
        pass


def test_other_models_and_longer_inputs_are_refused(tmp_path):
    with pytest.raises(ValueError, match="got Linear"):
        convert_mixers(nn.Linear(2, 2), "mlp")
    gemma = transformers.Gemma2Config(
        **COMMON,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
    )
    with pytest.raises(ValueError, match="got Gemma2Attention in layer 0"):
        convert_mixers(transformers.Gemma2ForCausalLM(gemma), "mlp")
    model = converted("llama", "random_qk", max_length=8)
    with pytest.raises(ValueError, match=r"at most 8 tokens.*got 9"):
        model(tokens(1, 9))
    build("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="expected a model of convert_mixers"):
        load_mixers(tmp_path)


def test_taylor_and_dropout_on_the_map():
    model = converted("llama", "taylor", model={"attention_dropout": 0.25}).train()
    with pytest.raises(ValueError, match="taylor in AttentionMixer of layer 0: it has no dropout"):
        model(tokens(1, 9))
    converted("llama", "static_qk", model={"attention_dropout": 0.25}).train()(tokens(1, 9))
