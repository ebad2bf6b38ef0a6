"""The record goes to JSON and back, and refuses what JSON cannot hold."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings

from attending.diagnosis.record import Diagnosis
from tests.report import synthetic
from tests.report.hostile import saying, texts


def test_json_and_back(speech: Diagnosis) -> None:
    assert Diagnosis.from_json(speech.to_json()) == speech


def test_json_on_disk(speech: Diagnosis, tmp_path: Path) -> None:
    path = tmp_path / "diagnosis.json"
    text = speech.to_json(path)
    assert path.read_text(encoding="utf-8") == text
    assert Diagnosis.from_json(path.read_text(encoding="utf-8")).to_html() == speech.to_html()


@given(texts, texts, texts)
@settings(max_examples=40)
def test_any_text_survives_json(name: str, token: str, words: str) -> None:
    diagnosis = saying(name, token, words)
    again = Diagnosis.from_json(diagnosis.to_json())
    assert again == diagnosis
    assert again.layers[0].top_keys[0][0].token == token
    diagnosis.to_json().encode("ascii")  # so that any file can hold it


def test_an_empty_diagnosis_survives_json() -> None:
    empty = dataclasses.replace(synthetic.healthy(), layers=[], hidden=[], preview=[])
    assert Diagnosis.from_json(empty.to_json()) == empty


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_null_in_json_and_nan_again(value: float) -> None:
    diagnosis = saying("x")
    diagnosis.layers[0].statistics["entropy"][1] = value
    diagnosis.hidden[0].max_abs = value
    text = diagnosis.to_json()
    assert json.loads(text)["layers"][0]["statistics"]["entropy"] == [0.5, None]
    again = Diagnosis.from_json(text)
    assert math.isnan(again.layers[0].statistics["entropy"][1])
    assert math.isnan(again.hidden[0].max_abs)
    assert again.layers[0].layer is None
    assert again.findings[0].evidence[2].head is None


def test_rows_have_every_head_and_every_number(speech: Diagnosis) -> None:
    rows = speech.to_rows()
    assert len(rows) == sum(layer.num_heads for layer in speech.layers) == 141
    layer = speech.layers[6]
    row = next(r for r in rows if r["name"] == layer.name and r["head"] == 3)
    assert row["sink"] == layer.statistics["sink"][3]
    assert row["mass_special"] == layer.class_mass["special"][3]
    assert (row["kind"], row["layer"]) == ("self", 0)


def test_frame(speech: Diagnosis) -> None:
    pandas = pytest.importorskip("pandas")
    frame = speech.to_frame()
    assert isinstance(frame, pandas.DataFrame)
    assert len(frame) == 141
    expected = [v for layer in speech.layers for v in layer.statistics["entropy"]]
    assert frame["entropy"].tolist() == expected


def test_json_is_what_the_fields_say(speech: Diagnosis) -> None:
    data = json.loads(speech.to_json())
    assert set(data) == {field.name for field in dataclasses.fields(Diagnosis)}
    assert data["layers"][0]["pooled"][0] == speech.layers[0].pooled[0]
