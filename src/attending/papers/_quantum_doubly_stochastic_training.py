"""The experiment: small vision transformers that differ in the normaliser of their attention."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from attending.nn.birkhoff import birkhoff_distance, orthostochastic
from attending.nn.doubly_stochastic import DoublyStochasticAttention
from attending.nn.normalizers import Normalizer, norm_softmax, sinkhorn, softmax
from attending.nn.quantum_circuit import CircuitMap

TOKENS = 8  # an image of the digits is 8 x 8: a token is a row of it
BATCH = 100


@dataclass
class Trained:
    """What became of one model. `distance` and `entropy` are means over maps of the test images."""

    accuracy: float = math.nan
    distance: float = math.nan
    entropy: float = math.nan
    epochs: list[int] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)


class Block(nn.Module):
    """A pre-norm block with one head and a feed-forward part no wider than the model."""

    def __init__(self, width: int, normalizer: Normalizer, scale: float) -> None:
        super().__init__()
        self.attention = DoublyStochasticAttention(width, 1, normalizer, scale=scale)
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, hidden: Tensor) -> Tensor:
        """The block."""
        hidden = hidden + self.attention(self.first(hidden))
        after: Tensor = hidden + self.mlp(self.second(hidden))
        return after


class Classifier(nn.Module):
    """Rows of an image as tokens, blocks, the mean over the tokens, classes."""

    def __init__(self, width: int, blocks: list[Block]) -> None:
        super().__init__()
        self.embed = nn.Linear(8, width)
        self.positions = nn.Parameter(torch.randn(TOKENS, width) * 0.02)
        self.blocks = nn.ModuleList(blocks)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [batch, 10] of images [batch, 8, 8]."""
        hidden = self.embed(images) + self.positions
        for block in self.blocks:
            hidden = block(hidden)
        logits: Tensor = self.head(self.norm(hidden.mean(1)))
        return logits


def normalizer(name: str, width: int, aux_qubits: int) -> tuple[Normalizer, float]:
    """The normaliser of a variant, and the scale of the scores that it gets."""
    scale = width**-0.5
    if name == "norm_softmax":
        return partial(norm_softmax, cap=1 / scale), 1.0
    kind, _, number = name.partition("_")
    if kind == "sinkhorn":
        return partial(sinkhorn, iterations=int(number)), scale
    if kind == "circuit":
        return CircuitMap(TOKENS, aux_qubits, int(number)), scale
    return {"softmax": softmax, "qr": orthostochastic}[kind], scale


@lru_cache(maxsize=1)
def digits() -> tuple[Tensor, Tensor]:
    """Scikit-learn's handwritten digits, scaled to mean 0 and variance 1."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.from_numpy(bunch.images).float()
    return (images - images.mean()) / images.std(), torch.from_numpy(bunch.target).long()


def train(name: str, blocks: int, settings: Mapping[str, Any], seed: int) -> Trained:
    """Train one model and measure it on the fifth of the images that it has not seen."""
    images, labels = digits()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    held_out, training = order[: len(images) // 5], order[len(images) // 5 :]
    width = settings["width"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = [
            Block(width, *normalizer(name, width, settings["aux_qubits"])) for _ in range(blocks)
        ]
        model = Classifier(width, made)
    optimizer = torch.optim.Adam(model.parameters(), lr=settings["learning_rate"])
    epochs = settings["epochs"]
    falls = [round(0.6 * epochs), round(0.9 * epochs)]  # as the paper's 31 and 45 of 50
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, falls, 0.1)
    shuffle = torch.Generator().manual_seed(seed)
    outcome = Trained()
    for epoch in range(epochs):
        model.train()
        for batch in training[torch.randperm(len(training), generator=shuffle)].split(BATCH):
            loss = cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            if not math.isfinite(float(loss.detach())):
                return Trained()
            optimizer.step()
        schedule.step()
        model.eval()
        with torch.no_grad():
            right = model(images[held_out]).argmax(-1) == labels[held_out]
        outcome.epochs.append(epoch + 1)
        outcome.accuracies.append(100.0 * float(right.float().mean()))
    outcome.accuracy = outcome.accuracies[-1]
    maps = maps_of(model, images[held_out])
    outcome.distance = float(birkhoff_distance(maps).mean())
    outcome.entropy = float(-torch.special.xlogy(maps, maps).sum(-1).mean())
    return outcome


@torch.no_grad()
def maps_of(model: Classifier, images: Tensor) -> Tensor:
    """The attention maps of all blocks, [blocks * batch, 1, tokens, tokens], in float64."""
    found = []
    for block in model.blocks:
        assert isinstance(block, Block)
        inner: Any = block.attention.normalizer

        def keep(scores: Tensor, visible: Tensor | None = None, inner: Any = inner) -> Tensor:
            attention_map: Tensor = inner(scores, visible)
            found.append(attention_map.double())
            return attention_map

        # A module that was a child has to go before a function takes its name.
        del block.attention.normalizer
        block.attention.normalizer = keep
    model(images)
    return torch.cat(found)


@torch.no_grad()
def distinct_maps(settings: Mapping[str, Any], seed: int) -> dict[str, float]:
    """The share of all inputs of 4 x 4 with entries -1 and 1 whose map no other has (6 digits)."""
    size, entries = 4, settings["grid_entries"]
    free = np.array(list(product((-1.0, 1.0), repeat=entries)))
    grid = np.ones((len(free), size * size))
    grid[:, :entries] = free
    scores = torch.from_numpy(grid).view(-1, size, size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        circuit = CircuitMap(size, num_layers=settings["grid_layers"], dtype=torch.float64)
    functions: dict[str, Normalizer] = {
        "softmax": softmax,
        "sinkhorn": partial(sinkhorn, iterations=201),
        "qr": partial(orthostochastic, noise=0.0),
        "circuit": circuit,
    }
    shares = {}
    for name, function in functions.items():
        maps = torch.cat([function(part) for part in scores.split(4096)])
        rounded = maps.flatten(1).mul(1e6).round().long()
        shares[name] = len(torch.unique(rounded, dim=0)) / len(rounded)
    return shares
