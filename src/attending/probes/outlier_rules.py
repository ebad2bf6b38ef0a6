"""What counts as an outlier: rules on tensors, with named criteria and their sources.

Everything is computed at least in float32 (1e-8 is zero in half precision, and a mean of bfloat16
is wrong in its third digit), for each sequence by itself (a mean over a batch mixes sequences), and
without padding.
"""

import math
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Criterion = Literal["mean", "median", "magnitude"]

EPSILON = 1e-8  # added to the mean magnitude of a row or column of a weight, as in the code
MASSIVE = 100.0  # Sun et al.: what is smaller is never massive
MAGNITUDE = 6.0  # LLM.int8: magnitude of an outlier feature,
TOKEN_SHARE = 0.06  # in this share of the tokens


class ActivationOutliers(NamedTuple):
    """The outliers of hidden states, for each sequence.

    Attributes:
        elements: which values are outliers.
        threshold: what a magnitude has to exceed.
        largest, mean, median: of the magnitudes of the sequence, without padding.
    """

    elements: Bool[Tensor, "batch tokens dim"]
    threshold: Float[Tensor, " batch"]
    largest: Float[Tensor, " batch"]
    mean: Float[Tensor, " batch"]
    median: Float[Tensor, " batch"]

    @property
    def tokens(self) -> Bool[Tensor, "batch tokens"]:
        """Tokens with an outlier in any channel."""
        return self.elements.any(-1)

    @property
    def channels(self) -> Bool[Tensor, "batch dim"]:
        """Channels with an outlier at any token."""
        return self.elements.any(-2)


class WeightRatios(NamedTuple):
    """How far the largest weight of each row and column is above their mean magnitude.

    Attributes:
        column: `max |w| / (mean |w| + 1e-8)` of each input feature.
        row: the same of each output feature.
    """

    column: Float[Tensor, " in_features"]
    row: Float[Tensor, " out_features"]

    @property
    def largest(self) -> float:
        """The statistic of a module: its largest ratio."""
        return float(torch.maximum(self.column.max(), self.row.max()))


class AttentionOutliers(NamedTuple):
    """The outliers among the keys, for each sequence.

    Attributes:
        received: the attention that a key receives, summed over the queries, mean over the heads.
        importance: `received` over the number of queries that see the key: fair to late keys.
        keys: `received >= share * queries`, the rule of the paper. Under a causal mask a key in the
            last tenth can never meet it.
        fair_keys: `importance >= share`.
        head_share: the share of a head's attention that `keys` receive.
    """

    received: Float[Tensor, "batch keys"]
    importance: Float[Tensor, "batch keys"]
    keys: Bool[Tensor, "batch keys"]
    fair_keys: Bool[Tensor, "batch keys"]
    head_share: Float[Tensor, "batch heads"]


def activation_outliers(
    hidden: Float[Tensor, "batch tokens dim"],
    *,
    criterion: Criterion = "mean",
    tau: float = 1000.0,
    token_mask: Bool[Tensor, "batch tokens"] | None = None,
) -> ActivationOutliers:
    """Values of hidden states that are far out.

    - `"mean"`: `|x| > tau * mean |x|` (An et al., 2502.06415, code and paper);
    - `"median"`: `|x| > 100` and `|x| > tau * median |x|` (Sun et al., 2402.17762);
    - `"magnitude"`: `|x| >= 6` in channels where 6 % of the tokens reach it (LLM.int8, 2208.07339).

    The first cannot be met by small tensors: an outlier raises the mean, so `max / mean` is at most
    the number of values. 24 tokens of 64 channels have 1536 values; two equal outliers among them
    reach 768 at the very most. Use `"median"`, or a smaller `tau`. LLM.int8 also asks that a
    channel is an outlier in a quarter of the layers; that takes a model, see `find_outliers`.

    Args:
        hidden: hidden states.
        criterion: one of the above.
        tau: the factor of `"mean"` and `"median"`.
        token_mask: True for real tokens; all by default.

    Raises:
        ValueError: for arguments that do not fit; the message names the argument.
    """
    if hidden.dim() != 3 or not hidden.is_floating_point():
        raise ValueError(
            "hidden: expected a float tensor [batch, tokens, dim], got "
            f"{hidden.dtype} {list(hidden.shape)}."
        )
    check_criterion(criterion, tau)
    if token_mask is not None and tuple(token_mask.shape) != tuple(hidden.shape[:2]):
        raise ValueError(
            f"token_mask: expected [batch, tokens] = {list(hidden.shape[:2])}, got "
            f"{list(token_mask.shape)}."
        )
    magnitude = hidden.detach().abs().to(torch.promote_types(hidden.dtype, torch.float32))
    parts = []
    for index, values in enumerate(magnitude):
        real = None if token_mask is None else token_mask[index].bool().to(values.device)
        kept = values if real is None else values[real]
        found = _one_sequence(kept, criterion, tau)
        elements = torch.zeros_like(values, dtype=torch.bool)
        if real is None:
            elements = found.elements
        else:
            elements[real] = found.elements
        parts.append(found._replace(elements=elements))
    if not parts:
        nothing = magnitude.new_zeros(0)
        empty = torch.zeros_like(magnitude, dtype=torch.bool)
        return ActivationOutliers(empty, nothing, nothing, nothing, nothing)
    return ActivationOutliers(*(torch.stack(column) for column in zip(*parts, strict=True)))


