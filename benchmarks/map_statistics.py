"""Entropy, received attention and mass per class of every head, against the eager map.

    python benchmarks/map_statistics.py [--quick] [--lengths 1024 4096 16384] [--threads 1]

The work: for every head of a layer with 12 heads of dim 64, float32, causal, batch 1, the entropy
of each row, the attention that each key receives, and the mass of each row on 4 classes of keys.

Measured against one forward of `scaled_dot_product_attention` on the same tensors, which is not
counted as part of any contender. The eager map is the one that transformers makes with
`output_attentions=True`, by its own `eager_attention_forward`; it has to be there in full before
anything can be read from it. TransformerLens runs a whole one-layer GPT-2 with `run_with_cache`,
so it is compared with our tap on that same model.
"""

import argparse
import copy
import json
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _measure import interleaved, machine, peak_growth, ratio, write
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import one_hot, scaled_dot_product_attention

from attending.core import statistics
from attending.taps import AttentionCall, Proceed, tap

HEADS, DIM, CLASSES = 12, 64, 4
BASE, OURS, EAGER = "SDPA forward", "map_summary", "eager map"
ROUNDS = {1024: 15, 4096: 7}  # 3 for longer ones


class Work:
    """One layer's tensors, and everybody's way to the three statistics."""

    def __init__(self, length: int) -> None:
        torch.manual_seed(0)
        self.query, self.key, self.value = torch.randn(3, 1, HEADS, length, DIM).unbind(0)
        self.classes = torch.arange(length) % CLASSES
        self.features = one_hot(self.classes, CLASSES).float()
        self.lse = torch.zeros(0)

    def sdpa(self) -> Tensor:
        return scaled_dot_product_attention(self.query, self.key, self.value, is_causal=True)

    def map_summary(self) -> tuple[Tensor, ...]:
        found = statistics.map_summary(self.query, self.key, self.features, is_causal=True)
        assert found.features is not None
        return found.entropy, found.mass, found.features

    def three_functions(self) -> tuple[Tensor, ...]:
        return (
            statistics.entropy(self.query, self.key, is_causal=True),
            statistics.column_mass(self.query, self.key, is_causal=True),
            statistics.class_mass(self.query, self.key, self.classes, CLASSES, is_causal=True),
        )

    def fused_passes(self) -> tuple[Tensor, ...]:
        """What a caller with gradients gets: the fused kernels, with a graph (no backward here)."""
        query = self.query.clone().requires_grad_()
        with torch.enable_grad():
            found = statistics.map_summary(query, self.key, self.features, is_causal=True)
        assert found.features is not None
        return found.entropy, found.mass, found.features

    def head_means(self) -> tuple[Tensor, ...]:
        """The means over the queries alone, by a caller that has the lse of the forward."""
        found = statistics.column_summary(self.query, self.key, self.lse, is_causal=True)
        assert found.entropy is not None
        return found.entropy, found.mass, found.mass @ self.features

    def eager(self) -> tuple[Tensor, ...]:
        from transformers.models.llama.modeling_llama import eager_attention_forward

        length = self.query.shape[2]
        hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
        mask = torch.zeros(1, 1, length, length)
        mask.masked_fill_(hidden, torch.finfo(torch.float32).min)
        layer = types.SimpleNamespace(num_key_value_groups=1, training=False)
        _, p = eager_attention_forward(
            layer, self.query, self.key, self.value, mask, scaling=DIM**-0.5
        )
        return torch.special.entr(p).sum(-1), p.sum(-2), p @ self.features

    def contenders(self) -> dict[str, Callable[[], object]]:
        """By name; one that does not fit into this machine's memory is left out."""
        self.lse = statistics.row_summary(self.query, self.key, is_causal=True).lse
        found: dict[str, Callable[[], object]] = {
            BASE: self.sdpa,
            OURS: self.map_summary,
            "entropy, column_mass, class_mass": self.three_functions,
            "map_summary, gradients on": self.fused_passes,
            "column_summary (head means, lse known)": self.head_means,
        }
        if eager_fits(self.query.shape[2]):
            found[EAGER] = self.eager
        return found


def eager_fits(length: int) -> bool:
    """Scores, their sum with the mask, probabilities and entropies are there at the same time."""
    from psutil import virtual_memory

    return bool(5 * HEADS * length**2 * 4 < virtual_memory().available)


def check() -> dict[str, float]:
    """The largest difference between our statistics and those of the eager map, in float32."""
    work = Work(512)
    theirs = work.eager()
    ours = {OURS: work.map_summary(), "gradients on": work.fused_passes()}
    return {
        f"{name}, {what}": float((mine - yours).abs().max())
        for name, found in ours.items()
        for what, mine, yours in zip(("entropy", "mass", "classes"), found, theirs, strict=True)
    }


