"""Settings on disk: what is written comes back, and what is no such file is refused."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor

from attending.interventions.attention_calibration import AttentionCalibration
from attending.interventions.head_selection import HeadScores
from attending.interventions.settings import load_settings, save_settings


@dataclass(frozen=True)
class Part:
    depth: int
    weight: Tensor | None = None


@dataclass(frozen=True)
class Method:
    name: str = "plain"
    factor: float = 1.0
    places: tuple[int, ...] = ()
    by_layer: dict[int, tuple[float, ...]] = field(default_factory=dict)
    by_name: dict[str, Tensor] = field(default_factory=dict)
    marked: frozenset[int] = frozenset()
    part: Part | None = None
    parts: tuple[Part, ...] = ()
    derived: int = field(init=False, default=3)


@pytest.mark.parametrize(
    "method",
    [
        Method(),
        Method("x", float("inf"), (1, 2), {0: (0.5,), 11: ()}, {}, frozenset({2, 1})),
        Method(part=Part(2), parts=(Part(1), Part(3))),
        Method(factor=-float("inf")),
        AttentionCalibration(),
        AttentionCalibration(heads={2: (0, 3), 5: (1,)}, beta=0.2, protect=(0, 4)),
        AttentionCalibration(layers=(1, 2), threshold=0.1),
        HeadScores(0.5, {1: (0.25, 0.75)}, 3),
    ],
)
def test_what_is_written_comes_back(method: object, tmp_path: Path) -> None:
    path = save_settings(method, tmp_path / "method.json")
    assert load_settings(type(method), path) == method
    assert list(tmp_path.iterdir()) == [path]  # no tensors, no second file


def test_tensors_go_to_safetensors(tmp_path: Path) -> None:
    method = Method(
        by_name={"layers.0": torch.randn(2, 3).T, "layers.1": torch.arange(4)},
        part=Part(1, torch.randn(3, dtype=torch.bfloat16)),
    )
    save_settings(method, tmp_path / "method.json")
    again = load_settings(Method, tmp_path / "method.json")
    assert {path.name for path in tmp_path.iterdir()} == {"method.json", "method.safetensors"}
    for name, tensor in method.by_name.items():
        assert torch.equal(again.by_name[name], tensor)
        assert again.by_name[name].dtype == tensor.dtype
    assert again.part is not None
    assert torch.equal(again.part.weight, method.part.weight)
    (tmp_path / "method.safetensors").unlink()
    with pytest.raises(ValueError, match="expected a safetensors file beside"):
        load_settings(Method, tmp_path / "method.json")


def test_what_cannot_be_stored_is_refused_and_nothing_written(tmp_path: Path) -> None:
    for wrong in (Method(by_name={"f": print}), Method, {"a": 1}):
        with pytest.raises(ValueError, match="method: expected"):
            save_settings(wrong, tmp_path / "method.json")
    assert list(tmp_path.iterdir()) == []


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "method.json"
    path.write_text("nonsense")
    with pytest.raises(ValueError, match="path: expected a file that save_settings wrote"):
        load_settings(Method, path)
    save_settings(Part(1), path)
    with pytest.raises(ValueError, match=r"expected settings of Method .* got those of Part"):
        load_settings(Method, path)
    save_settings(Method(), path)
    record = json.loads(path.read_text())
    record["settings"]["later"] = 1
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"got \['later'\]"):
        load_settings(Method, path)
    del record["settings"]["later"], record["settings"]["factor"]
    record["settings"]["part"] = {"__dataclass__": "Popen", "settings": {"args": "x"}}
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match="expected a dataclass that the field is annotated with"):
        load_settings(Method, path)
    record["settings"]["part"] = None
    path.write_text(json.dumps(record))
    assert load_settings(Method, path) == Method()  # a default for what the file does not have
