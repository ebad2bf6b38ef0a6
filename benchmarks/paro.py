"""PAROAttention: what the permutation and the planning add to block-sparse attention.

    python benchmarks/paro.py [--quick] [--grid 16 16 16] [--block 64]

2 heads of dim 64, float32, batch 1, on a grid of tokens; one head looks along time and one along
columns, on top of noise, so that orders and masks are those that a calibration finds. The unit is
one dense `scaled_dot_product_attention` of the same tensors, in the same run and by turns.

- block-sparse: `block_sparse_attention` over the same plan, with tokens that are in order already.
- PARO: `paro_attention`, which permutes query, key, value and output.
- permutation: those four permutations alone.
- planning: the mask unpacked, its rows grouped and the index made, once for a layer and a mask.
- scores of orders, block sums: what calibration computes for one call, off line.
- simulated INT8: for judging quality; it is no faster kernel.
"""

import argparse
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from _measure import RESULTS, interleaved, machine, ratio, write
from rich.console import Console
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import attending as at
from attending.sparse.axis_order import permute_tokens
from attending.sparse.block_scores import block_probabilities
from attending.sparse.order_scores import order_statistics
from attending.sparse.paro import PAROPlan, paro_attention
from attending.sparse.paro_calibration import PAROCalibration

HEADS, DIM = 2, 64
SDPA, SPARSE, PARO = "SDPA", "block-sparse", "PARO"
DENSITIES = [0.2, 0.3, 0.5]
# The goals at 4096 tokens: PARO over block-sparse on ordered tokens, and planning over SDPA.
GOALS = {"overhead of the order": 1.15, "planning": 0.1}


def tensors_of(grid: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Heads that look along an axis: tokens that differ only there have the same direction."""
    torch.manual_seed(0)
    places = torch.cartesian_prod(*(torch.arange(size) for size in grid))
    query, key, value = torch.randn(3, 1, HEADS, len(places), DIM).unbind(0)
    query, key = 0.3 * query, 0.3 * key
    for head, axis in enumerate((0, len(grid) - 2)):
        rest = [other for other in range(len(grid)) if other != axis]
        line = torch.zeros(len(places), dtype=torch.long)
        for other in rest:
            line = line * grid[other] + places[:, other]
        directions = torch.randn(int(line.max()) + 1, DIM)[line]
        query[0, head] += directions
        key[0, head] += directions
    return query, key, value


def calibrated(
    tensors: tuple[Tensor, ...], grid: tuple[int, ...], block: int, density: float
) -> PAROPlan:
    """Orders and masks from the tensors themselves."""
    calibration = PAROCalibration(
        grid, steps=1, block_size=block, criterion="mass", density=density
    )
    calibration.see("layer", 0, *tensors[:2])
    calibration.choose_orders()
    calibration.see("layer", 0, *tensors[:2])
    return calibration.plan()


def fresh_plan(plan: PAROPlan) -> None:
    """What the first call of a layer needs of a plan that was read from a file."""
    fresh = replace(plan)
    fresh.index("layer")
    fresh.block_plan("layer", 0).groups(1, HEADS)


def measure(grid: tuple[int, ...], block: int, rounds: int) -> dict[str, Any]:
    """All densities by turns with dense attention."""
    tensors = tensors_of(grid)
    exact = scaled_dot_product_attention(*tensors)
    figures: dict[str, Any] = {}
    for density in DENSITIES:
        plan = calibrated(tensors, grid, block, density)
        index = plan.index("layer")
        assert index is not None
        there, back = index
        ordered = [permute_tokens(one, there) for one in tensors]
        blocks = plan.block_plan("layer", 0)

        def permute(there: Tensor = there, back: Tensor = back) -> None:
            for one in (*tensors, exact):
                permute_tokens(one, back if one is exact else there)

        jobs: dict[str, Callable[[], object]] = {
            SDPA: lambda: scaled_dot_product_attention(*tensors),
            SPARSE: lambda ordered=ordered, blocks=blocks: at.block_sparse_attention(
                *ordered, blocks
            ),
            PARO: lambda plan=plan: paro_attention(*tensors, plan, "layer", 0),
            "permutation": permute,
            "planning": lambda plan=plan: fresh_plan(plan),
        }
        with torch.no_grad():
            seconds = interleaved(jobs, rounds)
            output = jobs[PARO]().output  # type: ignore[attr-defined]
            figures[str(density)] = {
                "kept": plan.density,
                "orders": plan.names("layer"),
                "over SDPA": {name: ratio(seconds, name, SDPA) for name in jobs},
                "overhead of the order": ratio(seconds, PARO, SPARSE),
                "error": float((output - exact).norm() / exact.norm()),
            }
    query, key, _ = tensors
    plan = calibrated(tensors, grid, block, DENSITIES[0])
    offline: dict[str, Callable[[], object]] = {
        SDPA: lambda: scaled_dot_product_attention(*tensors),
        "scores of orders": lambda: order_statistics(query, key, grid, block_size=block),
        "block sums": lambda: block_probabilities(query, key, block),
        "simulated INT8": lambda: paro_attention(*tensors, plan, "layer", 0, quant="int8"),
    }
    with torch.no_grad():
        seconds = interleaved(offline, min(rounds, 3))
    figures["off line, over SDPA"] = {name: ratio(seconds, name, SDPA) for name in offline}
    return figures


def goals(figures: dict[str, Any]) -> dict[str, str]:
    """Whether the goals are met at every density."""
    found = [figures[str(density)] for density in DENSITIES]
    values = {
        "overhead of the order": max(one["overhead of the order"] for one in found),
        "planning": max(one["over SDPA"]["planning"] for one in found),
    }
    return {
        name: f"at most {most}: {'met' if values[name] <= most else 'not met'} ({values[name]:.3g})"
        for name, most in GOALS.items()
    }


def main() -> None:
    """Measure, print, write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small grid: does it run at all?")
    parser.add_argument("--grid", type=int, nargs="+", default=[16, 16, 16])
    parser.add_argument("--block", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="results/benchmarks/paro.json by default")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    console = Console()
    console.print(machine())
    grid = (4, 12, 12) if arguments.quick else tuple(arguments.grid)
    figures = measure(grid, arguments.block, 2 if arguments.quick else 15)
    out = arguments.out or RESULTS / "paro.json"
    said = goals(figures)
    tokens = math.prod(grid)
    write("paro", {"grid": grid, "tokens": tokens, "figures": figures, "goals": said}, out)
    console.print(figures, said, f"wrote {out}")


if __name__ == "__main__":
    main()
