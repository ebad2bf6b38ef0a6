"""Edits of the attention of a running model, against the same edits on an eager map.

    python benchmarks/interventions.py [--quick] [--lengths 1024 4096] [--only ACT ...]

The work of a row: one layer with 12 heads of dim 64, float32, causal, batch 1; its output after the
edit. The unit is one forward of plain `scaled_dot_product_attention` on the same tensors. The eager
contender makes the map by transformers' own `eager_attention_forward` and edits it there, head by
head, as the official code of the method does.

A row is an entry of `EDITS`: a class whose instances have `sdpa`, `ours` and `eager`, each of which
returns the output. Add one to measure another edit.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from _edited_layer import DIM, HEADS, Attention, eager_map
from _interventions.visual_attention_redistribution import Redistribution
from _measure import interleaved, machine, peak_growth, ratio, write
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from attending.interventions.attention_calibration import AttentionCalibration

BASE, OURS, EAGER = "SDPA forward", "ours", "eager map"
ROUNDS = {1024: 15, 4096: 7}  # 3 for longer ones
TIME_GOAL, MEMORY_GOAL, DIFFERENCE_GOAL = 1.6, 0.2, 1e-4


class Work(Protocol):
    """One row: everybody's way to the edited output."""

    def sdpa(self) -> Tensor: ...

    def ours(self) -> Tensor: ...

    def eager(self) -> Tensor: ...


class Layer(nn.Module):
    """A layer that is nothing but its attention."""

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.self_attn = attention

    def forward(self) -> Tensor:
        found: Tensor = self.self_attn()
        return found


class Model(nn.Module):
    """What an intervention takes hold of: a stack of one layer."""

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, is_causal: bool = True) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(Attention(query, key, value, is_causal))])

    def forward(self) -> Tensor:
        found: Tensor = self.layers[0]()
        return found


