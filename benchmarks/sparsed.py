"""SparseD: the attention of a denoising loop, its choice of blocks included, against dense.

    python benchmarks/sparsed.py [--quick] [--lengths 1024 4096] [--blocks 32 128]

Two heads of dim 64, float32, batch 1, random queries and keys; skip 0.2, select 0.3, an answer of
an eighth of the tokens. The unit is one dense `scaled_dot_product_attention` of the same tensors,
by turns. From the three calls that a loop is made of follows its time for any number of steps;
beside it stands the bound: the choice at the price of a dense call, sparse calls at their density.
A loop of 16 steps is timed as a whole, too.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _measure import RESULTS, interleaved, machine, ratio, write
from rich.console import Console
from torch.nn.functional import scaled_dot_product_attention

import attending as at
from attending.interventions.sparsed import SparseD
from attending.papers._sparsed_speed import attention_seconds
from attending.sparse.sparsed import sparsed_plan

HEADS, DIM, SELECT, SKIP = 2, 64, 0.3, 0.2
DENSE, SPARSE, CHOICE = "dense call", "sparse call", "choice"
STEPS = [16, 128, 1024]


def measure(length: int, block: int, rounds: int) -> dict[str, Any]:
    """The calls of a loop, and what they add up to."""
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, HEADS, length, DIM).unbind(0)

    def choose() -> at.BlockPlan:
        made = sparsed_plan(query, key, length // 8, select=SELECT, block_size=block)
        made.groups(1, HEADS)  # what the first sparse call would do
        return made

    plan = choose()
    jobs: dict[str, Callable[[], object]] = {
        DENSE: lambda: scaled_dot_product_attention(query, key, value),
        SPARSE: lambda: at.block_sparse_attention(query, key, value, plan),
        CHOICE: choose,
    }
    with torch.no_grad():
        seconds = interleaved(jobs, rounds)
        found: dict[str, Any] = {name: ratio(seconds, name, DENSE) for name in jobs}
        found["density"] = plan.density
    found["loop over dense"] = {}
    for steps in STEPS:
        dense = SparseD(skip=SKIP).last_dense_step(steps) + 1
        ours = dense + found[CHOICE] + (steps - dense) * found[SPARSE]
        least = dense + 1 + (steps - dense) * plan.density
        found["loop over dense"][steps] = {"from its calls": ours / steps, "bound": least / steps}
    settings = {"answer": length // 8, "skip": SKIP, "select": SELECT, "block_size": block}
    timed = attention_seconds(0, tokens=length, steps=STEPS[0], **settings)
    found["loop over dense"][STEPS[0]]["as a whole"] = timed["attention_seconds_ratio"]
    return found


def main() -> None:
    """Measure, print, write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="short lengths: does it run at all?")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--blocks", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="results/benchmarks/sparsed.json by default")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    console = Console()
    console.print(machine())
    out = arguments.out or RESULTS / "sparsed.json"
    figures: dict[str, Any] = {}
    for length in [640] if arguments.quick else arguments.lengths:
        for block in [64] if arguments.quick else arguments.blocks:
            found = measure(length, block, 2 if arguments.quick else 7)
            figures[f"{length}, blocks of {block}"] = found
            console.print(length, block, found)
            write("sparsed", {"figures": figures}, out)
    console.print(f"wrote {out}")


if __name__ == "__main__":
    main()
