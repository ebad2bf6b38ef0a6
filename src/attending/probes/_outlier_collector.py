"""Turns what hooks and the tap show of a running model into the records of an `OutlierReport`."""

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attending.core.statistics import column_mass
from attending.probes.outlier_report import (
    ActivationRecord,
    AttentionRecord,
    OutlierReport,
    OutlierToken,
    Overlap,
    WeightRecord,
)
from attending.probes.outlier_rules import Criterion, activation_outliers, attention_outliers
from attending.taps import AttentionCall, Proceed
from attending.taps.blocks import outermost
from attending.taps.running import first_tensor

TOP = 3  # largest magnitudes that are shown of a place, as in the official code
LAYER_SHARE = 0.25  # LLM.int8: an outlier feature is one in this share of the layers


class Collector:
    """What hooks and tap show, turned into records at once, so that no tensor is kept."""

    def __init__(self, criterion: Criterion, tau: float, attention_share: float) -> None:
        self.criterion, self.tau, self.attention_share = criterion, tau, attention_share
        self.activations: dict[tuple[str, str], ActivationRecord] = {}
        self.attention: dict[str, AttentionRecord] = {}
        self.counts: Counter[tuple[str, str]] = Counter()
        self.skipped: dict[str, str] = {}
        self.batch: Any = {}
        self.sequences = self.tokens = 0
        self.size = 0  # sequences of this batch
        self.seen = False

    def begin(self, batch: Any) -> None:
        """A batch follows."""
        first = first_tensor(batch)
        if first is None or first.dim() == 0:
            raise ValueError("batches: expected a tensor in every batch, got one without any.")
        self.batch, self.size, self.seen = batch, first.shape[0], False

    def finish(self) -> None:
        """The batch is through."""
        self.sequences += self.size

    def block(self, name: str, hidden: Tensor) -> None:
        """The output of a block."""
        self._activation(name, "block", hidden)

    def down_projection(self, name: str, hidden: Tensor) -> None:
        """The input of a down-projection."""
        self._activation(name, "down_projection", hidden)

    def _activation(self, name: str, where: Any, hidden: Tensor) -> None:
        if hidden.shape[0] != self.size:
            self.skipped[name] = f"a batch of {hidden.shape[0]} for {self.size} sequences"
            return
        mask = self._token_mask(name, hidden.shape[0], hidden.shape[1])
        self._see(hidden.shape[0], hidden.shape[1], mask)
        found = activation_outliers(hidden, criterion=self.criterion, tau=self.tau, token_mask=mask)
        record = self.activations.setdefault((name, where), ActivationRecord(name, where))
        record.largest = _larger(record.largest, float(found.largest.max()))
        before = self.counts[name, where]
        self.counts[name, where] += len(hidden)
        for field in ("mean", "median", "threshold"):
            total = getattr(record, field) * before + float(getattr(found, field).sum())
            setattr(record, field, total / (before + len(hidden)))
        magnitudes = hidden.abs().to(found.largest.dtype)
        if mask is not None:
            magnitudes = magnitudes.masked_fill(~mask.to(hidden.device)[..., None], 0.0)
        top = magnitudes.flatten(1).topk(min(TOP, magnitudes[0].numel())).values.sum(0)
        record.top = [
            (old * before + float(new)) / (before + len(hidden))
            for old, new in zip(record.top or [0.0] * TOP, top, strict=False)
        ]
        peaks = magnitudes.amax((0, 1)).tolist()
        if record.by_channel:
            peaks = [_larger(*pair) for pair in zip(record.by_channel, peaks, strict=True)]
        record.by_channel = peaks
        for sequence, position in found.tokens.nonzero().tolist():
            outliers = magnitudes[sequence, position] * found.elements[sequence, position]
            channel = int(outliers.argmax())
            value = float(hidden[sequence, position, channel])
            token = self._token(sequence, position, mask, value, channel)
            record.tokens.append(token)
        for channel in found.channels.any(0).nonzero().flatten().tolist():
            largest = float(magnitudes[..., channel][found.elements[..., channel]].max())
            record.channels[channel] = max(record.channels.get(channel, 0.0), largest)

    def attention_call(self, call: AttentionCall, proceed: Proceed) -> Tensor:
        """A call of attention: a handler for the tap."""
        output = proceed(call)
        why = self._why_not(call)
        if why is not None:
            self.skipped[call.name] = why
            return output
        batch, heads, length, _ = call.query.shape
        mask = self._token_mask(call.name, batch, length)
        self._see(batch, length, mask)
        real = torch.ones(batch, length, dtype=torch.bool) if mask is None else mask
        real = real.to(call.query.device)
        mass = column_mass(
            call.query,
            call.key,
            query_weights=None if mask is None else real[:, None].float(),
            attn_mask=call.attn_mask,
            is_causal=call.is_causal,
            scale=call.scale,
            enable_gqa=call.enable_gqa,
        )
        queries = real.sum(-1)
        found = attention_outliers(
            mass, _visible_queries(call, real), queries, share=self.attention_share
        )
        record = self.attention.setdefault(
            call.name, AttentionRecord(call.name, 0.0, [0.0] * heads)
        )
        before = self.counts[call.name, "attention"]
        self.counts[call.name, "attention"] += batch
        total = found.head_share.sum(0).tolist()
        record.head_share = [
            (old * before + new) / (before + batch)
            for old, new in zip(record.head_share, total, strict=True)
        ]
        share = found.received / queries.clamp_min(1)[:, None]
        record.largest_share = _larger(record.largest_share, float(share.max()))
        for keys, values, kept in (
            (found.keys, share, record.tokens),
            (found.fair_keys, found.importance, record.fair_tokens),
        ):
            for sequence, position in keys.nonzero().tolist():
                value = float(values[sequence, position])
                kept.append(self._token(sequence, position, mask, value))
        return output

    def _why_not(self, call: AttentionCall) -> str | None:
        if call.is_cross:
            return "cross-attention; the rule is for self-attention"
        if call.query.dim() != 4 or call.query_length != call.key_length:
            return "not as many queries as keys; the rule is for self-attention"
        if call.query.shape[0] != self.size:
            return f"a batch of {call.query.shape[0]} for {self.size} sequences (windows, chunks)"
        return None

    def _see(self, batch: int, tokens: int, mask: Tensor | None) -> None:
        if not self.seen:
            self.seen = True
            self.tokens += batch * tokens if mask is None else int(mask.sum())

    def _token_mask(
        self, name: str, batch: int, tokens: int
    ) -> Bool[Tensor, "batch tokens"] | None:
        """The padding mask that fits hidden states at this place."""
        if not isinstance(self.batch, Mapping):
            return None
        in_decoder = "encoder" not in name.split(".") and "decoder" in name.split(".")
        has_two = "decoder_input_ids" in self.batch or "labels" in self.batch
        key = "decoder_attention_mask" if in_decoder and has_two else "attention_mask"
        mask = self.batch.get(key)
        if isinstance(mask, Tensor) and tuple(mask.shape) == (batch, tokens):
            return mask.bool()
        return None

    def _token(
        self,
        sequence: int,
        position: int,
        mask: Tensor | None,
        value: float,
        channel: int | None = None,
    ) -> OutlierToken:
        named = isinstance(self.batch, Mapping)
        ids = self.batch.get("input_ids") if named else first_tensor(self.batch)
        token = None
        if isinstance(ids, Tensor) and not ids.is_floating_point() and ids.dim() == 2:
            fits = sequence < ids.shape[0] and position < ids.shape[1]
            token = int(ids[sequence, position]) if fits else None
        if mask is not None:
            position = int(mask[sequence, :position].sum())
        return OutlierToken(self.sequences + sequence, position, token, value, channel)

    def report(self, weights: list[WeightRecord], weight_factor: float) -> OutlierReport:
        """All that was seen."""
        blocks = set(outermost([name for name, where in self.activations if where == "block"]))
        activations = [
            record
            for (name, where), record in self.activations.items()
            if where == "down_projection" or name in blocks
        ]
        activations.sort(key=lambda record: record.where)  # blocks first
        residual = [record for record in activations if record.where == "block"]
        channels = Counter(channel for record in residual for channel in record.channels)
        least = LAYER_SHARE * len(residual) if self.criterion == "magnitude" else 0
        kept = {channel: count for channel, count in channels.items() if count >= least}
        attention = list(self.attention.values())
        skipped = {name: why for name, why in self.skipped.items() if name not in self.attention}
        return OutlierReport(
            criterion=self.criterion,
            tau=self.tau,
            attention_share=self.attention_share,
            weight_factor=weight_factor,
            activations=activations,
            weights=weights,
            attention=attention,
            overlap=_overlap(activations, weights, attention, set(kept)),
            channels=dict(sorted(kept.items())),
            sequences=self.sequences,
            tokens=self.tokens,
            skipped=skipped,
        )


