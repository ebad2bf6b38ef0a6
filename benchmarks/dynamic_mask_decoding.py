"""A step of decoding of one layer of dynamic mask attention, after many tokens, in one run.

    python benchmarks/dynamic_mask_decoding.py [--quick] [--lengths 2048 16384 65536]

Width 512, 8 heads, float32, batch 1, a window of 1024; the cache holds random keys and values. The
step takes the projections, the cache and the attention:

- dense attention of the same size, with transformers' `DynamicCache` (the unit), which copies
  itself with every token;
- the same with a cache that is written in place, as large as it will ever be, as `StaticCache` is;
- dynamic mask attention with that cache, which scores all tokens anew, as transformers' Doge does;
- with a cache that forgets, `DynamicMaskCache`.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from _measure import RESULTS, interleaved, machine, ratio, write
from rich.console import Console
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import DynamicCache

from attending.nn.dynamic_mask_attention import DynamicMaskAttention
from attending.nn.dynamic_mask_cache import DynamicMaskCache

WIDTH, HEADS, WINDOW = 512, 8, 1024
DENSE, IN_PLACE = "dense", "dense, cache in place"
ALL, FORGETS = "dynamic, all tokens cached", "dynamic, the cache forgets"


def contenders(layer: DynamicMaskAttention, length: int) -> dict[str, Callable[[], object]]:
    """Steps after so many tokens; each goes on from its own cache."""
    torch.manual_seed(0)
    key, value = torch.randn(2, 1, HEADS, length, WIDTH // HEADS).unbind(0)
    token = torch.randn(1, 1, WIDTH)
    dense, every, forgets = DynamicCache(), DynamicCache(), DynamicMaskCache(layer.keep_window)
    for cache in (dense, every):
        cache.update(key, value, 0)
    forgets.update(key, value, 0, delta=layer.scores(value))

    def step() -> Tensor:
        query, *new = layer.project(token)
        output: Tensor = scaled_dot_product_attention(query, *dense.update(*new, 0))
        return layer.combine(output)

    room = torch.cat([torch.stack([key, value]), torch.zeros(2, 1, HEADS, 1, WIDTH // HEADS)], 3)

    def step_in_place() -> Tensor:
        query, *new = layer.project(token)
        room[:, :, :, -1:] = torch.stack(new)
        output: Tensor = scaled_dot_product_attention(query, room[0], room[1])
        return layer.combine(output)

    return {
        DENSE: step,
        IN_PLACE: step_in_place,
        ALL: lambda: layer(token, is_causal=True, cache=every),
        FORGETS: lambda: layer(token, is_causal=True, cache=forgets),
    }


def measure(layer: DynamicMaskAttention, length: int, rounds: int) -> dict[str, Any]:
    """Of one length."""
    jobs = contenders(layer, length)
    seconds = interleaved(jobs, rounds)
    found: dict[str, Any] = {
        name: {"milliseconds": 1000 * median(times), "over dense": ratio(seconds, name, DENSE)}
        for name, times in seconds.items()
    }
    bytes_a_token = 2 * 4 * WIDTH
    for name in (DENSE, IN_PLACE, ALL):
        found[name]["cache MB"] = length * bytes_a_token / 1e6
    found[FORGETS]["cache MB"] = min(length, layer.keep_window) * (bytes_a_token + 4 * HEADS) / 1e6
    return found


def main() -> None:
    """Measure, print, write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="short lengths: does it run at all?")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 16384, 65536])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="results/benchmarks/dynamic_mask_decoding.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    console = Console()
    console.print(machine())
    torch.manual_seed(0)
    layer = DynamicMaskAttention(WIDTH, HEADS, keep_window=32 if arguments.quick else WINDOW)
    lengths: dict[str, Any] = {}
    with torch.no_grad():
        for length in [64, 128] if arguments.quick else arguments.lengths:
            lengths[str(length)] = measure(
                layer, length, 2 if arguments.quick else arguments.rounds
            )
            console.print(length, lengths[str(length)])
    out = arguments.out or RESULTS / "dynamic_mask_decoding.json"
    write("dynamic_mask_decoding", {"lengths": lengths}, out)
    console.print(f"wrote {out}")


if __name__ == "__main__":
    main()
