"""Block caching as it is defined, in float64 and one branch: what the tests hold the library to."""

from collections.abc import Callable, Sequence

from torch import Tensor

Block = Callable[[Tensor], Tensor]


def cached_generation(
    blocks_of_step: Callable[[int], Sequence[Block]],
    inputs: Sequence[Tensor],
    cached: set[int],
    computed: set[int],
) -> tuple[list[Tensor], int]:
    """The outputs of each step, and how many blocks ran."""
    outputs, calls, stored = [], 0, {}
    for step, states in enumerate(inputs):
        index, blocks = 0, blocks_of_step(step)
        while index < len(blocks):
            if index not in cached:
                states, calls, index = blocks[index](states), calls + 1, index + 1
                continue
            last = index
            while last + 1 in cached and last + 1 < len(blocks):
                last += 1
            if step in computed:
                before = states
                for block in blocks[index : last + 1]:
                    states, calls = block(states), calls + 1
                stored[index] = states - before
            else:
                states = states + stored[index]
            index = last + 1
        outputs.append(states)
    return outputs, calls
