"""How the entropy of a model's attention changes with the number of its keys.

Softmax spreads over its keys. For Gaussian logits of variance v, entropy is `ln N - v / 2`: at a
fixed scale it grows with the log of the number of keys, and `entropy / ln N` grows towards 1. A
model that runs at another size than trained therefore attends more evenly, or more sharply, than it
learned to. The curve shows it layer by layer; within a block of
`attending.interventions.logit_scaling.LogitScaling` it shows what scaling makes of it.

    curve = entropy_curve(model, {side: images_of(side) for side in (8, 12, 16)})
    print(curve)
    with LogitScaling().calibrate(model, images_of(8))(model):
        print(entropy_curve(model, {side: images_of(side) for side in (8, 12, 16)}))

Background: Jin et al. (2306.08645), whose proposition has the growth with `ln N`; the constant
`v / 2` is the project's derivation.
"""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from attending.core.masks import seen_keys
from attending.core.statistics import entropy
from attending.taps import AttentionCall, Proceed, tap
from attending.taps.running import as_batches, evaluating, run_model
from attending.taps.visible_keys import visible_keys


@dataclass(frozen=True, eq=False)
class EntropyCurve:
    """Entropy against size; prints as a table.

    Attributes:
        sizes: the names of the sizes, in the order in which they were given.
        layers: the names of the attention modules.
        keys: how many keys a row sees, the geometric mean over rows.
        entropy: of a row, in nats; mean over samples, heads and rows.
        normalized: entropy over the log of the keys that the row sees, mean likewise; rows that see
            one key are left out of all three.
    """

    sizes: tuple[Hashable, ...]
    layers: tuple[str, ...]
    keys: Float[Tensor, "sizes layers"]
    entropy: Float[Tensor, "sizes layers"]
    normalized: Float[Tensor, "sizes layers"]

    @property
    def drift(self) -> Float[Tensor, " layers"]:
        """The largest minus the smallest normalised entropy over the sizes, of each layer."""
        return self.normalized.amax(0) - self.normalized.amin(0)

    @property
    def slope(self) -> Float[Tensor, " layers"]:
        """Nats of entropy for each nat of `ln keys`, by least squares; nan with one size.

        1 where the logits have the same variance at every size; below 1 where scaling keeps
        `entropy / ln N`: then it is that ratio.
        """
        log = self.keys.log()
        log = log - log.mean(0)
        square = log.square().sum(0)
        return torch.where(square > 0, (log * self.entropy).sum(0) / square, torch.nan)

    def __str__(self) -> str:
        """One line for each size: means over the layers."""
        lines = [f"{'size':>12} {'keys':>9} {'entropy':>9} {'/ ln N':>9}"]
        rows = zip(self.sizes, self.keys, self.entropy, self.normalized, strict=True)
        for size, keys, nats, share in rows:
            mean = float(keys.log().mean().exp())
            lines.append(
                f"{size!s:>12} {mean:9.1f} {float(nats.mean()):9.3f} {float(share.mean()):9.3f}"
            )
        drift, slope = float(self.drift.mean()), float(self.slope.mean())
        lines.append(f"{len(self.layers)} layers; drift {drift:.3f}, slope {slope:.3f}")
        return "\n".join(lines)


def entropy_curve(
    model: nn.Module,
    inputs_by_size: Mapping[Any, Any],
    *,
    last: int | None = None,
    cross: bool = False,
) -> EntropyCurve:
    """Run a model on inputs of several sizes and measure the entropy of its attention.

    Exact, without a map; in evaluation mode and without gradients. Padding does not count, neither
    as a row nor as a key.

    Args:
        model: any model that a tap can see.
        inputs_by_size: for each size a batch (a mapping of the model's arguments, a tuple of
            positional ones, a tensor) or an iterable of batches. The names of the sizes are for the
            report; keys are counted where attention happens.
        last: of causal maps, how many rows at the end of each sample count, as early rows see few
            keys at any size. All by default.
        cross: measure cross-attention instead of self-attention.

    Returns:
        The curve. A module that attends more than once in a forward has the mean of its calls.

    Raises:
        ValueError: for no sizes, a `last` below 1, or a model without such attention, or whose
            attention modules are others from size to size.
        attending.taps.TapError: if no attention call was seen; the message says what to set.
    """
    if not inputs_by_size:
        raise ValueError("inputs_by_size: expected inputs for at least one size, got none.")
    if last is not None and last < 1:
        raise ValueError(f"last: expected at least 1 row, got {last}.")
    found = {size: _Sums(last, cross) for size in inputs_by_size}
    with evaluating(model), torch.no_grad():
        for size, inputs in inputs_by_size.items():
            with tap(model, found[size]):
                for batch in as_batches(inputs):
                    run_model(model, batch)
    layers = tuple(next(iter(found.values())).by_layer)
    for size, sums in found.items():
        if set(sums.by_layer) != set(layers) or not layers:
            kind = "cross-attention" if cross else "self-attention"
            raise ValueError(
                f"inputs_by_size: expected calls of {kind} from the same modules at every size, "
                f"got {len(layers)} modules, and {len(sums.by_layer)} at size {size!r}."
            )
    table = torch.stack(
        [torch.stack([one.by_layer[name] for name in layers]) for one in found.values()]
    )
    count, log_keys, nats, shares = table.unbind(-1)
    count = count.where(count > 0, torch.nan)
    return EntropyCurve(
        tuple(found), layers, (log_keys / count).exp(), nats / count, shares / count
    )


class _Sums:
    """A handler that adds up, by layer: rows, log keys, entropy, and entropy over log keys."""

    def __init__(self, last: int | None, cross: bool) -> None:
        self.last, self.cross = last, cross
        self.by_layer: dict[str, Tensor] = {}

    def __call__(self, call: AttentionCall, proceed: Proceed) -> Tensor:
        if call.is_cross == self.cross and call.key_length:
            found = self._measure(call)
            self.by_layer[call.name] = self.by_layer.get(call.name, torch.zeros(4)) + found
        return proceed(call)

    def _measure(self, call: AttentionCall) -> Tensor:
        query, key, mask = call.query, call.key, call.attn_mask
        if query.dim() == 3:  # no dimension of heads
            query, key = query[:, None], key[:, None]
            mask = mask[:, None] if mask is not None and mask.dim() == 3 else mask
        nats = entropy(
            query,
            key,
            attn_mask=mask,
            is_causal=call.is_causal,
            scale=call.scale,
            enable_gqa=call.enable_gqa,
        ).double()
        counts, _ = visible_keys(call)
        if call.query.dim() == 3:
            counts = counts.transpose(0, 1)
        counts = counts.expand(nats.shape)
        real = counts > 1
        if mask is not None and call.query_length == call.key_length:
            shape = (1,) * (4 - mask.dim()) + tuple(mask.shape)
            real = real & seen_keys(mask.reshape(shape), len(nats), call.key_length)[:, None]
        if self.last is not None:
            most = counts.where(real, 0).amax(2, keepdim=True)
            real = real & (counts > most - self.last)
        log = counts.clamp_min(2).double().log()
        parts = (torch.ones_like(nats), log, nats, nats / log)
        return torch.stack([part.where(real, 0.0).sum() for part in parts]).float().cpu()
