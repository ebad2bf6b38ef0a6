"""Rows and columns of a map together: what a report on a head needs, for the least work."""

import math
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from attending.core.precision import full_precision
from attending.core.statistics._call import prepare
from attending.core.statistics._exchange import (
    bucket_columns,
    check_weights,
    pool,
    received_state,
)
from attending.core.statistics._sweep import can_sweep, sweep
from attending.core.statistics.columns import Columns
from attending.core.statistics.rows import (
    Key,
    Query,
    Rows,
    key_features,
    max_probability,
    participation_ratio,
    row_summary,
)


class MapSummary(NamedTuple):
    """What is known of a map after `map_summary`.

    Attributes:
        lse: log of the normaliser of each row, -inf for an empty one.
        entropy: Shannon entropy of each row, in nats.
        max_probability: the largest probability of each row, or None if it was not wanted.
        participation_ratio: `1 / sum_j p^2` of each row (0 for an empty one), or None if it was not
            wanted.
        features: the mean of the key features under each row, or None if none were given.
        mass: the attention that each key receives, `sum_i w[i] p[i, j]`.
        pooled: the map in `size x size` buckets, or None if no size was given.
    """

    lse: Rows
    entropy: Rows
    max_probability: Rows | None
    participation_ratio: Rows | None
    features: Float[Tensor, "batch heads queries features"] | None
    mass: Columns
    pooled: Float[Tensor, "batch heads size size"] | None


@full_precision
def map_summary(
    query: Query,
    key: Key,
    features: Float[Tensor, "*feature_batch keys features"] | None = None,
    query_weights: Float[Tensor, "*weight_batch queries"] | None = None,
    size: int | None = None,
    with_max_probability: bool = False,
    with_participation_ratio: bool = False,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> MapSummary:
    """Entropy, key features, received attention and pooled map of every head, exact, at once.

    On a CPU and without gradients this is a single sweep over the map, in blocks of rows that stay
    in the cache: with everything but the pooled map it costs about one
    `scaled_dot_product_attention`, less than `row_summary` and `column_mass` one after the other.
    Elsewhere it is those two fused passes; there the participation ratio is a third one, and the
    maximum costs an eager map in blocks.

    Args:
        features: of the keys, as in `row_summary`; one-hot classes give the mass on each class.
        query_weights: of the queries in `mass` and `pooled`, as in `column_mass`. The statistics
            of rows are those of every row.
        size: also return the map in this many buckets per side: the weighted mean over a bucket's
            queries of the mass on a bucket's keys. Empty rows are left out of the mean.
        with_max_probability: also return the largest probability of each row.
        with_participation_ratio: also return how many keys each row looks at.
    """
    call = prepare(query, key, attn_mask, is_causal, scale, enable_gqa)
    weights = check_weights(query_weights, call)
    if features is not None:
        features = key_features(features, call)
    if size is not None and size < 1:
        raise ValueError(f"size: expected at least 1, got {size}.")
    rows = None if size is None else bucket_columns(query.shape[2], size).to(call.query)
    top = ratio = None
    if can_sweep(call, features, weights):
        ask = call.query.new_ones(call.query.shape[:3]) if weights is None else weights
        found = sweep(
            call,
            entropy=True,
            second_moment=with_participation_ratio,
            features=features,
            query_features=ask[..., None] if size is None else None,
            size=size,
            weights=ask,
        )
        assert found.entropy is not None
        lse, entropy, features = found.lse, found.entropy, found.features
        mass, by_bucket = found.mass(), found.by_bucket
        if with_max_probability:
            top = found.max_probability
        if found.second_moment is not None:
            ratio = found.second_moment.reciprocal().masked_fill(lse == -math.inf, 0.0)
    else:
        arguments = (attn_mask, is_causal, scale, enable_gqa)
        lse, entropy, features = row_summary(query, key, features, *arguments)
        if with_max_probability:
            top = max_probability(query, key, *arguments)
        if with_participation_ratio:
            ratio = participation_ratio(query, key, *arguments, lse=lse)
        buckets = call.query if rows is None else rows.expand(*query.shape[:3], rows.shape[1])
        log_weights = None if weights is None else weights.log()
        received = received_state(call, lse, log_weights, buckets)
        mass = received.lse.exp()
        by_bucket = (mass[..., None] * received.output).transpose(-1, -2)
    pooled = None
    if rows is not None and by_bucket is not None:
        weight = (lse > -math.inf).to(lse) * (1.0 if weights is None else weights)
        pooled = pool(by_bucket, rows, weight)
    return MapSummary(lse, entropy, top, ratio, features, mass, pooled)
