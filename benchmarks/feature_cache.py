"""Time of a sampling with feature caches, against the same sampling without one.

    python benchmarks/feature_cache.py [--quick] [--rounds 3] [--threads 1]

The work: 12 steps of a `WanTransformer3DModel` with random weights, float32: 8 blocks of width 256,
512 tokens of video and 16 of text, guidance in two calls. Weights do not change the time, except
that they decide when caches that go by drift compute: their thresholds are set so that they
compute about half of the steps. Beside each time stands the share that was computed, which is what
a cache without costs of its own would take; "computes all" is what those costs are.
"""

import argparse
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from _measure import interleaved, machine, ratio, write
from rich.console import Console

from attending.interventions.cache_schedule import UniformSteps
from attending.interventions.diffusers_caches import FirstBlockCache, PyramidAttentionBroadcast
from attending.interventions.feature_cache import ProfilingCache, TeaCache
from attending.interventions.intervention import InterventionWarning
from attending.interventions.output_cache import FORA

PLAIN = "no cache"


class Sampling:
    """Euler's steps from noise, with guidance, within a cache."""

    def __init__(self, model: Any, method: Any, steps: int, side: int) -> None:
        self.model, self.method, self.steps = model, method, steps
        generator = torch.Generator().manual_seed(0)
        self.noise = torch.randn(1, 3, 8, side, side, generator=generator)
        self.text = {name: torch.randn(1, 16, 64, generator=generator) for name in ("cond", "un")}
        self.density = 1.0

    @torch.no_grad()
    def __call__(self) -> None:
        """Sample once."""
        block = nullcontext() if self.method is None else self.method(self.model)
        with block as run:
            sample = self.noise
            for step in range(self.steps):
                time = torch.tensor([1000.0 * (1 - step / self.steps)])
                found = {}
                for name, states in self.text.items():
                    with self.model.cache_context(name):
                        found[name] = self.model(sample, time, states).sample
                velocity = found["un"] + 3 * (found["cond"] - found["un"])
                sample = sample - velocity / self.steps
        self.density = 1.0 if run is None else run.density


def make_wan(quick: bool) -> Any:
    """A WanTransformer3DModel of middling size, newly drawn."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    return WanTransformer3DModel(
        patch_size=(1, 4, 4),
        num_attention_heads=2 if quick else 8,
        attention_head_dim=12 if quick else 32,
        in_channels=3,
        out_channels=3,
        text_dim=64,
        freq_dim=64,
        ffn_dim=64 if quick else 1024,
        num_layers=8,
    ).eval()


def about_half(make: Callable[[float], Any], model: Any, steps: int, side: int) -> Any:
    """The method with a threshold at which it computes about half."""
    low, high = 0.0, 16.0
    for _ in range(12):
        middle = (low + high) / 2
        sampling = Sampling(model, make(middle), steps, side)
        sampling()
        if abs(sampling.density - 0.5) < 0.05:
            break
        low, high = (middle, high) if sampling.density > 0.5 else (low, middle)
    return make(middle)


def main() -> None:
    """Measure, print, write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small model: does it run?")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="results/benchmarks/feature_cache.json by default")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    console = Console()
    console.print(machine())
    rounds, side = (1, 8) if arguments.quick else (arguments.rounds, 32)
    steps, model = 12, make_wan(arguments.quick)
    methods: dict[str, Any] = {
        PLAIN: None,
        "ProfilingCache, computes all": ProfilingCache(None, UniformSteps(1)),
        "ProfilingCache, 4 of 8 blocks": ProfilingCache((0, 2, 3, 5), UniformSteps(3)),
        "ProfilingCache, all blocks": ProfilingCache(None, UniformSteps(2)),
        "TeaCache": about_half(TeaCache, model, steps, side),
        "FORA": FORA(2),
        "FirstBlockCache": about_half(FirstBlockCache, model, steps, side),
        "PyramidAttentionBroadcast": PyramidAttentionBroadcast(2, cross=2, timesteps=(0, 1001)),
    }
    contenders = {name: Sampling(model, method, steps, side) for name, method in methods.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InterventionWarning)  # one of them computes all on purpose
        seconds = interleaved(dict(contenders), rounds)
    found = {
        name: {
            "time": ratio(seconds, name, PLAIN),
            "computed": contenders[name].density,
            "seconds": sorted(seconds[name])[rounds // 2],
        }
        for name in methods
    }
    console.print(found)
    if arguments.quick and arguments.out is None:  # figures of a small model are not kept
        return
    console.print(f"wrote {write('feature_cache', {'sampling': found}, arguments.out)}")


if __name__ == "__main__":
    main()
