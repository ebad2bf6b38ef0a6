import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attending.diagnosis.record import Diagnosis
from attending.report.stacks import (
    by_severity,
    group,
    kind_in_words,
    places,
    severities_in_words,
    shape_in_words,
    short_names,
    stacks_of,
)
from tests.report import synthetic
from tests.report.hostile import saying

# Names of attention modules as the models have them, and the stacks that a reader expects.
LLAMA = [(f"model.layers.{i}.self_attn", "self") for i in range(3)]
BERT = [(f"bert.encoder.layer.{i}.attention.self", "self") for i in range(3)]
T5 = [(f"encoder.block.{i}.layer.0.SelfAttention", "self") for i in range(2)] + [
    entry
    for i in range(2)
    for entry in (
        (f"decoder.block.{i}.layer.0.SelfAttention", "self"),
        (f"decoder.block.{i}.layer.1.EncDecAttention", "cross"),
    )
]
WHISPER = [(f"model.encoder.layers.{i}.self_attn", "self") for i in range(2)] + [
    entry
    for i in range(2)
    for entry in (
        (f"model.decoder.layers.{i}.self_attn", "self"),
        (f"model.decoder.layers.{i}.encoder_attn", "cross"),
    )
]
UNET = [
    (f"{where}.transformer_blocks.0.{name}", kind)
    for where in (
        "down_blocks.0.attentions.0",
        "down_blocks.0.attentions.1",
        "down_blocks.1.attentions.0",
        "mid_block.attentions.0",
        "up_blocks.1.attentions.0",
        "up_blocks.1.attentions.1",
    )
    for name, kind in (("attn1", "self"), ("attn2", "cross"))
]
SD3 = [(f"transformer_blocks.{i}.attn", "self") for i in range(3)] + [
    (f"transformer_blocks.{i}.attn2", "self") for i in range(2)
]
FLUX = [(f"transformer_blocks.{i}.attn", "self") for i in range(2)] + [
    (f"single_transformer_blocks.{i}.attn", "self") for i in range(2)
]
LLAVA = [(f"model.vision_tower.encoder.layers.{i}.self_attn", "self") for i in range(2)] + [
    (f"model.language_model.layers.{i}.self_attn", "self") for i in range(2)
]
CALLED_TWICE = [("block.attn#0", "self"), ("block.attn#1", "self")]
SEQUENTIAL = [("0", "self"), ("1", "self"), ("12", "self")]
ALONE = [("attn", "self"), ("pool.attn", "self")]


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        (LLAMA, [("model.layers", "self", "0 1 2")]),
        (BERT, [("bert.encoder.layer", "self", "0 1 2")]),
        (
            T5,
            [
                ("encoder.block", "self", "0 1"),
                ("decoder.block", "self", "0 1"),
                ("decoder.block", "cross", "0 1"),
            ],
        ),
        (
            WHISPER,
            [
                ("model.encoder.layers", "self", "0 1"),
                ("model.decoder.layers", "self", "0 1"),
                ("model.decoder.layers", "cross", "0 1"),
            ],
        ),
        (
            UNET,
            [
                ("down_blocks", "self", "0.0 0.1 1.0"),
                ("down_blocks", "cross", "0.0 0.1 1.0"),
                ("mid_block.attentions", "self", "0"),
                ("mid_block.attentions", "cross", "0"),
                ("up_blocks", "self", "1.0 1.1"),
                ("up_blocks", "cross", "1.0 1.1"),
            ],
        ),
        (
            SD3,
            [
                ("transformer_blocks.*.attn", "self", "0 1 2"),
                ("transformer_blocks.*.attn2", "self", "0 1"),
            ],
        ),
        (
            FLUX,
            [
                ("transformer_blocks", "self", "0 1"),
                ("single_transformer_blocks", "self", "0 1"),
            ],
        ),
        (CALLED_TWICE, [("", "self", "block.attn#0 block.attn#1")]),
        (SEQUENTIAL, [("", "self", "0 1 12")]),
        (ALONE, [("", "self", "attn pool.attn")]),
        ([("blocks.0.attn", "self"), ("blocks.1.attn.2", "self")],
         [("blocks", "self", "0.attn 1.2.attn")]),
        ([], []),
    ],
)  # fmt: skip
def test_stacks_of_real_names(
    entries: list[tuple[str, str]], expected: list[tuple[str, str, str]]
) -> None:
    found = [(s.prefix, s.kind, " ".join(row.label for row in s.rows)) for s in group(entries)]
    assert found == expected


