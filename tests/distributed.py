"""Processes that form a process group of `torch.distributed`, for tests of several ranks.

    def _sum(rank: int, world_size: int, value: float) -> float:    # at the top of the test's file
        total = torch.tensor(value + rank)
        torch.distributed.all_reduce(total)
        return float(total)

    def test_sum(two_processes: Ranks) -> None:                     # the fixture is in conftest.py
        assert two_processes.run(_sum, 1.0) == [3.0, 3.0]

The processes are started once for all tests of a session, by the first that needs them: each has to
load torch. They meet in a file and talk over gloo, so that sessions side by side (`pytest -n 2`) do
not fight for ports. A rank that raises or does not answer in time fails the test, and all ranks are
ended; the next test starts new ones. A function goes by its file and name, as pytest names modules
in ways that other processes cannot import; arguments and what is returned are pickled.
"""

import datetime
import functools
import importlib.util
import inspect
import multiprocessing
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import ModuleType
from typing import Any

START_SECONDS = 120.0  # for processes to load torch, on a machine that is busy
COLLECTIVE_SECONDS = 60.0  # after which a rank gives up waiting for another


class Ranks:
    """Some processes in one gloo group. Use it as a context manager, or `close` it."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._workers: list[Any] = []
        self._pipes: list[Connection] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def run(self, function: Callable[..., Any], *args: Any, seconds: float = 60.0) -> list[Any]:
        """`function(rank, world_size, *args)` in every process; what each returned, by rank."""
        if not self._workers:
            self._start()
        path = inspect.getsourcefile(function)
        job = pickle.dumps((path, function.__name__, args))
        for pipe in self._pipes:
            pipe.send_bytes(job)
        found = self._answers(time.monotonic() + seconds)
        errors = [f"rank {rank}: {text}" for rank, (ok, text) in enumerate(found) if not ok]
        if errors:
            self.close()  # the others may still wait for the one that failed
            raise AssertionError("\n".join(errors))
        return [value for _, value in found]

    def close(self) -> None:
        """End the processes."""
        for worker in self._workers:
            worker.kill()
        for worker in self._workers:
            worker.join()
        for pipe in self._pipes:
            pipe.close()
        self._workers, self._pipes = [], []
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> None:
        # Not forked: torch's threads and its backward pass do not survive that.
        context = multiprocessing.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory(prefix="attending-ranks-")
        meeting = str(Path(self._folder.name) / "meeting")
        for rank in range(self.world_size):
            mine, theirs = context.Pipe()
            worker = context.Process(
                target=_work, args=(rank, self.world_size, meeting, theirs), daemon=True
            )
            worker.start()
            theirs.close()
            self._workers.append(worker)
            self._pipes.append(mine)
        found = self._answers(time.monotonic() + START_SECONDS)
        if not all(ok for ok, _ in found):
            self.close()
            raise AssertionError(f"the processes did not start: {found}")

    def _answers(self, deadline: float) -> list[tuple[bool, Any]]:
        found: dict[Connection, tuple[bool, Any]] = {}
        while len(found) < len(self._pipes) and (left := deadline - time.monotonic()) > 0:
            for pipe in wait([one for one in self._pipes if one not in found], left):
                try:
                    found[pipe] = pickle.loads(pipe.recv_bytes())
                except (EOFError, OSError) as error:
                    found[pipe] = (False, f"its process ended: {error!r}")
                if not found[pipe][0]:  # the others may wait for this one: a moment, no longer
                    deadline = min(deadline, time.monotonic() + 0.5)
        return [found.get(pipe, (False, "no answer")) for pipe in self._pipes]


@functools.cache
def _module(path: str) -> ModuleType:
    """A file of tests, run once for each process."""
    spec = importlib.util.spec_from_file_location(f"_ranks_{abs(hash(path))}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _work(rank: int, world_size: int, meeting: str, pipe: Connection) -> None:
    """What runs in a process: meet the others, then one job after another until the pipe ends."""
    try:
        import torch
        import torch.distributed as dist

        torch.set_num_threads(1)
        dist.init_process_group(
            "gloo",
            init_method=f"file://{meeting}",
            rank=rank,
            world_size=world_size,
            timeout=datetime.timedelta(seconds=COLLECTIVE_SECONDS),
        )
        pipe.send_bytes(pickle.dumps((True, None)))
    except BaseException:
        pipe.send_bytes(pickle.dumps((False, traceback.format_exc())))
        return
    while True:
        try:
            job = pipe.recv_bytes()
        except EOFError:
            return
        try:
            path, name, args = pickle.loads(job)
            torch.manual_seed(0)
            answer = pickle.dumps((True, getattr(_module(path), name)(rank, world_size, *args)))
        except BaseException:
            answer = pickle.dumps((False, traceback.format_exc()))
        pipe.send_bytes(answer)
