"""Structure that can be used: heads that are alike, local, block-sparse or tiled."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from attending.diagnosis.findings.heads import Head, heads, in_words
from attending.diagnosis.record import Finding, LayerRecord
from attending.diagnosis.thresholds import Thresholds

Map = npt.NDArray[np.float64]


def duplicates(layers: Sequence[LayerRecord], thresholds: Thresholds) -> Finding | None:
    """Heads of a layer whose outputs are the same up to rotation and scale."""
    limit = thresholds.duplicate_cka
    pairs = [
        (Head(layer, one, cka), other)
        for layer in layers
        for one, row in enumerate(layer.similarity)
        for other, cka in enumerate(row)
        if other > one and cka > limit
    ]
    if not pairs:
        return None
    pairs.sort(key=lambda pair: -pair[0].value)
    ends = {(head.layer.name, number) for head, other in pairs for number in (head.number, other)}
    noun = "pair" if len(pairs) == 1 else "pairs"
    return Finding(
        kind="duplicates",
        title="Duplicate heads",
        severity="info",
        summary=(
            f"{len(pairs)} {noun} of heads, {len(ends)} heads in all, put out nearly the same "
            "within their layer; they could be merged, or share keys and values."
        ),
        threshold=f"linear CKA of the outputs > {limit:g}",
        source="attending's own number; heads are grouped by CKA in DHA, arXiv 2406.06567",
        evidence=tuple(
            head.evidence(f"like head {other}: CKA {head.value:.3f}") for head, other in pairs
        ),
        methods=("dha",),
    )


def local(layers: Sequence[LayerRecord], thresholds: Thresholds) -> Finding | None:
    """Heads that stay close to the query."""
    limit = thresholds.local_mass
    found = [head for head in _with_map(layers, "local_mass", thresholds) if head.value > limit]
    if not found:
        return None
    found.sort(key=lambda head: -head.value)
    return Finding(
        kind="local",
        title="Local heads",
        severity="info",
        summary=(
            f"{in_words(found, layers)} keep to the neighbourhood of the query: a window would do "
            "for them."
        ),
        threshold=f"mass within one bucket of the query > {limit:g}",
        source="attending's own number",
        evidence=tuple(
            head.evidence(
                f"{head.value:.0%} within {_width(head.layer)} of the sequence on either side"
            )
            for head in found
        ),
        methods=("clear", "sparsed", "combiner"),
    )


def block_sparse(layers: Sequence[LayerRecord], thresholds: Thresholds) -> Finding | None:
    """Heads whose mass lies in few blocks of the map."""
    limit = thresholds.block_density
    found = [head for head in _with_map(layers, "block_density", thresholds) if head.value < limit]
    if not found:
        return None
    found.sort(key=lambda head: head.value)
    return Finding(
        kind="block_sparse",
        title="Block-sparse heads",
        severity="info",
        summary=(
            f"{in_words(found, layers)} have 95 % of their attention in few blocks of the map. "
            "Attention over those blocks alone would save time on long sequences."
        ),
        threshold=f"share of the visible blocks with 95 % of the mass < {limit:g}",
        source="break-even of gather-and-flash attention, 1.35 d + 0.02 of dense time (measured)",
        evidence=tuple(
            head.evidence(f"95 % of the mass in {head.value:.0%} of the blocks") for head in found
        ),
        methods=("sparsed", "rectified-spaattn", "paro-attention", "dynamic-mask-attention"),
    )


def tiles(layers: Sequence[LayerRecord], thresholds: Thresholds) -> Finding | None:
    """Heads whose map repeats along the keys, as that of video frames does."""
    limit = thresholds.tile_correlation
    found = []
    for layer in layers:
        # A causal map does not repeat: its lower left corner is all there is.
        if layer.kind == "self" and not layer.is_causal and _large(layer, thresholds):
            for number, one in enumerate(layer.pooled):
                period, correlation = repetition(np.asarray(one))
                if correlation > limit:
                    found.append((Head(layer, number, correlation), period))
    if not found:
        return None
    found.sort(key=lambda item: -item[0].value)
    return Finding(
        kind="tiles",
        title="Maps that repeat in tiles",
        severity="info",
        summary=(
            f"{in_words([head for head, _ in found], layers)} look at the same places again and "
            "again along the sequence, as maps over the frames of a video do."
        ),
        threshold=f"correlation of the map with itself, one period on, > {limit:g}",
        source="attending's own number; the pattern is that of Efficient-vDiT, arXiv 2502.06155",
        evidence=tuple(
            head.evidence(
                f"correlation {head.value:.2f} at {period} of {len(head.layer.pooled[0])} buckets"
            )
            for head, period in found
        ),
        methods=("efficient-vdit", "paro-attention"),
    )


def repetition(pooled: Map) -> tuple[int, float]:
    """The period along the keys after which a map is most like itself, and the correlation there.

    Half a period on it has to be unlike itself, or else it does not repeat but is smooth: then, and
    where the map has no structure at all, the correlation is 0.
    """
    size = len(pooled)
    correlations = {
        shift: _correlation(pooled[:, :-shift], pooled[:, shift:])
        for shift in range(1, size // 2 + 1)
    }
    periods = [
        period
        for period in range(2, size // 2 + 1)
        if min(correlations[shift] for shift in range(1, period)) < 0.5 * correlations[period]
        and correlations[period] > 0
    ]
    if not periods:
        return 0, 0.0
    # What repeats after 4 repeats after 8, too, and chance may make that look better.
    enough = 0.98 * max(correlations[period] for period in periods)
    period = next(period for period in periods if correlations[period] >= enough)
    return period, correlations[period]


def _correlation(one: Map, other: Map) -> float:
    one, other = one - one.mean(), other - other.mean()
    norm = float(np.sqrt((one**2).sum() * (other**2).sum()))
    # What is uniform but for rounding correlates with itself by chance.
    return float((one * other).sum()) / norm if norm > 1e-9 else 0.0


def _with_map(layers: Sequence[LayerRecord], statistic: str, thresholds: Thresholds) -> list[Head]:
    return [
        head
        for head in heads(layers, statistic)
        if head.layer.kind == "self" and _large(head.layer, thresholds)
    ]


def _large(layer: LayerRecord, thresholds: Thresholds) -> bool:
    return bool(layer.pooled) and len(layer.pooled[0]) >= thresholds.min_buckets


def _width(layer: LayerRecord) -> str:
    return f"{1.5 / len(layer.pooled[0]):.1%}"
