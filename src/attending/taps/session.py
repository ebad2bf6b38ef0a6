"""The tap: a context manager that shows every attention call of a model to a handler."""

import threading
import warnings
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Generic, TypeVar, cast, overload

import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack

from attending.taps.call import AttentionCall, Handler, Link, Proceed, Site
from attending.taps.checkpoint import Interceptor, open_regions
from attending.taps.refusal import (
    TapError,
    TapWarning,
    refuse_what_bypasses,
    why_missed,
    why_no_call,
)
from attending.taps.where import Running, cache_of, is_cross, places

Yielded = TypeVar("Yielded", list[AttentionCall], None)


@overload
def tap(model: nn.Module) -> "Tap[list[AttentionCall]]": ...


@overload
def tap(model: nn.Module, handler: Handler) -> "Tap[None]": ...


@overload
def tap(model: nn.Module, handler: Handler | None) -> "Tap[list[AttentionCall]] | Tap[None]": ...


def tap(model: nn.Module, handler: Handler | None = None) -> "Tap[list[AttentionCall]] | Tap[None]":
    """Show every `scaled_dot_product_attention` call of a model, or stand in for it.

    Without a handler, the calls are recorded:

        with tap(model) as calls:
            model(**inputs)
        for call in calls:
            print(call)          # AttentionCall('model.layers.0.self_attn', forward 0, call 0, ...

    With one, it runs in place of the function, and `proceed` is the function. It may pass on a
    changed call, change what comes back, call `proceed` several times or not at all:

        def hotter(call, proceed):
            return proceed(dataclasses.replace(call, scale=call.softmax_scale / 2))

        with tap(model, hotter):
            model.generate(**inputs)

    Taps nest like functions: the outermost `with` sees a call first, and its `proceed` leads to
    the next one in. So `with tap(model) as calls, tap(model, handler)` records what the model asked
    for, and the other way round what the handler made of it.

    A recording holds every query, key and value; for long runs use a handler that keeps only what
    it needs. One that keeps calls of a checkpointed region in a list should empty it when done: the
    region holds the handler, and until backward has run, the tensors hold the region. Attention
    calls that a handler makes itself are not tapped, so it may use the function freely.

    Under gradient checkpointing the calls of a region run again during backward. They pass through
    the same handlers, wherever backward runs, and have `recomputed` set; a recording leaves them
    out, and a handler that counts should too.

    A tap sees the calls that the thread that entered it makes within forwards of the model; other
    threads use the model undisturbed, or with taps of their own. Within the block, PyTorch does not
    use the fused inference path of `nn.TransformerEncoderLayer` and `nn.MultiheadAttention`: their
    outputs may differ in rounding from those without a tap (those of the layer in other threads
    too), and padding gets values that the fused path leaves at 0. All else is bit for bit the same,
    and the model afterwards is what it was.

    What `generate` compiles on its own (a static cache on a GPU) is seen too, at the cost of graph
    breaks and recompilation. A `KeyboardInterrupt` skips PyTorch's hooks: after one, leave the
    block, as what follows in it may go by a wrong name.

    Args:
        model: any module; names are relative to it. A pipeline has several: `tap(pipe.unet)`.
        handler: `handler(call, proceed)` returns the output, `[batch, heads, queries, value_dim]`.

    Returns:
        A context manager that yields the list of calls, or None with a handler. It can be entered
        again, also inside itself.

    Raises:
        TypeError: if the model is no module or the handler no function.
        ValueError: on entry, for a compiled model or one that is set to attention that never calls
            the function; the message says what to set.
        TapError: on exit, if no call was seen; the message says why and what to set.

    Warns:
        TapWarning: on exit, if some attention modules of the model ran without a call.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model must be a torch.nn.Module, got {type(model).__name__}; of a pipeline, tap the "
            "model inside (pipe.unet, pipe.transformer, ...)"
        )
    if handler is None:
        return Tap[list[AttentionCall]](model, None)
    if not callable(handler):
        raise TypeError(f"handler must be callable, got {type(handler).__name__}")
    return Tap[None](model, handler)


class Tap(Generic[Yielded]):
    """The context manager that `tap` returns."""

    def __init__(self, model: nn.Module, handler: Handler | None) -> None:
        self.model = model
        self.handler = handler
        self._open = threading.local()  # what this thread entered and has not left

    def __enter__(self) -> Yielded:
        calls: list[AttentionCall] | None = [] if self.handler is None else None
        session = _Session(self.model, self.handler, calls)
        session.open()
        self._open.sessions = [*getattr(self._open, "sessions", ()), session]
        return cast(Yielded, calls)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if not getattr(self._open, "sessions", ()):
            raise RuntimeError("this tap is not open in this thread: leave it where it was entered")
        session = self._open.sessions.pop()
        session.close()
        if kind is None:
            session.report()


class _Session:
    """One entered `with` block."""

    def __init__(
        self, model: nn.Module, handler: Handler | None, calls: list[AttentionCall] | None
    ) -> None:
        refuse_what_bypasses(model)
        self.model = model
        self.handler = self._record if handler is None else handler
        self.calls = calls
        self.places = places(model)
        self.stack: list[Running] = []  # the modules that run, outermost first
        self.thread = threading.get_ident()
        self.task = _backward_pass()
        self.older = [region for region, _ in open_regions()]
        self.forward = -1
        self.index = 0
        self.ran = self.elsewhere = False
        self.missed: dict[str, nn.Module] = {}
        self.mode = _interceptor()
        self._cleanup = ExitStack()

    def open(self) -> None:
        with ExitStack() as cleanup:
            self.mode.add(self)
            cleanup.callback(self.mode.remove, self)
            for module in self.places:
                # First in, last out: what other hooks do belongs to the module as well, and
                # whatever they raise, each entry on the stack is taken off again.
                before = module.register_forward_pre_hook(
                    self._before, prepend=True, with_kwargs=True
                )
                cleanup.callback(before.remove)
                after = module.register_forward_hook(self._after, always_call=True)
                cleanup.callback(after.remove)
            self._cleanup = cleanup.pop_all()

    def close(self) -> None:
        self._cleanup.close()

    def report(self) -> None:
        """Never an empty success: say so if there was nothing to see, or not all."""
        if self.forward < 0:
            raise TapError(why_no_call(self.model, self.ran, self.elsewhere, self.missed))
        if self.missed:
            warnings.warn(why_missed(self.model, self.missed), TapWarning, stacklevel=3)

    def link(self, key: Tensor) -> Link | None:
        """This tap's part in the chain of a call, which is counted."""
        if not self.stack:
            return None
        if not self.stack[0].reached:
            self.forward += 1
            self.index = 0
        else:
            self.index += 1
        for running in self.stack:
            running.reached = True
        module, place = self.stack[-1].module, self.stack[-1].place
        cross = is_cross(self.stack, key)
        cache = cache_of(self.stack)
        site = Site(place.name, place.layer, module, cross, self.index, self.forward, cache=cache)
        return Link(self.handler, site, self.older, changes=self.calls is None)

    def _record(self, call: AttentionCall, proceed: Proceed) -> Tensor:
        assert self.calls is not None
        self.calls.append(call)
        return proceed(call)

    def _is_mine(self) -> bool:
        # Not what backward runs again: that knows its own handlers. And not what other threads or
        # handlers run: there the mode is off.
        modes = _get_current_function_mode_stack()
        return _backward_pass() == self.task and any(mode is self.mode for mode in modes)

    # Another thread that is just running the model calls a hook without kwargs while this one
    # takes it off, so the hooks take what comes.
    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: Any = None) -> None:
        if not self._is_mine():
            self.elsewhere |= threading.get_ident() != self.thread
            return
        _refuse_nested(module, args, kwargs)
        self.ran = True
        self.stack.append(Running(module, self.places[module], args, kwargs or {}))

    def _after(self, module: nn.Module, args: Any, output: Any, *_: Any) -> None:
        if not self.stack or self.stack[-1].module is not module or not self._is_mine():
            return
        running = self.stack.pop()
        if running.place.attends and not running.reached and output is not None:
            self.missed.setdefault(running.place.name, module)


def _interceptor() -> Interceptor:
    """The one of this thread; a new one on top of the modes if there is none."""
    for mode in reversed(_get_current_function_mode_stack()):
        if isinstance(mode, Interceptor):
            return mode
    mode = Interceptor()
    mode.__enter__()  # type: ignore[no-untyped-call]
    return mode


def _backward_pass() -> int:
    """A number for the backward pass in which this thread runs, -1 outside of any."""
    return int(torch._C._current_graph_task_id())


def _refuse_nested(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> None:
    if not isinstance(module, nn.MultiheadAttention | nn.TransformerEncoderLayer):
        return
    for value in (*args[:1], *(kwargs or {}).values()):
        if isinstance(value, Tensor) and value.is_nested:
            raise ValueError(
                f"{type(module).__name__} takes nested tensors only on its fused inference path, "
                "which no tap can see; give it padded tensors and a key padding mask"
            )
