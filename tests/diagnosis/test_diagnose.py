"""The diagnosis of real models: padding, batches, every kind of model, errors."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import attending as at
from attending.diagnosis import LayerRecord
from attending.diagnosis.record import STATISTICS
from tests.tap.diffusion_models import DIFFUSION
from tests.tap.models import LANGUAGE, Example, bert, gpt2, llama_model, t5_model, tokens


class Words:
    """A tokenizer of 40 words: what `diagnose` asks of one."""

    all_special_ids = (3,)

    def convert_ids_to_tokens(self, ids: int) -> str:
        return self.decode([ids])

    def decode(self, token_ids: list[int], **kwargs: Any) -> str:
        word = token_ids[0]
        return "<s>" if word == 3 else "." if word == 4 else "\n" if word == 5 else f" w{word}"


def randomized(model: nn.Module) -> nn.Module:
    """With weights so large that the maps are not uniform."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return model


def same(one: list[LayerRecord], other: list[LayerRecord], tolerance: float = 1e-4) -> None:
    assert [layer.name for layer in one] == [layer.name for layer in other]
    for a, b in zip(one, other, strict=True):
        assert a.statistics.keys() == b.statistics.keys()
        for name in a.statistics:
            assert a.statistics[name] == pytest.approx(b.statistics[name], abs=tolerance), name
        assert a.class_mass.keys() == b.class_mass.keys()
        for name in a.class_mass:
            assert a.class_mass[name] == pytest.approx(b.class_mass[name], abs=tolerance), name
        torch.testing.assert_close(
            torch.tensor(a.pooled), torch.tensor(b.pooled), rtol=0, atol=tolerance
        )


@pytest.mark.parametrize("example", [*LANGUAGE, *DIFFUSION], ids=lambda one: one.__name__)
def test_every_architecture(example: Callable[[], Example]) -> None:
    """All attention modules are there, with statistics that can be."""
    made = example()
    diagnosis = at.diagnose(
        made.model, {}, forward=lambda model, batch: made.forward(), progress=False
    )
    names = [seen.name for seen in made.expected]
    assert [layer.name.partition("#")[0] for layer in diagnosis.layers] == names
    for layer, seen in zip(diagnosis.layers, made.expected, strict=True):
        assert layer.kind == ("cross" if seen.is_cross else "self")
        assert layer.layer == seen.layer
        assert layer.num_heads == seen.query[1]
        assert layer.head_dim == seen.query[3]
        assert layer.longest <= seen.key[2]
        for name, values in layer.statistics.items():
            low, high = STATISTICS[name].low, STATISTICS[name].high
            assert all(math.isfinite(value) for value in values)
            assert low is None or min(values) >= low - 1e-6
            assert high is None or max(values) <= high + 1e-6
        for head in layer.pooled:
            assert [sum(row) for row in head] == pytest.approx([1.0] * len(head), abs=1e-5)
    blocks = {block.name for block in diagnosis.hidden}
    for block in blocks:
        assert any(name.startswith(block) for name in names)
    assert len(blocks) >= 1
    assert diagnosis.parameters == sum(p.numel() for p in made.model.parameters())
    assert at.Diagnosis.from_json(diagnosis.to_json()).layers == diagnosis.layers


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["llama", "bert", "gpt2"])
def test_padding_is_left_out(kind: str, side: str) -> None:
    model = {
        "llama": llama_model,
        "bert": lambda: bert().model,
        "gpt2": lambda: gpt2().model,
    }[kind]()
    if kind == "gpt2":
        from transformers import GPT2Config, GPT2LMHeadModel

        model = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=32, n_layer=2, n_head=4)).eval()
    model = randomized(model)
    words = [tokens(1, 20)[0], tokens(1, 33)[0], tokens(1, 33).flip(1)[0, :9]]
    ids, mask = torch.zeros(3, 33).long(), torch.zeros(3, 33).long()
    for row, text in enumerate(words):
        place = slice(33 - len(text), 33) if side == "left" else slice(0, len(text))
        ids[row, place], mask[row, place] = text, 1
    position = (mask.cumsum(1) - 1).clamp_min(0)
    padded = {"input_ids": ids, "attention_mask": mask, "position_ids": position}
    options: dict[str, Any] = {"tokenizer": Words(), "map_size": 8, "progress": False}
    together = at.diagnose(model, padded, **options)
    alone = at.diagnose(model, [{"input_ids": text[None]} for text in words], **options)
    assert together.tokens == alone.tokens == 62
    assert together.sequences == alone.sequences == 3
    assert together.preview == alone.preview
    same(together.layers, alone.layers)
    assert together.layers[0].strong_keys.keys() == alone.layers[0].strong_keys.keys()
    for a, b in zip(together.hidden, alone.hidden, strict=True):
        assert a.token_similarity == pytest.approx(b.token_similarity, abs=1e-4)
        assert a.effective_rank == pytest.approx(b.effective_rank, rel=1e-3)
        assert a.max_abs == pytest.approx(b.max_abs, rel=1e-3)
        assert (a.max_token, a.max_channel) == (b.max_token, b.max_channel)


