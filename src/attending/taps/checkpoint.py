"""Interception of the function, also where gradient checkpointing runs it once more.

Gradient checkpointing (`torch.utils.checkpoint`) drops the activations of a region of the model and
runs the region again during backward. That second run has to be the first one over again: the same
handlers, on the same calls. Otherwise a handler that changes values would get wrong gradients, and
nobody would notice. But backward often runs after the `with` block of the tap, when the model is
back to what it was. So the chain of every call made in a region is left with the region itself, and
the k-th call of its second run takes the k-th chain. That needs no hook, no tap that is still open,
and not the same thread, and is gone when the graph is.

Both kinds of checkpointing keep the function to run again in an object that can be reached from the
Python frames of the region while it runs: `ctx.run_function` of the reentrant kind and
`frame.recompute_fn` of the other.
"""

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from types import CodeType, FunctionType
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter
from torch.overrides import TorchFunctionMode
from torch.utils import checkpoint

from attending.taps.call import Link, bind, run


class OpenTap(Protocol):
    """What an interceptor asks of a tap."""

    def link(self, key: Tensor) -> Link | None:
        """Its part in the chain of a call with this key; None if the call is none of its model."""


class Interceptor(TorchFunctionMode):
    """Takes every attention call of this thread through the open taps, outermost first.

    One for all taps of a thread, so that they keep their order. In the second run of a region it
    has the chains of the first run, which come before the taps that open within the region.
    """

    def __init__(self, chains: Iterable[Sequence[Link]] | None = None) -> None:
        super().__init__()
        self.taps: tuple[OpenTap, ...] = ()
        self._is_recomputation = chains is not None
        self._chains = iter(chains or ())

    def add(self, tap: OpenTap) -> None:
        """Open a tap inside those that are open."""
        self.taps = (*self.taps, tap)

    def remove(self, tap: OpenTap) -> None:
        """Close a tap; without any the mode ends."""
        self.taps = tuple(other for other in self.taps if other is not tap)
        if not self.taps and not self._is_recomputation:
            self.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Where PyTorch sends every function, this mode being off until it returns."""
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            arguments = bind(*args, **kwargs)
            opened = [link for tap in self.taps if (link := tap.link(arguments["key"]))]
            numbered = (
                link._replace(inner=inner)
                for link, inner in zip(opened, reversed(range(len(opened))), strict=True)
            )
            links = [*next(self._chains, ()), *numbered]
            _remember(links)
            return run(links, arguments)
        # It makes its attention call further in, so the mode has to be on there. (A subclass of
        # Tensor that overrides it decides for itself what happens inside.)
        if func is F.multi_head_attention_forward and {Tensor, Parameter}.issuperset(types):
            with self:
                return _undispatched(F.multi_head_attention_forward)(*args, **kwargs)
        return func(*args, **kwargs)


def _undispatched(function: Callable[..., Any]) -> Callable[..., Any]:
    """The body of an overridable function of torch.

    Such a function first asks whether a mode is on, and hands itself to the mode: called with the
    mode on, it would never get to its body. This is a copy that is told that there is none.
    """
    assert isinstance(function, FunctionType)
    names = function.__globals__ | {"has_torch_function": lambda _: False}
    body = FunctionType(function.__code__, names, function.__name__, function.__defaults__)
    body.__kwdefaults__ = function.__kwdefaults__
    return body


class _RunAgain:
    """Stands in for the function that a region runs again."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.chains: list[Sequence[Link]] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with Interceptor(self.chains):
            return self.function(*args, **kwargs)


_REENTRANT: CodeType = checkpoint.CheckpointFunction.forward.__code__
_NON_REENTRANT: CodeType = inspect.unwrap(checkpoint.checkpoint).__code__
# Further out than these lies what a region does not run again itself: backward, and the call whose
# handler it is that calls.
_BORDERS: tuple[CodeType, ...] = (_RunAgain.__call__.__code__, run.__code__)


def open_regions() -> Iterator[tuple[Any, str]]:
    """The checkpointed regions in which the caller runs, innermost first.

    Yields:
        The object that keeps the function to run again, and the name of the attribute.
    """
    frame = sys._getframe(1)
    while frame is not None and frame.f_code not in _BORDERS:
        if frame.f_code is _REENTRANT:
            yield frame.f_locals["ctx"], "run_function"
        elif frame.f_code is _NON_REENTRANT and frame.f_locals.get("gen") is not None:
            yield frame.f_locals["gen"].gi_frame.f_locals["new_frame"], "recompute_fn"
        frame = frame.f_back  # type: ignore[assignment]


def _remember(links: Sequence[Link]) -> None:
    """Leave the chain of a call with all regions that it lies in."""
    if torch.is_inference_mode_enabled():
        return
    for region, attribute in open_regions():
        again = getattr(region, attribute)
        if not isinstance(again, _RunAgain):
            again = _RunAgain(again)
            setattr(region, attribute, again)
        # A tap that began inside the region begins again in its second run. And a call that is of
        # no tap is remembered too, so that the others keep their places.
        again.chains.append(
            [
                Link(link.handler, replace(link.site, recomputed=True), inner=link.inner)
                for link in links
                if link.changes and not any(region is older for older in link.older)
            ]
        )
