"""The experiment: six GPT-2 models that differ in their nonlinearities, on the same text."""

import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from attending.conversion.softmax_only import reduce_nonlinearities
from attending.core import statistics
from attending.losses.entropy_regularization import entropy_quartiles
from attending.losses.entropy_regularizer import EntropyRegularizer
from attending.taps import tap
from attending.zoo.recipes.packing import PackedTokens
from attending.zoo.recipes.stdlib_text import read_documents, split

BEGIN = 256  # in front of every row; the other tokens are bytes
HELD_OUT_PER_MILLE = 40
EVALUATE_ROWS = 32  # at a time

# name: what reduce_nonlinearities does, or None for the ordinary GPT-2; and the loss semantics.
VARIANTS: dict[str, tuple[dict[str, Any] | None, str | None]] = {
    "baseline": (None, None),
    "softmax_only": ({"feed_forward": "linear"}, None),
    "scaled": ({"feed_forward": "scaled_fused"}, None),
    "tempered": ({"feed_forward": "scaled_fused", "initial_temperature": True}, None),
    "regularised": ({"feed_forward": "scaled_fused", "initial_temperature": True}, "official"),
    "as_printed": ({"feed_forward": "scaled_fused", "initial_temperature": True}, "paper"),
}


@dataclass
class Trained:
    """What became of one model. Entropies are means over held-out text, in nats."""

    perplexity: float = math.nan
    entropies: Tensor = field(default_factory=lambda: torch.empty(0))  # [layers, heads]
    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    @property
    def quartiles(self) -> list[float]:
        """Shares of heads by quarter of the largest entropy observed; nan for a broken model."""
        if not math.isfinite(self.perplexity):
            return [math.nan] * 4
        return [float(share) for share in entropy_quartiles(self.entropies)]

    def near_even(self, context: int) -> float:
        """Share of heads above 3/4 of the entropy of an even look at all that came before.

        Unlike the quartiles of the paper this is the same number of nats for every model.
        """
        if not math.isfinite(self.perplexity):
            return math.nan
        even = math.lgamma(context + 1) / context  # the mean of log i over the rows
        return float(entropy_quartiles(self.entropies, largest=even)[3])

    @property
    def entropy_by_layer(self) -> list[float]:
        """Mean head entropy of each layer; none for a broken model."""
        return [float(layer) for layer in self.entropies.mean(-1)] if len(self.entropies) else []

    @property
    def mean_entropy(self) -> float:
        """Over all heads; nan for a broken model."""
        return float(self.entropies.mean()) if len(self.entropies) else math.nan


@lru_cache(maxsize=1)
def corpus() -> tuple[Tensor, Tensor]:
    """The bytes of the standard library: to train on, and held out."""
    parts = split(read_documents(), HELD_OUT_PER_MILLE)
    texts = (b"".join(one.text.encode("utf-8") for one in part) for part in parts)
    training, held_out = (
        torch.frombuffer(bytearray(text), dtype=torch.uint8).long() for text in texts
    )
    return training, held_out


def run(settings: Mapping[str, Any], seed: int) -> dict[str, Trained]:
    """Train all variants: the same initial embeddings and attention, the same batches."""
    return {name: train(name, settings, seed) for name in settings["variants"]}


def train(name: str, settings: Mapping[str, Any], seed: int) -> Trained:
    """Train one variant and measure it on held-out text."""
    training, held_out = corpus()
    data = PackedTokens(training, BEGIN, seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build(name, settings)
    semantics = VARIANTS[name][1]
    regularizer = None
    if semantics is not None:
        rows = settings["rows"] * settings["context"]
        # The official code sums over batch and queries; `strength` is what that comes to.
        weight = settings["strength"] / rows if semantics == "official" else settings["weight"]
        regularizer = EntropyRegularizer.for_model(
            model,
            data.batch(0, 1, settings["context"])[:, :-1],
            weight=weight,
            tolerance=settings["tolerance"],
            semantics="official" if semantics == "official" else "paper",
        )
    outcome = Trained()
    optimizer, schedule = optimise(model, regularizer, settings)
    for step in range(settings["steps"]):
        batch = data.batch(step, settings["rows"], settings["context"])
        with regularizer.watch(model) if regularizer is not None else nullcontext():
            logits = model(batch[:, :-1], use_cache=False).logits
        loss = cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        if not bool(loss.isfinite()):
            return outcome
        if step % settings["record_every"] == 0:
            outcome.steps.append(step)
            outcome.losses.append(float(loss.detach()))
        total = loss if regularizer is None else loss + regularizer.loss()
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    outcome.perplexity, outcome.entropies = measure(model, held_out, settings)
    return outcome


def build(name: str, settings: Mapping[str, Any]) -> Any:
    """The untrained model of a variant."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=BEGIN + 1,
        n_embd=settings["hidden"],
        n_layer=settings["layers"],
        n_head=settings["heads"],
        n_positions=settings["context"],
        # GPT-2's 0.02 at width 768, in proportion: 0.02 at width 64 leaves all scores near 0.
        initializer_range=0.02 * math.sqrt(768 / settings["hidden"]),
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=BEGIN,
        eos_token_id=BEGIN,
        attn_implementation="sdpa",
    )
    model = GPT2LMHeadModel(config)
    changes = VARIANTS[name][0]
    if changes is not None:
        changes = dict(changes)
        if changes.pop("initial_temperature", False):
            changes["initial_temperature"] = settings["initial_temperature"]
        reduce_nonlinearities(model, **changes)
    return model.train()


def optimise(
    model: Any, regularizer: EntropyRegularizer | None, settings: Mapping[str, Any]
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """AdamW with warm-up and linear decay, as in the authors' config; matrices alone decay."""
    parameters = list(model.named_parameters())
    matrices = [p for n, p in parameters if p.dim() > 1 and "log_temperature" not in n]
    others = [p for n, p in parameters if p.dim() < 2 or "log_temperature" in n]
    if regularizer is not None:
        others += list(regularizer.parameters())
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=settings["learning_rate"], eps=1e-8)
    steps = settings["steps"]
    warm = max(1, round(0.05 * steps))

    def factor(step: int) -> float:
        return float(min((step + 1) / warm, max(0.0, (steps - step) / max(1, steps - warm))))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


@torch.no_grad()
def measure(model: Any, held_out: Tensor, settings: Mapping[str, Any]) -> tuple[float, Tensor]:
    """Perplexity per byte, and the mean entropy of each head, on held-out text."""
    model.eval()
    context = settings["context"]
    data = PackedTokens(held_out, BEGIN, seed=0)
    nats, heads = [], []
    for index in range(settings["evaluation_batches"]):
        batch = data.batch(index, EVALUATE_ROWS, context)
        with tap(model) as calls:
            logits = model(batch[:, :-1], use_cache=False).logits
        nats.append(float(cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())))
        heads.append(torch.stack([_entropies(call) for call in calls]))
    mean = sum(nats) / len(nats)
    return (math.exp(mean) if mean < 700 else math.inf), torch.stack(heads).mean(0)


def _entropies(call: Any) -> Tensor:
    rows = statistics.entropy(
        call.query, call.key, call.attn_mask, call.is_causal, call.scale, call.enable_gqa
    )
    return rows.mean((0, 2))
