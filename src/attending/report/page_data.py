"""The data of the page: what the scripts of the page draw, as small as it can be said in JSON."""

import base64
import zlib
from collections.abc import Sequence
from dataclasses import asdict

import numpy as np

from attending.diagnosis.record import STATISTICS, Diagnosis, Finding, LayerRecord, Statistic
from attending.report.stacks import by_severity, group, kind_in_words, short_names, stacks_of
from attending.report.text import printable, rounded, visible


def page_data(diagnosis: Diagnosis) -> dict[str, object]:
    """Everything that the page draws, ready for `json.dumps`.

    Tokens come as they are to be shown. Maps and similarities are packed (see `packed`), because
    they are most of the numbers and are looked at one layer at a time.
    """
    layers = diagnosis.layers
    rank = {layer.name: index for index, layer in enumerate(layers)}
    stacks = stacks_of(diagnosis)
    blocks = group([(hidden.name, "") for hidden in diagnosis.hidden])
    return {
        "statistics": [asdict(statistic) for statistic in statistics_of(diagnosis)],
        "stacks": [
            {
                "prefix": printable(stack.prefix),
                "kind": kind_in_words(layers, stack),
                "heads": max(layers[row.index].num_heads for row in stack.rows),
                "rows": [{"layer": row.index, "label": printable(row.label)} for row in stack.rows],
            }
            for stack in stacks
        ],
        "layers": [_layer(layer) for layer in layers],
        "blocks": [
            {
                "prefix": printable(name),
                "rows": [
                    {"label": printable(row.label), **_hidden(diagnosis, row.index)}
                    for row in stack.rows
                ],
            }
            for stack, name in zip(blocks, short_names([b.prefix for b in blocks]), strict=True)
        ],
        "findings": [
            {
                "title": printable(finding.title),
                "severity": finding.severity,
                "heads": _heads_named(finding, rank, layers),
            }
            for finding in by_severity(diagnosis.findings)
        ],
    }


def statistics_of(diagnosis: Diagnosis) -> list[Statistic]:
    """What there is to draw: the statistics of the layers, then the masses of token classes."""
    found = [name for layer in diagnosis.layers for name in layer.statistics]
    known = [name for name in STATISTICS if name in found]
    other = [name for name in dict.fromkeys(found) if name not in STATISTICS]
    classes = dict.fromkeys(name for layer in diagnosis.layers for name in layer.class_mass)
    return [
        *(STATISTICS[name] for name in known),
        *(Statistic(name, printable(name), "", "", None, None) for name in other),
        *(
            Statistic(
                f"mass_{name}",
                f"On {printable(name)}",
                "share",
                f"Attention to tokens of the class {printable(name)}, averaged over the queries.",
                0.0,
                1.0,
            )
            for name in classes
        ),
    ]


def values_of(layer: LayerRecord, statistic: str) -> list[float | None]:
    """One value per head, None where the layer does not have the statistic."""
    values = layer.statistics.get(statistic)
    if values is None:
        values = layer.class_mass.get(statistic.removeprefix("mass_"), [])
    known = [rounded(value) for value in values]
    return known + [None] * (layer.num_heads - len(known))


def _heads_named(
    finding: Finding, rank: dict[str, int], layers: Sequence[LayerRecord]
) -> list[tuple[int, int]]:
    """Layer and head of the evidence, in its order: the page opens with the first of them."""
    named = [
        (rank[evidence.where], evidence.head)
        for evidence in finding.evidence
        if evidence.head is not None and evidence.where in rank
    ]
    return [
        (layer, head) for layer, head in dict.fromkeys(named) if 0 <= head < layers[layer].num_heads
    ]


def _layer(layer: LayerRecord) -> dict[str, object]:
    names = [*layer.statistics, *(f"mass_{name}" for name in layer.class_mass)]
    return {
        "name": printable(layer.name),
        "heads": layer.num_heads,
        "head_dim": layer.head_dim,
        "values": {name: values_of(layer, name) for name in names},
        "keys": [
            [[visible(k.token), k.position, k.sequence, rounded(k.importance)] for k in head]
            for head in layer.top_keys
        ],
        "maps": packed(layer.pooled),
        "similarity": packed(layer.similarity),
    }


def _hidden(diagnosis: Diagnosis, index: int) -> dict[str, object]:
    hidden = diagnosis.hidden[index]
    return {
        "name": printable(hidden.name),
        "token_similarity": rounded(hidden.token_similarity),
        "effective_rank": rounded(hidden.effective_rank),
        "max_abs": rounded(hidden.max_abs),
        "median_abs": rounded(hidden.median_abs),
        "max_token": visible(hidden.max_token),
        "max_position": hidden.max_position,
        "max_channel": hidden.max_channel,
    }


def packed(values: Sequence[object]) -> dict[str, object] | None:
    """Half-precision numbers, deflated, in base64; None where there are none.

    Half precision keeps 3 digits and goes down to 6e-8, which a map that is shown on a logarithmic
    scale needs; a causal map is half zeros, which deflate removes.
    """
    array = np.asarray(values, dtype="<f2")
    if array.size == 0:
        return None
    text = base64.b64encode(zlib.compress(array.tobytes(), 9)).decode("ascii")
    return {"shape": array.shape, "data": text}