def _one_sequence(values: Tensor, criterion: Criterion, tau: float) -> ActivationOutliers:
    if values.numel() == 0:
        zero = values.new_zeros(())
        return ActivationOutliers(values.bool(), zero, zero, zero, zero)
    mean, median = values.mean(), values.median()
    if criterion == "magnitude":
        threshold = torch.full_like(mean, MAGNITUDE)
        large = values >= MAGNITUDE
        elements = large & (large.to(values.dtype).mean(0) >= TOKEN_SHARE)
    else:
        threshold = tau * (mean if criterion == "mean" else median)
        if criterion == "median":
            threshold = threshold.clamp_min(MASSIVE)
        elements = values > threshold
    return ActivationOutliers(elements, threshold, values.max(), mean, median)


def weight_outlier_ratios(weight: Float[Tensor, "out_features in_features"]) -> WeightRatios:
    """`max |w| / (mean |w| + 1e-8)` of every column and every row of a weight.

    About 5 for a wide layer of normally distributed weights; a hundred and more where a few weights
    write or read massive activations (An et al., 2502.06415).

    Args:
        weight: in the layout of `nn.Linear`; transpose that of transformers' `Conv1D`.
    """
    if weight.dim() != 2 or weight.numel() == 0 or not weight.is_floating_point():
        raise ValueError(
            "weight: expected a float tensor [out_features, in_features] that is not empty, got "
            f"{weight.dtype} {list(weight.shape)}."
        )
    magnitude = weight.detach().abs().to(torch.promote_types(weight.dtype, torch.float32))
    return WeightRatios(
        magnitude.amax(0) / (magnitude.mean(0) + EPSILON),
        magnitude.amax(1) / (magnitude.mean(1) + EPSILON),
    )


def attention_outliers(
    column_mass: Float[Tensor, "batch heads keys"],
    visible_queries: Float[Tensor, "#batch #heads keys"] | Int[Tensor, "#batch #heads keys"],
    queries: int | Float[Tensor, " batch"] | Int[Tensor, " batch"],
    *,
    share: float = 0.1,
) -> AttentionOutliers:
    """Keys that receive a large part of all attention.

    Args:
        column_mass: what each key receives, `attending.statistics.column_mass`, summed over the
            real queries: no N x N map is needed.
        visible_queries: how many real queries see each key; `[batch or 1, heads or 1, keys]`.
        queries: how many real queries there are, T: a number, or one for each sequence.
        share: a key is an outlier from `share * T` on (0.1 in the paper's code).
    """
    if column_mass.dim() != 3:
        raise ValueError(
            f"column_mass: expected [batch, heads, keys], got {list(column_mass.shape)}."
        )
    if visible_queries.dim() != 3 or visible_queries.shape[-1] != column_mass.shape[-1]:
        raise ValueError(
            "visible_queries: expected a shape that broadcasts to [batch, heads, keys] = "
            f"{list(column_mass.shape)}, got {list(visible_queries.shape)}."
        )
    check_share(share)
    mass = column_mass.detach().to(torch.promote_types(column_mass.dtype, torch.float32))
    seen = visible_queries.to(mass)
    fair = torch.where(seen > 0, mass / seen.clamp_min(1.0), torch.zeros_like(mass))
    received, importance = mass.mean(1), fair.mean(1)
    count = torch.as_tensor(queries, dtype=mass.dtype, device=mass.device).reshape(-1, 1)
    keys = (received >= share * count) & (count > 0)
    total = mass.sum(-1)
    on_outliers = (mass * keys[:, None]).sum(-1)
    head_share = torch.where(total > 0, on_outliers / total.clamp_min(1e-30), total)
    return AttentionOutliers(received, importance, keys, importance >= share, head_share)


def check_criterion(criterion: str, tau: float) -> None:
    """Raise unless the criterion is known and tau is positive."""
    if criterion not in get_args(Criterion):
        raise ValueError(f"criterion: expected one of {get_args(Criterion)}, got {criterion!r}.")
    if not 0 < tau < math.inf:
        raise ValueError(f"tau: expected a finite number above 0, got {tau}.")


def check_share(share: float) -> None:
    """Raise unless the share is above 0 and at most 1."""
    if not 0 < share <= 1:
        raise ValueError(f"share: expected a number above 0 and at most 1, got {share}.")
