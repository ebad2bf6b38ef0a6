"""What goes wrong in the states between the blocks: they become alike, they explode, they break."""

import math
from collections.abc import Sequence

from attending.diagnosis.record import Evidence, Finding, HiddenRecord, LayerRecord
from attending.diagnosis.thresholds import Thresholds


def not_finite(layers: Sequence[LayerRecord], hidden: Sequence[HiddenRecord]) -> Finding | None:
    """NaN or infinity anywhere."""
    evidence = [
        Evidence(layer.name, head, math.nan, f"{name} is not a finite number")
        for layer in layers
        for name, values in layer.statistics.items()
        for head, value in enumerate(values)
        if not math.isfinite(value)
    ]
    evidence += [
        Evidence(block.name, None, math.nan, "the hidden states hold NaN or infinity")
        for block in hidden
        if not math.isfinite(block.mean_abs)
    ]
    if not evidence:
        return None
    return Finding(
        kind="not_finite",
        title="Not a number",
        severity="critical",
        summary="The model computes NaN or infinity. The first places in its order are the cause.",
        threshold="any value that is not finite",
        source="attending",
        evidence=tuple(evidence),
        methods=("sigma-reparam",),
    )


def oversmoothing(hidden: Sequence[HiddenRecord], thresholds: Thresholds) -> Finding | None:
    """Blocks after which all tokens point the same way."""
    limit = thresholds.oversmoothing_similarity
    found = [block for block in hidden if block.token_similarity > limit]
    if not found:
        return None
    last = found[-1].name == hidden[-1].name
    first, end = hidden[0], hidden[-1]
    return Finding(
        kind="oversmoothing",
        title="Oversmoothing",
        severity="warning" if last else "info",
        summary=(
            f"After {len(found)} of {len(hidden)} blocks the tokens of a sequence are nearly "
            f"alike. Their mean similarity is {first.token_similarity:.2f} after the first block "
            f"and {end.token_similarity:.2f} after the last; the effective rank goes from "
            f"{first.effective_rank:.1f} to {end.effective_rank:.1f}."
        ),
        threshold=f"mean cosine between different tokens > {limit:g}",
        source="attending's own number; rank collapse is from Dong et al. 2021, arXiv 2103.03404",
        evidence=tuple(
            Evidence(
                block.name,
                None,
                block.token_similarity,
                f"similarity {block.token_similarity:.3f}, "
                f"effective rank {block.effective_rank:.1f}",
            )
            for block in found
        ),
        methods=("dydila", "sigma-reparam"),
    )


def massive_activations(hidden: Sequence[HiddenRecord], thresholds: Thresholds) -> Finding | None:
    """Single values that are orders of magnitude larger than all others."""
    found = [
        block
        for block in hidden
        if block.max_abs > thresholds.massive_activation
        and block.max_abs > thresholds.massive_ratio * block.median_abs
    ]
    if not found:
        return None
    found.sort(key=lambda block: -block.max_abs)
    channels = sorted({block.max_channel for block in found})
    named = ", ".join(map(str, channels[:6])) + (" and more" if len(channels) > 6 else "")
    return Finding(
        kind="massive",
        title="Massive activations",
        severity="warning",
        summary=(
            f"After {len(found)} of {len(hidden)} blocks a single value is far beyond all others, "
            f"in {'channel' if len(channels) == 1 else 'channels'} {named}. Such values make sinks "
            "and spoil quantization with one scale for all."
        ),
        threshold=(
            f"|x| > {thresholds.massive_activation:g} and > {thresholds.massive_ratio:g} times the "
            "median of the block"
        ),
        source="Sun et al. 2024, arXiv 2402.17762, as others report it",
        evidence=tuple(
            Evidence(
                block.name,
                None,
                block.max_abs,
                f"{block.max_abs:,.0f} at “{block.max_token}” (token {block.max_position}), "
                f"channel {block.max_channel}: "
                f"{block.max_abs / max(block.median_abs, 1e-30):,.0f} times the median",
            )
            for block in found
        ),
        methods=("systematic-outliers", "visual-attention-redistribution"),
    )
