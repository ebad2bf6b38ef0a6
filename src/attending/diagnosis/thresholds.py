"""The numbers that turn a statistic into a finding, each with the place that it is taken from."""

import math
from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Thresholds:
    """When a statistic is a finding. Change any: `Thresholds(sink_importance=0.5)`.

    Where no paper gives a number, the default is attending's own and says so; such a threshold
    sorts heads for a look, it proves nothing.

    Attributes:
        collapsed_entropy: a head is collapsed when its normalized entropy is below this. Own
            choice: the papers on entropy collapse (Zhai et al. 2023, arXiv 2303.06296) show it and
            give no number.
        collapsed_share: collapsed heads are critical from this share of all heads on. The share of
            heads in the lowest quarter of entropies in the softmax-only model that diverged (Jha
            and Reagen 2025, arXiv 2501.03489).
        uniform_entropy: a head is near-uniform when its normalized entropy is above this. Own
            choice.
        overloaded_share: a model is overloaded when more than this share of its heads lies in the
            top quarter, from 3/4 of the largest head entropy on. Between the 23 % of a healthy
            model and the 45 % to 58 % of overloaded ones in arXiv 2501.03489; own choice within.
        sink_importance: a key is a sink of a head when its mean attention, over the queries that
            see it, exceeds this. Gu et al. (ICLR 2025, arXiv 2410.10781), there for the first token
            and 64 tokens; the number is from memory of the paper, not checked.
        sink_min_keys: sinks are looked for only in sequences of at least this many tokens: among
            few keys, 0.3 on one is nothing special. Own choice.
        sink_heads: a sink is a warning when it takes this share of all heads. Own choice.
        duplicate_cka: two heads of a layer are duplicates when the linear CKA of their outputs
            exceeds this. Own choice; Chen et al. (DHA, NeurIPS 2024) cluster heads by CKA without a
            fixed number.
        oversmoothing_similarity: tokens are oversmoothed when the mean cosine between different
            tokens exceeds this. Own choice.
        local_mass: a head is local when this share of its attention stays within the query's bucket
            of the pooled map and the next ones. Own choice.
        block_density: a head is block-sparse when 95 % of its attention lies in less than this
            share of the visible buckets. At 0.35, gather-and-flash attention over blocks took half
            the time of dense attention on a CPU (1.35 d + 0.02 of it, measured for attending).
        tile_correlation: a head repeats tiles when its pooled map, shifted by a whole period along
            the keys, correlates with itself by more than this. Own choice; the pattern is that of
            Efficient-vDiT (arXiv 2502.06155), which gives no number.
        massive_activation: an activation is massive when it exceeds this, and
        massive_ratio: this many times the median of the hidden state. Both from Sun et al. (2024,
            arXiv 2402.17762), as others report them.
        min_buckets: local, block-sparse and tiled structure is looked for only in pooled maps with
            at least this many buckets per side. Own choice.
    """

    collapsed_entropy: float = 0.1
    collapsed_share: float = 0.33
    uniform_entropy: float = 0.95
    overloaded_share: float = 0.4
    sink_importance: float = 0.3
    sink_min_keys: float = 16
    sink_heads: float = 0.5
    duplicate_cka: float = 0.95
    oversmoothing_similarity: float = 0.9
    local_mass: float = 0.8
    block_density: float = 0.35
    tile_correlation: float = 0.9
    massive_activation: float = 100.0
    massive_ratio: float = 1000.0
    min_buckets: float = 16

    def __post_init__(self) -> None:
        """Refuse what is no number."""
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, int | float) or math.isnan(value):
                raise ValueError(f"{field.name}: expected a number, got {value!r}.")
