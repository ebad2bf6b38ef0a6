"""The processes of the tests: they work together, and one that fails does not hang the rest."""

import pytest
import torch
import torch.distributed as dist

from tests.distributed import Ranks


def _sum(rank: int, world_size: int, value: float) -> float:
    total = torch.tensor(value + rank)
    dist.all_reduce(total)
    return float(total)


def _fail(rank: int, world_size: int) -> None:
    if rank == 1:
        raise RuntimeError("this rank fails")
    dist.barrier()


def test_ranks_work_together_and_go_on_after_a_failure(two_processes: Ranks) -> None:
    assert two_processes.run(_sum, 1.0) == [3.0, 3.0]
    with pytest.raises(AssertionError, match="this rank fails"):
        two_processes.run(_fail, seconds=10.0)
    assert two_processes.run(_sum, 2.0) == [5.0, 5.0]