def test_padding_of_an_encoder_and_of_a_decoder() -> None:
    model = randomized(t5_model())
    source, target = tokens(2, 12), tokens(2, 9)
    source_mask, target_mask = torch.ones(2, 12).long(), torch.ones(2, 9).long()
    source_mask[1, 8:], target_mask[1, 5:] = 0, 0
    batch = {
        "input_ids": source, "attention_mask": source_mask, "decoder_input_ids": target,
        "decoder_attention_mask": target_mask,
    }  # fmt: skip
    alone = [
        {"input_ids": source[:1], "decoder_input_ids": target[:1]},
        {"input_ids": source[1:, :8], "decoder_input_ids": target[1:, :5]},
    ]
    options: dict[str, Any] = {"tokenizer": Words(), "map_size": 5, "progress": False}
    together = at.diagnose(model, batch, **options)
    same(together.layers, at.diagnose(model, alone, **options).layers)
    kinds = [(layer.kind, layer.is_causal) for layer in together.layers]
    assert ("cross", False) in kinds
    assert all(layer.class_mass for layer in together.layers)


def test_the_model_is_left_as_it_was() -> None:
    model = llama_model().train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    inputs = {"input_ids": tokens(2, 16)}
    before = [parameter.clone() for parameter in model.parameters()]
    diagnosis = at.diagnose(model, inputs, progress=False)
    assert [module.training for module in model.modules()] == modes
    assert all(not module._forward_hooks for module in model.modules())
    assert all(not module._forward_pre_hooks for module in model.modules())
    assert all(map(torch.equal, before, model.parameters()))
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.is_grad_enabled()
    again = at.diagnose(model.eval(), inputs, progress=False)
    assert again.to_rows() == diagnosis.to_rows()  # without dropout, and the same every time


def test_what_fails_in_the_model_leaves_no_trace() -> None:
    model = llama_model().train()
    with pytest.raises(IndexError):
        at.diagnose(model, {"input_ids": torch.full((1, 5), 999)}, progress=False)
    assert all(not module._forward_hooks for module in model.modules())
    assert model.training
    assert torch.is_grad_enabled()


def test_kinds_of_inputs_agree() -> None:
    model = llama_model()
    data = [{"input_ids": tokens(1, 16)[0] + i} for i in range(4)]
    options: dict[str, Any] = {"progress": False, "map_size": 8}
    expected = at.diagnose(
        model, {"input_ids": torch.stack([d["input_ids"] for d in data])}, **options
    )
    loader: Any = DataLoader(data, batch_size=2)  # type: ignore[arg-type]
    for inputs in (
        loader,
        (batch for batch in loader),
        [batch["input_ids"] for batch in loader],
        [(batch["input_ids"],) for batch in loader],
        [[batch["input_ids"]] for batch in loader],
    ):
        found = at.diagnose(model, inputs, **options)
        assert (found.sequences, found.tokens) == (4, 64)
        same(found.layers, expected.layers)
    first = at.diagnose(model, loader, max_batches=1, **options)
    assert first.sequences == 2


