"""The experiment of momentum decoding: `llama-stdlib` continues files that it has not seen.

Prompts are 32 tokens from anywhere in the held-out files of the standard library (without the
tables of `encodings`), continuations 200 tokens; special tokens are suppressed, so that all are
equally long, since every measure depends on the length. The ways of decoding take turns on each
batch of prompts, and the processor time of each is summed.

Measured, as in the paper: diversity of words (text split at white space, pooled over texts),
coherence and greedy ratio. Coherence is the mean log-probability under the model itself, since
there is no larger one here that knows Python; the paper has OPT-2.7B. What the files' authors
wrote is measured too.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attending.decoding.contrastive_search import ContrastiveSearch
from attending.decoding.momentum import MomentumDecoding
from attending.probes.continuations import score_continuations
from attending.probes.text import diversity, rep_n
from attending.zoo import load
from attending.zoo.recipes.stdlib_text import read_documents, split


@dataclass(frozen=True)
class Found:
    """What came out of one way of decoding.

    Attributes:
        diversity: of words, 0 to 1.
        token_diversity: of tokens.
        rep_4: share of 4-grams of words that repeat an earlier one of their text.
        coherence: mean log-probability of the continuation's tokens, nats.
        greedy_ratio: share of them that greedy search would have taken.
        seconds: of the processor, for all continuations; nan for people.
    """

    diversity: float
    token_diversity: float
    rep_4: float
    coherence: float
    greedy_ratio: float
    seconds: float


def ways(contrastive: tuple[float, int]) -> dict[str, Mapping[str, Any]]:
    """What `generate` gets, by name; sampling draws from torch's global generator."""
    alpha, top_k = contrastive
    greedy = {"do_sample": False}
    sampling = {"do_sample": True, "temperature": 1.0}
    search = ContrastiveSearch(alpha, top_k).custom_generate
    ngrams = MomentumDecoding(resistance="ngram4").custom_generate
    return {
        "greedy": greedy,
        "momentum": {**greedy, "custom_generate": MomentumDecoding().custom_generate},
        "contrastive": {**greedy, "custom_generate": search},
        "top_k": {**sampling, "top_k": 50, "top_p": 1.0},
        "nucleus": {**sampling, "top_k": 0, "top_p": 0.95},
        "ngram4": {**greedy, "custom_generate": ngrams},
    }


def passages(tokenizer: Any, seed: int, count: int, length: int) -> Tensor:
    """Passages of held-out files that do not overlap, [count, length], drawn by the seed."""
    _, held_out = split(read_documents(), 40)
    windows: list[list[int]] = []
    for document in held_out:
        if not document.path.startswith("encodings/"):
            ids = tokenizer(document.text, add_special_tokens=False, verbose=False)["input_ids"]
            ends = range(length, len(ids) + 1, length)
            windows.extend(ids[end - length : end] for end in ends)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(windows), generator=generator)[:count]
    return torch.tensor(windows)[chosen]


def run(
    seed: int,
    *,
    prompts: int,
    batch: int,
    prompt_tokens: int,
    new_tokens: int,
    contrastive_alpha: float,
    contrastive_top_k: int,
) -> dict[str, Found]:
    """Continue the prompts in all ways; with `people`, whose continuations are there."""
    zoo_model = load("llama-stdlib")
    model: Any = zoo_model.model
    text = passages(zoo_model.tokenizer, seed, prompts, prompt_tokens + new_tokens)
    starts, written = text[:, :prompt_tokens], text[:, prompt_tokens:]
    contenders = ways((contrastive_alpha, contrastive_top_k))
    parts: dict[str, list[Tensor]] = {name: [] for name in contenders}
    seconds = dict.fromkeys(contenders, 0.0)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        for ids in starts.split(batch):
            for name, settings in contenders.items():
                begun = time.process_time()
                whole = model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=new_tokens,
                    suppress_tokens=list(range(3)),  # BOS, EOS and padding
                    **settings,
                )
                seconds[name] += time.process_time() - begun
                parts[name].append(whole[:, prompt_tokens:])
    continuations = {name: torch.cat(rows) for name, rows in parts.items()}
    continuations["people"] = written
    found = {}
    for name, rows in continuations.items():
        scores = score_continuations(model, list(starts), list(rows), batch_size=batch)
        words = zoo_model.tokenizer.batch_decode(rows)
        found[name] = Found(
            diversity=diversity(words),
            token_diversity=diversity(list(rows)),
            rep_4=rep_n(words, 4),
            coherence=float(scores.coherence.mean()),
            greedy_ratio=float(scores.greedy_ratio.mean()),
            seconds=seconds.get(name, float("nan")),
        )
    return found
