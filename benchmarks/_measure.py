"""What the benchmarks share: interleaved timing, peak memory, the machine, the JSON file."""

import json
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).resolve().parents[1] / "results" / "benchmarks"


def interleaved(
    contenders: dict[str, Callable[[], object]], rounds: int, warm_up: bool = True
) -> dict[str, list[float]]:
    """Seconds of each contender in each round: A B C A B C ...

    The warm-up is one more round, which is not counted.

    With one thread it is the time that this process had the processor, so that what else runs on
    the machine counts as little as can be; with more threads it is the time on the clock.
    """
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for count in range(-1 if warm_up else 0, rounds):
        for name, contender in contenders.items():
            start = clock()
            contender()
            if count >= 0:
                seconds[name].append(clock() - start)
    return seconds


def ratio(seconds: dict[str, list[float]], name: str, over: str) -> float:
    """The median over the rounds of the ratio within a round."""
    pairs = zip(seconds[name], seconds[over], strict=True)
    return statistics.median(one / other for one, other in pairs)


def peak_growth(function: Callable[[], object]) -> int:
    """By how many bytes the resident memory of this process grows at most while a function runs."""
    status = Path("/proc/self/status")
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the peak so far
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        function()
        return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit

    def read(field: str) -> int:
        lines = status.read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

    before = read("VmRSS")
    function()
    return read("VmHWM") - before


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    info = Path("/proc/cpuinfo")
    names = info.read_text().splitlines() if info.exists() else []
    name = next((line.split(": ")[1] for line in names if line.startswith("model name")), "")
    return {
        "processor": name or platform.processor() or platform.machine(),
        "cores": torch.multiprocessing.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "command": " ".join(["python", *sys.argv]),
    }


def write(name: str, figures: dict[str, Any], out: Path | None = None) -> Path:
    """Write the figures of a benchmark and the machine they are from."""
    path = out or RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine(), **figures}, indent=2) + "\n")
    return path
