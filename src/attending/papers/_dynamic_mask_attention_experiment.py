"""The experiment of dynamic mask attention: recall and text at an equal number of keys.

Small causal transformers of two layers that differ in their attention alone:

- `full`: every earlier token;
- `window`: the last w tokens;
- `nsa_like`: three parts that a gate weighs, in the manner of Native Sparse Attention: means of
  blocks of keys and values, the tokens of the best blocks by those means, and the last tokens.
  Chosen tokens and last tokens are w together; the means come on top. (NSA learns how to compress,
  and has kernels; this is its idea at a small size, not the published model.)
- `dynamic`: dynamic mask attention with w kept tokens.

Recall: pairs of a key and a value at the front, then filler among which each key comes once more,
and the model is to name its value (MQAR without the repeats). An embedding of the token before is
added to each token, as models of that benchmark have a short convolution, so that a pair can be
found in one place. Text: the next byte of the standard library's source.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from attending.core.state import attention_state
from attending.nn.dynamic_mask_attention import DynamicMaskAttention
from attending.nn.key_selection import keep_largest
from attending.nn.operator_attention import OperatorAttention
from attending.zoo.recipes.packing import PackedTokens
from attending.zoo.recipes.stdlib_text import read_documents, split

LAYERS = 2
MODELS = ("full", "window", "nsa_like", "dynamic")
FILLER = 16  # different ones
BEGIN = 0  # a byte that no source file has


@dataclass(frozen=True)
class Found:
    """What became of one model: its loss in nats, the share of right answers, the loss by step."""

    loss: float
    accuracy: float
    curve: Sequence[tuple[int, float]]


def windowed_attention(
    query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool, window: int
) -> Tensor:
    """Attention to the last `window` tokens."""
    place = torch.arange(query.shape[2])
    back = place[:, None] - place
    mask = (back >= 0) & (back < window)
    output: Tensor = scaled_dot_product_attention(query, key, value, attn_mask=mask)
    return output


class NSALikeAttention(nn.Module):
    """Compressed blocks, chosen blocks and a window, weighed by a gate: see the module.

    Args:
        dim, heads: of the layer.
        window: tokens that a query attends to, half of them chosen and half the last ones.
        block: tokens in a block.
    """

    def __init__(self, dim: int, heads: int, window: int, block: int) -> None:
        super().__init__()
        self.heads = OperatorAttention(dim, heads, scaled_dot_product_attention, bias=False)
        self.gate = nn.Linear(dim, 3 * heads)
        self.recent, self.block = window // 2, block
        self.chosen = (window - self.recent) // block

    def forward(self, hidden: Tensor, is_causal: bool) -> Tensor:
        """Attend; `is_causal` is there for the other layers' sake."""
        query, key, value = self.heads.project(hidden)
        tokens = key.shape[2]
        count = tokens // self.block
        whole = count * self.block
        keys, values = (
            one[:, :, :whole].unflatten(2, (count, self.block)).mean(3) for one in (key, value)
        )
        last = torch.arange(count) * self.block + self.block - 1
        finished = torch.arange(tokens)[:, None] > last  # blocks that lie in the past as a whole
        compressed = attention_state(query, keys, values, attn_mask=finished).output
        scores = (query.detach() @ keys.detach().mT).masked_fill(~finished, -torch.inf)
        best = keep_largest(scores, self.chosen).repeat_interleave(self.block, -1)
        best = nn.functional.pad(best, (0, tokens - whole))
        chosen = attention_state(query, key, value, attn_mask=best).output
        recent = windowed_attention(query, key, value, is_causal=True, window=self.recent)
        gates = torch.sigmoid(self.gate(hidden)).unflatten(-1, (3, -1, 1)).transpose(1, 3)
        mixed = gates[:, :, 0] * compressed + gates[:, :, 1] * chosen + gates[:, :, 2] * recent
        output: Tensor = self.heads.out_proj(mixed.transpose(1, 2).flatten(2))
        return output


def attention(name: str, settings: Mapping[str, Any]) -> nn.Module:
    """A layer of one of the `MODELS`."""
    dim, heads, window = settings["dim"], settings["heads"], settings["window"]
    if name == "dynamic":
        return DynamicMaskAttention(dim, heads, keep_window=window)
    if name == "nsa_like":
        return NSALikeAttention(dim, heads, window, settings["block"])
    operator: Callable[..., Tensor] = scaled_dot_product_attention
    if name == "window":
        operator = partial(windowed_attention, window=window)
    return OperatorAttention(dim, heads, operator, bias=False)


