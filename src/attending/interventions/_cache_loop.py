"""Which branch and step of the sampler's loop a call of the model belongs to, for caches."""

import inspect
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from attending.interventions._cache_forwards import Forwards
from attending.interventions._cache_run import Branch
from attending.taps.denoising import DenoisingClock


class CacheLoop(ExitStack):
    """Follows the calls of a model: which branch of the guidance, and which call in that branch.

    The branch is the name of diffusers' `cache_context` where one is open, and otherwise the place
    among the calls with the same timestep. A step is a call in a branch. A generation ends when the
    timestep moves back, when the shapes of the inputs change, when a pipeline of diffusers says so,
    or after `steps`.

    Args:
        model: what the sampler calls.
        forwards: where the hook for contexts goes.
        steps: of one generation in each branch; needed where the forward takes no `timestep`.

    Attributes:
        branch, step: of the call that runs, or that ran last.
        running: whether the model runs.
        context: the name of the open `cache_context`, None if none is.

    Raises:
        ValueError: if nothing would tell one generation from the next.
    """

    def __init__(self, model: nn.Module, forwards: Forwards, steps: int | None = None) -> None:
        super().__init__()
        if steps is not None and steps < 1:
            raise ValueError(f"steps: expected at least 1 step, got {steps}.")
        if steps is None and "timestep" not in inspect.signature(model.forward).parameters:
            raise ValueError(
                f"steps: expected how often a generation calls the model in each branch, as the "
                f"forward of {type(model).__name__} takes no `timestep` that would tell one "
                "generation from the next; got None."
            )
        self.model, self.steps = model, steps
        self.branch: Branch = 0
        self.step = 0
        self.running = False
        self._forwards = forwards
        self._clock = DenoisingClock(model)
        self._begin: list[Callable[[], object]] = []
        self._end: list[tuple[Callable[[], object], bool]] = []
        self._restart: list[Callable[[], object]] = []
        self._calls: dict[Branch, int] = {}
        self._shapes: dict[Branch, tuple[Any, ...]] = {}
        self._name: Callable[[], str | None] = lambda: None

    @property
    def timestep(self) -> float:
        """Of the call that runs; 0 for models that take none."""
        return self._clock.now().timestep or 0.0

    @property
    def context(self) -> str | None:
        """The name of the `cache_context` of diffusers that is open."""
        return self._name()

    def on_begin(self, callback: Callable[[], object]) -> None:
        """Call this before each forward of the model, once branch and step are known."""
        self._begin.append(callback)

    def on_end(self, callback: Callable[[], object], *, failed_too: bool = False) -> None:
        """Call this after each forward of the model; of those that fail only if so told."""
        self._end.append((callback, failed_too))

    def on_restart(self, callback: Callable[[], object]) -> None:
        """Call this when a generation begins."""
        self._restart.append(callback)

    def restart(self) -> None:
        """Begin a generation with the next call."""
        self._clock.reset()

    def __enter__(self) -> "CacheLoop":
        super().__enter__()
        self._name = self._forwards.contexts(self.restart)
        self._clock.on_restart(self._new_generation)
        self.enter_context(self._clock)
        before = self.model.register_forward_pre_hook(self._start, with_kwargs=True)
        self.callback(before.remove)
        after = self.model.register_forward_hook(self._stop, always_call=True)
        self.callback(after.remove)
        return self

    def _start(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        name, moment = self.context, self._clock.now()
        self.branch = moment.branch if name is None else name
        shapes = _shapes_of(args, kwargs)
        exhausted = self.steps is not None and self._calls.get(self.branch, 0) >= self.steps
        if exhausted or self._shapes.get(self.branch, shapes) != shapes:
            self._new_generation()
        self._shapes[self.branch] = shapes
        self.step = self._calls.get(self.branch, 0)
        self._calls[self.branch] = self.step + 1
        self.running = True
        for callback in self._begin:
            callback()

    def _stop(self, module: nn.Module, args: Any, output: Any) -> None:
        if not self.running:
            return
        self.running = False
        for callback, failed_too in self._end:
            if output is not None or failed_too:
                callback()

    def _new_generation(self) -> None:
        self._calls.clear()
        self._shapes.clear()
        for callback in self._restart:
            callback()


def _shapes_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(
        tuple(value.shape) for value in (*args, *kwargs.values()) if isinstance(value, Tensor)
    )
