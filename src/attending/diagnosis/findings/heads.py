"""What the findings on heads share: going through them, and saying how many and where."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from attending.diagnosis.record import Evidence, LayerRecord


class Head(NamedTuple):
    """One head and its value of one statistic."""

    layer: LayerRecord
    number: int
    value: float

    def evidence(self, text: str) -> Evidence:
        """This head as evidence."""
        return Evidence(self.layer.name, self.number, self.value, text)


def heads(layers: Sequence[LayerRecord], statistic: str) -> Iterator[Head]:
    """Every head that has the statistic."""
    for layer in layers:
        for number, value in enumerate(layer.statistics.get(statistic, ())):
            yield Head(layer, number, value)


def head_count(layers: Sequence[LayerRecord]) -> int:
    """Heads of all layers together."""
    return sum(layer.num_heads for layer in layers)


def in_words(found: Sequence[Head], layers: Sequence[LayerRecord]) -> str:
    """`14 of 72 heads, in 5 of 6 layers,`."""
    within = len({head.layer.name for head in found})
    heads_of_all = head_count(layers)
    noun = "head" if heads_of_all == 1 else "heads"
    where = "layer" if len(layers) == 1 else "layers"
    return f"{len(found)} of {heads_of_all} {noun}, in {within} of {len(layers)} {where},"
