"""Where a model is in a denoising loop that it knows nothing of: which step, which call within it.

Diffusion models are called once or several times a step by a sampler that belongs to somebody else.
What differs from step to step (dense early steps, patterns that are reused, features that are
cached) asks a clock, which watches the calls of the model:

    with DenoisingClock(model) as clock:
        clock.on_restart(patterns.clear)
        pipeline(prompt)                   # meanwhile: clock.moment.step, clock.moment.branch
"""

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


@dataclass(frozen=True)
class Moment:
    """A call of the model, seen from the sampler's loop.

    Attributes:
        step: of the loop, from 0.
        branch: which call within the step, from 0: with guidance 0 is usually the condition and 1
            none; in samplers of second order the second look.
        timestep: what the model was given as its `timestep` (the largest, if several); None for
            models that take none.
    """

    step: int
    branch: int
    timestep: float | None


class DenoisingClock(AbstractContextManager["DenoisingClock"]):
    """Tells the step from the calls of the model.

    A model whose `forward` takes a `timestep` (all denoisers of diffusers): a step begins when the
    timestep changes, calls at the same one are branches, and when it moves back against its
    direction a new generation begins. Other models (masked language models): each call is a step,
    and a new generation begins after `steps` of them.

    Args:
        model: what the sampler calls.
        steps: of one generation; None if the timestep tells, or there is only one generation.

    Attributes:
        model, steps: as given.
        moment: where the loop is. Before the first call it is None.
        generations: how many have begun.

    Raises:
        ValueError: for `steps` below 1.
    """

    def __init__(self, model: nn.Module, steps: int | None = None) -> None:
        if steps is not None and steps < 1:
            raise ValueError(f"steps: expected at least 1 step, got {steps}.")
        self.model, self.steps = model, steps
        self.generations = 0
        self.moment: Moment | None = None
        self._restarts: list[Callable[[], object]] = []
        self._hook: RemovableHandle | None = None
        self._fresh = True
        self._direction = 0.0  # of the timestep in this generation; 0 while it has not moved

    def on_restart(self, callback: Callable[[], object]) -> None:
        """Call this whenever a generation begins, the first one too, before the model runs."""
        self._restarts.append(callback)

    def reset(self) -> None:
        """Say that the next call of the model begins a generation, where nothing else tells."""
        self._fresh = True

    def now(self) -> Moment:
        """The moment.

        Raises:
            RuntimeError: outside a call of the model.
        """
        if self.moment is None:
            raise RuntimeError(
                "moment: the model that the clock watches was not called yet. Give the clock the "
                "model that the sampler calls, not a part of it."
            )
        return self.moment

    def __enter__(self) -> "DenoisingClock":
        if self._hook is not None:
            raise RuntimeError("this clock runs already; make one for each block")
        signature = inspect.signature(self.model.forward)
        takes_timestep = "timestep" in signature.parameters

        def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given: Any = None
            if takes_timestep:
                given = signature.bind_partial(*args, **kwargs).arguments.get("timestep")
            self.tick(given)

        self._hook = self.model.register_forward_pre_hook(look, with_kwargs=True, prepend=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def tick(self, timestep: Tensor | float | None = None) -> Moment:
        """One more call of the model, at this timestep. The hook does this."""
        if isinstance(timestep, Tensor):
            timestep = float(timestep.max()) if timestep.numel() else None
        elif timestep is not None:
            timestep = float(timestep)
        self.moment = self._following(timestep)
        if self.moment.step == 0 and self.moment.branch == 0:
            self._fresh = False
            self.generations += 1
            for callback in self._restarts:
                callback()
        return self.moment

    def _following(self, timestep: float | None) -> Moment:
        before = self.moment
        start = Moment(0, 0, timestep)
        if before is None or self._fresh:
            self._direction = 0.0
            return start
        if timestep is None or before.timestep is None:
            step = before.step + 1
        elif timestep == before.timestep:
            return Moment(before.step, before.branch + 1, timestep)
        else:
            move = timestep - before.timestep
            if move * self._direction < 0:
                self._direction = 0.0
                return start
            self._direction, step = move, before.step + 1
        if self.steps is not None and step >= self.steps:
            self._direction = 0.0
            return start
        return Moment(step, 0, timestep)
