"""What rectification costs on top of plain block-sparse attention, forward.

    python benchmarks/rectified.py [--quick] [--length 4096]

2 heads of dim 64, float32, batch 1, blocks of 128; the blocks are chosen from the tensors in every
call, `top_k` of a row. The unit is one dense `scaled_dot_product_attention` of the same tensors, in
the same run and by turns. "blocks alone" is `block_sparse_attention` on the plan that was chosen;
"reordered" is the paper's mode with the copies that put tokens along the curve and back.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _measure import RESULTS, interleaved, ratio, write
from rich.console import Console
from torch.nn.functional import scaled_dot_product_attention

import attending as at
from attending.sparse.curve_order import gilbert_order
from attending.sparse.rectified import RECTIFY, rectification, rectified_block_sparse_attention

HEADS, DIM, BLOCK = 2, 64, 128
DENSITIES = (0.1, 0.25)
SDPA, ALONE, REORDERED = "SDPA", "blocks alone", "ipar+gapr, reordered"


def measure(length: int, density: float, rounds: int) -> dict[str, Any]:
    """All modes by turns with dense attention and with the same blocks alone."""
    torch.manual_seed(0)
    query, key, value = tensors = torch.randn(3, 1, HEADS, length, DIM).unbind(0)
    blocks = -(-length // BLOCK)
    rule: dict[str, Any] = {"block_size": BLOCK, "top_k": round(density * blocks), "top_p": None}
    plan = rectification(*tensors, rectify="none", **rule).plan
    order = gilbert_order(length // 256, 16, 16)

    def reordered() -> object:
        moved = (order.apply(one) for one in (query, key, value))
        return order.undo(rectified_block_sparse_attention(*moved, **rule))

    jobs: dict[str, Callable[[], object]] = {
        SDPA: lambda: scaled_dot_product_attention(*tensors),
        ALONE: lambda: at.block_sparse_attention(*tensors, plan),
    }
    for mode in RECTIFY:
        jobs[mode] = lambda mode=mode: rectified_block_sparse_attention(
            *tensors, rectify=mode, **rule
        )
    jobs[REORDERED] = reordered
    with torch.no_grad():
        seconds = interleaved(jobs, rounds)
    return {
        "density": plan.density,
        "over dense": {name: ratio(seconds, name, SDPA) for name in jobs},
        "over blocks alone": {name: ratio(seconds, name, ALONE) for name in jobs},
    }


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--length", type=int, default=4096, help="tokens, a multiple of 256")
    parser.add_argument("--quick", action="store_true", help="one round: does it run at all?")
    parser.add_argument("--out", type=Path, default=RESULTS / "rectified.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rounds = 1 if arguments.quick else 15
    figures = {
        f"{arguments.length} tokens, density {density}": measure(arguments.length, density, rounds)
        for density in DENSITIES
    }
    write("rectified", {"figures": figures}, arguments.out)
    Console().print(figures)


if __name__ == "__main__":
    main()
