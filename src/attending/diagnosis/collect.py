"""Statistics of a model while it runs: one pass over its attention calls and its blocks."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from jaxtyping import Bool, Int
from torch import Tensor, nn

from attending.diagnosis.blocks import BlockStatistics
from attending.diagnosis.heads import HeadStatistics
from attending.diagnosis.problems import (
    call_in_four_dimensions,
    in_four_dimensions,
    problems,
    visible_tokens,
)
from attending.diagnosis.record import HiddenRecord, LayerRecord
from attending.diagnosis.tokens import TokenReader, decoder_padding, encoder_of, key_ids
from attending.probes.hidden import watch_blocks
from attending.taps import AttentionCall, Proceed, tap
from attending.taps.blocks import outermost
from attending.taps.where import layer_of

PREVIEW = 48  # tokens of the first sequence that are shown


@dataclasses.dataclass
class _Text:
    """The tokens of the stream that an attention call works on."""

    visible: Bool[Tensor, "batch tokens"]
    ids: Int[Tensor, "batch tokens"] | None


class Collector:
    """Sums up statistics over any number of forward passes.

    Args:
        model: what runs.
        reader: names tokens and their classes.
        wanted: statistics to compute.
        map_size: buckets per side of the pooled maps.
        on_call: called with the name of each attention module as it is reached.
    """

    def __init__(
        self,
        model: nn.Module,
        reader: TokenReader,
        wanted: frozenset[str],
        map_size: int,
        on_call: Callable[[str], None],
    ) -> None:
        self.model, self.reader, self.wanted, self.map_size = model, reader, wanted, map_size
        self.on_call = on_call
        self.sequences = self.tokens = 0
        self.preview: list[str] = []
        self._heads: dict[str, HeadStatistics] = {}
        self._blocks: dict[str, BlockStatistics] = {}
        self._encoder = encoder_of(model)
        self._batch: Any = None
        self._streams: dict[tuple[int, int], _Text] = {}
        self._calls: Counter[str] = Counter()
        self._size: tuple[int, int] | None = None  # sequences and tokens of the current batch

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Collects from all that the model does as long as the context is open."""
        with watch_blocks(self.model, self._block), tap(self.model, self._call):
            yield

    @contextmanager
    def batch(self, batch: Any) -> Iterator[None]:
        """One forward pass, of this input."""
        self._batch, self._size = batch, None
        self._streams.clear()
        self._calls.clear()
        yield
        if self._size is not None:
            self.sequences += self._size[0]
            self.tokens += self._size[1]

    def layers(self) -> list[LayerRecord]:
        """The statistics of the attention modules, in the order in which they first ran."""
        return [heads.record() for heads in self._heads.values()]

    def hidden(self) -> list[HiddenRecord]:
        """The statistics of the outermost blocks, in the order in which they first ran."""
        names = outermost(list(self._blocks))
        return [self._blocks[name].record() for name in names if self._blocks[name].sequences]

    def _call(self, call: AttentionCall, proceed: Proceed) -> Tensor:
        output = proceed(call)
        self.on_call(call.name)
        if call.query.is_nested or not call.query_length or not call.key_length:
            return output
        self._calls[call.name] += 1
        count = self._calls[call.name]
        name = call.name if count == 1 else f"{call.name}#{count}"
        shown = call_in_four_dimensions(call)
        padding = decoder_padding(self._batch)
        asking, seen = visible_tokens(shown, padding)
        ids = key_ids(shown, self._batch, self._encoder, len(seen))
        self._note_stream(shown, asking, ids)
        if name not in self._heads:
            self._heads[name] = HeadStatistics(
                name,
                call.layer,
                "cross" if call.is_cross else "self",
                self.wanted,
                self.map_size,
                self.reader,
            )
        heads = self._heads[name]
        outputs = in_four_dimensions(output)
        for problem in problems(shown, asking, seen):
            chosen = None
            if ids is not None:
                chosen = ids[problem.sequences.cpu()][:, problem.keys.cpu()]
            heads.add(problem, chosen, self.sequences)
            heads.add_outputs(outputs[problem.sequences][:, :, problem.queries])
        return output

    def _note_stream(self, call: AttentionCall, asking: Tensor, ids: Tensor | None) -> None:
        """Remember the tokens that ask: the blocks around the call hand on their states."""
        first = self._size is None
        if first:
            self._size = (len(asking), int(asking.sum()))
        if call.is_cross:
            return
        if call.query_length != call.key_length:
            ids = None
        self._streams[asking.shape[0], asking.shape[1]] = _Text(asking, ids)
        if first and ids is not None and not self.preview:
            tokens = ids[0][asking[0].cpu()][:PREVIEW].tolist()
            self.preview = [self.reader.text(token) for token in tokens]

    def _block(self, name: str, hidden: Tensor) -> None:
        if name not in self._blocks:
            self._blocks[name] = BlockStatistics(name, layer_of(self.model, name), self.reader)
        text = self._streams.get((hidden.shape[0], hidden.shape[1]))
        visible, ids = (None, None) if text is None else (text.visible, text.ids)
        self._blocks[name].add(hidden.detach(), visible, ids)