def test_text_needs_a_tokenizer() -> None:
    llama = at.zoo.load("llama-stdlib")
    text = "def attention(query, key, value):\n    return softmax(query @ key.T) @ value\n"
    found = at.diagnose(llama.model, text, tokenizer=llama.tokenizer, progress=False)
    inputs = llama.tokenizer(text, return_tensors="pt")
    same(
        found.layers,
        at.diagnose(llama.model, inputs, tokenizer=llama.tokenizer, progress=False).layers,
    )
    assert "".join(found.preview) == f"<|bos|>{text}"
    assert found.model == "llama-stdlib"
    several = at.diagnose(
        llama.model, [text, "import os"], tokenizer=llama.tokenizer, progress=False
    )
    assert several.sequences == 2
    assert several.tokens == found.tokens + len(llama.tokenizer("import os")["input_ids"])
    with pytest.raises(ValueError, match=r"inputs: expected batches.*tokenizer=tokenizer"):
        at.diagnose(llama.model, text)
    with pytest.raises(ValueError, match="empty one"):
        at.diagnose(llama.model, [text, " \n"], tokenizer=llama.tokenizer)


def test_token_classes() -> None:
    model, inputs = llama_model(), {"input_ids": tokens(2, 16)}

    def classes(**options: Any) -> dict[str, list[float]]:
        return at.diagnose(model, inputs, progress=False, **options).layers[0].class_mass

    assert classes() == {}
    default = classes(tokenizer=Words())
    assert set(default) == {"special", "punctuation", "whitespace", "words"}
    assert torch.tensor(list(default.values())).sum(0).tolist() == pytest.approx([1.0] * 4)
    by_id = classes(token_classes={"dots": [4], "starts": {3}})
    assert set(by_id) == {"dots", "starts", "other"}
    assert by_id["dots"] == pytest.approx(default["punctuation"])
    assert by_id["starts"] == pytest.approx(default["special"])
    by_text = classes(tokenizer=Words(), token_classes=lambda text: "w" if "w" in text else "rest")
    assert by_text["w"] == pytest.approx(default["words"])
    with pytest.raises(ValueError, match="token_classes: expected a mapping"):
        classes(token_classes=3)


def test_statistics_on_request() -> None:
    model, inputs = llama_model(), {"input_ids": tokens(2, 16)}
    found = at.diagnose(model, inputs, statistics=["entropy", "max_probability"], progress=False)
    assert set(found.layers[0].statistics) == {"entropy", "max_probability"}
    default = at.diagnose(model, inputs, progress=False)
    assert set(default.layers[0].statistics) == set(STATISTICS) - {"max_probability"}
    assert default.layers[0].statistics["entropy"] == found.layers[0].statistics["entropy"]
    with pytest.raises(ValueError, match=r"statistics: expected some of entropy,.*got 'entrpy'"):
        at.diagnose(model, inputs, statistics=["entrpy"])
    with pytest.raises(ValueError, match="got none"):
        at.diagnose(model, inputs, statistics=[])


def test_half_precision_is_computed_in_single() -> None:
    model = randomized(llama_model())
    inputs = {"input_ids": tokens(2, 40)}
    single = at.diagnose(model, inputs, progress=False)
    half = at.diagnose(model.to(torch.bfloat16), inputs, progress=False)
    assert half.layers[0].statistics["entropy"] == pytest.approx(
        single.layers[0].statistics["entropy"], rel=0.05
    )
    assert half.to_json()


