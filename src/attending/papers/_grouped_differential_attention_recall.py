"""The experiment of grouped differential attention: recall among noisy distractors.

A sequence is a list of pairs of a key and a value, each one token (the sum of two fixed random
vectors), and then some of the keys again, each of which asks for its value. All tokens carry
Gaussian noise, so that no key fits exactly and the other pairs of the list, the distractors, fit a
little: what a model has to learn is where to look, and to look nowhere else. Two layers, causal,
10 query heads of one width in all models but those that grow:

- `softmax`: attention as usual, with 2 heads of key and value;
- `diff_1to1`: the Differential Transformer, 5 signal and 5 noise heads, one pair of keys;
- `grouped_4to1`: 8 signal and 2 noise heads;
- `unsubtracted`: `diff_1to1` with lambda held at 0: the norm over each head, without the noise.

Parameters are equal to one per mille: more signal heads need a wider output projection, and the MLP
is narrower for it. Scores and weighted sums of values cost the same, except that softmax's values
are half as wide.

Growth: a model of 4 + 2 heads is trained, then goes on as 8 + 2, once with its signal heads copied
and once with new random heads in their place (and the output projection as it was for the old).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from attending.conversion.grow_heads import grow_signal_heads
from attending.core.reference import attention_map
from attending.nn.differential_attention import differential_maps
from attending.nn.grouped_differential_attention import GroupedDifferentialAttention
from attending.nn.operator_attention import OperatorAttention

LAYERS = 2
HEADS: Mapping[str, tuple[int, int]] = {  # signal and noise
    "softmax": (10, 0),
    "diff_1to1": (5, 5),
    "grouped_4to1": (8, 2),
    "unsubtracted": (5, 5),
}
SMALL_HEADS = (4, 2)


@dataclass(frozen=True)
class Found:
    """What became of one model.

    Attributes:
        loss, accuracy: of the answers on new sequences; nats.
        target: what a query puts on the pair that answers it, as a share of the sum of the
            magnitudes of its weights; of the head where that is largest.
        curve: `(step, loss)`.
    """

    loss: float
    accuracy: float
    target: float
    curve: Sequence[tuple[int, float]]


@dataclass(frozen=True)
class Batch:
    """Sequences: `tokens [batch, length, 2]` of ids, the answers and the pairs that hold them."""

    tokens: Tensor
    answers: Tensor
    places: Tensor
    noise: Tensor


class Task:
    """Noisy associative recall.

    Args:
        seed: of the vectors and of the sequences.
        settings: `dim`, `vocabulary`, `pairs`, `queries`, `noise`.
    """

    def __init__(self, seed: int, settings: Mapping[str, Any]) -> None:
        self.settings = settings
        generator = torch.Generator().manual_seed(seed)
        count = settings["vocabulary"]
        self.vectors = torch.randn(2 * count + 1, settings["dim"], generator=generator)

    def batch(self, size: int, generator: torch.Generator) -> Batch:
        """Sequences of distinct keys, values at random, and questions in any order."""
        settings = self.settings
        count, pairs, queries = settings["vocabulary"], settings["pairs"], settings["queries"]
        keys = torch.rand(size, count, generator=generator).argsort(1)[:, :pairs]
        values = torch.randint(count, (size, pairs), generator=generator)
        places = torch.rand(size, pairs, generator=generator).argsort(1)[:, :queries]
        asked = keys.gather(1, places)
        question = torch.full_like(asked, 2 * count)
        tokens = torch.cat(
            [torch.stack([keys, values + count], -1), torch.stack([asked, question], -1)], 1
        )
        shape = (*tokens.shape[:2], settings["dim"])
        noise = settings["noise"] * torch.randn(shape, generator=generator)
        return Batch(tokens, values.gather(1, places), places, noise)

    def hidden(self, batch: Batch) -> Tensor:
        """What a model gets to see of a batch."""
        return self.vectors[batch.tokens].sum(2) + batch.noise


class Recall(nn.Module):
    """A pre-norm causal transformer from vectors to logits of the values.

    Args:
        name: a key of `HEADS`, or "small" for a model that shall grow.
        settings: `dim`, `head_dim`, `vocabulary`, and what gives the length.
    """

    def __init__(self, name: str, settings: Mapping[str, Any]) -> None:
        super().__init__()
        dim, head_dim = settings["dim"], settings["head_dim"]
        signal, noise = HEADS.get(name, SMALL_HEADS)
        self.places = nn.Embedding(settings["pairs"] + settings["queries"], dim)
        self.attention, self.norms, self.mlps = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for layer in range(LAYERS):
            self.attention.append(_attention(name, layer, settings))
            self.norms.append(nn.RMSNorm(dim))
            wider = 0 if name == "softmax" else (2 * signal - 10) * head_dim
            hidden = 4 * dim - (wider + (signal + noise - 10) * head_dim) // 2
            self.mlps.append(
                nn.Sequential(
                    nn.RMSNorm(dim), nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim)
                )
            )
        self.norm = nn.RMSNorm(dim)
        self.out = nn.Linear(dim, settings["vocabulary"], bias=False)
        nn.init.normal_(self.places.weight, std=0.1)

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits at every place."""
        hidden = hidden + self.places.weight
        for norm, attention, mlp in zip(self.norms, self.attention, self.mlps, strict=True):
            hidden = hidden + attention(norm(hidden), is_causal=True)
            hidden = hidden + mlp(hidden)
        logits: Tensor = self.out(self.norm(hidden))
        return logits


