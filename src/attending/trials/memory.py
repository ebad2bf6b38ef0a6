"""The most memory that a run holds at once, as PyTorch's own allocators know it.

What is counted is the same on a CPU and on CUDA: the bytes that the allocator of PyTorch has given
out and not got back, at their highest during the run, less what it held before. So it is the
activations, caches, temporary buffers inside of operators and outputs, and not the weights or the
inputs. On CUDA that is `torch.cuda.max_memory_allocated`. On a CPU it is the running sum over every
allocation that PyTorch's profiler reports: the same in each run, unlike the resident memory of the
process, which depends on what the system's allocator kept from before.

What other libraries allocate (NumPy, a tokenizer) is not counted, nor what is freed on a CPU in a
thread that another library made.
"""

import gc
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.autograd.profiler import profile

LONGEST_PIECE = 1.0  # seconds of a profile on a CPU, after which the next forward begins another


def peak_memory(model: nn.Module, run: Callable[[], object]) -> int | None:
    """The most bytes that `run` holds at once, beyond those held before.

    Args:
        model: says on which devices; on a CPU, its forwards divide the profile into pieces, so that
            a long run does not fill the memory with events.
        run: what is measured. It is slower than without.

    Returns:
        Bytes, of all devices of the model together; None on a device that cannot tell (MPS).
    """
    devices = {parameter.device for parameter in model.parameters()}
    kinds = {device.type for device in devices} or {"cpu"}
    if kinds == {"cuda"}:
        return _cuda_peak(sorted(devices, key=str), run)
    if kinds == {"cpu"}:
        return _cpu_peak(model, run)
    return None


def _cuda_peak(devices: list[torch.device], run: Callable[[], object]) -> int:
    before = 0
    for device in devices:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before += torch.cuda.memory_allocated(device)
    run()
    return sum(torch.cuda.max_memory_allocated(device) for device in devices) - before


def _cpu_peak(model: nn.Module, run: Callable[[], object]) -> int:
    gc.collect(1)  # the profiler complains of what was there before and is freed during the run
    count = _Count()
    with count.watching():
        hook = model.register_forward_pre_hook(lambda *_: count.next_piece())
        try:
            run()
        finally:
            hook.remove()
    return count.peak


class _Count:
    """The running sum of allocations over consecutive pieces of a profile."""

    def __init__(self) -> None:
        self.held = self.peak = 0
        self.began = 0.0
        self.piece: Any = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        self._begin()
        try:
            yield
        finally:
            self._end()

    def next_piece(self) -> None:
        if time.monotonic() - self.began > LONGEST_PIECE:
            self._end()
            self._begin()

    def _begin(self) -> None:
        self.began = time.monotonic()
        self.piece = profile(profile_memory=True)
        with _silent():
            self.piece.__enter__()

    def _end(self) -> None:
        with _silent():
            self.piece.__exit__(None, None, None)
        events = [
            (event.start_ns(), event.nbytes())
            for event in self.piece.kineto_results.events()
            if event.name() == "[memory]" and event.device_type().name == "CPU"
        ]
        for _, size in sorted(events, key=lambda event: event[0]):  # stable within one nanosecond
            self.held += size
            self.peak = max(self.peak, self.held)


@contextmanager
def _silent() -> Iterator[None]:
    """Without the lines that the profiler's C++ writes to stderr when it starts and stops."""
    try:
        sys.stderr.flush()
        saved = os.dup(2)
    except (OSError, ValueError, AttributeError):  # there is no stderr to keep quiet
        yield
        return
    try:
        with open(os.devnull, "w", encoding="utf-8") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
