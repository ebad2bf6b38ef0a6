"""Heads that look at too few keys, and heads that look at all of them."""

from collections.abc import Sequence

from attending.diagnosis.findings.heads import Head, head_count, heads, in_words
from attending.diagnosis.record import Finding, LayerRecord
from attending.diagnosis.thresholds import Thresholds


def collapsed(layers: Sequence[LayerRecord], thresholds: Thresholds) -> Finding | None:
    """Heads with hardly any entropy."""
    limit = thresholds.collapsed_entropy
    found = [head for head in heads(layers, "normalized_entropy") if head.value < limit]
    if not found:
        return None
    found.sort(key=lambda head: head.value)
    serious = len(found) >= thresholds.collapsed_share * head_count(layers)
    return Finding(
        kind="collapsed",
        title="Collapsed heads",
        severity="warning" if serious else "info",
        summary=(
            f"{in_words(found, layers)} look at hardly more than one key. A head that copies the "
            "previous token is like that by design; in training, entropy that falls in many heads "
            "goes before oscillation and divergence."
        ),
        threshold=f"normalized entropy < {limit:g}",
        source=(
            "attending's own number; entropy collapse is from Zhai et al. 2023, arXiv 2303.06296"
        ),
        evidence=tuple(head.evidence(_how_sharp(head)) for head in found),
        methods=("sigma-reparam", "entropy-guided-attention"),
    )


def overloaded(layers: Sequence[LayerRecord], thresholds: Thresholds) -> Finding | None:
    """Heads that choose nothing, or too many heads near the top of the model's entropies."""
    limit, share = thresholds.uniform_entropy, thresholds.overloaded_share
    entropies = [head for head in heads(layers, "entropy") if head.value == head.value]
    largest = max((head.value for head in entropies), default=0.0)
    top = [head for head in entropies if head.value >= 0.75 * largest > 0]
    found = [head for head in heads(layers, "normalized_entropy") if head.value > limit]
    crowded = len(top) > share * head_count(layers)
    if not found and not crowded:
        return None
    found.sort(key=lambda head: -head.value)
    summary = f"{in_words(found, layers)} spread their attention almost evenly. " if found else ""
    summary += (
        f"{len(top) / head_count(layers):.0%} of the heads have at least 3/4 of the largest "
        f"entropy in the model, {largest:.2f} nats; a healthy model had 23 %, overloaded ones 45 % "
        "to 58 %."
    )
    evidence = [
        head.evidence(f"{head.value:.1%} of the largest entropy possible") for head in found
    ]
    if not evidence:
        top.sort(key=lambda head: -head.value)
        evidence = [head.evidence(f"{head.value:.2f} nats") for head in top]
    return Finding(
        kind="overloaded",
        title="Entropic overload" if crowded else "Near-uniform heads",
        severity="warning" if crowded else "info",
        summary=summary,
        threshold=(
            f"normalized entropy > {limit:g}, or more than {share:.0%} of heads in the top quarter"
        ),
        source=(
            "top quarter: Jha and Reagen 2025, arXiv 2501.03489; the numbers are attending's own"
        ),
        evidence=tuple(evidence),
        methods=("entropy-guided-attention",),
    )


def _how_sharp(head: Head) -> str:
    entropies = head.layer.statistics.get("entropy")
    nats = f"{entropies[head.number]:.2f} nats, " if entropies else ""
    text = f"{nats}{head.value:.1%} of the largest possible"
    strongest = head.layer.top_keys[head.number][:1] if head.layer.top_keys else []
    return text + "".join(f"; strongest key “{key.token}”" for key in strongest)
