"""What `AttentionMonitor` costs a training, at its default interval and for one measurement.

    python benchmarks/monitor.py [--quick] [--rounds 3] [--threads 1]

The work: steps of AdamW on a model of the size of llama-stdlib (8 layers, hidden 192, 6 query and
2 key heads of dim 32, vocabulary 4096, 2.9 M parameters), float32, 4 sequences of 512 tokens. The
probe is a batch of the same size, without labels. Two models with the same weights are trained on
the same batches in turns, one with the monitor and one without, each for as many steps as the
interval is long, so that a round has one measurement. Weights after the last round must be equal to
the last bit.

The time of one measurement over that of one step says what any other interval costs; these are
medians of 15 rounds.
"""

import argparse
from collections.abc import Callable
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

import torch
from _measure import interleaved, machine, ratio, write
from rich.console import Console
from torch import Tensor, nn

from attending.monitor import AttentionMonitor
from attending.taps.running import evaluating

VOCABULARY, BATCH, CONTEXT = 4096, 4, 512
PLAIN, WATCHED = "without", "with the monitor"
GOAL = 0.05


def make_model() -> nn.Module:
    """The size of llama-stdlib, newly drawn."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=448,
        num_hidden_layers=8,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).train()


def batch_of(seed: int) -> Tensor:
    """Random tokens: what they are does not change the time."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCABULARY, (BATCH, CONTEXT), generator=generator)


class Training:
    """A model in training, with or without a monitor."""

    def __init__(self, every: int, watch: bool) -> None:
        self.model: Any = make_model()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, fused=True)
        self.probe = {"input_ids": batch_of(10**6)}
        self.monitor = AttentionMonitor(self.model, self.probe, every=every) if watch else None
        self.every, self.steps = every, count()
        if self.monitor is not None:
            self.monitor.measure()  # the first one, before the training

    def step(self) -> None:
        """One step of the optimizer."""
        batch = batch_of(next(self.steps))
        self.model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.monitor is not None:
            self.monitor.step()

    def interval(self) -> None:
        """As many steps as lie between two measurements."""
        for _ in range(self.every):
            self.step()

    def forward(self) -> None:
        """The least that a measurement can do: the probe, without labels."""
        with torch.no_grad(), evaluating(self.model):
            self.model(**self.probe)


def in_steps(rounds: int) -> dict[str, float]:
    """One measurement, its parts and one forward, in units of one step of plain training."""
    plain, watched, bare = Training(1, False), Training(1, True), Training(1, True)
    assert watched.monitor is not None
    assert bare.monitor is not None
    bare.monitor = AttentionMonitor(bare.model, bare.probe, weights=())  # layers alone
    contenders: dict[str, Callable[[], object]] = {
        "step": plain.step,
        "forward of the probe": plain.forward,
        "copy of the weights": lambda: watched.monitor.before_step(watched.monitor.steps + 1),
        "measurement": lambda: watched.monitor.measure(watched.monitor.steps + 1),
        "measurement of layers alone": bare.monitor.measure,
    }
    seconds = interleaved(contenders, rounds)
    assert all(weight.update_ratio is not None for weight in watched.monitor.history[-1].weights)
    found = {name: ratio(seconds, name, "step") for name in contenders if name != "step"}
    return {"seconds of a step": median(seconds["step"]), **found}


def whole(every: int, rounds: int) -> dict[str, float]:
    """Training with the monitor over training without it."""
    plain, watched = Training(every, False), Training(every, True)
    seconds = interleaved({PLAIN: plain.interval, WATCHED: watched.interval}, rounds, warm_up=False)
    assert watched.monitor is not None
    assert len(watched.monitor.history) == 1 + rounds
    for one, other in zip(plain.model.parameters(), watched.model.parameters(), strict=True):
        if not torch.equal(one, other):
            raise AssertionError("the monitor changed the training")
    return {
        "every": every,
        "rounds": rounds,
        "with over without": ratio(seconds, WATCHED, PLAIN),
        "least": min(b / a for a, b in zip(*seconds.values(), strict=True)),
        "largest": max(b / a for a, b in zip(*seconds.values(), strict=True)),
    }


def main() -> None:
    """Measure, print, write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a short interval: does it run?")
    parser.add_argument("--rounds", type=int, default=3, help="of a whole interval each")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="results/benchmarks/monitor.json by default")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    console = Console()
    console.print(machine())
    every = 5 if arguments.quick else 100  # the default of AttentionMonitor
    steps = in_steps(2 if arguments.quick else 15)
    console.print(steps)
    cost = steps["measurement"] + steps["copy of the weights"]
    intervals = {str(k): cost / k for k in (1, 10, 20, 50, 100, 1000)}
    console.print("share of the training, by interval:", intervals)
    found = whole(every, 1 if arguments.quick else arguments.rounds)
    console.print(found)
    if arguments.quick and arguments.out is None:  # figures of a short interval are not kept
        return
    share = found["with over without"] - 1
    figures = {
        "one measurement in steps": steps,
        "computed share of the training by interval": intervals,
        "training": found,
        "goal": f"under {GOAL:.0%} at the default interval: "
        f"{'met' if share < GOAL else 'not met'}, {share:.1%}",
    }
    console.print(figures["goal"])
    console.print(f"wrote {write('monitor', figures, arguments.out)}")


if __name__ == "__main__":
    main()
