"""A vision transformer trained on digits of 8 x 8 pixels, shown digits of other sizes.

`transformers.ViTForImageClassification` with a token for each pixel, so 64 tokens and the class
token. At other sizes the images are resized and the model interpolates its positions, as it is made
to; attention is left as it is, or its logits are scaled to the number of tokens.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

from attending.interventions.logit_scaling import LogitScaling
from attending.probes.entropy_curve import EntropyCurve, entropy_curve

TRAINED = 8
HELD_OUT = 500
MEASURED = 64  # images for the entropy


class Found(NamedTuple):
    """What became of one way to scale: a number for each side, and the entropy."""

    accuracy: list[float]
    curve: EntropyCurve


@lru_cache(maxsize=1)
def _digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return images[order], torch.tensor(digits.target)[order]


def run(
    seed: int, kinds: Sequence[str], sides: Sequence[int], settings: Mapping[str, Any]
) -> dict[str, Found]:
    """Train, and classify held-out digits at every size with every kind ("none" among them)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _train(settings)
    trained = _at_side(TRAINED, MEASURED)
    by_size = {side: _at_side(side, MEASURED) for side in sides}
    found = {}
    for kind in kinds:
        if kind == "none":
            found[kind] = Found(_accuracies(model, sides), entropy_curve(model, by_size))
            continue
        scaling = LogitScaling(kind=kind).calibrate(model, trained)  # type: ignore[arg-type]
        with scaling(model):
            found[kind] = Found(_accuracies(model, sides), entropy_curve(model, by_size))
    return found


def _at_side(side: int, count: int) -> dict[str, Any]:
    images = _digits()[0][:count]
    if side != TRAINED:
        images = interpolate(
            images, size=(side, side), mode="bilinear", align_corners=False, antialias=True
        )
    return {"pixel_values": images, "interpolate_pos_encoding": True}


@torch.no_grad()
def _accuracies(model: nn.Module, sides: Sequence[int]) -> list[float]:
    labels = _digits()[1][:HELD_OUT]
    guesses = (model(**_at_side(side, HELD_OUT)).logits.argmax(-1) for side in sides)
    return [float((guess == labels).float().mean()) for guess in guesses]


def _train(settings: Mapping[str, Any]) -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    images, labels = (part[HELD_OUT:] for part in _digits())
    config = ViTConfig(
        hidden_size=settings["dim"],
        intermediate_size=2 * settings["dim"],
        num_hidden_layers=settings["layers"],
        num_attention_heads=settings["heads"],
        image_size=TRAINED,
        patch_size=1,
        num_channels=1,
        num_labels=10,
        attn_implementation="sdpa",
    )
    model: nn.Module = ViTForImageClassification(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings["rate"])
    steps = settings["steps"]
    warm_up = min(30, steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warm_up, (steps - step) / max(steps - warm_up, 1)),
    )
    for _ in range(steps):
        chosen = torch.randint(len(images), (settings["rows"],))
        loss = cross_entropy(model(pixel_values=images[chosen]).logits, labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()