def _attention(name: str, layer: int, settings: Mapping[str, Any]) -> nn.Module:
    dim, head_dim = settings["dim"], settings["head_dim"]
    if name == "softmax":
        return OperatorAttention(dim, 10, scaled_dot_product_attention, bias=False, num_kv_heads=2)
    signal, noise = HEADS.get(name, SMALL_HEADS)
    held = 0.0 if name == "unsubtracted" else None
    made = GroupedDifferentialAttention(
        dim, signal, noise, False, 1, head_dim, layer, lambda_init=held
    )
    if held is not None:  # lambda = 1 - 1 + 0, and none of its vectors is trained
        for vector in (made.lambda_q1, made.lambda_k1, made.lambda_q2, made.lambda_k2):
            nn.init.zeros_(vector).requires_grad_(False)
    return made


def run(seed: int, settings: Mapping[str, Any]) -> dict[str, Found]:
    """Train each model on the same sequences; then grow one."""
    task = Task(seed, settings)
    found = {}
    with torch.random.fork_rng(devices=[]):
        for name in HEADS:
            torch.manual_seed(seed)
            model = Recall(name, settings)
            curve = train(model, task, seed, settings["steps"])
            found[name] = measure(model, task, curve)
        found |= _growth(task, seed, settings)
    return found


def _growth(task: Task, seed: int, settings: Mapping[str, Any]) -> dict[str, Found]:
    torch.manual_seed(seed)
    before, after = settings["growth_steps"]
    small = Recall("small", settings)
    curve = train(small, task, seed, before)
    found = {"small": measure(small, task, curve)}
    for name in ("copied", "random"):
        torch.manual_seed(seed + 1)
        grown = Recall("small", settings)
        grown.load_state_dict(small.state_dict())
        for index, layer in enumerate(small.attention):
            assert isinstance(layer, GroupedDifferentialAttention)
            larger = grow_signal_heads(layer, 2, noise_snr_db=20.0, seed=seed)
            if name == "random":
                _renew_copies(larger, layer)
            grown.attention[index] = larger
        found[f"grown_{name}_at_once"] = measure(grown, task, [])
        curve = train(grown, task, seed + 2, after)
        found[f"grown_{name}"] = measure(grown, task, curve)
    return found


