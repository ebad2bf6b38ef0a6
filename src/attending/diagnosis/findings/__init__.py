"""From statistics to findings: each with its threshold, where that is from, and its evidence."""

from collections.abc import Sequence

from attending.diagnosis.findings.entropy import collapsed, overloaded
from attending.diagnosis.findings.hidden import massive_activations, not_finite, oversmoothing
from attending.diagnosis.findings.sinks import sinks
from attending.diagnosis.findings.structure import block_sparse, duplicates, local, tiles
from attending.diagnosis.record import Finding, HiddenRecord, LayerRecord
from attending.diagnosis.thresholds import Thresholds

__all__ = ["find"]


def find(
    layers: Sequence[LayerRecord], hidden: Sequence[HiddenRecord], thresholds: Thresholds
) -> list[Finding]:
    """All findings, what is worst first within each kind.

    Args:
        layers: the attention modules.
        hidden: the outputs of the blocks.
        thresholds: what makes a statistic a finding.
    """
    found = [
        not_finite(layers, hidden),
        collapsed(layers, thresholds),
        overloaded(layers, thresholds),
        *sinks(layers, thresholds),
        oversmoothing(hidden, thresholds),
        massive_activations(hidden, thresholds),
        duplicates(layers, thresholds),
        local(layers, thresholds),
        block_sparse(layers, thresholds),
        tiles(layers, thresholds),
    ]
    return [finding for finding in found if finding is not None]
