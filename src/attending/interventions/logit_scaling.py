"""Attention scaled to the number of its keys, in any model that runs at another size than trained.

Entropy-aware scaling of Jin et al. (2306.08645): in every self-attention layer the logits are
multiplied by `sqrt(ln N / ln T)`, for N keys now and T in training. It was made for text-to-image
models at other sizes; it goes wherever the number of keys has changed (pruned or merged tokens,
local windows, longer video). Its relatives are kinds of the same: see `attending.nn.logit_scale`.

    scaling = LogitScaling().calibrate(unet, inputs_at_training_size)   # T of each layer
    with scaling(unet) as run:
        pipe(prompt, height=768, width=768)
    print(run)

What is counted:

- keys, not queries, and only those that the query sees, so a padded batch scales each sample by its
  own length;
- for each layer by itself. A UNet has four numbers of tokens, and the T of its top level in its
  deep levels would correct them too little or too much;
- in joint attention over text and image (SD3, Flux) the tokens of both, as in Lumina 2 (whose
  processor in diffusers counts padding, too);
- with causal masks, row by row: a token's factor depends on the tokens before it and no later ones,
  so that decoding with a cache computes what one forward does. A row with fewer keys than T was in
  training just so (row i of a sequence of T tokens sees i + 1), so by default its factor is 1:
  only rows beyond T change. That is ours; the paper has no causal models.

Where attention goes along one axis of several (time, rows), its layers have a T of their own: that
of the axis. Cross-attention is left alone, as in the paper: its keys (77 tokens of text) do not
change. A bias that the model adds to the logits (ALiBi, relative positions) stays as it is.

The number of keys changes the statistics of attention. Convolutions, position codes and all else
that a model knows of its size stay as they are.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import torch
from torch import Tensor, nn

from attending.core.statistics import centred_logit_norm
from attending.interventions.intervention import (
    Counted,
    InterventionWarning,
    Run,
    with_counters,
)
from attending.nn.logit_scale import Kind, logit_scale
from attending.taps import AttentionCall, Proceed, tap
from attending.taps.running import as_batches, evaluating, run_model
from attending.taps.visible_keys import visible_keys


@dataclass(frozen=True)
class LogitScaling:
    """Scale the logits of self-attention to the number of keys, while a block runs.

    Attributes:
        kind: "normalized" (the paper's), "log" or "constant"; see `logit_scale`.
        n_train: keys in training: one number for all layers, or one by the name of the attention
            module, as `calibrate` finds them. A layer without a number is left alone.
        variance: for "constant": the variance of the logits in training by the name of the module,
            a number for each head. From `calibrate`.
        minimum: the least factor. None is 0 for maps in which all rows see the same keys, and 1 for
            causal and other maps that grow from row to row (see the module's docstring); a number
            is for both.
        maximum: the largest factor.
        cross: whether to scale cross-attention, too.
    """

    kind: Kind = "normalized"
    n_train: float | Mapping[str, float] | None = None
    variance: Mapping[str, Sequence[float]] | None = None
    minimum: float | None = None
    maximum: float | None = None
    cross: bool = False

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(
                f"kind: expected one of {', '.join(get_args(Kind))}, got {self.kind!r}."
            )
        numbers = self.n_train.values() if isinstance(self.n_train, Mapping) else [self.n_train]
        for number in numbers:
            if number is not None and not 1 <= number < math.inf:
                raise ValueError(f"n_train: expected counts of at least 1, got {number!r}.")
        low, high = self.minimum or 0.0, math.inf if self.maximum is None else self.maximum
        if not 0 <= low <= high or high == 0:
            raise ValueError(
                "minimum, maximum: expected 0 <= minimum <= maximum, and a maximum above 0, got "
                f"{self.minimum} and {self.maximum}."
            )

    def calibrate(self, model: nn.Module, inputs: Any) -> "LogitScaling":
        """The same with `n_train`, and for "constant" `variance`, as found in a dry run.

        Runs the model on inputs of the size that it was trained on, in evaluation mode and without
        gradients. The keys of a layer are the most that any query of a sample sees; over samples
        of several lengths the geometric mean is taken, as only logs matter.

        Args:
            model: what will be scaled.
            inputs: a mapping of the model's arguments, a tuple of positional ones, a tensor, or an
                iterable of those. The values do not matter, but for `kind="constant"`.

        Raises:
            attending.taps.TapError: if no attention call was seen; the message says what to set.
            ValueError: if there was no self-attention among the calls.
        """
        logs: dict[str, list[Tensor]] = {}
        spreads: dict[str, list[Tensor]] = {}

        def record(call: AttentionCall, proceed: Proceed) -> Tensor:
            if (call.is_cross and not self.cross) or not call.key_length:
                return proceed(call)
            counts, _ = visible_keys(call)
            most = counts.amax((1, 2)).clamp_min(1)
            # One entry for each sample, so that batches of different sizes count as they should.
            logs.setdefault(call.name, []).append(
                most.double().log().expand(call.query.shape[0]).cpu()
            )
            if self.kind == "constant":
                spreads.setdefault(call.name, []).append(_variance(call, counts, most).cpu())
            return proceed(call)

        with evaluating(model), torch.no_grad(), tap(model, record):
            for batch in as_batches(inputs):
                run_model(model, batch)
        if not logs:
            raise ValueError(
                "model: expected self-attention to calibrate, got calls of cross-attention only. "
                "Set cross=True to scale those."
            )
        n_train = {name: float(torch.cat(found).mean().exp()) for name, found in logs.items()}
        n_train = {name: _whole(count) for name, count in n_train.items()}
        variance = {
            name: tuple(float(v) for v in torch.cat(found).mean(0).clamp_min(1e-6))
            for name, found in spreads.items()
        }
        return replace(self, n_train=n_train, variance=variance or None)

    def __call__(self, model: nn.Module) -> Counted:
        """The context manager within which the model's attention is scaled; it yields the counts.

        Raises:
            ValueError: without `n_train` (or `variance`, for "constant"), or for names in it that
                are no modules of the model. Within the block: for nested tensors.

        Warns:
            InterventionWarning: within the block, where the model scales its attention already, and
                where one number is given for layers of different sizes. On exit, if nothing was
                scaled, with the reason.
        """
        self._check(model)
        return with_counters(model, lambda run: _Handler(self, run), name="LogitScaling")

    def factors(self, model: nn.Module, inputs: Any) -> dict[str, tuple[float, float]]:
        """The smallest and the largest factor of each layer, by its name, for one batch.

        Runs the model on it, scaled, in evaluation mode and without gradients. Layers that are left
        alone are missing.

        Raises:
            ValueError: as when called.
        """
        found: dict[str, tuple[float, float]] = {}

        def record(call: AttentionCall, proceed: Proceed) -> Tensor:
            factor = self.factor(call)
            if factor is not None:
                low, high = torch.as_tensor(factor).aminmax()
                found[call.name] = float(low), float(high)
            return proceed(call)

        self._check(model)
        scaled = tap(model, _Handler(self, Run("LogitScaling")))
        with evaluating(model), torch.no_grad(), tap(model, record), scaled:
            run_model(model, inputs)
        return found

    def _check(self, model: nn.Module) -> None:
        for name in ("n_train", "variance")[: 2 if self.kind == "constant" else 1]:
            given = getattr(self, name)
            if given is None:
                raise ValueError(
                    f"{name}: expected numbers for kind {self.kind!r}, got None. Call "
                    "scaling.calibrate(model, inputs_at_training_size) and use what it returns."
                )
            if isinstance(given, Mapping):
                known = dict(model.named_modules())
                unknown = [one for one in given if one not in known]
                if unknown:
                    raise ValueError(
                        f"{name}: expected names of modules of {type(model).__name__}, got "
                        f"{unknown[0]!r}. Calibrate with the very model that is scaled."
                    )

    def _n_train(self, call: AttentionCall) -> float | None:
        if isinstance(self.n_train, Mapping):
            return self.n_train.get(call.name)
        return self.n_train

    def factor(self, call: AttentionCall) -> float | Tensor | None:
        """The factor of a call's logits, None where it is left alone.

        Returns:
            A number where all rows have the same, else a tensor that broadcasts to
            `[batch, heads, queries]`.
        """
        n_train = self._n_train(call)
        if n_train is None or (call.is_cross and not self.cross) or not call.key_length:
            return None
        if self.kind == "constant" and call.name not in (self.variance or {}):
            return None
        counts, grows = visible_keys(call)
        counts = counts.to(torch.promote_types(call.query.dtype, torch.float32))
        low = self.minimum if self.minimum is not None else float(grows)
        high = math.inf if self.maximum is None else self.maximum
        if self.kind == "constant":
            assert self.variance is not None
            spread = counts.new_tensor(self.variance[call.name])[:, None]
            scales = logit_scale(counts, n_train, self.kind, spread).clamp(low, high)
        else:
            lowest, highest = (float(end) for end in counts.aminmax())
            ends = [
                min(max(logit_scale(n, n_train, self.kind), low), high) for n in (lowest, highest)
            ]
            if ends[0] == ends[1]:
                return ends[0]
            scales = logit_scale(counts, n_train, self.kind).clamp(low, high)
        return scales


class _Handler:
    """Stands in for the function; knows what it has warned of."""

    def __init__(self, scaling: LogitScaling, run: Run) -> None:
        self.scaling, self.run = scaling, run
        self._warned: set[str] = set()
        self._forward = -1
        self._lengths: set[int] = set()  # of the keys, in this forward

    def __call__(self, call: AttentionCall, proceed: Proceed) -> Tensor:
        factor = self.scaling.factor(call)
        if factor is None:
            why = "it is cross-attention" if call.is_cross else "its layer has no n_train"
            self.run.left(call, why)
            return proceed(call)
        self._look(call)
        if isinstance(factor, float) and factor == 1.0:
            self.run.left(call, "it has no more and no fewer keys than in training")
            return proceed(call)
        heads = call.num_heads if call.query.dim() == 4 else 1
        rows = call.query.shape[:-1].numel()
        self.run.edited(call, heads=range(heads), rows=rows)
        if isinstance(factor, float):  # into the scale, which is never in half precision
            return proceed(replace(call, scale=call.softmax_scale * factor))
        while factor.dim() >= call.query.dim():  # a call without a dimension of heads
            factor = factor.squeeze(0)
        query = call.query * factor[..., None].to(call.query.dtype)
        return proceed(replace(call, query=query))

    def _look(self, call: AttentionCall) -> None:
        usual = getattr(call.module, "scale", getattr(call.module, "scaling", None))
        if (
            isinstance(usual, float)
            and call.scale not in (None, 1.0)  # 1: the query was multiplied before (Whisper, OPT)
            and not math.isclose(call.scale, usual, rel_tol=1e-6)
        ):
            self._warn(
                "scale",
                f"{call.name}: the scale {call.scale:.6g} of this call is not the module's own, "
                f"{usual:.6g}, so the model, or another block, scales already (diffusers' Lumina "
                "pipelines do, by proportional_attn=True). Twice the scaling is another kind.",
            )
        if isinstance(self.scaling.n_train, Mapping):
            return
        if call.forward != self._forward:
            self._forward, self._lengths = call.forward, set()
        self._lengths.add(call.key_length)
        if len(self._lengths) > 1:
            self._warn(
                "n_train",
                f"n_train: one number, {self.scaling.n_train}, for layers of "
                f"{sorted(self._lengths)} keys cannot be right for all of them. Use what "
                "scaling.calibrate(model, inputs) returns.",
            )

    def _warn(self, kind: str, message: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(message, InterventionWarning, stacklevel=2)


def _variance(call: AttentionCall, counts: Tensor, most: Tensor) -> Tensor:
    """The variance of a row's logits, `[batch, heads]`: mean over the rows that see most keys."""
    norm = centred_logit_norm(
        call.query,
        call.key,
        attn_mask=call.attn_mask,
        is_causal=call.is_causal,
        scale=call.scale,
        enable_gqa=call.enable_gqa,
    ).double()
    weights = (2 * counts >= most[:, None, None]).expand(norm.shape).double()
    spread = norm.square() / counts.clamp_min(1)
    return (spread * weights).sum(2) / weights.sum(2).clamp_min(1.0)


def _whole(count: float) -> float:
    """The count without the rounding of its log."""
    return round(count) if math.isclose(count, round(count), rel_tol=1e-9) else count
