"""The experiment of Flow-Attention: small language models that differ in their attention.

The source code of the standard library byte by byte, a causal transformer, and for attention

- `softmax`: the usual;
- `linear`: normalised linear attention with the sigmoid as its kernel, which is what is left of
  Flow-Attention without competition and allocation;
- `no_competition`, `no_allocation`: one of the two left out;
- `flow`: Flow-Attention as published, with the clamp;
- `unclamped`: without the clamp, which the paper does not have.

All have the same number of parameters and start from the same weights. Quality is the mean loss on
held-out files, in nats per byte; beside it the entropy of the rows of the maps (each row at sum 1),
as a share of that of an even row: how flat they are.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from attending.nn.flow_attention import flow_attention, unclamped_flow_attention
from attending.nn.operator_attention import OperatorAttention
from attending.zoo.recipes.packing import PackedTokens
from attending.zoo.recipes.stdlib_text import read_documents, split

OPERATORS: Mapping[str, Callable[..., Tensor]] = {
    "softmax": scaled_dot_product_attention,
    "linear": functools.partial(flow_attention, competition=False, allocation=False),
    "no_competition": functools.partial(flow_attention, competition=False),
    "no_allocation": functools.partial(flow_attention, allocation=False),
    "flow": flow_attention,
    "unclamped": unclamped_flow_attention,
}
BEGIN = 0  # a byte that no source file has


@dataclass(frozen=True)
class Found:
    """What became of one model: held-out loss in nats per byte, flatness of its maps, a curve."""

    loss: float
    flatness: float
    curve: Sequence[tuple[int, float]]


class ByteModel(nn.Module):
    """A pre-norm causal transformer over bytes, with learned positions."""

    def __init__(
        self, operator: Callable[..., Tensor], context: int, dim: int, heads: int, layers: int
    ) -> None:
        super().__init__()
        self.words = nn.Embedding(256, dim)
        self.places = nn.Embedding(context, dim)
        self.attention = nn.ModuleList(
            OperatorAttention(dim, heads, operator) for _ in range(layers)
        )
        self.attention_norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(layers))
        self.mlps = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(dim), nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim)
            )
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(dim)
        self.out = nn.Linear(dim, 256, bias=False)

    def forward(self, words: Tensor) -> Tensor:
        """Logits of the next byte."""
        hidden = self.words(words) + self.places.weight[: words.shape[1]]
        layers = zip(self.attention_norms, self.attention, self.mlps, strict=True)
        for norm, attention, mlp in layers:
            hidden = hidden + attention(norm(hidden), is_causal=True)
            hidden = hidden + mlp(hidden)
        logits: Tensor = self.out(self.norm(hidden))
        return logits


@lru_cache(maxsize=1)
def _bytes(files: int) -> tuple[Tensor, Tensor]:
    """Bytes to train on, and held-out ones."""
    found = []
    for part in split(read_documents(), 40):
        text = b"".join(document.text.encode() for document in part[:files])
        found.append(torch.frombuffer(bytearray(text), dtype=torch.uint8).long())
    return found[0], found[1]


def run(seed: int, settings: Mapping[str, Any]) -> dict[str, Found]:
    """Train a model for each kind of attention; all see the same batches."""
    training, held_out = _bytes(settings["files"])
    context = settings["context"]
    data = PackedTokens(training, BEGIN, seed)
    unseen = PackedTokens(held_out, BEGIN, 0).batch(0, settings["held_out_rows"], context)
    return {name: _train(name, data, unseen, seed, settings) for name in OPERATORS}


def _train(
    name: str, data: PackedTokens, unseen: Tensor, seed: int, settings: Mapping[str, Any]
) -> Found:
    context, steps = settings["context"], settings["steps"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ByteModel(
            OPERATORS[name], context, settings["dim"], settings["heads"], settings["layers"]
        )
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings["rate"], weight_decay=0.01)
    warm_up = max(steps // 10, 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warm_up, (steps - step) / max(steps - warm_up, 1)),
    )
    curve: list[tuple[int, float]] = []
    for step in range(steps):
        batch = data.batch(step, settings["rows"], context)
        loss = cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % settings["measure_every"] == 0 or step + 1 == steps:
            curve.append((step + 1, _loss(model, unseen)))
    return Found(curve[-1][1], _flatness(model, unseen[:4, :-1]), curve)


@torch.no_grad()
def _loss(model: ByteModel, batch: Tensor) -> float:
    return float(cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten()))


@torch.no_grad()
def _flatness(model: ByteModel, words: Tensor) -> float:
    """Entropy of the rows over that of an even row, mean over layers, heads and rows."""
    shares: list[Tensor] = []

    def measure(layer: OperatorAttention, inputs: tuple[Tensor, ...], _: Tensor) -> None:
        query, key, _ = layer.project(inputs[0])
        tokens = key.shape[2]
        # The output is linear in the values: with the identity for values it is the map.
        identity = torch.eye(tokens).expand(*key.shape[:2], tokens, tokens)
        whole = layer.operator(query, key, identity, is_causal=True)
        rows = whole / whole.sum(-1, keepdim=True)
        entropy = torch.special.entr(rows).sum(-1)[..., 1:]
        shares.append(entropy / torch.arange(2, tokens + 1).log())

    hooks = [layer.register_forward_hook(measure) for layer in model.attention]
    model(words)
    for hook in hooks:
        hook.remove()
    return float(torch.stack(shares).mean())
