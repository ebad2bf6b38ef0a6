"""Frame masks: kept share against time, dense SDPA of the same tensors being the unit.

    python benchmarks/frame_masks.py [--quick]

2 heads of dim 64, float32, batch 1, about 4096 tokens: 8 frames of 512 tokens, 24 of 170 and 32 of
128, with fewer and fewer reference frames (24 frames are the paper's 93-frame videos). Blocks are
whole frames, or 128 tokens as GPUs want them; at 24 frames these are rounded up. The same masks
as masks of tokens of SDPA, and the bound 1 / kept share, are beside them.
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
from attending.sparse.frame_masks import expand_frame_mask, frame_reference_mask, frame_token_mask

HEADS, DIM = 2, 64
VIDEOS = {8: (512, (4, 2, 1)), 24: (170, (6, 3)), 32: (128, (4, 1))}


def measure(frames: int, tokens: int, k: int, rounds: int) -> dict[str, Any]:
    """One mask, forward and with the backward pass, by turns with dense attention."""
    torch.manual_seed(0)
    tensors = torch.randn(3, 1, HEADS, frames * tokens, DIM).unbind(0)
    mask = frame_reference_mask(frames, k)
    shown = frame_token_mask(mask, tokens)[None, None]
    plans = {
        "blocks of a frame": expand_frame_mask(mask, tokens),
        "blocks of 128": expand_frame_mask(mask, tokens, block_size=128),
    }
    functions: dict[str, Callable[..., Any]] = {
        "SDPA": scaled_dot_product_attention,
        "SDPA with a mask": lambda *given: scaled_dot_product_attention(*given, attn_mask=shown),
    }
    for name, plan in plans.items():
        functions[name] = lambda *given, plan=plan: at.block_sparse_attention(*given, plan).output
    exact = functions["SDPA with a mask"](*tensors)
    difference = float((functions["blocks of a frame"](*tensors) - exact).abs().max())
    found: dict[str, Any] = {
        "kept": {name: plan.density for name, plan in plans.items()},
        "largest difference": difference,
    }
    with torch.no_grad():
        seconds = interleaved(
            {name: (lambda run=run: run(*tensors)) for name, run in functions.items()}, rounds
        )
    found["forward"] = {name: ratio(seconds, name, "SDPA") for name in functions}
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    cotangent = torch.ones_like(tensors[0])
    seconds = interleaved(
        {
            name: (lambda run=run: torch.autograd.grad(run(*leaves), leaves, cotangent))
            for name, run in functions.items()
        },
        rounds,
    )
    found["forward and backward"] = {name: ratio(seconds, name, "SDPA") for name in functions}
    return found


def main() -> None:
    """Measure, print, write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="short videos: does it run at all?")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="results/benchmarks/frame_masks.json by default")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    console = Console()
    console.print(machine())
    out = arguments.out or RESULTS / "frame_masks.json"
    figures: dict[str, Any] = {}
    for frames, (tokens, ks) in ({8: (80, (1,))} if arguments.quick else VIDEOS).items():
        for k in ks:
            name = f"{frames} frames of {tokens} tokens, {k} references"
            figures[name] = measure(frames, tokens, k, 2 if arguments.quick else arguments.rounds)
            console.print(name, figures[name])
            write("frame_masks", {"figures": figures}, out)
    console.print(f"wrote {out}")


if __name__ == "__main__":
    main()
