"""Settings of a method on disk: JSON to read, safetensors for tensors, never a pickle."""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import safetensors.torch
from torch import Tensor

FORMAT = 1

Settings = TypeVar("Settings")


def save_settings(method: object, path: str | Path) -> Path:
    """Write a dataclass to a JSON file, and its tensors to a safetensors file beside it.

        save_settings(AttentionCalibration(heads={2: (0, 3)}), "act.json")

    Fields may hold numbers, strings, booleans, None, tensors, and tuples, lists, sets and mappings
    (keys: strings or integers) of those, and other dataclasses.

    Args:
        method: an instance of a dataclass.
        path: of the JSON file; the tensors, if any, go to the same name with ".safetensors".

    Returns:
        The path of the JSON file.

    Raises:
        ValueError: for what is no dataclass, or holds what cannot be stored. Nothing is written.
    """
    if not dataclasses.is_dataclass(method) or isinstance(method, type):
        raise ValueError(f"method: expected an instance of a dataclass, got {method!r}.")
    path = Path(path)
    tensors: dict[str, Tensor] = {}
    fields = {
        field.name: _encode(getattr(method, field.name), field.name, tensors)
        for field in dataclasses.fields(method)
        if field.init
    }
    text = json.dumps(
        {"format": FORMAT, "class": type(method).__name__, "settings": fields},
        indent=2,
        allow_nan=False,
    )
    if tensors:
        contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        safetensors.torch.save_file(contiguous, path.with_suffix(".safetensors"))
    path.write_text(text + "\n", encoding="utf-8")
    return path


def load_settings(cls: type[Settings], path: str | Path) -> Settings:
    """Read what `save_settings` wrote.

    Lists come back as tuples. Fields that the file does not have get their defaults.

    Args:
        cls: the dataclass to make.
        path: of the JSON file.

    Raises:
        ValueError: if the file is of another class or has other fields, or is no such file.
    """
    path = Path(path)
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        name, fields, number = record["class"], dict(record["settings"]), record["format"]
    except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"path: expected a file that save_settings wrote, got {path} ({error!r})."
        ) from error
    if name != cls.__name__ or number != FORMAT:
        raise ValueError(
            f"path: expected settings of {cls.__name__} in format {FORMAT}, got those of {name} in "
            f"format {number} ({path})."
        )
    if not dataclasses.is_dataclass(cls):
        raise ValueError(f"cls: expected a dataclass, got {cls!r}.")
    known = {field.name for field in dataclasses.fields(cls) if field.init}
    if unknown := set(fields) - known:
        raise ValueError(
            f"path: expected settings among {sorted(known)}, got {sorted(unknown)} in {path}. It "
            "was probably written by another version."
        )
    hints = get_type_hints(cls)
    beside = path.with_suffix(".safetensors")
    tensors = safetensors.torch.load_file(beside) if beside.exists() else {}
    return cls(**{name: _decode(value, hints.get(name), tensors) for name, value in fields.items()})


def _encode(value: Any, place: str, tensors: dict[str, Tensor]) -> Any:
    if value is None or isinstance(value, bool | str | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"__float__": str(value)}
    if isinstance(value, Tensor):
        tensors[place] = value
        return {"__tensor__": place}
    if isinstance(value, tuple | list):
        return [_encode(item, f"{place}.{i}", tensors) for i, item in enumerate(value)]
    if isinstance(value, set | frozenset):
        return {
            "__set__": [_encode(v, f"{place}.{i}", tensors) for i, v in enumerate(sorted(value))]
        }
    if isinstance(value, Mapping) and all(isinstance(key, str | int) for key in value):
        # JSON has no integer keys, so a mapping is a list of pairs.
        return {
            "__mapping__": [
                [key, _encode(v, f"{place}.{key}", tensors)] for key, v in value.items()
            ]
        }
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        inner = {
            field.name: _encode(getattr(value, field.name), f"{place}.{field.name}", tensors)
            for field in dataclasses.fields(value)
            if field.init
        }
        return {"__dataclass__": type(value).__name__, "settings": inner}
    raise ValueError(
        f"method: expected numbers, strings, tensors, and tuples, sets and mappings of them in "
        f"{place}, got {type(value).__name__}."
    )


def _decode(value: Any, hint: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return tuple(_decode(item, hint, tensors) for item in value)
    if not isinstance(value, dict):
        return value
    if "__float__" in value:
        return float(value["__float__"])
    if "__tensor__" in value:
        if value["__tensor__"] not in tensors:
            raise ValueError(
                f"path: expected a safetensors file beside the JSON file that holds "
                f"{value['__tensor__']!r}; it is missing."
            )
        return tensors[value["__tensor__"]]
    if "__set__" in value:
        return frozenset(_decode(item, hint, tensors) for item in value["__set__"])
    if "__mapping__" in value:
        return {key: _decode(item, hint, tensors) for key, item in value["__mapping__"]}
    # Only classes that the field's annotation names are ever made.
    for candidate in _dataclasses_in(hint):
        if candidate.__name__ == value.get("__dataclass__"):
            hints = get_type_hints(candidate)
            inner = value["settings"]
            return candidate(**{n: _decode(v, hints.get(n), tensors) for n, v in inner.items()})
    raise ValueError(f"path: expected a dataclass that the field is annotated with, got {value!r}.")


def _dataclasses_in(hint: Any) -> list[Any]:
    if dataclasses.is_dataclass(hint):
        return [hint]
    if get_origin(hint) in (Union, UnionType) or get_args(hint):
        return [found for part in get_args(hint) for found in _dataclasses_in(part)]
    return []
