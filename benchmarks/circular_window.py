"""Attention within circles (CLEAR) over full attention and over a mask of the same circles.

    python benchmarks/circular_window.py             # about two minutes on one core
    python benchmarks/circular_window.py --quick     # does it run at all?

An image of 64 x 64 tokens and 512 text tokens, 2 heads of dim 64, float32, batch 1: forward,
forward and backward, peak memory; and forward alone at 128 x 128. They are written to
`results/benchmarks/circular_window.json`.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _measure import interleaved, peak_growth, ratio, write
from rich.console import Console
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import attending as at
from attending.sparse.circular_window import circular_window_attention, circular_window_mask
from attending.sparse.square_tiles import circular_window_plan, square_tile_order

HEADS, DIM = 2, 64
SDPA, OURS, MASKED = "SDPA", "circular_window_attention", "SDPA with a mask"
POOLED = "circular_window_attention, down-sampled keys too"
# Of the image alone, without text: what its circles cost as a plan of blocks and a mask.
ENGINE = "block_sparse_attention of the image, square tiles and a mask"


def contenders(side: int, text: int, radius: int) -> dict[str, Callable[..., Tensor]]:
    """Functions of query, key and value."""
    grid = (side, side)
    mask = circular_window_mask(grid, radius, text_length=text)
    order = square_tile_order(grid)
    plan = circular_window_plan(grid, radius)
    inside = circular_window_mask(grid, radius)[order][:, order]

    def tiled(*given: Tensor) -> Tensor:
        image = [one[:, :, text:][:, :, order] for one in given]
        return at.block_sparse_attention(*image, plan, bias=inside).output

    return {
        SDPA: scaled_dot_product_attention,
        OURS: lambda *given: circular_window_attention(*given, grid, radius, text_length=text),
        POOLED: lambda *given: circular_window_attention(
            *given, grid, radius, text_length=text, down_factor=4
        ),
        MASKED: lambda *given: scaled_dot_product_attention(*given, attn_mask=mask),
        ENGINE: tiled,
    }


def with_backward(function: Callable[..., Tensor], tensors: tuple[Tensor, ...]) -> Any:
    """A run of both passes."""
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    return lambda: torch.autograd.grad(function(*leaves).sum(), leaves)


def measure(side: int, text: int, radius: int, rounds: int) -> dict[str, Any]:
    """One radius."""
    torch.manual_seed(0)
    tensors = torch.randn(3, 1, HEADS, side**2 + text, DIM).unbind(0)
    functions = contenders(side, text, radius)
    jobs: dict[str, Callable[[], object]] = {
        name: (lambda function=function: function(*tensors)) for name, function in functions.items()
    }
    mask = circular_window_mask((side, side), radius, text_length=text)
    difference = functions[OURS](*tensors) - functions[MASKED](*tensors)
    found: dict[str, Any] = {
        "share of the map": float(mask.float().mean()),
        "largest difference": float(difference.abs().max()),
    }
    with torch.no_grad():
        seconds = interleaved(jobs, rounds)
        found["forward"] = {name: ratio(seconds, name, SDPA) for name in jobs}
        found["peak MB"] = {name: peak_growth(job) / 1e6 for name, job in jobs.items()}
    both = {name: with_backward(functions[name], tensors) for name in functions}
    seconds = interleaved(both, rounds)
    found["forward and backward"] = {name: ratio(seconds, name, SDPA) for name in both}
    return found


def larger(side: int, text: int, radius: int, rounds: int) -> dict[str, Any]:
    """Forward on an image for which a mask is too large."""
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, HEADS, side**2 + text, DIM).unbind(0)
    jobs: dict[str, Callable[[], object]] = {
        SDPA: lambda: scaled_dot_product_attention(query, key, value),
        OURS: lambda: circular_window_attention(
            query, key, value, (side, side), radius, text_length=text
        ),
    }
    with torch.no_grad():
        seconds = interleaved(jobs, rounds)
    return {"forward": {name: ratio(seconds, name, SDPA) for name in jobs}}


def goals(figures: dict[str, Any]) -> dict[str, str]:
    """What was to be reached at radius 8."""
    said = {}
    for work, most in (("forward", 0.5), ("forward and backward", 0.5)):
        if "radius 8" in figures:
            value = figures["radius 8"][work][OURS]
            said[work] = f"at most {most}: {'met' if value <= most else 'not met'} ({value:.3g})"
    return said


def main() -> None:
    """Measure, print, write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small image: does it run at all?")
    parser.add_argument("--out", type=Path, help="results/benchmarks/circular_window.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    console = Console()
    side, text, radii, rounds = (16, 32, [4], 1) if arguments.quick else (64, 512, [8, 16], 5)
    figures = {}
    for radius in radii:
        figures[f"radius {radius}"] = measure(side, text, radius, rounds)
        console.print(radius, figures[f"radius {radius}"])
    if not arguments.quick:
        figures["128 x 128 tokens, radius 8"] = larger(128, text, 8, 3)
        console.print(figures["128 x 128 tokens, radius 8"])
    path = write("circular_window", {"figures": figures, "goals": goals(figures)}, arguments.out)
    console.print(goals(figures))
    console.print(f"wrote {path}")


if __name__ == "__main__":
    main()
