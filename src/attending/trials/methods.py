"""The methods that can be named in a text: which there are, and how their parameters are read.

    act                                 one method, as it is
    act:beta=0.2,alpha=4                with parameters, which are those of its dataclass
    hierarchical:tree=4/4,layers=-1/-3  a list has slashes
    act:file=act.json                   as `save_settings` wrote it
    act+momentum                        a stack, the first outermost

Nothing is imported before a method is asked for.
"""

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from attending.trials.contenders import Method


@dataclass(frozen=True)
class MethodEntry:
    """A method that has a name.

    Attributes:
        target: "module:Class" of its dataclass.
        summary: what it does, in a line.
        takes: what models it is for.
        settings: parameters under this name that differ from the defaults of the class.
        calibrates: whether it learns from data first, by its `calibrate(model, inputs)`.
    """

    target: str
    summary: str
    takes: str
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    calibrates: bool = False


_PRUNING = "attending.interventions.visual_token_pruning:VisualTokenPruning"
_LLAVA = "LLaVA"
METHODS: dict[str, MethodEntry] = {
    "act": MethodEntry(
        "attending.interventions.attention_calibration:AttentionCalibration",
        "damp attention sinks that are not the first one",
        "decoders",
    ),
    "var": MethodEntry(
        "attending.interventions.visual_attention_redistribution:VisualAttentionRedistribution",
        "move attention from sinks to the rest of the image",
        "decoders that see",
        {"scale_tau": True},
        calibrates=True,
    ),
    "agile": MethodEntry(
        _PRUNING,
        "keep image tokens by attention and an adaptive distance",
        _LLAVA,
        {"selector": "agile"},
        calibrates=True,
    ),
    "fastv": MethodEntry(
        _PRUNING, "drop image tokens after some layers", _LLAVA, {"selector": "fastv"}
    ),
    "divprune": MethodEntry(
        _PRUNING, "keep image tokens that differ", _LLAVA, {"selector": "divprune"}
    ),
    "prune": MethodEntry(
        _PRUNING, "keep image tokens by selector=NAME", _LLAVA, {"selector": "fastervlm"}
    ),
    "momentum": MethodEntry(
        "attending.decoding.momentum:MomentumDecoding",
        "greedy search that resists walking in circles",
        "models that generate",
    ),
    "contrastive-search": MethodEntry(
        "attending.decoding.contrastive_search:ContrastiveSearch",
        "the likely token that is unlike the text so far",
        "decoders that generate",
    ),
    "damro": MethodEntry(
        "attending.decoding.damro:DAMRO",
        "contrast with the image tokens that everything looks at",
        "models that see and generate",
    ),
    "logit-scale": MethodEntry(
        "attending.interventions.logit_scaling:LogitScaling",
        "scale logits to the number of keys; needs n_train=N",
        "any",
    ),
    "hierarchical": MethodEntry(
        "attending.interventions.hierarchical_attention:HierarchicalAttention",
        "tie attention along windows; needs tree=4/4,layers=-1",
        "encoders",
    ),
}
_STACK = re.compile(r"\+(?=[a-z])")  # not that of 1e+5 or of the selector prumerge+
_FILE = "file"


