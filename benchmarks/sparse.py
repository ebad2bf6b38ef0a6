"""Block-sparse attention: ours against dense SDPA, SDPA with a mask, and compiled flex_attention.

    python benchmarks/sparse.py [--quick] [--lengths 1024 4096 16384] [--blocks 64 128] [--flex]

One head group of 2 heads of dim 64, float32, batch 1; a random mask of blocks of each density; the
unit is one dense `scaled_dot_product_attention` of the same tensors, in the same run and by turns.
Flex compiles for tens of seconds and has no backward pass on a CPU, so it is asked for by `--flex`.
Planning is the time to make the groups of rows from a mask of blocks.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _measure import RESULTS, interleaved, machine, peak_growth, ratio, write
from rich.console import Console
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import attending as at

HEADS, DIM = 2, 64
SDPA, OURS, MASKED, FLEX, PLANNING = "SDPA", "ours", "SDPA with a mask", "flex", "planning"
DENSITIES = [0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0]
MASKED_UP_TO = 4096  # tokens: the mask alone takes a gigabyte at 16384
# The goals at 4096 tokens in blocks of 128, by density: at most this much of the dense time.
GOALS = {0.1: 0.17, 0.25: 0.38, 0.5: 0.75}


def plan_of(length: int, block: int, density: float) -> at.BlockPlan:
    """A random plan; the seed is that of its density."""
    blocks = -(-length // block)
    generator = torch.Generator().manual_seed(int(1000 * density))
    mask = torch.rand(1, HEADS, blocks, blocks, generator=generator) < density
    return at.BlockPlan.from_block_mask(
        mask, block_size=block, query_length=length, key_length=length
    )


def contenders(
    tensors: tuple[Tensor, ...], plan: at.BlockPlan, with_flex: bool
) -> dict[str, Callable[..., Tensor]]:
    """Functions of query, key and value."""
    length = tensors[0].shape[2]
    found: dict[str, Callable[..., Tensor]] = {
        OURS: lambda *given: at.block_sparse_attention(*given, plan).output
    }
    if length <= MASKED_UP_TO:
        mask = plan.visible().expand(1, HEADS, length, length)
        found[MASKED] = lambda *given: scaled_dot_product_attention(*given, attn_mask=mask)
    if with_flex:
        found[FLEX] = flex_of(plan)
    return found


def flex_of(plan: at.BlockPlan) -> Callable[..., Tensor]:
    """Compiled flex_attention with the same blocks."""
    from torch.nn.attention.flex_attention import flex_attention

    from attending.core._flex import block_mask_of

    compiled = torch.compile(flex_attention)
    return lambda *given: compiled(*given, block_mask=block_mask_of(plan))


def with_backward(function: Callable[..., Tensor], tensors: tuple[Tensor, ...]) -> Any:
    """A run of both passes."""
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    cotangent = torch.ones_like(tensors[0])
    return lambda: torch.autograd.grad(function(*leaves), leaves, cotangent)


def fresh_plan(plan: at.BlockPlan) -> object:
    """The integers that a run needs, from the mask of blocks."""
    made = at.BlockPlan(plan.block_mask, plan.block_size, plan.query_length, plan.key_length)
    return made.groups(1, HEADS)


def measure(length: int, block: int, rounds: int, with_flex: bool) -> dict[str, Any]:
    """All densities by turns with dense attention."""
    torch.manual_seed(0)
    tensors = torch.randn(3, 1, HEADS, length, DIM).unbind(0)
    figures: dict[str, Any] = {}
    for density in DENSITIES:
        plan = plan_of(length, block, density)
        functions = contenders(tensors, plan, with_flex)
        found: dict[str, Any] = {"kept": plan.density}
        if MASKED in functions:
            exact = functions[MASKED](*tensors)
            seen = plan.visible().any(-1, keepdim=True).expand_as(exact)  # elsewhere it gives NaN
            difference = (functions[OURS](*tensors) - exact)[seen].abs()
            found["largest difference"] = float(difference.max()) if difference.numel() else 0.0
        dense = {SDPA: lambda: scaled_dot_product_attention(*tensors)}
        jobs: dict[str, Callable[[], object]] = dense | {
            name: (lambda function=function: function(*tensors))
            for name, function in functions.items()
        }
        jobs[PLANNING] = lambda plan=plan: fresh_plan(plan)
        with torch.no_grad():
            seconds = interleaved(jobs, rounds)
            found["forward"] = {name: ratio(seconds, name, SDPA) for name in jobs}
            found["peak MB"] = {
                name: peak_growth(jobs[name]) / 1e6 for name in (SDPA, OURS, MASKED) if name in jobs
            }
        both = {SDPA: with_backward(scaled_dot_product_attention, tensors)} | {
            name: with_backward(functions[name], tensors)
            for name in (OURS, MASKED)
            if name in functions
        }
        seconds = interleaved(both, rounds)
        found["forward and backward"] = {name: ratio(seconds, name, SDPA) for name in both}
        figures[str(density)] = found
    return figures


def goals(figures: dict[str, Any]) -> dict[str, str]:
    """What was to be reached at 4096 tokens in blocks of 128."""
    found = figures.get("4096, blocks of 128", {})
    said = {}
    for density, bound in GOALS.items():
        for work, most in (("forward", bound), ("forward and backward", 1.1 * bound)):
            if str(density) in found:
                value = found[str(density)][work][OURS]
                met = "met" if value <= most else "not met"
                said[f"{work}, density {density}"] = f"at most {most:.3g}: {met} ({value:.3g})"
    return said


def plot(figures: dict[str, Any], path: Path) -> None:
    """Time over dense SDPA against density, a panel for each length and size of blocks."""
    from matplotlib.figure import Figure

    picture = Figure(figsize=(4.5 * len(figures), 4), layout="constrained")
    panels = picture.subplots(1, len(figures), squeeze=False)[0]
    for (title, found), axis in zip(figures.items(), panels, strict=True):
        for work, style in (("forward", "-"), ("forward and backward", "--")):
            kept = [one["kept"] for one in found.values()]
            for color, name in enumerate((OURS, FLEX, MASKED)):
                times = [one[work].get(name) for one in found.values()]
                if None not in times:
                    axis.plot(
                        kept, times, style, color=f"C{color}", marker="o", label=f"{name}, {work}"
                    )
        axis.axhline(1, color="gray", linewidth=1)
        axis.set(title=title, xlabel="density", ylabel="time over dense SDPA", ylim=(0, 2.6))
        axis.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.savefig(path, dpi=100)


def main() -> None:
    """Measure, print, write the JSON file and the picture beside it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="short lengths: does it run at all?")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--blocks", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--flex", action="store_true", help="compile and time flex_attention too")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="results/benchmarks/sparse.json by default")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    console = Console()
    console.print(machine())
    out = arguments.out or RESULTS / "sparse.json"
    figures: dict[str, Any] = {}
    for length in [256] if arguments.quick else arguments.lengths:
        for block in [64] if arguments.quick else arguments.blocks:
            rounds = 2 if arguments.quick else 21 if length < 4096 else 7 if length < 8192 else 3
            found = measure(length, block, rounds, arguments.flex)
            figures[f"{length}, blocks of {block}"] = found
            console.print(length, block, found)
            write("sparse", {"figures": figures, "goals": goals(figures)}, out)
    plot(figures, out.with_suffix(".png"))
    console.print(goals(figures))
    console.print(f"wrote {out}")


if __name__ == "__main__":
    main()
