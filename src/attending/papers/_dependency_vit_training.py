"""The experiment of DependencyViT: digits to classify, and coloured shapes to parse.

**Digits.** A plain vision transformer and one with reversed attention, of one size, are trained on
scikit-learn's digits (8 x 8 pixels, 16 tokens). Then, without further training, 16% of the
tokens go after each of the first three blocks: those with the smallest message, those that receive
least, or random ones.

**Shapes.** Images of 16 x 16 with two or three coloured shapes, on a noisy ground. Models of
both kinds learn which of nine sorts are there, nothing of where. Then trees: dependency masks of
all layers, and maps of forward attention, are multiplied as in attention rollout (half of each step
goes past attention), the best arborescence of the product is cut below its root's children, and its
parts are compared with the shapes by the adjusted Rand index. k-means on the last hidden states of
the reversed model, told the number of parts, stands beside them.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from attending.models.dependency_vit import Attention, DependencyViT, Ranking
from attending.probes.dependency_tree import accumulated_dependency, dependency_tree, tree_segments

SIDE, PATCH = 16, 2
KINDS = 3  # disk, square, triangle, in red, green or blue: nine sorts
PRUNED = (0, 1, 2)


@dataclass(frozen=True)
class Digits:
    """Accuracies in %: of the whole model, and after pruning by each ranking."""

    accuracy: float
    pruned: Mapping[str, float]
    curve: Sequence[tuple[int, float]]


@lru_cache(maxsize=1)
def digits() -> tuple[Tensor, Tensor]:
    """Images [1797, 1, 8, 8] of mean 0 and variance 1, and their digits."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.from_numpy(bunch.images).float()[:, None]
    return (images - images.mean()) / images.std(), torch.from_numpy(bunch.target).long()


