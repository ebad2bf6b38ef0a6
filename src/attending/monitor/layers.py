"""Entropy, sinks and the largest logit of every attention call of a forward."""

import dataclasses
from collections import Counter
from collections.abc import Callable
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from attending.core import statistics
from attending.core.statistics._call import prepare
from attending.diagnosis.heads import key_importance, share_of_entropy
from attending.diagnosis.problems import (
    Problem,
    call_in_four_dimensions,
    problems,
    visible_tokens,
)
from attending.diagnosis.tokens import decoder_padding
from attending.monitor.records import LayerMeasurement
from attending.taps import AttentionCall, Proceed, tap

PerHead = Float[Tensor, " heads"]


class LayerTotals:
    """Sums over the sequences of the probe batch, for each head of one module.

    They stay on the device until `measurement`, so that a GPU need not be waited for at each layer.

    Args:
        name: of the module.
        layer: its number.
        kind: what it attends to.
    """

    def __init__(self, name: str, layer: int | None, kind: Literal["self", "cross"]) -> None:
        self.name, self.layer, self.kind = name, layer, kind
        self._rows = self._sequences = 0
        self._sums: list[PerHead] = []
        self._logit: PerHead | None = None

    def add(self, problem: Problem) -> None:
        """Take in the attention of some sequences."""
        summary = statistics.map_summary(
            problem.query, problem.key, with_max_probability=True, **problem.arguments
        )
        assert summary.max_probability is not None
        call = prepare(problem.query, problem.key, **problem.arguments)
        visible = call.visible_keys().expand(summary.entropy.shape)
        sums = [
            summary.entropy.sum((0, 2)),
            share_of_entropy(summary.entropy, visible).sum((0, 2)),
            (visible > 1).to(summary.entropy).sum((0, 2)),
            key_importance(call, summary.mass).amax(-1).sum(0),
            summary.mass[..., 0].sum(0),
        ]
        # max_j p_j = exp(max_j s_j - lse): the largest score of a row, and no map is needed. An
        # empty row has lse = -inf.
        logit = (summary.lse + summary.max_probability.log()).amax((0, 2))
        if self._logit is not None:
            sums = [old + new for old, new in zip(self._sums, sums, strict=True)]
            logit = torch.maximum(self._logit, logit)
        self._sums, self._logit = sums, logit
        self._sequences += problem.query.shape[0]
        self._rows += problem.query.shape[0] * problem.query.shape[2]

    def measurement(self) -> LayerMeasurement:
        """Least, mean and largest over the heads."""
        assert self._logit is not None
        entropy, share, counted, sink, first, logit = torch.stack([*self._sums, self._logit]).cpu()
        entropy, share = entropy / self._rows, torch.where(counted > 0, share / counted, 1.0)
        sink, first = sink / self._sequences, first / self._rows
        return LayerMeasurement(
            name=self.name,
            layer=self.layer,
            kind=self.kind,
            entropy_min=float(entropy.min()),
            entropy_mean=float(entropy.mean()),
            entropy_max=float(entropy.max()),
            normalized_entropy_min=float(share.min()),
            normalized_entropy_mean=float(share.mean()),
            normalized_entropy_max=float(share.max()),
            sink_mean=float(sink.mean()),
            sink_max=float(sink.max()),
            first_token_mean=float(first.mean()),
            first_token_max=float(first.max()),
            logit_max=float(logit.max()),
            entropy_min_head=int(entropy.argmin()),
            logit_max_head=int(logit.argmax()),
        )


def measure_layers(
    model: nn.Module, batch: Any, forward: Callable[[nn.Module, Any], Any]
) -> list[LayerMeasurement]:
    """Run a model once and measure each of its attention calls.

    Args:
        model: in evaluation mode, without gradients.
        batch: what it gets.
        forward: calls it with the batch.
    """
    layers: dict[str, LayerTotals] = {}
    calls: Counter[str] = Counter()

    def watch(call: AttentionCall, proceed: Proceed) -> Tensor:
        output = proceed(call)
        if call.query.is_nested or not call.query_length or not call.key_length:
            return output
        calls[call.name] += 1
        count = calls[call.name]
        name = call.name if count == 1 else f"{call.name}#{count}"
        kind: Literal["self", "cross"] = "cross" if call.is_cross else "self"
        shown = call_in_four_dimensions(_as_autocast_casts(call))
        # What the kernel gets may be in half precision, but not the statistics of it.
        with torch.autocast(call.query.device.type, enabled=False):
            for problem in problems(shown, *visible_tokens(shown, decoder_padding(batch))):
                layers.setdefault(name, LayerTotals(name, call.layer, kind)).add(problem)
        return output

    with tap(model, watch):
        forward(model, batch)
    return [layer.measurement() for layer in layers.values()]


def _as_autocast_casts(call: AttentionCall) -> AttentionCall:
    """Autocast rounds query and key after the tap has seen them, on the way to the kernel."""
    device = call.query.device.type
    if not torch.is_autocast_enabled(device) or call.query.dtype == torch.float64:
        return call
    dtype = torch.get_autocast_dtype(device)
    return dataclasses.replace(call, query=call.query.to(dtype), key=call.key.to(dtype))