def test_a_broken_model_is_told_and_can_be_saved() -> None:
    model = llama_model()
    model.model.layers[1].self_attn.q_proj.weight.data[0, 0] = math.nan
    diagnosis = at.diagnose(model, {"input_ids": tokens(1, 16)}, progress=False)
    broken = next(finding for finding in diagnosis.findings if finding.kind == "not_finite")
    assert broken.evidence[0].where == "model.layers.1.self_attn"
    loaded = at.Diagnosis.from_json(diagnosis.to_json())
    assert math.isnan(loaded.layers[1].statistics["entropy"][0])
    assert "no number" in diagnosis.to_html() or "not a finite number" in diagnosis.to_html()
    assert "CRITICAL" in str(diagnosis)


def test_a_model_whose_weights_are_elsewhere() -> None:
    """As `device_map` makes it: hooks of accelerate bring the weights as each module runs."""
    from accelerate import cpu_offload

    model, inputs = llama_model(), {"input_ids": tokens(2, 16)}
    expected = at.diagnose(model, inputs, progress=False)
    cpu_offload(model, execution_device="cpu")
    assert next(model.parameters()).is_meta
    found = at.diagnose(model, inputs, progress=False)
    assert found.to_rows() == expected.to_rows()
    assert next(model.parameters()).is_meta


class Twice(nn.Module):
    """A module that calls attention twice, and tied layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.MultiheadAttention(8, 2, batch_first=True)])

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = self.layers[0](x, x, x, need_weights=False)[0]
        return x


def test_plain_pytorch_and_modules_that_run_twice() -> None:
    diagnosis = at.diagnose(Twice(), torch.randn(3, 9, 8), progress=False)
    assert [layer.name for layer in diagnosis.layers] == ["layers.0", "layers.0#2"]
    assert diagnosis.layers[0].top_keys[0][0].token.startswith("position ")
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, batch_first=True), 2)
    found = at.diagnose(encoder, torch.randn(3, 9, 8), progress=False)
    assert len(found.layers) == len(found.hidden) == 2


def test_frame_has_a_row_for_each_head() -> None:
    frame = at.diagnose(llama_model(), {"input_ids": tokens(2, 16)}, progress=False).to_frame()
    assert len(frame) == 8
    assert list(frame.columns[:4]) == ["name", "layer", "kind", "head"]
    assert frame.loc[5, "name"] == "model.layers.1.self_attn"
    assert frame.loc[5, "head"] == 1


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ([], "at least one batch, got none"),
        (7, "expected a mapping of the model's arguments.*got int"),
        (None, "got NoneType"),
    ],
)
def test_inputs_that_are_none(inputs: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        at.diagnose(llama_model(), inputs, progress=False)


def test_bad_arguments() -> None:
    model, inputs = llama_model(), {"input_ids": tokens(1, 5)}
    with pytest.raises(ValueError, match="max_batches: expected at least 1"):
        at.diagnose(model, inputs, max_batches=0)
    with pytest.raises(ValueError, match="map_size: expected at least 1"):
        at.diagnose(model, inputs, map_size=0)
    with pytest.raises(ValueError, match=r"model: expected a torch.nn.Module, got str.*pipe.unet"):
        at.diagnose("llama", inputs)  # type: ignore[arg-type]
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match=r'set_attn_implementation\("sdpa"\)'):
        at.diagnose(model, inputs)
    with pytest.raises(at.TapError, match="never called"):
        at.diagnose(nn.Linear(3, 3), torch.randn(2, 3), progress=False)


def test_a_bar_only_if_wanted(capsys: pytest.CaptureFixture[str]) -> None:
    model, inputs = llama_model(), {"input_ids": tokens(1, 5)}
    at.diagnose(model, inputs, progress=False)
    at.diagnose(model, inputs)  # no terminal, no bar
    assert capsys.readouterr().err == ""
    at.diagnose(model, inputs, progress=True)
    assert "diagnose" in capsys.readouterr().err
