"""The experiment of systematic outliers: six ways of attention on a task that needs a sink.

Bigram-backcopy (Guo et al. 2024, 2410.13835): a sequence starts with a first token that is always
the same; each next token is drawn from a fixed table, given the one before; except after a trigger
token, where the token *before* the trigger comes again. So attention has something to do at the
triggers and nothing elsewhere: at most positions the best update is zero. Softmax attention cannot
output zero by itself; it can look at a token whose value is zero.

Models differ in the variant of `SelfAttention` and in nothing else, weights included. No weight
decay and no gradient clipping: both hold back what is looked for.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from attending.core.state import attention_state
from attending.core.statistics import column_mass
from attending.nn.self_attention import SelfAttention, Variant
from attending.nn.softmax_with_sink import sink_probability
from attending.probes.outlier_rules import activation_outliers
from attending.probes.quantization import quantization_probe

FIRST = 0  # the token that every sequence starts with


@dataclass(frozen=True)
class Task:
    """The tables of bigram-backcopy."""

    bigram: Tensor  # [vocabulary, vocabulary], rows sum to 1; triggers are drawn like any token
    triggers: Tensor  # [vocabulary], boolean
    length: int

    def sample(self, batch: int, generator: torch.Generator) -> Tensor:
        """Sequences `[batch, length + 1]`: inputs and, one on, the targets."""
        words = torch.full((batch, self.length + 1), FIRST)
        words[:, 1] = torch.randint(1, len(self.bigram), (batch,), generator=generator)
        chances = torch.rand(self.length + 1, batch, 1, generator=generator)
        below = self.bigram.cumsum(1)
        below[:, -1] = 1.0  # what rounding left open
        for place in range(2, self.length + 1):
            last = words[:, place - 1]
            drawn = torch.searchsorted(below[last], chances[place], right=True).squeeze(1)
            copies = self.triggers[last] & (words[:, place - 2] != FIRST)
            words[:, place] = torch.where(copies, words[:, place - 2], drawn)
        return words


def make_task(vocabulary: int, triggers: int, length: int, generator: torch.Generator) -> Task:
    """Random tables: rows of a softmax of normal numbers; the first token never comes again."""
    logits = torch.randn(vocabulary, vocabulary, generator=generator) * 1.5
    logits[:, FIRST] = -math.inf
    is_trigger = torch.zeros(vocabulary, dtype=torch.bool)
    is_trigger[1 : triggers + 1] = True
    return Task(logits.softmax(-1), is_trigger, length)


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, dim: int, heads: int, variant: Variant) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(dim)
        self.attention = SelfAttention(dim, heads, variant, bias=False)
        self.mlp_norm = nn.RMSNorm(dim)
        self.up = nn.Linear(dim, 4 * dim, bias=False)
        self.down = nn.Linear(4 * dim, dim, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """One update of the residual stream."""
        hidden = hidden + self.attention(self.attention_norm(hidden), is_causal=True)
        update: Tensor = self.down(nn.functional.gelu(self.up(self.mlp_norm(hidden))))
        return hidden + update


class LanguageModel(nn.Module):
    """A causal language model with learned positions."""

    def __init__(
        self, vocabulary: int, length: int, dim: int, heads: int, layers: int, variant: Variant
    ) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, dim)
        self.places = nn.Embedding(length, dim)
        self.blocks = nn.ModuleList(Block(dim, heads, variant) for _ in range(layers))
        self.norm = nn.RMSNorm(dim)
        self.lm_head = nn.Linear(dim, vocabulary, bias=False)

    def forward(self, words: Tensor) -> Tensor:
        """Logits of the next token."""
        hidden = self.words(words) + self.places.weight[: words.shape[1]]
        for block in self.blocks:
            hidden = block(hidden)
        logits: Tensor = self.lm_head(self.norm(hidden))
        return logits


@dataclass(frozen=True)
class Found:
    """What became of one variant.

    Attributes:
        loss: mean cross-entropy on new sequences, nats.
        excess: how far it is above that of who knows the tables.
        first_token: attention to the first token at positions without a task, mean over them; of
            the head where it is largest. Real keys and the learned bias together are 1.
        ratio: largest over median magnitude of the residual stream, of the block where it is
            largest, mean over the sequences.
        kurtosis: of the root mean squares of the channels of the residual stream (He et al. 2024),
            of the block where it is largest; 3 for normal numbers.
        gap_w8, gap_w8a8: by how much simulated int8 raises the loss, nats.
        curve: `(step, first_token, ratio)` on the way.
    """

    loss: float
    excess: float
    first_token: float
    ratio: float
    kurtosis: float
    gap_w8: float
    gap_w8a8: float
    curve: Sequence[tuple[int, float, float]]


def run(
    variants: Sequence[Variant],
    seed: int,
    *,
    vocabulary: int,
    triggers: int,
    length: int,
    dim: int,
    heads: int,
    layers: int,
    batch: int,
    steps: int,
    learning_rate: float,
    test_sequences: int,
    looks: int,
) -> Mapping[Variant, Found]:
    """Train one model for each variant, on the same sequences, from the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        generator = torch.Generator().manual_seed(seed)
        task = make_task(vocabulary, triggers, length, generator)
        test = task.sample(test_sequences, torch.Generator().manual_seed(seed + 10_000))
        plain = LanguageModel(vocabulary, length, dim, heads, layers, "softmax").state_dict()
        found = {}
        for variant in variants:
            torch.manual_seed(seed)
            model = LanguageModel(vocabulary, length, dim, heads, layers, variant)
            model.load_state_dict(plain, strict=False)
            data = torch.Generator().manual_seed(seed + 20_000)
            curve = _train(model, task, test, data, batch, steps, learning_rate, looks)
            found[variant] = _measure(model, task, test, curve)
        return found