parts = st.lists(
    st.sampled_from(["0", "1", "2", "10", "attn", "layers", "x", "self_attn"]),
    min_size=1,
    max_size=5,
)
names = st.tuples(parts.map(".".join), st.sampled_from(["", "#0", "#1"])).map("".join)


@given(st.lists(st.tuples(names, st.sampled_from(["self", "cross"])), unique=True, max_size=12))
def test_every_module_has_one_place_and_a_label_of_its_own(entries: list[tuple[str, str]]) -> None:
    stacks = group(entries)
    assert sorted(row.index for s in stacks for row in s.rows) == list(range(len(entries)))
    for stack in stacks:
        labels = [row.label for row in stack.rows]
        assert len(set(labels)) == len(labels)
        assert all(labels)
        assert {entries[row.index][1] for row in stack.rows} == {stack.kind}
        order = [row.index for row in stack.rows]
        assert order == sorted(order)


def placed(entries: list[tuple[str, str]]) -> list[str]:
    one = saying("x").layers[0]
    diagnosis = saying("x")
    diagnosis.layers = [
        dataclasses.replace(one, name=name, kind=kind)  # type: ignore[arg-type]
        for name, kind in entries
    ]
    place = places(diagnosis)
    return [place(name) for name, _ in entries]


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        (LLAMA, ["layer 0", "layer 1", "layer 2"]),
        (
            WHISPER,
            [
                "encoder, layer 0", "encoder, layer 1",
                "decoder, layer 0", "decoder cross, layer 0",
                "decoder, layer 1", "decoder cross, layer 1",
            ],
        ),
        (LLAVA, ["vision_tower.encoder, layer 0", "vision_tower.encoder, layer 1",
                 "language_model, layer 0", "language_model, layer 1"]),
        (SD3, ["attn, layer 0", "attn, layer 1", "attn, layer 2",
               "attn2, layer 0", "attn2, layer 1"]),
        ([("layers.0.a", "self"), ("layers.0.b", "cross")], ["self, layer 0", "cross, layer 0"]),
        (ALONE, ["attn", "pool.attn"]),
    ],
)  # fmt: skip
def test_places_say_what_tells_a_layer_apart(
    entries: list[tuple[str, str]], expected: list[str]
) -> None:
    assert placed(entries) == expected


@given(st.lists(st.tuples(names, st.sampled_from(["self", "cross"])), unique_by=lambda e: e[0],
                max_size=8))  # fmt: skip
def test_no_two_modules_are_called_the_same(entries: list[tuple[str, str]]) -> None:
    called = placed(entries)
    assert len(set(called)) == len(called)


def test_a_module_that_is_no_attention_keeps_its_name() -> None:
    place = places(synthetic.encoder(layers=2, heads=2, size=16))
    assert place("encoder.layer.1") == "encoder.layer.1"
    assert place("\x1b[31m") == "\\u001b[31m"


def test_short_names_keep_a_part() -> None:
    assert short_names(["a.b", "a.b.c"]) == ["b", "b.c"]
    assert short_names(["a.layers", "b.layers", ""]) == ["a", "b", ""]
    assert short_names(["model.layers"]) == ["model.layers"]
    assert short_names(["a", "a"]) == ["a", "a"]


def test_words_about_a_model(speech: Diagnosis) -> None:
    assert [kind_in_words(speech.layers, stack) for stack in stacks_of(speech)] == [
        "self-attention",
        "self-attention, causal",
        "cross-attention",
    ]
    assert shape_in_words(speech) == "18 layers, 141 heads"
    assert shape_in_words(synthetic.healthy()) == "4 layers, 4 heads each"
    assert shape_in_words(saying("x")) == "1 layer, 2 heads"


def test_the_gravest_findings_come_first(speech: Diagnosis) -> None:
    assert [finding.severity for finding in by_severity(speech.findings)] == [
        "critical", "warning", "warning", "info",
    ]  # fmt: skip
    assert severities_in_words(speech.findings) == "1 critical, 2 warnings, 1 note"
    assert severities_in_words([]) == ""
