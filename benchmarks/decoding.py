"""What ways of decoding cost over greedy search, on `llama-stdlib`, in one run.

    python benchmarks/decoding.py [--quick] [--rounds 11] [--threads 1]

The work: one continuation of a prompt of 32 tokens by 200 tokens, batch 1, float32, as in the
paper's protocol; no end token stops it. The prompts are passages of the standard library. Each
round takes another prompt, and all ways take turns on it. A ratio is the median over the
rounds. Contrastive search is ours (`attending.decoding.contrastive_search`), with the same loop of
prefill, a cache and one forward a token, k rows wide, that transformers had until version 4: its
version 5 has only a link to code on the hub.

Also: the time of the processor of momentum decoding alone, as a share of a step of greedy search,
and how it grows with the text; and the same in batches of 8.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from _measure import interleaved, machine, ratio, write
from rich.console import Console
from torch import Tensor
from transformers import NoRepeatNGramLogitsProcessor

from attending import zoo
from attending.decoding.contrastive_search import ContrastiveSearch
from attending.decoding.momentum import MomentumDecoding, MomentumLogitsProcessor

PROMPT, NEW = 32, 200
GREEDY, MOMENTUM, CONTRASTIVE = "greedy", "momentum", "contrastive search, k = 4"
GOAL = 0.05


def prompts(tokenizer: Any, count: int) -> Tensor:
    """Passages of files of the standard library."""
    import calendar
    import difflib
    import gettext
    import heapq
    import textwrap

    rows: list[list[int]] = []
    sources = [Path(module.__file__) for module in (calendar, difflib, gettext, heapq, textwrap)]
    texts = [tokenizer(path.read_text(encoding="utf-8")[200:1500])["input_ids"] for path in sources]
    for index in range(count):
        ids = texts[index % len(texts)]
        start = PROMPT * (index // len(texts))
        rows.append(ids[start : start + PROMPT])
        assert len(rows[-1]) == PROMPT
    return torch.tensor(rows)


class Work:
    """The ways to continue the prompts of a round; each call of one goes on to its next round."""

    def __init__(self, model: Any, rows: Tensor, batch: int, new: int) -> None:
        self.model, self.rows, self.batch, self.new = model, rows, batch, new
        self.turns: dict[str, int] = {}

    def continue_with(self, name: str, settings: Callable[[], dict[str, Any]]) -> Tensor:
        """One continuation."""
        turn = self.turns[name] = self.turns.get(name, -1) + 1
        ids = self.rows.roll(-turn * self.batch, 0)[: self.batch]
        written = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=self.new,
            eos_token_id=None,
            **{"do_sample": False, **settings()},
        )
        assert isinstance(written, Tensor)
        assert written.shape == (self.batch, PROMPT + self.new)
        return written


def contenders(work: Work) -> dict[str, Callable[[], object]]:
    """Each makes what it needs anew, as a user does."""
    ways: dict[str, Callable[[], dict[str, Any]]] = {
        GREEDY: dict,
        MOMENTUM: lambda: {"logits_processor": [MomentumLogitsProcessor()]},
        "momentum, k = 50": lambda: {"logits_processor": [MomentumLogitsProcessor(top_k=50)]},
        "no repeated 4-gram": lambda: {"logits_processor": [NoRepeatNGramLogitsProcessor(4)]},
        "nucleus, p = 0.95": lambda: {"do_sample": True, "top_p": 0.95, "top_k": 0},
        CONTRASTIVE: lambda: {"custom_generate": ContrastiveSearch(top_k=4).custom_generate},
        "contrastive search, k = 5": lambda: {
            "custom_generate": ContrastiveSearch(top_k=5).custom_generate
        },
    }
    return {name: partial(work.continue_with, name, way) for name, way in ways.items()}


def whole(model: Any, rows: Tensor, batch: int, rounds: int, new: int) -> dict[str, Any]:
    """Seconds of each way and its ratio to greedy search."""
    work = Work(model, rows, batch, new)
    seconds = interleaved(contenders(work), rounds)
    found = {
        name: {"seconds": median(times), "over greedy": ratio(seconds, name, GREEDY)}
        for name, times in seconds.items()
    }
    found["greedy"]["milliseconds a token"] = 1000 * median(seconds[GREEDY]) / new
    found[CONTRASTIVE]["over momentum"] = ratio(seconds, CONTRASTIVE, MOMENTUM)
    return found


def alone(model: Any, rows: Tensor, rounds: int, lengths: tuple[int, ...]) -> dict[str, float]:
    """Milliseconds a token of the processor, at the end of texts of several lengths."""
    vocabulary = model.config.vocab_size
    generator = torch.Generator().manual_seed(0)
    found = {}
    for length in lengths:
        ids = torch.randint(0, 300, (1, length + 50), generator=generator)
        scores = torch.randn(50, 1, vocabulary, generator=generator) * 3
        processor = MomentumLogitsProcessor()

        def steps(
            ids: Tensor = ids,
            scores: Tensor = scores,
            processor: MomentumLogitsProcessor = processor,
            length: int = length,
        ) -> None:
            for step in range(1, 50):
                processor(ids[:, : length + step], scores[step])

        def start(
            ids: Tensor = ids,
            scores: Tensor = scores,
            processor: MomentumLogitsProcessor = processor,
            length: int = length,
        ) -> None:
            processor.reset()
            processor(ids[:, :length], scores[0])

        seconds = interleaved({"start": start, "steps": steps}, rounds)
        found[f"a token after {length}"] = 1000 * median(seconds["steps"]) / 49
        found[f"a prompt of {length}"] = 1000 * median(seconds["start"])
    return found


def check(model: Any, rows: Tensor, new: int) -> None:
    """The forms of momentum decoding write the same, and k = 1 is greedy search."""
    ids = rows[:2]
    given = {"attention_mask": torch.ones_like(ids), "max_new_tokens": new, "eos_token_id": None}
    with MomentumDecoding()(model):
        inside = model.generate(ids, **given)
    custom = model.generate(ids, custom_generate=MomentumDecoding().custom_generate, **given)
    greedy = model.generate(ids, do_sample=False, **given)
    with MomentumDecoding(top_k=1)(model):
        limit = model.generate(ids, **given)
    if not (torch.equal(inside, custom) and torch.equal(greedy, limit)):
        raise AssertionError("the forms of momentum decoding do not agree")


def main() -> None:
    """Measure, print, write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few, short texts: does it run?")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="results/benchmarks/decoding.json by default")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    console = Console()
    console.print(machine())
    loaded = zoo.load("llama-stdlib")
    model: Any = loaded.model
    rounds, new = (2, 12) if arguments.quick else (arguments.rounds, NEW)
    rows = prompts(loaded.tokenizer, 40)
    check(model, rows, min(new, 50))
    one = whole(model, rows, 1, rounds, new)
    console.print(one)
    eight = whole(model, rows, 8, 2 if arguments.quick else max(3, rounds // 4), new)
    console.print(eight)
    processor = alone(model, rows, rounds, (64, 256) if arguments.quick else (64, 512, 4096, 32768))
    console.print(processor)
    if arguments.quick and arguments.out is None:  # figures of short texts are not kept
        return
    share = one[MOMENTUM]["over greedy"] - 1
    figures = {
        "one text": one,
        "eight texts": eight,
        "milliseconds of the processor": processor,
        "goal": f"momentum decoding at most {GOAL:.0%} over greedy search: "
        f"{'met' if share <= GOAL else 'not met'}, {share:.1%}",
    }
    console.print(figures["goal"])
    console.print(f"wrote {write('decoding', figures, arguments.out)}")


if __name__ == "__main__":
    main()
