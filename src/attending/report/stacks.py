"""Which modules belong together: the layers of an encoder, of a decoder, its cross attention."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from attending.diagnosis.record import Diagnosis, Finding, LayerRecord
from attending.report.text import plural, printable


@dataclass(frozen=True)
class Row:
    """One layer of a stack: where it is in the diagnosis, and what to call it."""

    index: int
    label: str  # its number, mostly


@dataclass(frozen=True)
class Stack:
    """Layers in order, that share a name before their number and a kind of attention."""

    prefix: str
    kind: str
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class _Name:
    """A module name taken apart: `decoder.layers.3.self_attn#1`."""

    prefix: str  # decoder.layers
    numbers: tuple[str, ...]  # 3
    suffix: str  # self_attn
    call: str  # 1


def _parse(name: str) -> _Name:
    path, _, call = name.partition("#")
    parts = path.split(".")
    numbered = [i for i, part in enumerate(parts) if part.isdigit()]
    if not numbered:
        return _Name("", (), path, call)
    suffix = ".".join("*" if part.isdigit() else part for part in parts[numbered[0] + 1 :])
    return _Name(".".join(parts[: numbered[0]]), tuple(parts[i] for i in numbered), suffix, call)


def group(entries: Sequence[tuple[str, str]]) -> list[Stack]:
    """The stacks of `(name, kind)` entries, in the order in which they first appear.

    A stack is what comes before the layer number, and the kind. Where that puts two modules on one
    number (two attentions in a block), what comes after the number tells them apart.
    """
    names = [_parse(name) for name, _ in entries]
    rough: dict[tuple[str, str], list[int]] = defaultdict(list)
    for index, (_, kind) in enumerate(entries):
        rough[names[index].prefix, kind].append(index)
    stacks = []
    for (prefix, kind), members in rough.items():
        numbers = [(names[i].numbers, names[i].call) for i in members]
        if not prefix and not any(names[i].numbers for i in members):
            parts = [members]  # modules without numbers: one stack, named rows
        elif len(set(numbers)) == len(numbers):
            parts = [members]
        else:
            by_suffix: dict[str, list[int]] = defaultdict(list)
            for i in members:
                by_suffix[names[i].suffix].append(i)
            parts = list(by_suffix.values())
        for part in parts:
            title = prefix if len(parts) == 1 else f"{prefix}.*.{names[part[0]].suffix}".strip(".")
            labels = _labels([names[i] for i in part])
            rows = tuple(Row(i, label) for i, label in zip(part, labels, strict=True))
            stacks.append(Stack(title, kind, rows))
    return stacks


def _labels(names: Sequence[_Name]) -> list[str]:
    """The shortest names that tell the rows of a stack apart: their numbers, where they differ."""
    width = {len(name.numbers) for name in names}
    if width == {0} or len(width) > 1:
        labels = [
            ".".join((*name.numbers, *(part for part in name.suffix.split(".") if part != "*")))
            for name in names
        ]
    else:
        columns = list(zip(*(name.numbers for name in names), strict=True))
        # A number that is the same everywhere says nothing; the first one is what people count by.
        kept = [k for k, column in enumerate(columns) if k == 0 or len(set(column)) > 1]
        labels = [".".join(name.numbers[k] for k in kept) for name in names]
    return [
        f"{label}#{name.call}" if name.call else label
        for label, name in zip(labels, names, strict=True)
    ]


def stacks_of(diagnosis: Diagnosis) -> list[Stack]:
    """The stacks of attention layers of a model."""
    return group([(layer.name, layer.kind) for layer in diagnosis.layers])


def kind_in_words(layers: Sequence[LayerRecord], stack: Stack) -> str:
    """`self-attention, causal`."""
    causal = all(layers[row.index].is_causal for row in stack.rows)
    return f"{stack.kind}-attention" + (", causal" if causal else "")


def short_names(prefixes: Sequence[str]) -> list[str]:
    """What tells module names apart: `encoder` and `decoder`, for `model.encoder.layers` and such.

    A name that stands alone keeps all of its parts, and every name keeps at least one.
    """
    paths = [prefix.split(".") for prefix in prefixes]
    distinct = list({prefix: prefix.split(".") for prefix in prefixes if prefix}.values())
    first, last = 0, 0
    if len(distinct) > 1:
        spare = min(map(len, distinct)) - 1
        while first < spare and len({path[first] for path in distinct}) == 1:
            first += 1
        while first + last < spare and len({path[-1 - last] for path in distinct}) == 1:
            last += 1
    return [".".join(path[first : len(path) - last]) for path in paths]


def places(diagnosis: Diagnosis) -> Callable[[str], str]:
    """How to call a module in a list: `layer 3`; where there are several stacks, with what tells
    the stack apart: `decoder cross, layer 3`.
    """
    stacks = stacks_of(diagnosis)
    prefixes = [stack.prefix for stack in stacks]
    one_prefix = len(set(prefixes)) == 1
    short = {}
    for stack, name in zip(stacks, short_names(prefixes), strict=True):
        if one_prefix:
            where = stack.kind if len(stacks) > 1 else ""
        else:
            where = f"{name} cross".strip() if stack.kind == "cross" else name
        for row in stack.rows:
            text = f"layer {row.label}" if row.label[:1].isdigit() else row.label
            text = f"{where}, {text}" if where else text
            short[diagnosis.layers[row.index].name] = printable(text)
    return lambda name: short.get(name, printable(name))


def shape_in_words(diagnosis: Diagnosis) -> str:
    """`12 layers, 12 heads each`, or with heads that differ `12 layers, 140 heads`."""
    layers = diagnosis.layers
    heads = {layer.num_heads for layer in layers}
    if len(heads) == 1 and len(layers) > 1:
        return f"{plural(len(layers), 'layer')}, {plural(heads.pop(), 'head')} each"
    total = sum(layer.num_heads for layer in layers)
    return f"{plural(len(layers), 'layer')}, {plural(total, 'head')}"


_ORDER = {"critical": 0, "warning": 1, "info": 2}
SEVERITY_WORDS = {"critical": "Critical", "warning": "Warning", "info": "Note"}


def by_severity(findings: Sequence[Finding]) -> list[Finding]:
    """The worst first; findings of one severity in the order in which they were made."""
    return sorted(findings, key=lambda finding: _ORDER[finding.severity])


def severities_in_words(findings: Sequence[Finding]) -> str:
    """`1 critical, 2 warnings, 3 notes`."""
    have = [finding.severity for finding in findings]
    words = {"critical": ("critical", "critical"), "warning": ("warning",), "info": ("note",)}
    return ", ".join(
        plural(have.count(severity), *words[severity]) for severity in _ORDER if severity in have
    )
