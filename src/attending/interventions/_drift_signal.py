"""What a cache by drift goes by: a tensor that tells early how far the model's output has moved."""

from typing import Any

from torch import Tensor, nn

from attending.interventions._cache_forwards import Proceed
from attending.taps.where import ATTENTION, arguments_of


def modulated_input(
    block: nn.Module, proceed: Proceed, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor:
    """What the first attention of a block is given: the states, normalised and modulated.

    The official code of TeaCache repeats norm and modulation of each model by hand. Here the block
    itself is run as far as its first attention, and no further: so any block will do.

    Raises:
        ValueError: if the block calls no attention module.
    """

    def stop(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        states = arguments_of(module, given, named).get("hidden_states", (*given, None)[0])
        if isinstance(states, Tensor):
            raise _ReachedError(states)

    attentions = [module for module in block.modules() if ATTENTION.search(type(module).__name__)]
    handles = [
        module.register_forward_pre_hook(stop, with_kwargs=True, prepend=True)
        for module in attentions
        if module is not block
    ]
    try:
        proceed(*args, **kwargs)
    except _ReachedError as reached:
        return reached.states
    finally:
        for handle in handles:
            handle.remove()
    raise ValueError(
        f"signal: expected a block with an attention module that is given states, but "
        f"{type(block).__name__} called none. Use signal='input', or a function of the block and "
        "its arguments."
    )


def block_input(
    block: nn.Module, proceed: Proceed, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor:
    """What the first block is given: the embedded sample.

    Raises:
        ValueError: if that is no tensor.
    """
    states = arguments_of(block, args, kwargs).get("hidden_states", (*args, None)[0])
    if not isinstance(states, Tensor):
        raise ValueError(
            f"signal: expected a block whose first input, or `hidden_states`, is a tensor, got "
            f"{type(states).__name__} in {type(block).__name__}. Use a function as signal."
        )
    return states


class _ReachedError(Exception):
    """The first attention was reached, with these states."""

    def __init__(self, states: Tensor) -> None:
        super().__init__("the first attention was reached")
        self.states = states
