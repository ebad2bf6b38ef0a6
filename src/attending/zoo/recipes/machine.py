"""What a data card says of the machine that did the work."""

import os
import platform
from pathlib import Path
from typing import Any

import torch


def describe_machine() -> dict[str, Any]:
    """Processor, threads and versions: what a time or a loss curve depends on besides the code."""
    processor = platform.processor() or platform.machine()
    listing = Path("/proc/cpuinfo")  # on Linux, where platform.processor() is usually empty
    if listing.exists():
        for line in listing.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                processor = line.partition(":")[2].strip()
                break
    return {
        "processor": processor,
        "logical_processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
    }
