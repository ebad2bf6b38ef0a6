"""Methods by name: every one is there, and every parameter that a text can say is read."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from attending.interventions.attention_calibration import AttentionCalibration
from attending.interventions.settings import save_settings
from attending.trials.methods import METHODS, method_of, parameters_of, stack_of

NEEDED = {"hierarchical": "hierarchical:tree=4/4,layers=-1"}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_there_and_its_defaults_can_be_said(name: str) -> None:
    method, calibrates = method_of(NEEDED.get(name, name))
    assert callable(method)
    assert calibrates == METHODS[name].calibrates
    assert calibrates <= hasattr(method, "calibrate")
    said = {key: value for key, value in parameters_of(name).items() if value}
    text = ",".join(f"{key}={value}" for key, value in said.items())
    if name not in NEEDED:
        assert method_of(f"{name}:{text}")[0] == method
    assert METHODS[name].summary
    assert METHODS[name].takes


def settings(text: str) -> dict[str, Any]:
    method: Any = method_of(text)[0]
    return {field.name: getattr(method, field.name) for field in dataclasses.fields(method)}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("act:beta=0.2,alpha=4", {"beta": 0.2, "alpha": 4.0}),
        ("act:layers=2/3,threshold=none", {"layers": (2, 3), "threshold": None}),
        ("act:protect=bos,beta=1e-1", {"protect": "bos", "beta": 0.1}),
        ("act:protect=0/1", {"protect": (0, 1)}),
        ("var:require_visual_sink=no, tau=3", {"require_visual_sink": False, "tau": 3.0}),
        ("var:sink_dimensions=7", {"sink_dimensions": (7,), "scale_tau": True}),
        ("fastv:keep=8,layer=1", {"selector": "fastv", "keep": 8, "layer": 1}),
        ("momentum:resistance=ngram4,max_depth=3", {"resistance": "ngram4", "max_depth": 3}),
        ("momentum:resistance=0/1/2.5", {"resistance": (0.0, 1.0, 2.5)}),
        ("logit-scale:n_train=128,kind=log", {"n_train": 128.0, "kind": "log"}),
        ("hierarchical:tree=4/2,layers=-1/-3", {"tree": (4, 2), "layers": (-1, -3)}),
    ],
)
def test_parameters_have_the_types_of_their_fields(text: str, expected: dict[str, Any]) -> None:
    found = settings(text)
    for name, value in expected.items():
        assert found[name] == value
        assert type(found[name]) is type(value)


def test_stacks() -> None:
    assert [type(m).__name__ for m, _ in stack_of("act:beta=1e+0+momentum:alpha=0.1")] == [
        "AttentionCalibration",
        "MomentumDecoding",
    ]
    merging, momentum = stack_of("prune:selector=prumerge+,keep=8+momentum")
    assert getattr(merging[0], "selector", None) == "prumerge+"
    assert type(momentum[0]).__name__ == "MomentumDecoding"


def test_settings_from_a_file(tmp_path: Path) -> None:
    method = AttentionCalibration(heads={1: (0, 2)}, beta=0.1)
    save_settings(method, tmp_path / "act.json")
    found, calibrates = method_of(f"act:file={tmp_path / 'act.json'}")
    assert found == method
    assert not calibrates
    with pytest.raises(ValueError, match="expected settings of DAMRO"):
        method_of(f"damro:file={tmp_path / 'act.json'}")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("atc", ["there is no method 'atc'; Did you mean act?", "momentum"]),
        ("", ["there is no method ''"]),
        ("act+", ["there is no method 'act+'"]),
        ("act:bta=3", ["act has no parameter 'bta'; Did you mean beta?", "min_observers"]),
        ("act:beta=x", ["beta: expected a number, got 'x'"]),
        ("act:beta=-1", ["act:beta=-1: beta: expected a share of at least 0, got -1.0."]),
        ("act:min_observers=1.5", ["expected a whole number, got '1.5'"]),
        ("act:heads=3", ["heads: a text cannot say it", "file=PATH"]),
        ("act:beta", ["expected NAME=VALUE after the colon, got 'beta'"]),
        ("act:beta=1,beta=2", ["beta is given twice"]),
        ("var:convention=papr", ["expected 'paper' or 'official-code', got 'papr'"]),
        ("act:layers=2/x", ["expected whole numbers with / between them or none, got '2/x'"]),
        ("var:scale_tau=perhaps", ["expected true or false, got 'perhaps'"]),
        ("hierarchical", ["needs tree and layers; write hierarchical:tree=VALUE"]),
        ("act:file=no.json", ["the file cannot be read (No such file or directory)"]),
        ("act:file=a.json,beta=1", ["file= has all parameters; give it alone"]),
    ],
)
def test_what_cannot_be_read(text: str, words: Sequence[str]) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the words are looked at below
        stack_of(text)
    for word in words:
        assert word in str(error.value)


def test_mappings_are_not_for_texts() -> None:
    hints: Mapping[str, str] = parameters_of("act")
    assert "heads" not in hints
    assert hints["layers"] == "none"
