"""The running part of visual attention redistribution: what it hooks, and what it counts."""

import threading
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import pad

from attending.interventions._visual_groups import Edited, Groups, edit
from attending.interventions._visual_sequences import Sequence, Sequences, cache_of
from attending.interventions.intervention import Run
from attending.interventions.sink_dimensions import PAPER_DIM, sink_value
from attending.interventions.vision_language import hidden_argument
from attending.taps import AttentionCall, Proceed, tap

if TYPE_CHECKING:
    from attending.interventions.visual_attention_redistribution import (
        VisualAttentionRedistribution,
    )

ChangeSinks = Callable[
    [int, Bool[Tensor, "batch tokens"], Bool[Tensor, "batch tokens"]], Bool[Tensor, "batch tokens"]
]

NO_IMAGE = "its keys hold no image token"
NO_QUERY = "it has no text query"
NO_SINK = "no image token of the layer is a sink"
NO_HEAD = "no head looks at the image"


@dataclass
class LayerRecord:
    """What was found in one layer; counts are over all sequences and forwards of the block.

    Attributes:
        image_tokens: image tokens that were looked at.
        image_sinks: sinks among them.
        text_sinks: other sinks.
        largest_phi: the largest phi of an image token.
        rows: text queries times heads.
        edited_rows: those that were edited.
        largest_image_mass: the largest mass that such a row has on the image.
        moved_mass: what was moved, summed over the edited rows.
    """

    image_tokens: int = 0
    image_sinks: int = 0
    text_sinks: int = 0
    largest_phi: float = 0.0
    rows: int = 0
    edited_rows: int = 0
    largest_image_mass: float = 0.0
    moved_mass: float = 0.0


@dataclass(eq=False)
class RedistributionRun(Run):
    """What redistribution did within a block; print it for a table.

    Attributes:
        layers: a record for each layer that was looked at, by its number.
        tau: what phi had to reach, after scaling.
    """

    layers: dict[int, LayerRecord] = field(default_factory=dict)
    tau: float = 0.0

    def warn_if_nothing_changed(self, stacklevel: int = 2) -> None:
        """Never an empty success: the reasons, with the numbers that came closest."""
        phi = max((one.largest_phi for one in self.layers.values()), default=0.0)
        mass = max((one.largest_image_mass for one in self.layers.values()), default=0.0)
        numbers = {
            NO_SINK: f" (the largest phi is {phi:.3g}, tau {self.tau:.3g})",
            NO_HEAD: f" (the largest mass on the image is {mass:.3g})",
        }
        reasons = self.left_alone
        self.left_alone = Counter(
            {f"{reason}{numbers.get(reason, '')}": count for reason, count in reasons.items()}
        )
        try:
            super().warn_if_nothing_changed(stacklevel + 1)
        finally:
            self.left_alone = reasons

    def __str__(self) -> str:
        """The counts in a line, then a line for each layer."""
        lines = [super().__str__()]
        for layer, one in sorted(self.layers.items()):
            mean = one.moved_mass / one.edited_rows if one.edited_rows else 0.0
            lines.append(
                f"  layer {layer}: {one.image_sinks} of {one.image_tokens} image tokens and "
                f"{one.text_sinks} others are sinks (largest phi {one.largest_phi:.3g}); edited "
                f"{one.edited_rows} of {one.rows} rows, {mean:.3g} of the mass on average"
            )
        return "\n".join(lines)


@dataclass(frozen=True, eq=False)
class Redistribution:
    """What a block of `VisualAttentionRedistribution` is opened with."""

    method: "VisualAttentionRedistribution"
    model: nn.Module
    layers: Mapping[int, tuple[str, nn.Module]]
    image_mask: Bool[Tensor, "batch tokens"] | None
    prompt_length: int | Int[Tensor, " batch"] | None
    change_sinks: ChangeSinks | None

    def opened(self, block: ExitStack) -> RedistributionRun:
        """Hook the model until the block ends."""
        run = RedistributionRun(type(self.method).__name__)
        work = _Work(self, run)
        hook = self.model.register_forward_pre_hook(work.forward, with_kwargs=True)
        block.callback(hook.remove)
        for number, (_, layer) in self.layers.items():
            hook = layer.register_forward_pre_hook(work.layer(number), with_kwargs=True)
            block.callback(hook.remove)
        block.enter_context(tap(self.model, work.attention))
        return run