def method_of(text: str) -> tuple[Method, bool]:
    """The method that a text without a stack names, and whether it is still to be calibrated.

    Raises:
        ValueError: for an unknown name or parameter, or a value that does not fit; it says what
            there is.
    """
    name, _, given = text.partition(":")
    entry = METHODS.get(name)
    if entry is None:
        close = difflib.get_close_matches(name, METHODS, 1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise ValueError(f"there is no method {name!r};{hint} the methods are {', '.join(METHODS)}")
    module, _, attribute = entry.target.partition(":")
    cls = getattr(import_module(module), attribute)
    values = _pairs(text, given)
    if _FILE in values:
        from attending.interventions.settings import load_settings

        if len(values) > 1:
            raise ValueError(f"{text}: file= has all parameters; give it alone")
        try:
            return load_settings(cls, Path(values[_FILE])), False
        except OSError as error:
            raise ValueError(f"{text}: the file cannot be read ({error.strerror})") from error
    hints = typing.get_type_hints(cls)
    known = [field.name for field in dataclasses.fields(cls) if field.init]
    settings = dict(entry.settings)
    for parameter, value in values.items():
        if parameter not in known:
            close = difflib.get_close_matches(parameter, known, 1)
            hint = f" Did you mean {close[0]}?" if close else ""
            raise ValueError(
                f"{text}: {name} has no parameter {parameter!r};{hint} it has {', '.join(known)}"
            )
        settings[parameter] = _value(f"{text}: {parameter}", value, hints[parameter])
    missing = [
        field.name
        for field in dataclasses.fields(cls)
        if field.init
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
        and field.name not in settings
    ]
    if missing:
        raise ValueError(
            f"{text}: {name} needs {' and '.join(missing)}; write {name}:{missing[0]}=VALUE"
        )
    try:
        method: Method = cls(**settings)
    except ValueError as error:
        raise ValueError(f"{text}: {error}") from error
    return method, entry.calibrates


def stack_of(text: str) -> list[tuple[Method, bool]]:
    """The methods that a text names, the outermost first; see `method_of`."""
    return [method_of(part) for part in _STACK.split(text)]


def parameters_of(name: str) -> dict[str, str]:
    """The parameters of a named method with their defaults, in words; those that a text can set."""
    entry = METHODS[name]
    module, _, attribute = entry.target.partition(":")
    cls = getattr(import_module(module), attribute)
    hints = typing.get_type_hints(cls)
    found = {}
    for field in dataclasses.fields(cls):
        if not field.init or not _can_be_said(hints[field.name]):
            continue
        default = entry.settings.get(field.name, field.default)
        found[field.name] = "" if default is dataclasses.MISSING else _written(default)
    return found


def _pairs(text: str, given: str) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for part in given.split(",") if given else []:
        name, equals, value = part.partition("=")
        if not equals or not name.strip():
            raise ValueError(f"{text}: expected NAME=VALUE after the colon, got {part!r}")
        if name.strip() in pairs:
            raise ValueError(f"{text}: {name.strip()} is given twice")
        pairs[name.strip()] = value.strip()
    return pairs


def _kinds(hint: Any) -> list[Any]:
    """What a text can be for a field of this type: types, literals, and one-element lists of them.

    Fields for functions, tensors and mappings have none: those are for Python.
    """
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return [kind for part in typing.get_args(hint) for kind in _kinds(part)]
    if origin is typing.Literal:
        return list(typing.get_args(hint))
    if isinstance(origin, type) and issubclass(origin, Collection):
        if issubclass(origin, Mapping):
            return []
        parts = [part for part in typing.get_args(hint) if part is not Ellipsis]
        inner = [kind for part in parts[:1] for kind in _kinds(part)]
        return [inner] if inner else []
    return [hint] if hint in (bool, int, float, str, type(None)) else []


def _can_be_said(hint: Any) -> bool:
    return any(kind is not type(None) for kind in _kinds(hint))


def _value(where: str, text: str, hint: Any) -> Any:
    if not _can_be_said(hint):
        raise ValueError(f"{where}: a text cannot say it; set it in Python, or give file=PATH")
    kinds = _kinds(hint)
    for kind in sorted(kinds, key=_rank):
        found = _read(text, kind)
        if found is not _NOT:
            return found
    words = list(dict.fromkeys(_in_words(kind) for kind in kinds))
    raise ValueError(f"{where}: expected {' or '.join(words)}, got {text!r}")


_NOT = object()


def _rank(kind: Any) -> int:
    """Narrow kinds first: a literal, nothing, a truth value, numbers, lists, any text."""
    if isinstance(kind, list):
        return 5
    order = [type(None), bool, int, float, str]
    return {0: 1, 1: 2, 2: 3, 3: 4, 4: 6}[order.index(kind)] if kind in order else 0


def _read(text: str, kind: Any) -> Any:
    if isinstance(kind, list):
        items = [
            next((x for k in sorted(kind, key=_rank) if (x := _read(part, k)) is not _NOT), _NOT)
            for part in text.split("/")
        ]
        return _NOT if _NOT in items else tuple(items)
    if kind is type(None):
        return None if text.lower() == "none" else _NOT
    if kind is bool:
        return {"true": True, "yes": True, "false": False, "no": False}.get(text.lower(), _NOT)
    if kind is str:
        return text
    if kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            return _NOT
    return kind if text == str(kind) else _NOT


def _in_words(kind: Any) -> str:
    if isinstance(kind, list):
        inner = " or ".join(f"{_in_words(one).removeprefix('a ')}s" for one in kind)
        return f"{inner} with / between them"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    if kind is type(None):
        return "none"
    return words[kind] if isinstance(kind, type) else repr(kind)


def _written(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, Sequence):
        return "/".join(map(str, value))
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)
