"""Keys that heads look at whatever the query asks."""

from collections import defaultdict
from collections.abc import Sequence

from attending.diagnosis.findings.heads import Head, head_count, heads, in_words
from attending.diagnosis.record import Finding, LayerRecord
from attending.diagnosis.thresholds import Thresholds

_FEW = 3  # keys that get a finding of their own


def sinks(layers: Sequence[LayerRecord], thresholds: Thresholds) -> list[Finding]:
    """One finding for each of the keys that most heads sink into, one for all others."""
    limit = thresholds.sink_importance
    by_key: dict[str, list[Head]] = defaultdict(list)
    for head in heads(layers, "sink"):
        if head.value > limit and head.layer.longest >= thresholds.sink_min_keys:
            by_key[_key_of(head)].append(head)
    ranked = sorted(by_key.items(), key=lambda item: -len(item[1]))
    named, others = ranked[:_FEW], [head for _, found in ranked[_FEW:] for head in found]
    if len(named) > 1:  # a key of a single head is not worth a finding of its own
        others += [head for _, found in named[1:] if len(found) == 1 for head in found]
        named = [named[0]] + [(key, found) for key, found in named[1:] if len(found) > 1]
    findings = [
        _finding(f"Attention sink: “{key}”", found, layers, thresholds) for key, found in named
    ]
    if others:
        findings.append(_finding("Attention sinks: other keys", others, layers, thresholds))
    return findings


def _finding(
    title: str, found: list[Head], layers: Sequence[LayerRecord], thresholds: Thresholds
) -> Finding:
    found.sort(key=lambda head: -head.value)
    mean = sum(head.value for head in found) / len(found)
    many = len(found) >= thresholds.sink_heads * head_count(layers)
    verb = "give" if len(found) > 1 else "gives"
    return Finding(
        kind="sink",
        title=title,
        severity="warning" if many else "info",
        summary=(
            f"{in_words(found, layers)} {verb} it {mean:.0%} of the attention of all queries that "
            "see it, on average. A sink lets a head do nothing; it comes with large "
            "activations, resists quantization, and a cache that drops it breaks the head."
        ),
        threshold=f"mean attention to one key > {thresholds.sink_importance:g}",
        source=(
            "Gu et al., ICLR 2025, arXiv 2410.10781 (there: the first token, among 64; the number "
            "is from memory of the paper)"
        ),
        evidence=tuple(head.evidence(f"{head.value:.0%} on “{_key_of(head)}”") for head in found),
        methods=(
            "attention-calibration-act",
            "systematic-outliers",
            "visual-attention-redistribution",
        ),
    )


def _key_of(head: Head) -> str:
    strong = head.layer.strong_keys
    return max(strong, key=lambda key: strong[key][head.number], default="one key")