class _Work:
    """The hooks and the handler of one block."""

    def __init__(self, block: Redistribution, run: RedistributionRun) -> None:
        self.method = block.method
        self.run = run
        self.change_sinks = block.change_sinks
        self.numbers = {name: number for number, (name, _) in block.layers.items()}
        self.sequences = Sequences(
            block.model, block.method.image_token_id, block.image_mask, block.prompt_length
        )
        self.thread = threading.get_ident()

    def forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward of the model begins."""
        if threading.get_ident() == self.thread:  # others use the model undisturbed
            self.sequences.begin(module, args, kwargs)

    def layer(self, number: int) -> Any:
        """A hook for a layer: which tokens are sinks at its input."""

        def find(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if threading.get_ident() != self.thread:
                return
            self.sequences.belongs_to(cache_of(kwargs))
            sequence, hidden = self._present(), hidden_argument(args, kwargs).detach()
            if hidden.shape[1] != sequence.new:
                raise ValueError(
                    f"model: expected {sequence.new} tokens in its layer {number}, as in its "
                    f"input, got {hidden.shape[1]}. Pruning within the language model (fastv, "
                    "sparsevlm) leaves other tokens in each layer, in which redistribution does "
                    "not know the images. Prune before the language model."
                )
            if sequence.brings_prompt:
                self._mark(number, sequence, sink_value(hidden, self._dimensions()), hidden)
            else:
                sequence.mark(number, hidden.new_zeros(hidden.shape[:2], dtype=torch.bool))

        return find

    def _mark(
        self, number: int, sequence: Sequence, phi: Float[Tensor, "batch tokens"], hidden: Tensor
    ) -> None:
        tau = self._threshold(hidden.shape[-1])
        sinks = phi > tau if self.method.convention == "official-code" else phi >= tau
        record = self.run.layers.setdefault(number, LayerRecord())
        now = slice(sequence.length - sequence.new, None)
        image, prompt = sequence.image[:, now], sequence.prompt[:, now]
        if self.change_sinks is not None:
            sinks = self.change_sinks(number, sinks & prompt, image)
        sequence.mark(number, sinks)
        found = sequence.sinks[number][:, now]
        if bool(image.any()):
            record.largest_phi = max(record.largest_phi, float(phi[image].max()))
        record.image_tokens += int(image.sum())
        record.image_sinks += int((found & image).sum())
        record.text_sinks += int((found & ~image & sequence.real[:, now]).sum())

    def attention(self, call: AttentionCall, proceed: Proceed) -> Tensor:
        """The handler: an attention call of the model."""
        number = self._number_of(call.name)
        if number is None or call.is_cross:
            return proceed(call)
        groups = self._groups(number, self._present(), call)
        if isinstance(groups, str):
            self.run.left(call, groups)
            return proceed(call)
        found = edit(
            call,
            proceed,
            groups,
            min_image_mass=self.method.min_image_mass,
            min_non_sink_ratio=self.method.min_non_sink_ratio,
            move_fraction=self.method.move_fraction,
        )
        self._count(number, call, groups, found)
        return found.output

    def _groups(self, number: int, sequence: Sequence, call: AttentionCall) -> Groups | str:
        sinks, image, real = sequence.sinks[number], sequence.image, sequence.real
        places = torch.arange(sequence.length, device=image.device)
        queries = ~image & real
        if self.method.convention == "official-code":
            last = (places * image).amax(-1, keepdim=True)
            queries = queries & (places > last)
        queries = queries[:, -call.query_length :]
        if not sequence.has_image:
            return NO_IMAGE
        if not bool(queries.any()):
            return NO_QUERY
        if self.method.require_visual_sink:
            has_sink = (image & sinks).any(-1, keepdim=True)
            queries = queries & has_sink
            if not bool(has_sink.any()):
                return NO_SINK
        inside, image_sinks, text_sinks = (
            _fit(mask, call.key_length)
            for mask in (image & ~sinks, image & sinks, sinks & ~image & real)
        )
        return Groups(inside, image_sinks, text_sinks, queries)

    def _count(self, number: int, call: AttentionCall, groups: Groups, found: Edited) -> None:
        if call.recomputed:
            return
        record = self.run.layers.setdefault(number, LayerRecord())
        rows = groups.queries[:, None].expand_as(found.selected)
        edited = int(found.selected.sum())
        record.rows += int(rows.sum())
        record.edited_rows += edited
        if bool(rows.any()):
            largest = float(found.image_mass[rows].detach().max())
            record.largest_image_mass = max(record.largest_image_mass, largest)
        record.moved_mass += float(found.moved.detach().sum())
        if edited:
            heads = found.selected.any(-1).any(0).nonzero().flatten().tolist()
            self.run.edited(call, heads, edited)
        else:
            self.run.left(call, NO_HEAD)

    def _present(self) -> Sequence:
        sequence = self.sequences.present
        if sequence is None:
            raise ValueError(
                "model: expected the forward of the model for which the block was entered, as its "
                "arguments tell where the image is, got one of a part of it. Enter the block with "
                "the module that you run."
            )
        return sequence

    def _dimensions(self) -> tuple[int, ...]:
        assert self.method.sink_dimensions is not None  # the method has seen to it
        return self.method.sink_dimensions

    def _threshold(self, dim: int) -> float:
        scaled = self.method.scale_tau
        tau = self.method.tau * (dim / PAPER_DIM) ** 0.5 if scaled else self.method.tau
        if tau >= dim**0.5:
            raise ValueError(
                f"tau: expected less than {dim**0.5:.4g}, which phi cannot exceed at width {dim}, "
                f"got {tau:.4g}. Set scale_tau=True to have tau in the proportion of the paper."
            )
        self.run.tau = tau
        return tau

    def _number_of(self, name: str) -> int | None:
        end = len(name)
        while end > 0:
            if (number := self.numbers.get(name[:end])) is not None:
                return number
            end = name.rfind(".", 0, end)
        return None


def _fit(mask: Tensor, keys: int) -> Bool[Tensor, "batch keys"]:
    """The keys of a call: a static cache has room for more, one with a window has the last ones."""
    known = mask.shape[1]
    return mask[:, known - keys :] if keys < known else pad(mask, (0, keys - known))
