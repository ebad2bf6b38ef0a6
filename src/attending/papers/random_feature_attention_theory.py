"""The record of random-feature attention: what a layer with frozen queries and keys can learn."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attending.papers._record import Figure, Paper, Rule, Scale, Verdict
from attending.papers._reproduction import Reproduction, Series

MODELS = ("zero", "identity", "network")
TARGETS = {
    "key_2": "mean <b, x>^2",
    "key_4": "mean <b, x>^4",
    "correlation_1": "mean <q, x> <b, x>",
    "correlation_2": "mean <q, x>^2 <b, x>",
    "correlation_3": "mean <q, x>^3 <b, x>",
    "correlation_relu": "mean relu(<q, x>) <b, x>",
    "mixed_2": "half key_2, half correlation_2",
}
NATURAL = ("correlation_1", "correlation_relu")
COUNTS = (256, 1024, 4096)  # of samples, that the rule looks at


def _judge(ours: Mapping[str, Sequence[float]]) -> Verdict:
    seeds = range(len(ours["key_2_zero_256"]))

    def below(first: str, second: str, target: str, seed: int) -> bool:
        return all(
            ours[f"{target}_{first}_{count}"][seed] < ours[f"{target}_{second}_{count}"][seed]
            for count in COUNTS
        )

    def total(model: str, count: int) -> float:
        return sum(sum(ours[f"{target}_{model}_{count}"]) for target in TARGETS)

    fewer = all(below("zero", "network", target, seed) for target in TARGETS for seed in seeds)
    biased = all(below("identity", "zero", target, seed) for target in NATURAL for seed in seeds)
    if fewer and biased:
        return "held"
    ahead = all(total("zero", count) < total("network", count) for count in COUNTS)
    relu = all(below("identity", "zero", "correlation_relu", seed) for seed in seeds)
    return "held in direction" if ahead and relu else "did not hold"


RULE = Rule(
    words=(
        "Test error after 256, 1024 and 4096 samples. Held if in every seed, at each of the three, "
        "attention with query-key matrices of mean zero has a lower error than the network on each "
        "of the seven targets, and those of mean identity have a lower error than those of mean "
        "zero on the correlations of degree 1 and of relu. Held in direction if at each of the "
        "three the error of attention (mean zero), averaged over seeds and targets, is below the "
        "network's, and in every seed mean identity is below mean zero on the relu target. Did not "
        "hold otherwise. (A trial of one seed up to 1024 samples, by the authors of the notes that "
        "this follows, was known when the rule was written.)"
    ),
    judge=_judge,
)

PAPER = Paper(
    slug="random-feature-attention-theory",
    title="What can a Single Attention Layer Learn? A Study Through the Random Features Lens",
    arxiv="2307.11353",
    date="2023-07-21",
    venue="NeurIPS 2023",
    purpose=(
        "A bench for the inductive bias of attention, and a regressor on small sets in closed "
        "form. Many heads have random, frozen query-key matrices, and only the values are fitted, "
        "by ridge regression. It shows which functions of a query and a set of keys are learned "
        "from few samples."
    ),
    claim=(
        "Random-feature attention learns functions that ignore the order of the keys from fewer "
        "samples than a random-feature network, and a query-key matrix with a non-zero mean helps "
        "on natural targets."
    ),
    figures=(
        Figure(
            "samples needed, against a two-layer random-feature network",
            "fewer, in theory and simulation",
            "paper",
        ),
        Figure(
            "effect of a non-zero mean of the query-key matrix on natural targets",
            "fewer samples needed",
            "paper",
        ),
        Figure(
            "test error over variance, mean of squares, 1024 samples, attention (ours: with the "
            "1 in the values, and ridge chosen on validation sets)",
            "0.05 in a trial of one seed",
            "ran",
            measurement="key_2_zero_1024",
        ),
        Figure(
            "the same, network",
            "1.03 in a trial of one seed",
            "ran",
            measurement="key_2_network_1024",
        ),
        Figure(
            "test error over variance, relu target, 1024 samples, mean zero",
            "0.29 in a trial of one seed",
            "ran",
            measurement="correlation_relu_zero_1024",
        ),
        Figure(
            "the same, mean identity",
            "0.10 in a trial of one seed",
            "ran",
            measurement="correlation_relu_identity_1024",
        ),
        Figure(
            "the same, network",
            "0.47 in a trial of one seed",
            "ran",
            measurement="correlation_relu_network_1024",
        ),
    ),
    extension_points=("torch.nn.Module with frozen buffers, and a fit in closed form",),
    symbols=(
        "attending.nn.frozen_attention.FrozenAttention",
        "attending.nn.frozen_attention.frozen_attention_features",
        "attending.nn.frozen_attention.frozen_attention_kernel",
        "attending.nn.random_feature_mlp.RandomFeatureMLP",
        "attending.nn.ridge.ridge_solution",
        "attending.probes.set_targets.random_sets",
        "attending.probes.set_targets.key_power",
        "attending.probes.set_targets.correlation_power",
        "attending.probes.set_targets.correlation_relu",
        "attending.probes.set_targets.mixed_power",
    ),
    rule=RULE,
    status="built",
)

_SMALL: dict[str, Any] = {
    "dim": 8,
    "keys": 8,
    "heads": 128,
    "samples": [64, 256, 1024, 4096],
    "ridges": [1e-10, 1e-9, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0],
    "held_out": 1000,
    "test": 2000,
    "scaling_sets": 20_000,
}


def settings(scale: Scale) -> dict[str, Any]:
    """What determines a run but its seed. `full`, of the paper's size, was never run."""
    return {
        "smoke": {
            **_SMALL,
            "dim": 4,
            "keys": 4,
            "heads": 16,
            "samples": [64, 1024],
            "held_out": 50,
            "test": 100,
        },
        "small": _SMALL,
        "full": {
            **_SMALL,
            "dim": 16,
            "keys": 16,
            "heads": 1000,
            "samples": [64, 256, 1024, 4096, 8192],
        },
    }[scale]


