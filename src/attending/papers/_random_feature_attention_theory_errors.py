"""Test errors of frozen-QK attention and a random-feature network, by number of samples.

Queries and keys are uniform on the unit sphere. Every target is brought to mean 0 and variance 1 by
sets drawn for that alone. All models of a seed see the same sets, and all have as many learned
numbers. The strength of the ridge is chosen on validation sets, for each model, target and number
of samples, so none of them is fitted or chosen on the test sets.
"""

from typing import Any

import torch
from torch import Tensor

from attending.nn.frozen_attention import FrozenAttention
from attending.nn.random_feature_mlp import RandomFeatureMLP
from attending.nn.ridge import ridge_solution
from attending.probes.set_targets import (
    correlation_power,
    correlation_relu,
    key_power,
    mixed_power,
    random_sets,
)


def targets_of(query: Tensor, key: Tensor, direction: Tensor) -> dict[str, Tensor]:
    """All targets of these sets, by name."""
    return {
        "key_2": key_power(key, direction, 2),
        "key_4": key_power(key, direction, 4),
        "correlation_1": correlation_power(query, key, direction, 1),
        "correlation_2": correlation_power(query, key, direction, 2),
        "correlation_3": correlation_power(query, key, direction, 3),
        "correlation_relu": correlation_relu(query, key, direction),
        "mixed_2": mixed_power(query, key, direction, 2, 0.5),
    }


def run(seed: int, settings: dict[str, Any]) -> dict[str, dict[str, list[float]]]:
    """Mean squared error on the test sets over their variance: model, target, one per count."""
    dim, keys, heads = settings["dim"], settings["keys"], settings["heads"]
    samples: list[int] = settings["samples"]
    generator = torch.Generator().manual_seed(seed)
    double = torch.float64
    direction = torch.nn.functional.normalize(
        torch.randn(dim, generator=generator, dtype=double), dim=0
    )
    counts = {"train": samples[-1], "validation": settings["held_out"], "test": settings["test"]}
    sets = {
        name: random_sets(count, keys, dim, generator=generator, dtype=double)
        for name, count in counts.items()
    }
    scales = random_sets(settings["scaling_sets"], keys, dim, generator=generator, dtype=double)
    moments = {
        name: (float(one.mean()), float(one.std()))
        for name, one in targets_of(*scales, direction).items()
    }
    targets = {
        part: {
            name: (one - moments[name][0]) / moments[name][1]
            for name, one in targets_of(*drawn, direction).items()
        }
        for part, drawn in sets.items()
    }
    models: dict[str, FrozenAttention | RandomFeatureMLP] = {
        "zero": FrozenAttention(dim, heads, seed=seed, dtype=double),
        "identity": FrozenAttention(dim, heads, qk_mean="identity", seed=seed, dtype=double),
        "network": RandomFeatureMLP(dim, keys, heads * (dim + 1), seed=seed, dtype=double),
    }
    return {
        name: _errors(
            {part: model.features(*drawn).flatten(1) for part, drawn in sets.items()},
            targets,
            samples,
            settings["ridges"],
        )
        for name, model in models.items()
    }


def _errors(
    features: dict[str, Tensor],
    targets: dict[str, dict[str, Tensor]],
    samples: list[int],
    ridges: list[float],
) -> dict[str, list[float]]:
    # Of mean squared length 1, so that a ridge means the same to all models.
    size = float(features["train"].square().sum(1).mean()) ** 0.5
    phi = {part: one / size for part, one in features.items()}
    names = list(targets["train"])
    y = {part: torch.stack([one[name] for name in names], 1) for part, one in targets.items()}
    found: dict[str, list[float]] = {name: [] for name in names}
    for count in samples:
        weights = ridge_solution(phi["train"][:count], y["train"][:count], ridges)
        wrong = {  # [strengths, targets]
            part: (phi[part] @ weights - y[part]).square().mean(1)
            for part in ("validation", "test")
        }
        best = wrong["validation"].argmin(0)
        variance = y["test"].var(0, correction=0)
        for place, name in enumerate(names):
            found[name].append(float(wrong["test"][best[place], place] / variance[place]))
    return found
