"""The experiment of DyDiLA: small diffusion transformers that draw digits, by their attention.

scikit-learn's digits, 8 x 8 pixels and so 64 tokens, class-conditional flow matching: a model sees
`(1 - t) noise + t image` and says `image - noise`. Attention is one of `LinearDiT`'s kinds. DyDiLA
has more parameters in its attention; the others get them in their feed-forward layers.

Measured on images that were not trained on:

- the loss, with the same noise and times for all models;
- the Frechet distance between drawn and held-out digits, in the features of a small classifier
  (what FID is, for this size; a few hundred drawn digits);
- how alike the rows of the maps are (`attending.probes.oversmoothing`), mean over blocks and heads,
  of the first maps of the held-out images halfway between noise and image.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from attending.models.linear_dit import Attention, ImageAttention, LinearDiT
from attending.nn.dydila import DyDiLA
from attending.nn.focused_attention import focused_kernel
from attending.probes.oversmoothing import linear_row_similarity, softmax_row_similarity

KINDS: tuple[Attention, ...] = get_args(Attention)
TEST_IMAGES = 500


@dataclass(frozen=True)
class Found:
    """What became of one model: see the module's docstring; `curve` is `(step, loss)`."""

    loss: float
    distance: float
    similarity: float
    parameters: int
    curve: Sequence[tuple[int, float]]


@lru_cache(maxsize=1)
def _digits() -> tuple[Tensor, Tensor]:
    """Images in [-1, 1] and their digits, in an order of their own."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return images[order], torch.tensor(digits.target)[order]


def build(kind: Attention, settings: Mapping[str, Any]) -> LinearDiT:
    """A model of about the same number of parameters for every kind."""
    return LinearDiT(
        image_size=8,
        channels=1,
        num_classes=10,
        embed_dim=settings["dim"],
        depth=settings["depth"],
        num_heads=settings["heads"],
        attention=kind,
        mlp_ratio=4 if kind.startswith("dydila") else 7,
    )


def run(seed: int, settings: Mapping[str, Any]) -> dict[str, Found]:
    """Train a model of each kind, on the same batches with the same noise."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        classifier = _train_classifier(settings["classifier_steps"])
        return {kind: _train(kind, seed, classifier, settings) for kind in KINDS}


def flow_loss(
    model: LinearDiT, images: Tensor, labels: Tensor, generator: torch.Generator
) -> Tensor:
    """Mean squared error of the velocity, at uniform times."""
    noise = torch.randn(images.shape, generator=generator)
    time = torch.rand(len(images), generator=generator)
    share = time[:, None, None, None]
    velocity: Tensor = model((1 - share) * noise + share * images, time, labels)
    return (velocity - (images - noise)).square().mean()


@torch.no_grad()
def draw(model: LinearDiT, labels: Tensor, steps: int, generator: torch.Generator) -> Tensor:
    """Images of these classes: Euler steps from noise."""
    side = model.side * model.patch_size
    image = torch.randn(len(labels), model.channels, side, side, generator=generator)
    for step in range(steps):
        time = torch.full((len(labels),), step / steps)
        image = image + model(image, time, labels) / steps
    return image


def frechet_distance(one: Tensor, other: Tensor) -> float:
    """Between normal distributions with the means and covariances of two sets `[samples, dim]`.

    `|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))`; the trace of the root is that of the square roots
    of the eigenvalues of `C1^(1/2) C2 C1^(1/2)`, which is symmetric.
    """
    one, other = one.double(), other.double()
    covariances = [torch.cov(features.T) for features in (one, other)]
    values, vectors = torch.linalg.eigh(covariances[0])
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    both = torch.linalg.eigvalsh(root @ covariances[1] @ root).clamp(min=0).sqrt().sum()
    traces = sum(covariance.trace() for covariance in covariances)
    return float((one.mean(0) - other.mean(0)).square().sum() + traces - 2 * both)


def _train_classifier(steps: int) -> nn.Sequential:
    """Its last layer is left out when it gives features."""
    images, labels = _digits()
    images, labels = images[TEST_IMAGES:], labels[TEST_IMAGES:]
    layers = (nn.Flatten(), nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 32), nn.GELU())
    model = nn.Sequential(*layers, nn.Linear(32, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        chosen = torch.randint(len(images), (128,))
        noisy = images[chosen] + 0.1 * torch.randn(128, 1, 8, 8)
        loss = cross_entropy(model(noisy), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def _train(
    kind: Attention, seed: int, classifier: nn.Sequential, settings: Mapping[str, Any]
) -> Found:
    images, labels = _digits()
    training, test = slice(TEST_IMAGES, None), slice(0, TEST_IMAGES)
    torch.manual_seed(seed)
    model = build(kind, settings)
    generator = torch.Generator().manual_seed(seed)
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=settings["rate"], weight_decay=0.0)
    steps = settings["steps"]
    warm_up = max(steps // 10, 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warm_up, (steps - step) / max(steps - warm_up, 1)),
    )
    curve: list[tuple[int, float]] = []
    for step in range(steps):
        chosen = torch.randint(len(images) - TEST_IMAGES, (settings["rows"],), generator=generator)
        batch = images[training][chosen], labels[training][chosen]
        loss = flow_loss(model, *batch, generator)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % settings["measure_every"] == 0 or step + 1 == steps:
            with torch.no_grad():
                same = torch.Generator().manual_seed(0)
                curve.append((step + 1, float(flow_loss(model, images[test], labels[test], same))))
    wanted = labels[test][: settings["drawn"]]
    drawn = draw(model, wanted, settings["draw_steps"], torch.Generator().manual_seed(seed))
    with torch.no_grad():
        features = [classifier[:-1](some) for some in (drawn, images[test])]
    return Found(
        loss=curve[-1][1],
        distance=frechet_distance(features[0], features[1]),
        similarity=row_similarity(model, images[test][:64], labels[test][:64]),
        parameters=sum(parameter.numel() for parameter in learned),
        curve=curve,
    )


@torch.no_grad()
def row_similarity(model: LinearDiT, images: Tensor, labels: Tensor) -> float:
    """How alike the rows of the maps are, halfway between noise and image."""
    found: list[Tensor] = []

    def measure(layer: nn.Module, inputs: tuple[Tensor, ...], _: Tensor) -> None:
        found.append(layer_similarity(layer, inputs[0]).mean())

    hooks = [
        module.register_forward_hook(measure)
        for module in model.modules()
        if isinstance(module, DyDiLA | ImageAttention)
    ]
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    model((images + noise) / 2, torch.full((len(images),), 0.5), labels)
    for hook in hooks:
        hook.remove()
    return float(torch.stack(found).mean())


def layer_similarity(layer: nn.Module, hidden: Tensor) -> Tensor:
    """That of one layer's maps, `[batch, heads]`; the convolution beside the map is not in it."""
    if isinstance(layer, DyDiLA):
        query, key, other_query, other_key, asked, held = layer.features(hidden)
        return linear_row_similarity(
            query - asked[..., None] * other_query, key - held[..., None] * other_key
        )
    assert isinstance(layer, ImageAttention)
    query, key, _ = layer.project(hidden)
    if layer.power is None:
        return softmax_row_similarity(query, key)
    return linear_row_similarity(
        focused_kernel(query, layer.power), focused_kernel(key, layer.power)
    )