def reproduce(scale: Scale, seed: int, out_dir: Path) -> Reproduction:
    """Fit both kinds of attention and the network to seven targets, from few and many samples.

    See `attending.papers._random_feature_attention_theory_errors`.
    """
    from attending.papers._random_feature_attention_theory_errors import run

    settings_here = settings(scale)
    found = run(seed, settings_here)
    samples = settings_here["samples"]
    series = [
        Series(model, samples, found[model][target], shown, "samples", "error / variance")
        for target, shown in TARGETS.items()
        for model in MODELS
    ]
    return Reproduction(
        slug=PAPER.slug,
        scale=scale,
        seed=seed,
        measurements={
            f"{target}_{model}_{count}": error
            for target in TARGETS
            for model in MODELS
            for count, error in zip(samples, found[model][target], strict=True)
        },
        series=tuple(series),
        settings=settings_here,
    )


def plot(reproductions: Sequence[Reproduction], figure: Any) -> None:
    """Error by samples on log axes, a panel for each target, a line for each seed."""
    grid = figure.subplots(2, 4, sharex=True, sharey=True).ravel()
    colours = dict(zip(MODELS, ("C0", "C2", "C3"), strict=True))
    for axes, shown in zip(grid, TARGETS.values(), strict=False):
        for run in reproductions:
            for one in (one for one in run.series if one.panel == shown):
                axes.loglog(one.x, one.y, color=colours[one.name], alpha=0.7, marker=".")
        axes.set_title(shown, fontsize=8)
        axes.grid(alpha=0.3)
    names = {"zero": "attention", "identity": "attention, mean identity", "network": "network"}
    for model in MODELS:
        grid[-1].plot([], [], color=colours[model], label=names[model])
    grid[-1].legend(fontsize=8, loc="center")
    grid[-1].set_axis_off()
    figure.supxlabel("samples", fontsize=9)
    figure.supylabel("test error / variance", fontsize=9)