def shapes(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Images [count, 3, 16, 16], the sorts in them [count, 9], the shape of each token.

    The image is divided in four quarters, and two or three of them hold a shape of 5 to 8 pixels.
    A token, a patch of 2 x 2, belongs to the shape that has at least half of its pixels; 0 is the
    ground.
    """
    rows, columns = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    images = 0.15 * torch.randn(count, 3, SIDE, SIDE, generator=generator)
    sorts, owner = torch.zeros(count, KINDS * 3), torch.zeros(count, SIDE, SIDE)
    for index in range(count):
        number = int(torch.randint(2, 4, (), generator=generator))
        quarters = torch.randperm(4, generator=generator)[:number].tolist()
        for place, quarter in enumerate(quarters):
            kind, colour, size = (
                int(torch.randint(low, high, (), generator=generator))
                for low, high in ((0, KINDS), (0, 3), (5, 9))
            )
            slack = SIDE // 2 - size + 1
            top = quarter // 2 * SIDE // 2 + int(torch.randint(slack, (), generator=generator))
            left = quarter % 2 * SIDE // 2 + int(torch.randint(slack, (), generator=generator))
            down, right = rows - top, columns - left
            inside = (down >= 0) & (down < size) & (right >= 0) & (right < size)
            middle = (size - 1) / 2
            if kind == 0:
                inside &= (down - middle) ** 2 + (right - middle) ** 2 <= (size / 2) ** 2
            elif kind == 2:
                inside &= (right - middle).abs() <= down / 2
            images[index, colour] += inside.float()
            sorts[index, 3 * kind + colour] = 1.0
            owner[index][inside] = place + 1
    patches = owner.unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH).flatten(3).flatten(1, 2)
    tokens = torch.zeros(count, patches.shape[1], dtype=torch.long)
    for place in (1, 2, 3):
        tokens[(patches == place).sum(-1) >= PATCH**2 // 2] = place
    return images, sorts, tokens


def train_digits(attention: Attention, settings: Mapping[str, Any], seed: int) -> Digits:
    """Train on four fifths, measure on the rest, prune."""
    images, labels = digits()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    held_out, training = order[: len(images) // 5], order[len(images) // 5 :]
    model = _model(attention, 8, 1, 10, settings, seed)
    shuffle = torch.Generator().manual_seed(seed)
    epochs, size = settings["epochs"], settings["batch"]
    steps = epochs * math.ceil(len(training) / size)
    optimizer, schedule = _optimizer(model, steps, settings)
    curve = []
    for epoch in range(epochs):
        model.train()
        for batch in training[torch.randperm(len(training), generator=shuffle)].split(size):
            _step(optimizer, schedule, cross_entropy(model(images[batch]), labels[batch]))
        curve.append((epoch + 1, _accuracy(model, images[held_out], labels[held_out])))
    pruned: dict[str, float] = {}
    rankings: tuple[Ranking, ...] = ("random",)
    if attention == "reversed":
        rankings = ("message", "received", "random")
    for ranking in rankings:
        model.set_pruning(PRUNED, rank_by=ranking)
        repeats = 5 if ranking == "random" else 1
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            found = [_accuracy(model, images[held_out], labels[held_out]) for _ in range(repeats)]
        pruned[ranking] = sum(found) / repeats
    return Digits(curve[-1][1], pruned, curve)


def parse_shapes(settings: Mapping[str, Any], seed: int) -> dict[str, float]:
    """Train both kinds on the shapes; adjusted Rand indices and how well the sorts are told."""
    from sklearn.cluster import KMeans
    from sklearn.metrics import adjusted_rand_score

    generator = torch.Generator().manual_seed(1000 + seed)
    batches = [shapes(settings["shape_batch"], generator) for _ in range(settings["shape_sets"])]
    images, sorts, truth = shapes(settings["parsed"], generator)
    numbers: dict[str, float] = {}
    parts: dict[str, list[Any]] = {}
    kinds: tuple[Attention, ...] = ("reversed", "forward")
    for attention in kinds:
        model = _model(attention, SIDE, 3, 3 * KINDS, settings, seed)
        optimizer, schedule = _optimizer(model, settings["shape_steps"], settings)
        model.train()
        for step in range(settings["shape_steps"]):
            batch = batches[step % len(batches)]
            loss = binary_cross_entropy_with_logits(model(batch[0]), batch[1])
            _step(optimizer, schedule, loss)
        model.eval()
        seen: list[Tensor] = []
        handle = model.norm.register_forward_hook(lambda _, __, out, kept=seen: kept.append(out))
        with torch.no_grad():
            parse = model.parse(images)
        handle.remove()
        numbers[f"sorts_{attention}"] = 100 * float(
            ((parse.logits > 0) == sorts.bool()).float().mean()
        )
        whole = (
            accumulated_dependency(parse.dependencies, residual=0.5)
            if (attention == "reversed")
            else _rollout(parse.dependencies)
        )
        parts[f"tree_{attention}"] = list(tree_segments(dependency_tree(whole)))
        parts[f"last_{attention}"] = list(tree_segments(dependency_tree(parse.dependencies[-1])))
        if attention == "reversed":
            parts["kmeans"] = [
                KMeans(int(tokens.max()) + 1, n_init=3, random_state=seed).fit_predict(
                    features.double().numpy()
                )
                for features, tokens in zip(seen[0], truth, strict=True)
            ]
    for name, segments in parts.items():
        pairs = list(zip(truth, segments, strict=True))
        numbers[f"ari_{name}"] = sum(
            float(adjusted_rand_score(tokens, found)) for tokens, found in pairs
        ) / len(pairs)
        numbers[f"ari_of_shapes_{name}"] = sum(
            float(adjusted_rand_score(tokens[tokens > 0], found[tokens > 0]))
            for tokens, found in pairs
        ) / len(pairs)
    return numbers


def _rollout(maps: Sequence[Tensor]) -> Tensor:
    """Of forward attention, `[gatherer, source]`, with half of each step past attention."""
    eye = torch.eye(maps[0].shape[-1])
    found = eye
    for one in maps:
        found = (0.5 * eye + 0.5 * one) @ found
    return found


def _model(
    attention: Attention,
    side: int,
    channels: int,
    classes: int,
    settings: Mapping[str, Any],
    seed: int,
) -> DependencyViT:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return DependencyViT(
            side,
            channels,
            classes,
            PATCH,
            settings["dim"],
            settings["depth"],
            settings["heads"],
            attention=attention,
        )


def _optimizer(
    model: DependencyViT, steps: int, settings: Mapping[str, Any]
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings["rate"], weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings["rate"], total_steps=steps + 1, pct_start=0.15
    )
    return optimizer, schedule


def _step(
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    loss: Tensor,
) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    schedule.step()


@torch.no_grad()
def _accuracy(model: DependencyViT, images: Tensor, labels: Tensor) -> float:
    model.eval()
    return 100.0 * float((model(images).argmax(-1) == labels).float().mean())