@torch.no_grad()
def _renew_copies(larger: GroupedDifferentialAttention, old: GroupedDifferentialAttention) -> None:
    """Keep the first copy of each head as it was, and give the second one new weights."""
    copied = old.heads.grown_from(2)
    second = [i for i in range(1, len(copied)) if copied[i] == copied[i - 1]]
    query = larger.q_proj.weight.unflatten(0, (larger.heads.num_query, -1))
    query[second] = torch.empty_like(query[second]).uniform_(-1, 1) * larger.embed_dim**-0.5
    columns = larger.out_proj.weight.unflatten(1, (old.heads.num_signal, 2, -1))
    columns[:, :, 0] = old.out_proj.weight.unflatten(1, (old.heads.num_signal, -1))
    width = larger.out_proj.in_features
    columns[:, :, 1] = torch.empty_like(columns[:, :, 1]).uniform_(-1, 1) * width**-0.5


def train(model: Recall, task: Task, seed: int, steps: int) -> list[tuple[int, float]]:
    """Train; returns the loss on the way."""
    settings = task.settings
    data = torch.Generator().manual_seed(seed + 10_000)
    trained = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=settings["rate"], betas=(0.9, 0.98))
    warm_up = max(steps // 10, 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warm_up, (steps - step) / max(steps - warm_up, 1)),
    )
    curve = []
    for step in range(steps):
        loss, _ = _loss(model, task, task.batch(settings["batch"], data))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % settings["look_every"] == 0:
            curve.append((step + 1, measure_loss(model, task)[0]))
    return curve


def _loss(model: Recall, task: Task, batch: Batch) -> tuple[Tensor, Tensor]:
    logits = model(task.hidden(batch))[:, task.settings["pairs"] :]
    right = (logits.argmax(-1) == batch.answers).float().mean()
    return cross_entropy(logits.flatten(0, 1), batch.answers.flatten()), right


def _new_sequences(task: Task, size: int) -> Batch:
    return task.batch(size, torch.Generator().manual_seed(99))


@torch.no_grad()
def measure_loss(model: Recall, task: Task) -> tuple[float, float]:
    """Loss and accuracy on new sequences, the same for all models of a seed."""
    loss, right = _loss(model, task, _new_sequences(task, task.settings["test_sequences"]))
    return float(loss), float(right)


def measure(model: Recall, task: Task, curve: Sequence[tuple[int, float]]) -> Found:
    """All of `Found`."""
    loss, accuracy = measure_loss(model, task)
    return Found(loss, accuracy, target_share(model, task), curve)


@torch.no_grad()
def target_share(model: Recall, task: Task) -> float:
    """See `Found.target`."""
    batch = _new_sequences(task, 32)
    shares: list[Tensor] = []

    def look(layer: nn.Module, inputs: tuple[Tensor, ...], _: Tensor) -> None:
        weights = signed_map(layer, inputs[0])[:, :, task.settings["pairs"] :]
        places = batch.places[:, None, :, None].expand(-1, weights.shape[1], -1, -1)
        target = weights.gather(-1, places).squeeze(-1) / weights.abs().sum(-1)
        shares.append(target.mean((0, 2)))

    hooks = [layer.register_forward_hook(look) for layer in model.attention]
    model(task.hidden(batch))
    for hook in hooks:
        hook.remove()
    return float(torch.cat(shares).max())


def signed_map(layer: nn.Module, hidden: Tensor) -> Tensor:
    """The weights that a layer gives to values, `[batch, heads, queries, keys]`."""
    if isinstance(layer, OperatorAttention):
        query, key, _ = layer.project(hidden)
        return attention_map(query, key, is_causal=True, enable_gqa=True).probabilities
    assert isinstance(layer, GroupedDifferentialAttention)
    query, key, _ = layer.project(hidden)
    heads = layer.heads
    maps = differential_maps(query, key, ratio=heads.ratio, is_causal=True, enable_gqa=True)
    return maps.signal - layer.noise_weight(hidden) * maps.noise[:, list(heads.noise_of_signal)]
