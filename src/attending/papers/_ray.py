"""Spreading the runs of `reproduce --all` over a Ray cluster (extra `sweep`).

A run is a Ray task. If its worker dies, Ray makes the run again on another one. Workers send their
result to the driver, and the driver alone writes it, so each result is stored once, and what was
stored before the driver itself was stopped is not run again.
"""

import os
from collections.abc import Iterator, Sequence
from typing import Any

from attending.papers._reproduction import Reproduction
from attending.papers._run import Execute, Task, run_task


def on_ray(
    *,
    address: str | None = None,
    cpus_per_run: float = 1,
    gpus_per_run: float = 0,
    retries: int = 3,
) -> Execute:
    """What `reproduce_many(execute=...)` needs to make its runs on a Ray cluster.

    A Ray that is initialised already is used as it is, and left running. Otherwise one is started,
    or joined at `address`, and left when all runs are done. A run's work folder lies on the machine
    of its worker; on a cluster without a shared disk, what it keeps there stays there.

    Args:
        address: Of a running cluster; None starts one on this machine, with all of its cores.
        cpus_per_run: How many cores Ray sets aside for a run.
        gpus_per_run: How many GPUs.
        retries: How often a run is tried again after its worker died. An exception that the run
            itself raises is a failure at once.

    Raises:
        ImportError: Ray is not installed.
    """
    try:
        import ray  # noqa: F401
    except ImportError as error:
        raise ImportError(
            'runs on a Ray cluster need Ray: pip install "attending[sweep]"'
        ) from error

    def execute(tasks: Sequence[Task]) -> Iterator[tuple[Task, Reproduction | Exception]]:
        if not tasks:
            return
        import ray

        started_here = not ray.is_initialized()
        if started_here:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent anywhere
            ray.init(address=address, include_dashboard=False, log_to_driver=False)
        try:
            options = {"num_cpus": cpus_per_run, "num_gpus": gpus_per_run, "max_retries": retries}
            remote = ray.remote(**options)(run_task)
            yield from _as_they_finish({remote.remote(task): task for task in tasks})
        finally:
            if started_here:
                ray.shutdown()

    return execute


def _as_they_finish(pending: dict[Any, Task]) -> Iterator[tuple[Task, Reproduction | Exception]]:
    import ray

    while pending:
        (done,), _ = ray.wait(list(pending), num_returns=1)
        task = pending.pop(done)
        try:
            yield task, ray.get(done)
        except Exception as error:
            yield task, error
