"""Exact statistics of attention maps that are never built.

Rows (where a query looks): `entropy`, `normalized_entropy`, `renyi_entropy`,
`participation_ratio`, `second_moment`, `max_probability`, `varentropy`, `expected_features`,
`class_mass`, `key_set_mass`, `mean_distance`; several at once from one pass: `row_summary`.

Columns (what a key receives) and the whole map: `column_mass`, `column_importance`, `pooled_map`,
`received_features`; several at once from one pass: `column_summary`.

Rows and columns at once: `map_summary`. Attention itself and what each key receives:
`state_and_column_mass`.

Bounds: `entropy_lower_bound`, and what goes into it: `centred_logit_norm`, `global_logit_norm`.

Hidden states and heads: `effective_rank`, `token_similarity`, `head_similarity`.
"""

from attending.core.statistics.bounds import (
    centred_logit_norm,
    entropy_lower_bound,
    global_logit_norm,
)
from attending.core.statistics.columns import (
    ColumnSummary,
    column_importance,
    column_mass,
    column_summary,
    pooled_map,
    received_features,
)
from attending.core.statistics.hidden import effective_rank, head_similarity, token_similarity
from attending.core.statistics.map import MapSummary, map_summary
from attending.core.statistics.rows import (
    RowSummary,
    class_mass,
    entropy,
    expected_features,
    key_set_mass,
    max_probability,
    mean_distance,
    normalized_entropy,
    participation_ratio,
    renyi_entropy,
    row_summary,
    second_moment,
    varentropy,
)
from attending.core.statistics.state_and_mass import StateAndMass, state_and_column_mass

__all__ = [
    "ColumnSummary",
    "MapSummary",
    "RowSummary",
    "StateAndMass",
    "centred_logit_norm",
    "class_mass",
    "column_importance",
    "column_mass",
    "column_summary",
    "effective_rank",
    "entropy",
    "entropy_lower_bound",
    "expected_features",
    "global_logit_norm",
    "head_similarity",
    "key_set_mass",
    "map_summary",
    "max_probability",
    "mean_distance",
    "normalized_entropy",
    "participation_ratio",
    "pooled_map",
    "received_features",
    "renyi_entropy",
    "row_summary",
    "second_moment",
    "state_and_column_mass",
    "token_similarity",
    "varentropy",
]
