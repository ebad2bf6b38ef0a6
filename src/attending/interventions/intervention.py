"""What all interventions have in common: how they are called, and what they report of a run.

An intervention is a dataclass of hyper-parameters that, called with a model, gives a context
manager. Within the block the model is changed; what the block yields is a `Run`, which counts what
was changed. Whatever an intervention has to remember while it runs (the sinks of a prompt) belongs
to the run, not to the dataclass. So one dataclass serves many models, and blocks nest.

To write one of your own:

    @dataclass(frozen=True)
    class Sharper:
        factor: float = 1.5

        def __call__(self, model: nn.Module) -> Counted:
            def start(run: Run) -> Handler:
                def sharpen(call: AttentionCall, proceed: Proceed) -> Tensor:
                    run.edited(call)
                    return proceed(replace(call, scale=self.factor * call.softmax_scale))

                return sharpen

            return with_counters(model, start, name="Sharper")
"""

import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Generic, Protocol, runtime_checkable

from torch import nn
from typing_extensions import TypeVar

from attending.taps import AttentionCall, Handler, Tap, tap


class InterventionWarning(UserWarning):
    """A block of an intervention ended, and nothing in it had been changed. It says why."""


@dataclass(eq=False)
class Run:
    """What an intervention did within one `with` block. Worth printing.

    Attributes:
        name: which intervention.
        calls: attention calls that it saw (for methods that work elsewhere: what they saw).
        edited_calls: those that it changed.
        edited_rows: rows of attention maps, one for each query and head, that it changed; 0 where
            a method does not count rows.
        heads: `(layer, head)` of each head in which it changed something.
        left_alone: why calls were not changed, and how many for each reason.
    """

    name: str
    calls: int = 0
    edited_calls: int = 0
    edited_rows: int = 0
    heads: set[tuple[int | None, int]] = field(default_factory=set)
    left_alone: Counter[str] = field(default_factory=Counter)

    @property
    def stats(self) -> Mapping[str, int | float]:
        """The counts, as a plain dictionary."""
        return {
            "calls": self.calls,
            "edited_calls": self.edited_calls,
            "edited_rows": self.edited_rows,
            "edited_heads": len(self.heads),
        }

    def edited(
        self, call: AttentionCall | None = None, heads: Iterable[int] = (), rows: int = 0
    ) -> None:
        """Count a call that was changed; not again where checkpointing runs it once more.

        Args:
            call: the call; None for what is not an attention call.
            heads: which of its heads were changed.
            rows: how many rows, over items of the batch, heads and queries.
        """
        if call is not None and call.recomputed:
            return
        self.calls += 1
        self.edited_calls += 1
        self.edited_rows += rows
        self.heads.update((None if call is None else call.layer, head) for head in heads)

    def left(self, call: AttentionCall | None, reason: str) -> None:
        """Count a call that was left alone, with the reason in a few words."""
        if call is not None and call.recomputed:
            return
        self.calls += 1
        self.left_alone[reason] += 1

    def warn_if_nothing_changed(self, stacklevel: int = 2) -> None:
        """Never an empty success.

        Warns:
            InterventionWarning: if nothing was edited; with the reasons, the most frequent first.
        """
        if self.edited_calls:
            return
        reasons = "; ".join(
            f"{count} {'time' if count == 1 else 'times'} because {reason}"
            for reason, count in self.left_alone.most_common()
        )
        warnings.warn(
            f"{self.name} changed nothing: of {self.calls} attention calls it left alone all"
            f"{', ' + reasons if reasons else ''}.",
            InterventionWarning,
            stacklevel=stacklevel + 1,
        )

    def __str__(self) -> str:
        """In one line."""
        line = (
            f"{self.name}: edited {self.edited_calls} of {self.calls} calls, "
            f"{self.edited_rows} rows in {len(self.heads)} heads"
        )
        reasons = (f"{count} x {reason}" for reason, count in self.left_alone.most_common())
        return "; left alone: ".join(filter(None, (line, ", ".join(reasons))))


@runtime_checkable
class Intervention(Protocol):
    """A method that changes a model while a block runs, and leaves no trace.

    Implementations are frozen dataclasses. Those that learn something from data have a method or
    function that returns a new dataclass (`select_heads`, `calibrate`), and all of them are stored
    with `save_settings` and read with `load_settings`.
    """

    def __call__(self, model: nn.Module, /) -> AbstractContextManager[Run]:
        """The context manager within which the model is changed; it yields the counts."""
        ...


RunT = TypeVar("RunT", bound=Run, default=Run)

Start = Callable[[RunT], Handler]
"""Makes the handler of one block. Called on entry, so state in its closure is that of the block."""


def with_counters(
    model: nn.Module,
    start: Start[RunT],
    *,
    name: str,
    new_run: Callable[[str], RunT] = Run,  # type: ignore[assignment]
    around: Callable[[RunT], AbstractContextManager[Any]] | None = None,
) -> "Counted[RunT]":
    """The context manager of an intervention that works on attention calls.

    Args:
        model: whose calls are handled. Names and layers are relative to it.
        start: called on every entry with a fresh `Run`; returns the handler of `attending.tap`.
        name: of the method, for the report.
        new_run: makes the `Run` from the name, for methods that count more.
        around: what else is open within the block, such as a clock of steps.

    Returns:
        A context manager that yields the `Run`. It can be entered again, also inside itself.

    Raises:
        TypeError, ValueError, TapError: as `attending.tap`.

    Warns:
        InterventionWarning: on exit, if no call was edited.
    """

    def opened(block: ExitStack) -> RunT:
        run = new_run(name)
        if around is not None:
            block.enter_context(around(run))
        tapped: Tap[None] = tap(model, start(run))
        block.enter_context(tapped)
        return run

    return Counted(opened, name=name)


class Counted(AbstractContextManager[RunT], Generic[RunT]):
    """The context manager of an intervention: opens something for each block, and counts in a run.

    Args:
        opened: called on every entry; pushes what is to be closed after the block onto the stack
            that it is given, and returns the run of the block.
        name: of the method, for errors.

    Raises:
        RuntimeError: on exit, where this thread has not entered it.

    Warns:
        InterventionWarning: on exit, if nothing was edited.
    """

    def __init__(self, opened: Callable[[ExitStack], RunT], *, name: str) -> None:
        self._opened, self._name = opened, name
        self._open = threading.local()  # what this thread entered and has not left

    def __enter__(self) -> RunT:
        with ExitStack() as opening:
            run = self._opened(opening)
            self._open.blocks = [*getattr(self._open, "blocks", ()), (opening.pop_all(), run)]
        return run

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if not getattr(self._open, "blocks", ()):
            raise RuntimeError(
                f"{self._name} is not open in this thread: leave it where it was entered"
            )
        block, run = self._open.blocks.pop()
        block.__exit__(kind, error, traceback)
        if kind is None:
            run.warn_if_nothing_changed()
