"""What the place of a call in the model tells: its layer, and whether it is cross-attention.

Lengths do not tell self- from cross-attention: under a KV cache a self-attention has more keys than
queries, and a text may be as long as its source. So it is asked, of the module that made the call
and then of the modules directly around it as long as they are attention too (`BertSelfAttention`
lies in `BertAttention`), and the first answer holds:

1. The module was given another sequence to attend to, by one of the names in `SOURCES`. Then it is
   cross-attention, unless there are more keys than that sequence has tokens: such keys hold the
   module's own tokens too, and this is self-attention over both (SD3, Flux).
2. The module says so in an attribute `is_cross_attention` (GPT-2, BERT, diffusers).
3. It is an `nn.MultiheadAttention`: cross-attention if query and key are not the same tensor.
4. The last part of its name, or else its class, has a usual word for the one or the other.

Without an answer it is self-attention.
"""

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from torch import Tensor, nn

SOURCES = (
    "encoder_hidden_states",
    "key_value_states",
    "cross_attention_states",
    "encoder_states",
    "context",
)
CACHES = ("cache", "past_key_values", "past_key_value", "layer_past")
ATTENTION = re.compile("Attention|Attn")  # in the name of a class
_CROSS = re.compile(r"cross|encoder_?attn|encoder_?attention|enc_?dec|^attn2$", re.IGNORECASE)
_SELF = re.compile(r"self_?att|^attn1$", re.IGNORECASE)


@dataclass(frozen=True)
class Place:
    """What is known of a module before it runs."""

    name: str
    layer: int | None
    attends: bool  # its class is named after attention
    hint: bool | None  # answers 2 and 4: cross, self, or no answer


@dataclass(slots=True, eq=False)
class Running:
    """A module that is running: where it is, and what it was called with."""

    module: nn.Module
    place: Place
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    reached: bool = False  # a call of scaled_dot_product_attention, here or further in


def places(model: nn.Module) -> dict[nn.Module, Place]:
    """The modules of a model that may make an attention call, and the model itself.

    Left out are the building blocks of `torch.nn` that hold no others, such as `nn.Linear`.
    """
    found = {}
    for name, module in model.named_modules():
        building_block = type(module).__module__.startswith("torch.nn.modules.")
        attends = ATTENTION.search(type(module).__name__) is not None
        if module is model or attends or not building_block or _has_children(module):
            found[module] = Place(name, layer_of(model, name), attends, _hint(module, name))
    return found


def _has_children(module: nn.Module) -> bool:
    return any(True for _ in module.children())


def layer_of(model: nn.Module, name: str) -> int | None:
    """The first integer in a module's name that indexes an `nn.ModuleList`, else the first one.

    The `0` of "0.auto_model.encoder.layer.3.attention" is a step of an `nn.Sequential`, and the
    layer is 3; in "blocks.3.attn" of a timm model, where blocks is an `nn.Sequential`, it is 3 too.
    """
    first = None
    parent = model
    for part in name.split(".") if name else ():
        if part.isdecimal():
            if isinstance(parent, nn.ModuleList):
                return int(part)
            first = int(part) if first is None else first
        parent = parent.get_submodule(part)
    return first


def is_cross(stack: Sequence[Running], key: Tensor) -> bool:
    """Whether the innermost of the running modules makes a call of cross-attention with this key.

    Args:
        stack: what runs, outermost first.
        key: the key of the call.
    """
    for running in reversed(stack):
        if running is not stack[-1] and not running.place.attends:
            break
        arguments = arguments_of(running.module, running.args, running.kwargs)
        own = arguments.get("hidden_states", running.args[0] if running.args else None)
        for name in SOURCES:
            source = arguments.get(name)
            if source is None or source is own:
                continue
            if not isinstance(source, Tensor) or source.ndim != 3:
                return True
            return key.shape[-2] <= source.shape[-2]
        if running.place.hint is not None:
            return running.place.hint
        if isinstance(running.module, nn.MultiheadAttention):
            return arguments.get("query") is not arguments.get("key")
    return False


def cache_of(stack: Sequence[Running]) -> object:
    """The KV cache that the innermost of the running modules was given, None if it was given none.

    Args:
        stack: what runs, outermost first. Modules around the innermost are asked too, as the code
            of an attention module may be in a part of its own.
    """
    for running in reversed(stack):
        arguments = arguments_of(running.module, running.args, running.kwargs)
        for name in CACHES:
            if arguments.get(name) is not None:
                return arguments[name]
    return None


def _hint(module: nn.Module, name: str) -> bool | None:
    flag = getattr(module, "is_cross_attention", None)
    if isinstance(flag, bool):
        return flag
    if isinstance(module, nn.MultiheadAttention):  # its arguments say it better than its name
        return None
    for word in (name.rpartition(".")[2], type(module).__name__):
        if _CROSS.search(word):
            return True
        if _SELF.search(word):
            return False
    return None


def arguments_of(
    module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """The arguments of a module's forward by name, however they were passed."""
    names = _parameters(type(module).forward)
    return dict(zip(names, args, strict=False)) | dict(kwargs)


@lru_cache(maxsize=1024)
def _parameters(forward: Callable[..., Any]) -> tuple[str, ...]:
    """The names of the positional parameters of a forward, in order, without self."""
    try:
        parameters = list(inspect.signature(forward).parameters.values())[1:]
    except (TypeError, ValueError):  # written in C: nothing to know
        return ()
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(p.name for p in parameters if p.kind in positional)