class Decoder(nn.Module):
    """A small pre-norm causal transformer, tokens to logits."""

    def __init__(
        self, name: str, vocabulary: int, length: int, settings: Mapping[str, Any]
    ) -> None:
        super().__init__()
        dim = settings["dim"]
        self.words, self.before = nn.Embedding(vocabulary, dim), nn.Embedding(vocabulary, dim)
        self.places = nn.Embedding(length, dim)
        nn.init.normal_(self.places.weight, std=0.1)
        self.attention = nn.ModuleList(attention(name, settings) for _ in range(LAYERS))
        self.norms = nn.ModuleList(nn.RMSNorm(dim) for _ in range(LAYERS))
        self.mlps = nn.ModuleList(
            nn.Sequential(
                nn.RMSNorm(dim), nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim)
            )
            for _ in range(LAYERS)
        )
        self.norm, self.out = nn.RMSNorm(dim), nn.Linear(dim, vocabulary, bias=False)

    def forward(self, words: Tensor) -> Tensor:
        """Logits at every place."""
        hidden = self.words(words) + self.places.weight[: words.shape[1]]
        before = self.before(words[:, :-1])
        hidden = hidden + nn.functional.pad(before, (0, 0, 1, 0))
        for norm, attend, mlp in zip(self.norms, self.attention, self.mlps, strict=True):
            hidden = hidden + attend(norm(hidden), is_causal=True)
            hidden = hidden + mlp(hidden)
        logits: Tensor = self.out(self.norm(hidden))
        return logits


@dataclass(frozen=True)
class Batch:
    """Sequences, and which places have to name which token."""

    words: Tensor
    places: Tensor
    answers: Tensor


class Recall:
    """Associative recall; half of the words are keys, half values, and some filler beside them."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.size, self.pairs = settings["recall_words"], settings["pairs"]
        self.length, self.rows = settings["recall_length"], settings["recall_rows"]
        self.test_rows = settings["test_rows"]
        self.vocabulary = 2 * self.size + FILLER

    def batch(self, rows: int, generator: torch.Generator) -> Batch:
        """New sequences."""
        first = 2 * self.pairs
        shape = (rows, self.length)
        words = torch.randint(2 * self.size, self.vocabulary, shape, generator=generator)
        keys = torch.rand(rows, self.size, generator=generator).argsort(1)[:, : self.pairs]
        values = torch.randint(self.size, 2 * self.size, (rows, self.pairs), generator=generator)
        words[:, 0:first:2], words[:, 1:first:2] = keys, values
        free = torch.rand(rows, self.length - first, generator=generator).argsort(1)
        places = free[:, : self.pairs] + first
        return Batch(words.scatter(1, places, keys), places, values)

    def training(self, step: int, seed: int) -> Batch:
        """The batch of a step."""
        return self.batch(self.rows, torch.Generator().manual_seed(seed * 100_003 + step))

    def unseen(self) -> Batch:
        """Sequences to measure with, the same for all models and seeds."""
        return self.batch(self.test_rows, torch.Generator().manual_seed(1))


class Text:
    """The next byte of source code."""

    vocabulary = 256

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.length, self.rows = settings["text_length"], settings["text_rows"]
        self.test_rows = settings["test_rows"] // 2
        self.training_bytes, self.held_out = _bytes(settings["files"])

    def training(self, step: int, seed: int) -> Batch:
        """The batch of a step."""
        return self._all(PackedTokens(self.training_bytes, BEGIN, seed), step, self.rows)

    def unseen(self) -> Batch:
        """Held-out text."""
        return self._all(PackedTokens(self.held_out, BEGIN, 0), 0, self.test_rows)

    def _all(self, data: PackedTokens, step: int, rows: int) -> Batch:
        words = data.batch(step, rows, self.length)
        places = torch.arange(words.shape[1] - 1).expand(rows, -1)
        return Batch(words[:, :-1], places, words[:, 1:])


@lru_cache(maxsize=1)
def _bytes(files: int) -> tuple[Tensor, Tensor]:
    """Bytes to train on, and held-out ones."""
    found = []
    for part in split(read_documents(), 40):
        text = b"".join(document.text.encode() for document in part[:files])
        found.append(torch.frombuffer(bytearray(text), dtype=torch.uint8).long())
    return found[0], found[1]


def run(seed: int, settings: Mapping[str, Any]) -> dict[str, dict[str, Found]]:
    """Each model on each task; of a seed all see the same batches. By task, then by model."""
    tasks: Mapping[str, Recall | Text] = {"recall": Recall(settings), "text": Text(settings)}
    return {
        task: {
            name: train(name, data, seed, settings[f"{task}_steps"], settings) for name in MODELS
        }
        for task, data in tasks.items()
    }


def train(
    name: str, task: Recall | Text, seed: int, steps: int, settings: Mapping[str, Any]
) -> Found:
    """Train one model, and measure it on what it has not seen."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Decoder(name, task.vocabulary, task.length, settings)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings["rate"], betas=(0.9, 0.98))
    warm_up = max(steps // 10, 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warm_up, (steps - step) / max(steps - warm_up, 1)),
    )
    curve: list[tuple[int, float]] = []
    unseen = task.unseen()
    for step in range(steps):
        loss, _ = _loss(model, task.training(step, seed))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % settings["look_every"] == 0 or step + 1 == steps:
            with torch.no_grad():
                loss, right = _loss(model, unseen)
            curve.append((step + 1, float(loss)))
    return Found(curve[-1][1], float(right), curve)


def _loss(model: Decoder, batch: Batch) -> tuple[Tensor, Tensor]:
    logits = model(batch.words)
    logits = logits.gather(1, batch.places[..., None].expand(-1, -1, logits.shape[-1]))
    right = (logits.argmax(-1) == batch.answers).float().mean()
    return cross_entropy(logits.flatten(0, 1), batch.answers.flatten()), right
