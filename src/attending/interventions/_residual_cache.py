"""What blocks add to the states, stored and added again: the work of the caches of whole blocks."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from attending.interventions._block_layout import (
    Layout,
    Layouts,
    Slot,
    inputs_of,
    outputs_of,
)
from attending.interventions._cache_forwards import Forwards, Proceed
from attending.interventions._cache_loop import CacheLoop
from attending.interventions._cache_run import Branch, CacheRun
from attending.interventions.cache_schedule import CacheSchedule, Decider

Signal = Callable[[nn.Module, Proceed, tuple[Any, ...], dict[str, Any]], Tensor]
"""What a schedule by drift goes by: gets the first block, its forward and its arguments."""


@dataclass
class _Residual:
    """What a run of blocks up to `last` added to each stream."""

    last: int
    added: dict[Slot, Tensor]


@dataclass
class _Open:
    """A run of cached blocks that is being computed."""

    first: int
    start: dict[Slot, Tensor]  # what the first of its blocks was given
    versions: dict[Slot, int]  # which tells whether somebody wrote into that
    last: int
    given: dict[Slot, Tensor]  # what the last one was given, and what it returned
    output: Any = None


@dataclass
class _BranchState:
    decide: Decider
    residuals: dict[tuple[str, int], _Residual] = field(default_factory=dict)


class ResidualCache:
    """Reuses what runs of blocks add to the states, while a block runs.

    Of every maximal run of cached blocks it stores `output of the last - input of the first`, for
    each stream, when the schedule has the step computed, and otherwise adds that to the input of
    the first. Nothing is written in place. A run ends early where the model itself changes the
    states between two blocks (the residuals of a ControlNet), as these are not the blocks' own.

    Args:
        model: the denoiser.
        stacks: its lists of blocks by name.
        cached: of each list, which blocks.
        schedule: when to compute.
        signal: what a schedule by drift goes by.
        run: what counts.
    """

    def __init__(
        self,
        model: nn.Module,
        stacks: dict[str, nn.ModuleList],
        cached: dict[str, frozenset[int]],
        schedule: CacheSchedule,
        signal: Signal | None,
        run: CacheRun,
    ) -> None:
        self.model, self.stacks, self.cached = model, stacks, cached
        self.schedule, self.signal, self.run = schedule, signal, run
        self._branches: dict[Branch, _BranchState] = {}
        self._layouts = Layouts()
        self._of_block: dict[tuple[str, int], Layout] = {}
        self._decided: bool | None = None
        self._reused = False
        self._open: _Open | None = None
        self._stack = ""
        self._until = -1  # the last block of the run that is being reused

    def install(self, forwards: Forwards, loop: CacheLoop) -> None:
        """Stand in for the forwards of all blocks."""
        self._loop = loop
        loop.on_restart(self.forget)
        loop.on_begin(self._begin)
        loop.on_end(self._end)
        for name, stack in self.stacks.items():
            for index, block in enumerate(stack):
                forwards.around(block, self._stand_in(name, index, block))

    def forget(self) -> None:
        """Begin a generation: nothing is stored."""
        self._branches.clear()
        self.run.generations += 1

    def _begin(self) -> None:
        if torch.is_grad_enabled() and getattr(self.model, "gradient_checkpointing", False):
            raise ValueError(
                "model: expected no gradient checkpointing, as backward would run blocks again "
                "that were reused; sample within torch.no_grad(), or call "
                "model.disable_gradient_checkpointing()."
            )
        self._decided, self._reused, self._open, self._until = None, False, None, -1

    def _end(self) -> None:
        self._close()
        if self._decided is not None:
            self.run.called(self._loop.branch, self._loop.step, self._reused)

    def _stand_in(self, name: str, index: int, block: nn.Module) -> Any:
        def stand_in(proceed: Proceed, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if not self._loop.running:  # a block that somebody calls on its own
                return proceed(*args, **kwargs)
            if self._decided is None:
                self._decided = self._decide(block, proceed, args, kwargs)
            if name != self._stack:
                self._close()
                self._stack, self._until = name, -1
            self.run.total += 1
            if not self._decided:
                reused = self._reuse(name, index, block, args, kwargs)
                if reused is not None:
                    return reused[0]
            self.run.computed += 1
            return self._compute(name, index, block, proceed, args, kwargs)

        return stand_in

    def _decide(
        self, block: nn.Module, proceed: Proceed, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> bool:
        state = self._branches.get(self._loop.branch)
        if state is None:
            state = _BranchState(self.schedule.start())
            self._branches[self._loop.branch] = state
        if not self.schedule.needs_signal:
            signal = None
        elif self.signal is None:
            raise ValueError("signal: expected one, as the schedule goes by its drift; got None.")
        else:
            with torch.no_grad():
                signal = self.signal(block, proceed, args, kwargs)
        if state.decide(self._loop.step, signal) or not state.residuals:
            state.residuals.clear()
            return True
        return False

    def _compute(
        self,
        name: str,
        index: int,
        block: nn.Module,
        proceed: Proceed,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        if not self._decided:  # a block that is always computed, or did not run when all were
            return proceed(*args, **kwargs)
        given = inputs_of(block, args, kwargs)
        before = self._open
        if before is not None:
            follows = before.last == index - 1 and self._layouts.follows(
                self.stacks[name][before.last], outputs_of(before.output), given
            )
            self._learn(before)
            if not follows or index not in self.cached[name]:
                self._close()
        if index in self.cached[name] and self._open is None:
            self._open = _opened(index, given)
        output = proceed(*args, **kwargs)
        if self._open is not None:
            self._open.last, self._open.given, self._open.output = index, given, output
        return output

    def _learn(self, done: _Open) -> Layout:
        """The layout of the last block of what is open."""
        key = (self._stack, done.last)
        if key not in self._of_block:
            block = self.stacks[self._stack][done.last]
            self._of_block[key] = self._layouts.of(block, done.given, done.output)
        return self._of_block[key]

    def _close(self) -> None:
        """Store what the open run of blocks has added."""
        done, self._open = self._open, None
        if done is None or done.output is None:
            return
        added = {}
        for slot, value in zip(self._learn(done).slots, outputs_of(done.output), strict=True):
            if slot is None or value is None:
                continue
            start = done.start[slot]
            if start.shape != value.shape:
                raise ValueError(
                    f"blocks: expected blocks that keep the shape of {slot}, but those from "
                    f"{done.first} to {done.last} of {self._stack} turn {list(start.shape)} into "
                    f"{list(value.shape)}. Leave out the block that does."
                )
            if done.versions.get(slot, 0) != _version(start):
                raise ValueError(
                    f"blocks: expected blocks that leave their input as it is, but block "
                    f"{done.first} of {self._stack} or one after it writes into {slot}, so what it "
                    "adds cannot be told. Sample within torch.inference_mode(), where a copy is "
                    "taken, or leave the block out."
                )
            added[slot] = (value - start).detach()
        state = self._branches[self._loop.branch]
        state.residuals[self._stack, done.first] = _Residual(done.last, added)

    def _reuse(
        self, name: str, index: int, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any] | None:
        """The output of a block that is reused, in a tuple; None if there is nothing to reuse."""
        if index > self._until:
            residual = self._branches[self._loop.branch].residuals.get((name, index))
            if residual is None:
                return None
            self._until, self._reused = residual.last, True
            added = residual.added
        else:  # within a run, all of which was added at its first block
            added = {}
        given = inputs_of(block, args, kwargs)
        streams = {slot: v + added[slot] if slot in added else v for slot, v in given.items()}
        return (self._of_block[name, index].pack(streams),)


def _opened(index: int, given: dict[Slot, Tensor]) -> _Open:
    # Tensors of inference mode do not tell whether they were written into, so a copy is kept.
    start = {
        slot: tensor.clone() if tensor.is_inference() and tensor.is_floating_point() else tensor
        for slot, tensor in given.items()
    }
    versions = {slot: _version(tensor) for slot, tensor in start.items()}
    return _Open(index, start, versions, index, given)


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
