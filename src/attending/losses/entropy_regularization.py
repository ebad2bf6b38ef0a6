"""A band around the entropy of every attention head, to train with: entropy-guided attention.

Heads that look evenly at everything ("entropic overload") or at one key only ("entropy collapse")
carry little. This loss pulls the entropy of each head into a band around a learned target and is 0
inside the band. It needs the row entropies and nothing else, which
`attending.core.statistics.entropy` computes on the fused kernels, with gradients: no attention map
is ever stored. `EntropyRegularizer` collects them from any model.

Source: Jha and Reagen, "Entropy-Guided Attention for Private LLMs" (arXiv 2501.03489),
Algorithm 1; and the authors' loss class, which computes something else (see `Semantics`).
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Entropies: TypeAlias = Float[Tensor, "batch _heads queries"]
Thresholds: TypeAlias = Float[Tensor, " _heads"]

Semantics: TypeAlias = Literal["paper", "official"]
"""What is compared with the band.

- `"paper"` (Algorithm 1): the entropy of a head, its mean over batch and queries. One penalty per
  head; mean over heads and layers.
- `"official"` (the authors' code): the entropy of every single row. One penalty per head, batch
  element and query, *summed* over batch and queries, mean over heads and layers. So the same weight
  acts `batch * queries` times as strongly, and rows deviate where their head does not.
"""


def entropy_regularization(
    entropies: Sequence[Entropies],
    thresholds: Sequence[Thresholds] | Float[Tensor, "layers heads"],
    *,
    max_entropy: float | Tensor | Sequence[float | Tensor],
    tolerance: float = 0.2,
    semantics: Semantics = "paper",
    query_mask: Bool[Tensor, "batch queries"] | Sequence[Tensor | None] | None = None,
) -> Float[Tensor, ""]:
    """The mean squared deviation of attention entropies that lie outside a band.

        delta   = E - threshold * max_entropy
        penalty = delta^2  if |delta| > tolerance * max_entropy  else 0
        loss    = mean over layers of mean over heads of penalty

    with `E` as `semantics` says. The penalty jumps at the edge of the band, from 0 to
    `(tolerance * max_entropy)^2`: that is the paper's, and it is not smoothed here. Inside the band
    neither the entropies nor the thresholds get a gradient; `tolerance=0` is the plain square.

    Args:
        entropies: of the rows, in nats, one tensor per layer. Head counts and lengths may differ
            between layers.
        thresholds: the targets as shares of `max_entropy`, one tensor per layer, usually learned.
            (The official code takes those of the first layer for all. To have that, pass
            `[theta] * num_layers`.)
        max_entropy: the entropy that a threshold of 1 stands for, in nats: `log(context)` in the
            paper, for every row, also where a causal mask lets a row see fewer keys. A tensor that
            broadcasts to `[batch, heads, queries]` gives each row its own; with `"paper"` semantics
            a head is then measured against the mean over its rows. Or one of these per layer.
        tolerance: half the width of the band, as a share of `max_entropy` (gamma in the paper,
            which settles on 0.2).
        semantics: see `Semantics`.
        query_mask: True for the rows that count, for batches with padding; or one per layer. The
            official code has none.

    Returns:
        A scalar, not yet multiplied by the weight of the loss (lambda: 1e-5 and 5e-5 in the paper).
        0 where no row counts. NaN if an entropy is NaN: the official code hides that.

    Raises:
        ValueError: for shapes that do not fit together, no layers, or a tolerance below 0.
    """
    if semantics not in ("paper", "official"):
        raise ValueError(f'semantics: expected "paper" or "official", got {semantics!r}.')
    if not tolerance >= 0:
        raise ValueError(f"tolerance: expected a number of at least 0, got {tolerance}.")
    if len(entropies) == 0:
        raise ValueError("entropies: expected one tensor per layer, got no layers.")
    if len(thresholds) != len(entropies):
        raise ValueError(
            f"thresholds: expected one tensor [heads] for each of the {len(entropies)} layers of "
            f"entropies, got {len(thresholds)}."
        )
    ceilings = _for_each_layer("max_entropy", max_entropy, len(entropies))
    masks = _for_each_layer("query_mask", query_mask, len(entropies))
    layers: list[Tensor] = []
    for entropy, threshold, ceiling, mask in zip(
        entropies, thresholds, ceilings, masks, strict=True
    ):
        rows = _check_layer(len(layers), entropy, threshold, ceiling, mask)
        layers.append(_layer_penalty(rows, tolerance, semantics))
    first = layers[0]
    return torch.stack([layer.to(first.device) for layer in layers]).mean()


class _Layer(NamedTuple):
    """The arguments of one layer, checked: same device and dtype, shapes that broadcast."""

    entropy: Tensor  # [batch, heads, queries]
    threshold: Tensor  # [heads]
    ceiling: Tensor  # [batch, heads, queries]
    counted: Tensor  # [batch, 1, queries], boolean


def _for_each_layer(name: str, value: Any, layers: int) -> list[Any]:
    if value is None or isinstance(value, int | float | Tensor):
        return [value] * layers
    if len(value) != layers:
        raise ValueError(
            f"{name}: expected one for all or one for each of the {layers} layers, "
            f"got {len(value)}."
        )
    return list(value)


def _check_layer(
    index: int, entropy: Tensor, threshold: Tensor, ceiling: float | Tensor, mask: Tensor | None
) -> _Layer:
    if entropy.dim() != 3 or not entropy.is_floating_point():
        raise ValueError(
            f"entropies[{index}]: expected floats [batch, heads, queries], got {entropy.dtype} "
            f"{list(entropy.shape)}. attending.statistics.entropy returns that."
        )
    batch, heads, queries = entropy.shape
    if tuple(threshold.shape) != (heads,):
        raise ValueError(
            f"thresholds[{index}]: expected [heads] = [{heads}], those of entropies[{index}], got "
            f"{list(threshold.shape)}."
        )
    ceiling = torch.as_tensor(ceiling, dtype=entropy.dtype, device=entropy.device)
    fits = ceiling.dim() <= 3 and all(
        size in (1, whole)
        for size, whole in zip(reversed(ceiling.shape), reversed(entropy.shape), strict=False)
    )
    if not fits:
        raise ValueError(
            f"max_entropy: expected a number or a tensor that broadcasts to [batch, heads, "
            f"queries] = {list(entropy.shape)}, got {list(ceiling.shape)}."
        )
    if mask is None:
        mask = torch.ones(batch, queries, dtype=torch.bool)
    elif mask.dtype != torch.bool or tuple(mask.shape) != (batch, queries):
        raise ValueError(
            f"query_mask: expected a boolean tensor [batch, queries] = {[batch, queries]} (True = "
            f"the row counts), got {mask.dtype} {list(mask.shape)}. A mask of 0 and 1 becomes "
            "boolean with query_mask.bool()."
        )
    return _Layer(
        entropy,
        threshold.to(entropy),
        ceiling.expand(entropy.shape),
        mask.to(entropy.device)[:, None],
    )


def _layer_penalty(layer: _Layer, tolerance: float, semantics: Semantics) -> Tensor:
    """Mean over the heads of one layer."""
    # A row that does not count is cut out before it is multiplied by anything: 0 * NaN is NaN.
    entropy = layer.entropy.where(layer.counted, 0.0)
    ceiling = layer.ceiling.where(layer.counted, 0.0)
    threshold = layer.threshold[:, None]
    if semantics == "paper":
        count = layer.counted.sum().clamp_min(1)
        entropy = entropy.sum((0, 2))[:, None] / count
        ceiling = ceiling.sum((0, 2))[:, None] / count
    delta = entropy - threshold * ceiling
    outside = delta.detach().abs() > tolerance * ceiling
    penalty = delta.square().where(outside | delta.isnan(), 0.0)
    return penalty.sum() / max(penalty.shape[-2], 1)


def entropy_quartiles(
    head_entropies: Float[Tensor, "..."], largest: float | None = None
) -> Float[Tensor, " 4"]:
    """The shares of heads in four equal bins of entropy, from collapsed to overloaded.

    The paper's reading: the bins are [0, 1/4), [1/4, 1/2), [1/2, 3/4) and [3/4, 1] of the largest
    head entropy *observed* in the model, so some head is always in the last one. About 90 % of
    heads in the two middle bins is healthy; many heads in the last one is "entropic overload", many
    in the first one "entropy collapse".

    Args:
        head_entropies: mean entropy of each head, in any shape.
        largest: the upper end of the bins in nats, in place of the largest observed one; heads
            above it count in the last bin.

    Returns:
        Four shares that sum to 1. If all entropies are 0, all heads are in the first bin.
    """
    values = head_entropies.detach().flatten().double()
    if values.numel() == 0 or not bool(values.isfinite().all()):
        raise ValueError(
            f"head_entropies: expected at least one head and finite numbers, got {head_entropies}."
        )
    top = float(values.max()) if largest is None else float(largest)
    if top <= 0:
        bins = torch.zeros_like(values, dtype=torch.long)
    else:
        bins = (values / top * 4).long().clamp(0, 3)
    return torch.bincount(bins, minlength=4).double() / values.numel()