def _visible_queries(
    call: AttentionCall, real: Bool[Tensor, "batch queries"]
) -> Float[Tensor, "batch #heads keys"]:
    """How many real queries see each key."""
    weight = real.float()
    if call.is_causal:
        return weight.flip(-1).cumsum(-1).flip(-1)[:, None]
    if call.attn_mask is None:
        return weight.sum(-1, keepdim=True).expand_as(weight)[:, None]
    mask = call.attn_mask
    # What hides a key in a float mask is -inf, or the most negative number of its dtype.
    visible = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    visible = visible.reshape((1,) * (4 - visible.dim()) + tuple(visible.shape))
    visible = visible.expand(*visible.shape[:2], call.query_length, call.key_length)
    return (weight[:, None, None] @ visible.float()).squeeze(2)


def _overlap(
    activations: list[ActivationRecord],
    weights: list[WeightRecord],
    attention: list[AttentionRecord],
    channels: set[int],
) -> Overlap:
    in_blocks = {
        (token.sequence, token.position)
        for record in activations
        if record.where == "block"
        for token in record.tokens
    }
    in_attention = {(token.sequence, token.position) for one in attention for token in one.tokens}
    inputs = {one.name: set(one.channels) for one in activations if one.where != "block"}
    rows = {row for one in weights if one.name in inputs for row in one.rows}
    columns = {one.name: set(one.columns) for one in weights}
    both = sum(len(found & columns.get(name, set())) for name, found in inputs.items())
    return Overlap(
        activation_in_attention=_share(len(in_blocks & in_attention), len(in_blocks)),
        attention_in_activation=_share(len(in_blocks & in_attention), len(in_attention)),
        channels_in_weight_rows=_share(len(channels & rows), len(channels)),
        inputs_in_weight_columns=_share(both, sum(len(found) for found in inputs.values())),
    )


def _larger(old: float, new: float) -> float:
    """The larger one, NaN if either is: `max` would drop it."""
    return new if new > old or math.isnan(new) else old


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None
