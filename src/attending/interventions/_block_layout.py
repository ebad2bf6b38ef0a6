"""Which outputs of a block are the next states of which of its inputs.

A block takes one stream of states (Wan: `hidden_states`) or two (SD3, Flux, HunyuanVideo: those of
the image and those of the text) and returns the streams anew, in an order of its own. To skip a
block, one has to know which is which. In this order:

1. diffusers has a registry of what its blocks return.
2. A block that returns one tensor returns its `hidden_states`, or the first input of that shape.
3. What a block returns is what the next one is given: the same tensor, which tells its name.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from attending.taps.where import arguments_of

Slot = str | int
"""An argument of a block: its name, or its place where the forward has no names."""


@dataclass(frozen=True)
class Layout:
    """The outputs of one block.

    Attributes:
        slots: for each output the argument that is the same stream; None for an output that is None
            (the text of SD3's last block).
        single: whether the block returns a bare tensor, not a tuple.
    """

    slots: tuple[Slot | None, ...]
    single: bool

    def pack(self, streams: Mapping[Slot, Tensor]) -> Any:
        """The output that a block with these streams would have."""
        values = tuple(None if slot is None else streams[slot] for slot in self.slots)
        return values[0] if self.single else values


def inputs_of(
    module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[Slot, Tensor]:
    """The tensors that a block is given, by name, or by place where its forward has no names."""
    named = arguments_of(module, args, kwargs)
    unnamed = dict(enumerate(args)) if args and len(named) < len(args) + len(kwargs) else {}
    return {slot: v for slot, v in (unnamed | named).items() if isinstance(v, Tensor)}


def outputs_of(output: Any) -> tuple[Tensor | None, ...]:
    """What a block returned, as a tuple.

    Raises:
        ValueError: if it is something else than tensors and None.
    """
    values = (output,) if isinstance(output, Tensor) else output
    if isinstance(values, tuple | list) and all(v is None or isinstance(v, Tensor) for v in values):
        return tuple(values)
    raise ValueError(
        f"model: expected blocks that return a tensor or a tuple of tensors, the states of their "
        f"streams; got {type(output).__name__}. Such blocks cannot be cached."
    )


class Layouts:
    """The layouts of a model's blocks, learned while they run."""

    def __init__(self) -> None:
        self._learned: dict[type, tuple[Slot | None, ...]] = {}

    def follows(
        self, before: nn.Module, output: Sequence[Tensor | None], given: Mapping[Slot, Tensor]
    ) -> bool:
        """Whether a block is given just what the one before returned; learns from it."""
        names = {id(tensor): slot for slot, tensor in given.items()}
        slots = tuple(None if tensor is None else names.get(id(tensor)) for tensor in output)
        unchanged = all(
            tensor is None or slot is not None for tensor, slot in zip(output, slots, strict=True)
        )
        if unchanged and None not in slots:
            self._learned.setdefault(type(before), slots)
        return unchanged

    def of(self, module: nn.Module, given: Mapping[Slot, Tensor], output: Any) -> Layout:
        """The layout of a block that has run.

        Raises:
            ValueError: if it cannot be told which output is which stream.
        """
        values = outputs_of(output)
        single = isinstance(output, Tensor)
        slots = _registered(module, len(values)) or self._learned.get(type(module))
        tensors = [index for index, value in enumerate(values) if value is not None]
        if slots is None and len(tensors) == 1:
            slot = _same_shape(given, values[tensors[0]])
            slots = tuple(slot if value is not None else None for value in values)
        fits = slots is not None and len(slots) == len(values)
        if slots is None or not fits or any(slots[index] not in given for index in tensors):
            raise ValueError(
                f"model: cannot tell which of the {len(tensors)} outputs of "
                f"{type(module).__name__} continues which of its inputs "
                f"({', '.join(map(str, given))}). Expected a block that returns one tensor, or "
                "is followed by one of its class that is given just what it returned."
            )
        return Layout(
            tuple(slots[i] if v is not None else None for i, v in enumerate(values)), single
        )


def _same_shape(given: Mapping[Slot, Tensor], value: Tensor | None) -> Slot | None:
    shape = None if value is None else value.shape
    if "hidden_states" in given and given["hidden_states"].shape == shape:
        return "hidden_states"
    return next((slot for slot, tensor in given.items() if tensor.shape == shape), None)


def _registered(module: nn.Module, outputs: int) -> tuple[Slot | None, ...] | None:
    """What diffusers knows of its own blocks; None for others."""
    if not type(module).__module__.startswith("diffusers."):
        return None
    from diffusers.hooks._helpers import TransformerBlockRegistry

    try:
        known = TransformerBlockRegistry.get(type(module))
    except ValueError:
        return None
    slots: list[Slot | None] = [None] * outputs
    hidden = getattr(known, "hidden_states_argument_name", "hidden_states")
    text = getattr(known, "encoder_hidden_states_argument_name", "encoder_hidden_states")
    for index, name in (
        (known.return_hidden_states_index, hidden),
        (known.return_encoder_hidden_states_index, text),
    ):
        if index is not None and index < outputs:
            slots[index] = name
    return tuple(slots)


STACKS = (
    "blocks",
    "transformer_blocks",
    "single_transformer_blocks",
    "layers",
    "visual_transformer_blocks",
    "temporal_transformer_blocks",
)
"""What diffusers calls the blocks that its caches work on."""


def stacks_of(model: nn.Module, names: Sequence[str] | None = None) -> dict[str, nn.ModuleList]:
    """The lists of blocks of a model, in the order in which they were made.

    Args:
        model: what holds them.
        names: which; None takes those directly in the model that have a usual name, and if there is
            none, the only list.

    Raises:
        ValueError: if there is no such list, or it is not clear which is meant.
    """
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module)
    }
    if names is not None:
        if missing := [name for name in names if name not in found]:
            raise ValueError(
                f"stack: expected a ModuleList of {type(model).__name__}, one of "
                f"{', '.join(found) or 'none at all'}; got {missing[0]!r}."
            )
        return {name: found[name] for name in names}
    usual = {name: stack for name, stack in found.items() if name in STACKS}
    direct = {name: stack for name, stack in found.items() if "." not in name}
    chosen = usual or direct
    if not chosen or (not usual and len(direct) > 1):
        raise ValueError(
            f"stack: expected to be told which ModuleList of {type(model).__name__} holds the "
            f"blocks, one of {', '.join(found) or 'none at all'}; got None."
        )
    return chosen
