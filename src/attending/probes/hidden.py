"""The hidden states that a model passes from block to block, and how they degenerate.

A transformer is a stack of blocks, each an entry of an `nn.ModuleList` (or `nn.Sequential`) with
attention inside. `watch_blocks` shows the output of every one while the model runs; `extremes` says
how far the largest value of such an output is out. How alike its tokens have become is said by
`attending.statistics.token_similarity` and `effective_rank`.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from attending.taps.blocks import blocks_of

BlockHandler = Callable[[str, Float[Tensor, "batch tokens dim"]], None]


class Extremes(NamedTuple):
    """How far the values of hidden states reach.

    Attributes:
        largest: the largest magnitude.
        token, channel: where it is.
        median: the median magnitude.
        mean: the mean magnitude.
    """

    largest: float
    token: int
    channel: int
    median: float
    mean: float


def hidden_states(output: Any) -> Float[Tensor, "batch tokens dim"] | None:
    """The hidden states in what a block returns, None if there are none.

    Of several tensors `[batch, tokens, dim]`, as the joint blocks of SD3 return for text and image,
    it is the one with the most tokens.
    """
    if isinstance(output, Mapping):
        output = tuple(output.values())
    candidates = output if isinstance(output, tuple | list) else (output,)
    states = [
        one
        for one in candidates
        if isinstance(one, Tensor) and one.dim() == 3 and one.is_floating_point()
    ]
    return max(states, key=lambda one: one.shape[1], default=None)


@contextmanager
def watch_blocks(model: nn.Module, handler: BlockHandler) -> Iterator[None]:
    """Call `handler(name, hidden)` with what each block returns, as long as the context is open.

    Args:
        model: any module.
        handler: gets the qualified name of the block, and its output `[batch, tokens, dim]`. An
            inner block is shown before the one it lies in. A block that returns something else,
            such as an image, is not shown.
    """

    def hook(name: str) -> Callable[..., None]:
        def show(module: nn.Module, args: Any, output: Any) -> None:
            hidden = hidden_states(output)
            if hidden is not None:
                handler(name, hidden)

        return show

    with ExitStack() as cleanup:
        for name, block in blocks_of(model).items():
            cleanup.callback(block.register_forward_hook(hook(name)).remove)
        yield


def extremes(hidden: Float[Tensor, "tokens dim"], sample: int = 1 << 20) -> Extremes:
    """The largest magnitude of one sequence's hidden states, and the median and mean beside it.

    An activation is called massive where it exceeds both 100 and 1000 times the median (Sun et al.
    2024, arXiv 2402.17762).

    Args:
        hidden: without padding.
        sample: where there are many more values than this, the median is that of about so many of
            them, evenly spaced. All else is exact.
    """
    if hidden.dim() != 2 or hidden.numel() == 0 or not hidden.is_floating_point():
        raise ValueError(
            "hidden: expected a float tensor [tokens, dim] with at least one value, got "
            f"{hidden.dtype} {list(hidden.shape)}."
        )
    width = hidden.shape[-1]
    magnitude = hidden.detach().abs().to(torch.promote_types(hidden.dtype, torch.float32)).flatten()
    largest, place = magnitude.max(0)
    token, channel = divmod(int(place), width)
    step = max(1, magnitude.numel() // max(sample, 1))
    while math.gcd(step, width) > 1:  # every k-th value shall come from all channels alike
        step += 1
    median = float(magnitude[::step].median())
    return Extremes(float(largest), token, channel, median, float(magnitude.mean()))