def memory_of(name: str, length: int) -> int:
    """The peak growth of a fresh process, in bytes: the tensors are there before it is measured."""
    command = [sys.executable, __file__, "--memory-of", name, "--lengths", str(length)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(json.loads(done.stdout))


def print_memory_of(name: str, length: int) -> None:
    """What `memory_of` runs in the fresh process."""
    small = Work(128)
    small.contenders()[name]()  # whatever is loaded at the first call
    run = Work(length).contenders()[name]
    print(json.dumps(peak_growth(run)))


def transformer_lens(length: int, rounds: int) -> dict[str, Any] | str:
    """Whole-model figures on a one-layer GPT-2, or the reason why there are none."""
    try:
        from transformer_lens import TransformerBridge
    except ImportError as error:
        return f"TransformerLens is not measured: {error}. Install transformer-lens to have it."
    if not eager_fits(length):
        return f"TransformerLens is not measured at {length} tokens: its maps do not fit."
    import tempfile

    from tokenizers import Tokenizer, models
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    config = GPT2Config(n_layer=1, n_head=HEADS, n_embd=HEADS * DIM, n_inner=64, vocab_size=100)
    config.update({"n_positions": length, "bos_token_id": 0, "eos_token_id": 0})
    config.architectures = ["GPT2LMHeadModel"]
    plain = GPT2LMHeadModel(config).eval()
    theirs = GPT2LMHeadModel(copy.deepcopy(config)).eval()  # the bridge changes what it gets
    theirs.load_state_dict(plain.state_dict())
    words = Tokenizer(models.WordLevel({str(i): i for i in range(100)}, unk_token="0"))
    special = dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), "0")
    with tempfile.TemporaryDirectory() as folder:  # the bridge wants one that was loaded
        PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        bridge = TransformerBridge.boot_transformers("gpt2", hf_model=theirs, tokenizer=tokenizer)
    ids = torch.randint(0, 100, (1, length))
    features = one_hot(torch.arange(length) % CLASSES, CLASSES).float()

    def lens() -> tuple[Tensor, ...]:
        _, cache = bridge.run_with_cache(ids, names_filter=lambda name: name.endswith("pattern"))
        p = cache["blocks.0.attn.hook_pattern"]
        return torch.special.entr(p).sum(-1), p.sum(-2), p @ features

    def ours() -> tuple[Tensor, ...]:
        kept = []

        def measure(call: AttentionCall, proceed: Proceed) -> Tensor:
            found = statistics.map_summary(call.query, call.key, features, is_causal=call.is_causal)
            kept.extend((found.entropy, found.mass, found.features))
            return proceed(call)

        with tap(plain, measure):
            plain(input_ids=ids)
        return tuple(kept)

    difference = max(float((a - b).abs().max()) for a, b in zip(lens(), ours(), strict=True))
    seconds = interleaved({"plain": lambda: plain(ids), "ours": ours, "lens": lens}, rounds)
    return {
        "largest difference": difference,
        "tap and map_summary over a plain forward": ratio(seconds, "ours", "plain"),
        "TransformerLens over a plain forward": ratio(seconds, "lens", "plain"),
        "TransformerLens over tap and map_summary": ratio(seconds, "lens", "ours"),
    }


def main() -> None:
    """Measure, print a table, write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="short lengths: does it run at all?")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 16384])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="results/benchmarks/statistics.json by default")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.set_grad_enabled(False)
    if arguments.memory_of:
        print_memory_of(arguments.memory_of, arguments.lengths[0])
        return
    console = Console()
    console.print(machine())
    lengths = [256, 512] if arguments.quick else arguments.lengths
    figures: dict[str, Any] = {"difference from the eager map": check(), "lengths": {}}
    for length in lengths:
        rounds = 2 if arguments.quick else ROUNDS.get(length, 3)
        seconds = interleaved(Work(length).contenders(), rounds, warm_up=length <= 4096)
        found = {
            name: {
                "seconds": sorted(times)[len(times) // 2],
                "over SDPA": ratio(seconds, name, BASE),
                "peak MB": memory_of(name, length) / 1e6,
            }
            for name, times in seconds.items()
        }
        figures["lengths"][length] = found
        console.print(_table(length, rounds, found))
        if EAGER not in found:
            console.print(f"The eager map does not fit into memory at {length} tokens.")
    figures["TransformerLens"] = {}
    for length in lengths:
        lens = transformer_lens(length, 2 if arguments.quick else ROUNDS.get(length, 3))
        figures["TransformerLens"][length] = lens
        console.print(f"TransformerLens at {length} tokens:", lens)
    figures["goals"] = goals(figures["lengths"])
    console.print(figures["goals"])
    console.print(f"wrote {write('statistics', figures, arguments.out)}")


def goals(lengths: dict[int, dict[str, dict[str, float]]]) -> dict[str, str]:
    """The goals that were set before, and what came out; only for the lengths that were run."""
    said = {}
    for length in (4096, 16384):
        if length in lengths:
            share = lengths[length][OURS]["over SDPA"]
            verdict = "met" if share <= 3.4 else "not met"
            said[f"all three at most 3.4 SDPA forwards at {length}"] = f"{verdict}: {share:.2f}"
    if 4096 in lengths and EAGER in lengths[4096]:
        found = lengths[4096]
        faster = found[EAGER]["over SDPA"] / found[OURS]["over SDPA"]
        verdict = "met" if faster >= 2 else "not met"
        said["at least 2 times as fast as the eager map at 4096"] = f"{verdict}: {faster:.1f}"
    if 4096 in lengths and 16384 in lengths:
        growth = lengths[16384][OURS]["peak MB"] / max(lengths[4096][OURS]["peak MB"], 1e-9)
        verdict = "met" if growth <= 5 else "not met"
        said["peak memory at 16384 at most 5 times that at 4096"] = f"{verdict}: {growth:.1f}"
    return said


def _table(length: int, rounds: int, found: dict[str, dict[str, float]]) -> Table:
    table = Table(title=f"{length} tokens, {HEADS} heads of {DIM}, median of {rounds} rounds")
    table.add_column("")
    for column in ("seconds", "over SDPA", "peak MB"):
        table.add_column(column, justify="right")
    for name, figures in found.items():
        row = (figures["seconds"], figures["over SDPA"], figures["peak MB"])
        table.add_row(name, f"{row[0]:.3f}", f"{row[1]:.2f}", f"{row[2]:.1f}")
    return table


if __name__ == "__main__":
    main()