class Calibration:
    """ACT over all heads. Every head has some sinks in the middle, as well as its early keys."""

    beta, alpha = 0.4, 5.0

    def __init__(self, length: int) -> None:
        generator = torch.Generator().manual_seed(0)
        query, key, value = torch.randn(3, 1, HEADS, length, DIM, generator=generator)
        shared = torch.randn(HEADS, 1, DIM, generator=generator)
        shared = shared * DIM**0.5 / shared.norm(dim=-1, keepdim=True)
        query = query + shared / 4
        sinks = torch.randint(1, length // 2, (HEADS, 4), generator=generator)
        for head, places in enumerate(sinks):
            key[0, head, places] += 2 * shared[head]
        self.tensors = (query, key, value)
        self.model = Model(*self.tensors)
        self.method = AttentionCalibration(
            layers=(0,), alpha=self.alpha, beta=self.beta, min_observers=1
        )

    def sdpa(self) -> Tensor:
        return scaled_dot_product_attention(*self.tensors, is_causal=True)

    def ours(self) -> Tensor:
        with self.method(self.model) as run:
            output: Tensor = self.model()
        assert len(run.heads) == HEADS
        return output

    def eager(self) -> Tensor:
        """One head after the other, in place, as the official code; its batch is one."""
        query, key, value = self.tensors
        p = eager_map(query, key, value)
        length = p.shape[-1]
        seen_by = torch.arange(length, 0, -1)
        for head in range(HEADS):
            own = p[0, head]
            sinks = (own.sum(0) / seen_by > self.alpha / length).nonzero().squeeze(-1)[1:]
            mass = own[:, sinks].sum(1)
            columns = own[:, sinks] * self.beta
            own *= (1 + (1 - self.beta) * mass / (1 - mass))[:, None]
            own[:, sinks] = columns
        return p @ value


class CalibrationStep(Calibration):
    """ACT in one step of decoding: one query over the keys of the prompt and its own."""

    def __init__(self, length: int) -> None:
        super().__init__(length)
        query, key, value = self.tensors
        self.next = (query[:, :, -1:], *(torch.cat([t, t[:, :, -1:]], 2) for t in (key, value)))
        self.attention = self.model.layers[0].self_attn
        self.block = self.method(self.model)
        self.run = self.block.__enter__()  # stays open, as within a generation
        self.model()  # the prompt
        self.attention.call, self.attention.is_causal = self.next, False
        # What an eager step has to know is in the prompt too, and is not part of the step.
        p = eager_map(query, key, value)
        seen_by = torch.arange(length, 0, -1)
        flagged = p[0].sum(1) / seen_by > self.alpha / length
        self.sinks = [found.nonzero().squeeze(-1)[1:] for found in flagged]

    def sdpa(self) -> Tensor:
        return scaled_dot_product_attention(*self.next)

    def ours(self) -> Tensor:
        output: Tensor = self.model()
        return output

    def eager(self) -> Tensor:
        query, key, value = self.next
        p = eager_map(query, key, value)
        for head, sinks in enumerate(self.sinks):
            own = p[0, head]
            mass = own[:, sinks].sum(1)
            columns = own[:, sinks] * self.beta
            own *= (1 + (1 - self.beta) * mass / (1 - mass))[:, None]
            own[:, sinks] = columns
        return p @ value


EDITS: dict[str, Callable[[int], Work]] = {
    "ACT": Calibration,
    "ACT, a step of decoding": CalibrationStep,
    "VAR": Redistribution,
}


def contenders(work: Work) -> dict[str, Callable[[], Tensor]]:
    """By name."""
    return {BASE: work.sdpa, OURS: work.ours, EAGER: work.eager}


def memory_of(edit: str, name: str, length: int) -> int:
    """The peak growth of a fresh process, in bytes: the tensors are there before it is measured."""
    command = [sys.executable, __file__, "--memory-of", edit, name, "--lengths", str(length)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(json.loads(done.stdout))


def print_memory_of(edit: str, name: str, length: int) -> None:
    """What `memory_of` runs in the fresh process."""
    contenders(EDITS[edit](128))[name]()  # whatever is loaded at the first call
    run = contenders(EDITS[edit](length))[name]
    print(json.dumps(peak_growth(run)))


def measure(edit: str, length: int, rounds: int) -> dict[str, Any]:
    """One row at one length."""
    work = EDITS[edit](length)
    difference = float((work.ours() - work.eager()).abs().max())
    seconds = interleaved(contenders(work), rounds)
    del work
    return {
        "largest difference from the eager edit": difference,
        **{
            name: {
                "seconds": sorted(times)[len(times) // 2],
                "over SDPA": ratio(seconds, name, BASE),
                "peak MB": memory_of(edit, name, length) / 1e6,
            }
            for name, times in seconds.items()
        },
    }


def goals(edit: str, found: dict[str, Any]) -> dict[str, str]:
    """The goals that were set before for 4096 tokens, and what came out."""

    def say(value: float, limit: float) -> str:
        return f"{'met' if value <= limit else 'not met'}: {value:.3g}"

    memory = found[OURS]["peak MB"] / max(found[EAGER]["peak MB"], 1e-9)
    return {
        f"{edit}: at most {TIME_GOAL} SDPA forwards": say(found[OURS]["over SDPA"], TIME_GOAL),
        f"{edit}: at most {MEMORY_GOAL} of the eager edit's memory": say(memory, MEMORY_GOAL),
        f"{edit}: the eager edit's numbers to {DIFFERENCE_GOAL}": say(
            found["largest difference from the eager edit"], DIFFERENCE_GOAL
        ),
    }


def main() -> None:
    """Measure, print a table, write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="short lengths: does it run at all?")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--only", nargs="+", choices=list(EDITS), default=list(EDITS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="results/benchmarks/interventions.json by default")
    parser.add_argument("--memory-of", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.set_grad_enabled(False)
    if arguments.memory_of:
        print_memory_of(*arguments.memory_of, arguments.lengths[0])
        return
    console = Console()
    console.print(machine())
    lengths = [256] if arguments.quick else arguments.lengths
    figures: dict[str, Any] = {"edits": {}, "goals": {}}
    for edit in arguments.only:
        figures["edits"][edit] = {}
        for length in lengths:
            rounds = 2 if arguments.quick else ROUNDS.get(length, 3)
            found = measure(edit, length, rounds)
            figures["edits"][edit][length] = found
            console.print(_table(edit, length, rounds, found))
            if length == 4096 and "step" not in edit:
                figures["goals"] |= goals(edit, found)
    console.print(figures["goals"])
    console.print(f"wrote {write('interventions', figures, arguments.out)}")


def _table(edit: str, length: int, rounds: int, found: dict[str, Any]) -> Table:
    table = Table(
        title=f"{edit}: {length} tokens, {HEADS} heads of {DIM}, median of {rounds} rounds, "
        f"largest difference {found['largest difference from the eager edit']:.2g}"
    )
    for column in ("contender", "ms", "over SDPA", "peak MB"):
        table.add_column(column, justify="left" if column == "contender" else "right")
    for name in (BASE, OURS, EAGER):
        one = found[name]
        table.add_row(
            name,
            f"{1000 * one['seconds']:.3g}",
            f"{one['over SDPA']:.2f}",
            f"{one['peak MB']:.0f}",
        )
    return table


if __name__ == "__main__":
    main()
