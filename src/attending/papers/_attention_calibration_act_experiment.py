"""The experiment of ACT: a multiple-choice cloze and perplexity, on files that were held out.

`llama-stdlib` reads 64 tokens of a file of the standard library that it has not seen, and is asked
which of eight continuations of 4 tokens is the file's own. The others come from elsewhere in the
same file. The answer is the continuation with the largest log-probability. Sinks are found in the
64 tokens, and kept for the continuations, which are decoded with the cache.

Heads are chosen on one set of questions as in the paper: each head of the layers 2 to L - 2 alone,
kept if the share of right answers grows. Whether they help is asked on other questions, of other
files: as many random heads, all heads, and none stand beside them. Perplexity is that of 64 tokens
after a prefix of 64, in which the sinks are found, so that no later token tells of them.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from attending import zoo
from attending.interventions.attention_calibration import AttentionCalibration
from attending.interventions.head_selection import HeadScores, select_heads
from attending.zoo.recipes.stdlib_text import read_documents, split

CHOICES = 8


class Questions(NamedTuple):
    """Beginnings, and what may come next: the first choice is right."""

    contexts: Tensor  # [questions, context], starting with BOS
    choices: Tensor  # [questions, CHOICES, tokens]


@dataclass(frozen=True)
class Found:
    """What came out.

    Attributes:
        scores: of the single heads, on the calibration questions.
        heads: how many were selected.
        accuracy: on the test questions; by the heads that are calibrated.
        likelihood: mean log-probability of the right continuation there, nats per token.
        nats: per token after a prefix.
        calibration_accuracy: on the calibration questions.
    """

    scores: HeadScores
    heads: int
    accuracy: Mapping[str, float]
    likelihood: Mapping[str, float]
    nats: Mapping[str, float]
    calibration_accuracy: Mapping[str, float]


def run(
    seed: int,
    *,
    calibration: int,
    test: int,
    context: int,
    answer: int,
    passages: int,
    random_draws: int,
    layers: Sequence[int] | None,
) -> Found:
    """Select heads on some files, and test on others.

    Args:
        seed: draws the files, the questions and the random heads.
        calibration, test: how many questions.
        context, answer: tokens of the beginning, and of a continuation.
        passages: how many for the perplexity, of twice `context` tokens.
        random_draws: how many sets of random heads; their mean is reported.
        layers: whose heads are searched; None for all but the first two and the last.
    """
    loaded = zoo.load("llama-stdlib")
    model: Any = loaded.model
    generator = torch.Generator().manual_seed(seed)
    windows = _windows(loaded, context, context + answer)
    order = torch.randperm(len(windows), generator=generator).tolist()
    half = len(order) // 2
    known = _questions([windows[i] for i in order[:half]], calibration, context, answer, generator)
    unseen_files = [windows[i] for i in order[half:]]
    unseen = _questions(unseen_files, test, context, answer, generator)
    text = _passages(unseen_files, passages, 2 * context, generator)

    every = AttentionCalibration(layers=layers)
    scores = select_heads(model, known, accuracy, every, progress=False)
    selected = scores.selected()
    number = sum(len(heads) for heads in selected.values())
    candidates = [
        (layer, head) for layer, found in scores.scores.items() for head in range(len(found))
    ]
    methods: dict[str, list[AttentionCalibration | None]] = {"none": [None], "all": [every]}
    if number:
        methods["selected"] = [AttentionCalibration(heads=selected)]
        draws = range(random_draws)
        methods["random"] = [_random_heads(candidates, number, generator) for _ in draws]
    else:  # nothing helped, so nothing is done
        methods["selected"] = methods["random"] = [None]
    seen = {
        name: [_look(model, method, known, unseen, text, context) for method in some]
        for name, some in methods.items()
    }

    def mean(place: int) -> dict[str, float]:
        return {
            name: sum(numbers[place] for numbers in rows) / len(rows) for name, rows in seen.items()
        }

    return Found(scores, number, mean(0), mean(1), mean(2), mean(3))


@torch.no_grad()
def log_probabilities(model: Any, questions: Questions, batch: int = 50) -> Tensor:
    """Of each choice after its context, [questions, CHOICES], summed over its tokens."""
    found = []
    for contexts, choices in zip(
        questions.contexts.split(batch), questions.choices.split(batch), strict=True
    ):
        begun = model(contexts, use_cache=True, logits_to_keep=1)
        cache = begun.past_key_values
        cache.batch_repeat_interleave(CHOICES)
        tokens = choices.flatten(0, 1)
        rest = model(tokens[:, :-1], cache=cache).logits
        logits = torch.cat([begun.logits.repeat_interleave(CHOICES, 0), rest], 1)
        losses = cross_entropy(logits.transpose(1, 2), tokens, reduction="none")
        found.append(-losses.sum(1).view(-1, CHOICES))
    return torch.cat(found)


def accuracy(model: Any, questions: Questions) -> float:
    """The share of questions whose right choice is the most likely one."""
    return _share_right(log_probabilities(model, questions))


def nats(model: Any, text: Tensor, prefix: int) -> float:
    """Mean cross-entropy of the tokens after a prefix."""
    logits = model(text, use_cache=False).logits[:, prefix - 1 : -1]
    return float(cross_entropy(logits.transpose(1, 2), text[:, prefix:]))


def _share_right(probabilities: Tensor) -> float:
    return float((probabilities.argmax(1) == 0).double().mean())


@torch.no_grad()
def _look(
    model: Any,
    method: AttentionCalibration | None,
    known: Questions,
    unseen: Questions,
    text: Tensor,
    prefix: int,
) -> tuple[float, float, float, float]:
    """Under a method: test accuracy, log-probability per token, nats, calibration accuracy."""
    with nullcontext() if method is None else method(model):
        probabilities = log_probabilities(model, unseen)
        calibration = accuracy(model, known)
    with nullcontext() if method is None else method(model, prompt_length=prefix):
        loss = nats(model, text, prefix)
    right = float(probabilities[:, 0].mean()) / unseen.choices.shape[-1]
    return _share_right(probabilities), right, loss, calibration


def _windows(loaded: Any, context: int, length: int) -> list[Tensor]:
    """The held-out files that have enough of them, each cut into windows: [windows, length]."""
    _, held_out = split(read_documents(), 40)
    cut = []
    for document in held_out:
        if document.path.startswith("encodings/"):  # tables
            continue
        ids = loaded.tokenizer(document.text, add_special_tokens=False, verbose=False)["input_ids"]
        count = len(ids) // length
        if count >= CHOICES:
            rows = torch.tensor(ids[: count * length]).view(count, length)
            begin = torch.full((count, 1), loaded.model.config.bos_token_id)
            cut.append(torch.cat([begin, rows], 1))
    return cut


def _questions(
    files: Sequence[Tensor], count: int, context: int, answer: int, generator: torch.Generator
) -> Questions:
    """Questions from files in turn; wrong choices follow other windows of the same file."""
    contexts, choices = [], []
    for number in range(count):
        windows = files[number % len(files)]
        drawn = torch.randperm(len(windows), generator=generator)[:CHOICES]
        contexts.append(windows[drawn[0], : context + 1])
        choices.append(windows[drawn, context + 1 : context + 1 + answer])
    return Questions(torch.stack(contexts), torch.stack(choices))


def _passages(
    files: Sequence[Tensor], count: int, length: int, generator: torch.Generator
) -> Tensor:
    """Runs of tokens from files in turn, [count, length], starting with BOS."""
    rows = []
    for number in range(count):
        windows = files[number % len(files)]
        flat = windows[:, 1:].flatten()
        start = int(torch.randint(0, len(flat) - length + 2, (1,), generator=generator))
        rows.append(torch.cat([windows[0, :1], flat[start : start + length - 1]]))
    return torch.stack(rows)


def _random_heads(
    candidates: Sequence[tuple[int, int]], number: int, generator: torch.Generator
) -> AttentionCalibration:
    heads: dict[int, tuple[int, ...]] = {}
    for place in (
        torch.randperm(len(candidates), generator=generator)[:number].sort().values.tolist()
    ):
        layer, head = candidates[place]
        heads[layer] = (*heads.get(layer, ()), head)
    return AttentionCalibration(heads=heads)
