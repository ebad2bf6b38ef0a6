"""What a diagnosis costs: `at.diagnose` of a whole model, against its plain forward.

    python benchmarks/diagnose.py [--quick] [--threads 1] [--batches 4]

The model is `llama-stdlib` of the zoo, a real `LlamaForCausalLM`, at its context length; the text
is source code of the standard library, which is what it was trained on. The forward is that of the
same batches, without gradients.
"""

import argparse
import inspect
import json
from pathlib import Path
from typing import Any

import torch
from _measure import interleaved, machine, ratio, write
from rich.console import Console

import attending as at

GOAL = 6.0


def batches(tokenizer: Any, length: int, count: int) -> list[dict[str, torch.Tensor]]:
    """Full windows of source code, as a user's text would be cut."""
    ids = tokenizer(inspect.getsource(json.decoder) + inspect.getsource(argparse)).input_ids
    windows = [ids[start : start + length] for start in range(0, count * length, length)]
    if len(windows[-1]) < length:
        raise SystemExit(f"--batches: the text has no {count} windows of {length} tokens.")
    return [{"input_ids": torch.tensor([window])} for window in windows]


def main() -> None:
    """Measure, print, write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a short text: does it run at all?")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batches", type=int, default=4, help="of one sequence each")
    parser.add_argument("--out", type=Path, help="results/benchmarks/diagnose.json by default")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    console = Console()
    console.print(machine())
    zoo_model = at.zoo.load("llama-stdlib")
    model = zoo_model.model
    context = model.config.max_position_embeddings
    length, count = (64, 1) if arguments.quick else (context, arguments.batches)
    inputs = batches(zoo_model.tokenizer, length, count)

    @torch.no_grad()
    def forward() -> None:
        for batch in inputs:
            model(**batch)

    def diagnose() -> None:
        at.diagnose(model, inputs, progress=False)

    rounds = 2 if arguments.quick else 7
    seconds = interleaved({"forward": forward, "diagnose": diagnose}, rounds)
    cost = ratio(seconds, "diagnose", "forward")
    figures = {
        "model": zoo_model.name,
        "tokens": [count, length],
        "rounds": rounds,
        "seconds": {name: sorted(times)[rounds // 2] for name, times in seconds.items()},
        "diagnose over forward": cost,
    }
    if not arguments.quick:
        verdict = "met" if cost <= GOAL else "not met"
        figures["goal"] = f"at most {GOAL:g} forwards: {verdict} ({cost:.2f})"
    console.print(figures)
    console.print(f"wrote {write('diagnose', figures, arguments.out)}")


if __name__ == "__main__":
    main()
