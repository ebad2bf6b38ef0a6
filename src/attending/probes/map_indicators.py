"""Numbers that tell attention maps apart: spread, concentration, sink, locality, head diversity.

From a map that is there, as `output_attentions=True` gives it. Without the map, entropy, sums of
squares and the mass on a key come from `attending.core.statistics`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class MapIndicators(NamedTuple):
    """The indicators of section 4.4 of "Deconstructing Attention" (2510.11602).

    Attributes:
        entropy: `-sum_ij A log A` of all rows together, nats.
        concentration: the Frobenius norm `sqrt(sum_ij A^2)`.
        sink: the mean mass on the first token, over the queries.
        local_focus: for each offset N, the mean mass on the key N places before, over the
            queries that have one.
        head_diversity: the mean, over the entries up to the diagonal, of the standard deviation
            between heads.
    """

    entropy: Float[Tensor, "*batch heads"]
    concentration: Float[Tensor, "*batch heads"]
    sink: Float[Tensor, "*batch heads"]
    local_focus: Float[Tensor, "*batch heads offsets"]
    head_diversity: Float[Tensor, "*batch"]


def map_indicators(
    attention: Float[Tensor, "*batch heads tokens tokens"],
    *,
    offsets: Sequence[int] = (0, 1, 2, 3),
    unbiased: bool = False,
) -> MapIndicators:
    """The indicators of causal attention maps, unscaled.

    The paper's plots scale the first three to 0..1 over the layers shown, and double the last.

    Args:
        attention: probabilities, causal; rows of queries.
        offsets: of `local_focus`; 0 is the token itself.
        unbiased: the standard deviation between heads with n - 1; the paper does not say which.

    Returns:
        The indicators, at least in float32.

    Raises:
        ValueError: for a map that is not square, or an offset that no query has.
    """
    if attention.dim() < 3 or attention.shape[-1] != attention.shape[-2] or not attention.numel():
        raise ValueError(
            f"attention: expected [..., heads, tokens, tokens], got {list(attention.shape)}."
        )
    tokens = attention.shape[-1]
    wrong = [offset for offset in offsets if not 0 <= offset < tokens]
    if wrong or not len(offsets):
        raise ValueError(f"offsets: expected some, from 0 to {tokens - 1}, got {list(offsets)}.")
    attention = attention.to(torch.promote_types(attention.dtype, torch.float32))
    focus = [attention.diagonal(-offset, -2, -1).mean(-1) for offset in offsets]
    spread = attention.std(-3, correction=int(unbiased))
    return MapIndicators(
        entropy=-torch.xlogy(attention, attention).sum((-2, -1)),
        concentration=attention.square().sum((-2, -1)).sqrt(),
        sink=attention[..., 0].mean(-1),
        local_focus=torch.stack(focus, -1),
        head_diversity=spread.tril().sum((-2, -1)) * 2 / (tokens * (tokens + 1)),
    )
