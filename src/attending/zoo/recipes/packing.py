"""A long stream of tokens served as training rows whose order is a pure function of the step.

Nothing about the order lives in a random generator's state, so an interrupted training that knows
only its step number continues with the very rows it would have seen.
"""

import hashlib
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Int
from torch import Tensor


@lru_cache(maxsize=4)
def _epoch_order(
    seed: int, context: int, epoch: int, windows: int
) -> tuple[npt.NDArray[np.int64], int]:
    """The shuffled windows of one epoch and where in the stream the first window starts."""
    generator = np.random.default_rng((seed, context, epoch))
    return generator.permutation(windows), int(generator.integers(context))


@dataclass(frozen=True, eq=False)
class PackedTokens:
    """Documents laid end to end, cut into windows, each window shown after a ``bos`` token.

    Every epoch cuts at another offset, so that no token always stands at the start of a window,
    where there is nothing to predict it from.

    Attributes:
        tokens: The whole corpus; each document already ends with its end token.
        bos: The token put in front of every row.
        seed: Decides the order.
    """

    tokens: Int[Tensor, " length"]
    bos: int
    seed: int

    @property
    def fingerprint(self) -> str:
        """Changes when any token does: guards a resumed training against another corpus."""
        return hashlib.sha256(self.tokens.to(torch.int32).numpy().tobytes()).hexdigest()

    def windows(self, context: int) -> int:
        """How many rows of ``context`` predicted tokens make one epoch."""
        count = len(self.tokens) // context - 1
        if count < 1:
            raise ValueError(
                f"expected at least {2 * context} tokens for a context of {context}, got "
                f"{len(self.tokens)}; shorten the context or bring more text"
            )
        return count

    def batch(self, index: int, rows: int, context: int) -> Int[Tensor, "rows length"]:
        """Batch number ``index`` (from 0): ``bos`` and ``context`` tokens in each row."""
        windows = self.windows(context)
        batch = torch.full((rows, context + 1), self.bos, dtype=torch.long)
        for row in range(rows):
            epoch, position = divmod(index * rows + row, windows)
            order, offset = _epoch_order(self.seed, context, epoch, windows)
            start = offset + int(order[position]) * context
            batch[row, 1:] = self.tokens[start : start + context]
        return batch