def _train(
    model: LanguageModel,
    task: Task,
    test: Tensor,
    data: torch.Generator,
    batch: int,
    steps: int,
    learning_rate: float,
    looks: int,
) -> list[tuple[int, float, float]]:
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate, betas=(0.9, 0.99))
    warmup = max(steps // 20, 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, 1.0)
    )
    curve = []
    for step in range(steps + 1):
        if step % max(steps // looks, 1) == 0:
            first, ratio, _ = _look(model, task, test)
            curve.append((step, first, ratio))
        if step == steps:
            break
        words = task.sample(batch, data)
        loss = cross_entropy(model(words[:, :-1]).flatten(0, 1), words[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return curve


def _measure(
    model: LanguageModel, task: Task, test: Tensor, curve: Sequence[tuple[int, float, float]]
) -> Found:
    def loss_function(model: nn.Module, words: Tensor) -> tuple[Tensor, int]:
        logits = model(words[:, :-1])
        total = cross_entropy(logits.flatten(0, 1), words[:, 1:].flatten(), reduction="sum")
        return total, words[:, 1:].numel()

    first, ratio, kurtosis = _look(model, task, test)
    weights = quantization_probe(model, test, "absmax_w8", loss_function=loss_function)
    both = quantization_probe(model, test, "absmax_w8a8", loss_function=loss_function)
    return Found(
        loss=weights.loss,
        excess=weights.loss - _least_loss(task, test),
        first_token=first,
        ratio=ratio,
        kurtosis=kurtosis,
        gap_w8=weights.gap,
        gap_w8a8=both.gap,
        curve=curve,
    )


def _least_loss(task: Task, words: Tensor) -> float:
    """The mean loss of who knows the tables, on these very sequences."""
    chance = task.bigram[words[:, 1:-1], words[:, 2:]]
    copies = task.triggers[words[:, 1:-1]] & (words[:, :-2] != FIRST)
    loss = torch.where(copies, torch.zeros_like(chance), -chance.log())
    opening = math.log(len(task.bigram) - 1)  # the second token is uniform
    return float(loss.sum() + opening * len(words)) / words[:, 1:].numel()


@torch.no_grad()
def _look(model: LanguageModel, task: Task, words: Tensor) -> tuple[float, float, float]:
    """First-token mass, max over median, and kurtosis, each where it is largest."""
    inputs = words[:, :-1]
    idle = ~task.triggers[inputs]
    idle[:, 0] = False  # the first token has nowhere else to look
    first, ratio, kurtosis = [], [], []

    def before_attention(layer: SelfAttention, arguments: tuple[Tensor, ...]) -> None:
        first.append(_first_token_mass(layer, arguments[0], idle))

    def after_block(block: nn.Module, arguments: tuple[Tensor, ...], hidden: Tensor) -> None:
        found = activation_outliers(hidden, criterion="median")
        ratio.append(float((found.largest / found.median).mean()))
        size = hidden.square().mean((0, 1)).sqrt()
        away = size - size.mean()
        kurtosis.append(float(away.pow(4).mean() / away.square().mean().square()))

    hooks = []
    for block in model.blocks:
        assert isinstance(block, Block)
        hooks.append(block.attention.register_forward_pre_hook(before_attention))
        hooks.append(block.register_forward_hook(after_block))
    model(inputs)
    for hook in hooks:
        hook.remove()
    return max(first), max(ratio), max(kurtosis)


def _first_token_mass(layer: SelfAttention, hidden: Tensor, idle: Tensor) -> float:
    """Attention of the idle tokens to the first one, in the head where it is largest."""
    query, key, value = layer.project(hidden)
    weights = idle[:, None].float().expand(-1, layer.num_heads, -1)
    lse = attention_state(query, key, value, is_causal=True).lse
    if layer.variant == "attention_bias":  # the learned key has a part of the attention
        logit = torch.einsum("bhqd,hd->bhq", query, layer.key_bias) * layer.head_dim**-0.5
        weights = weights * (1 - sink_probability(lse, logit))
    mass = column_mass(query, key, query_weights=weights, is_causal=True, lse=lse)
    return float((mass[:, :, 0].sum(0) / idle.sum()).max())
