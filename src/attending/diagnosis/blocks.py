"""Statistics of the hidden states after one block, summed up over sequences."""

from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attending.core import statistics
from attending.diagnosis.record import HiddenRecord
from attending.diagnosis.tokens import TokenReader
from attending.probes.hidden import extremes

RANK_TOKENS = 256  # tokens of a sequence, evenly spaced, whose effective rank is computed


@dataclass
class BlockStatistics:
    """What is known of the outputs of one block so far."""

    name: str
    layer: int | None
    reader: TokenReader
    sequences: int = 0
    tokens_similar: float = 0.0
    rank: float = 0.0
    median: float = 0.0
    mean: float = 0.0
    largest: tuple[float, str, int, int] = field(default=(-1.0, "", 0, 0))

    def add(
        self,
        hidden: Float[Tensor, "batch tokens dim"],
        visible: Bool[Tensor, "batch tokens"] | None,
        ids: Int[Tensor, "batch tokens"] | None,
    ) -> None:
        """Take in the output of the block.

        Args:
            hidden: as the block returned it.
            visible: which tokens are no padding; None if all.
            ids: the tokens, if they are tokens of a text.
        """
        for index, states in enumerate(hidden):
            tokens = None if ids is None else ids[index]
            if visible is not None and not bool(visible[index].all()):
                chosen = visible[index].to(states.device)
                states = states[chosen]
                tokens = None if tokens is None else tokens[chosen.cpu()]
            if not len(states):
                continue
            self.sequences += 1
            self.tokens_similar += float(statistics.token_similarity(states))
            every = -(-len(states) // RANK_TOKENS)
            self.rank += effective_rank(states[::every])
            found = extremes(states)
            self.median += found.median
            self.mean += found.mean
            if not found.largest <= self.largest[0]:
                text = f"position {found.token}"
                if tokens is not None:
                    text = self.reader.text(int(tokens[found.token]))
                self.largest = (found.largest, text, found.token, found.channel)

    def record(self) -> HiddenRecord:
        """The statistics as plain numbers."""
        largest, token, position, channel = self.largest
        return HiddenRecord(
            name=self.name,
            layer=self.layer,
            token_similarity=self.tokens_similar / self.sequences,
            effective_rank=self.rank / self.sequences,
            max_abs=largest,
            median_abs=self.median / self.sequences,
            mean_abs=self.mean / self.sequences,
            max_token=token,
            max_position=position,
            max_channel=channel,
        )


def effective_rank(states: Tensor) -> float:
    """As in `attending.statistics`, but not a number instead of an error for what is not finite."""
    if not bool(torch.isfinite(states).all()):
        return float("nan")
    return float(statistics.effective_rank(states))
