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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from types import CodeType
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import checkpoint

from attending.tap.call import Link, bind, run


class Interceptor(TorchFunctionMode):
    """Takes every attention call of this thread through the links that it finds for it."""

    def links(self, arguments: dict[str, Any]) -> Sequence[Link]:
        """The chain for a call with these arguments; empty if it is none of ours."""
        raise NotImplementedError

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Where PyTorch sends every function, this mode being off until it returns."""
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            arguments = bind(*args, **kwargs)
            links = self.links(arguments)
            _remember(links)
            return run(links, arguments)
        if func is F.multi_head_attention_forward:
            with self:  # it makes its attention call further in, so the mode has to be on there
                return func(*args, **kwargs)
        return func(*args, **kwargs)


class _Recomputation(Interceptor):
    """Takes the calls of a second run through the chains of the first."""

    def __init__(self, chains: Sequence[Sequence[Link]]) -> None:
        super().__init__()
        self._chains = iter(chains)

    def links(self, arguments: dict[str, Any]) -> Sequence[Link]:
        return next(self._chains, ())


class _RunAgain:
    """Stands in for the function that a region runs again."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.chains: list[Sequence[Link]] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with _Recomputation(self.chains):
            return self.function(*args, **kwargs)


_REENTRANT: CodeType = checkpoint.CheckpointFunction.forward.__code__
_NON_REENTRANT: CodeType = inspect.unwrap(checkpoint.checkpoint).__code__
_AGAIN: CodeType = _RunAgain.__call__.__code__


def open_regions() -> Iterator[tuple[Any, str]]:
    """The checkpointed regions in which the caller runs, innermost first.

    Yields:
        The object that keeps the function to run again, and the name of the attribute.
    """
    frame = sys._getframe(1)
    while frame is not None and frame.f_code is not _AGAIN:  # further out lies backward
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
                Link(link.handler, replace(link.site, recomputed=True))
                for link in links
                if not any(region is older for older in link.older)
            ]
        )
