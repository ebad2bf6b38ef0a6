"""The record of sigmaReparam: spectrally normalised weights with one learned scale."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attending.papers._record import Figure, Paper, Rule, Scale, Verdict
from attending.papers._reproduction import Reproduction, Series

VARIANTS = {"norm": "LayerNorm", "plain": "no norm", "ours": "no norm, sigmaReparam"}
GAP = 0.5  # nats
ACCURACY = 0.02
LOSS = 0.05  # nats per token


def _judge(ours: Mapping[str, Sequence[float]]) -> Verdict:
    seeds = range(len(ours["digits_entropy_ours"]))

    def stays_open(seed: int, task: str, gap: float) -> bool:
        """At the high rate: entropy above both others, and no divergence."""
        return not ours[f"{task}_diverged_ours"][seed] and all(
            ours[f"{task}_diverged_{other}"][seed] == 1
            or ours[f"{task}_entropy_ours"][seed] > ours[f"{task}_entropy_{other}"][seed] + gap
            for other in ("norm", "plain")
        )

    def as_good(seed: int) -> bool:
        """The best rate of each."""
        return (
            ours["digits_accuracy_ours"][seed] >= ours["digits_accuracy_norm"][seed] - ACCURACY
            and ours["text_loss_ours"][seed] <= ours["text_loss_norm"][seed] + LOSS
        )

    tasks = ("digits", "text")
    if not all(stays_open(seed, task, 0.0) for seed in seeds for task in tasks):
        return "did not hold"
    far = all(stays_open(seed, task, GAP) for seed in seeds for task in tasks)
    return "held" if far and all(as_good(seed) for seed in seeds) else "held in direction"


RULE = Rule(
    words=(
        "Stability, in every seed and both tasks, at the highest learning rate: the model with "
        "sigmaReparam and without LayerNorm does not diverge, and the lowest entropy of its lowest "
        "layer is above that of the model with LayerNorm and above that of the model without, by "
        "more than 0.5 nats; where one of those diverges, that counts instead. Quality, in every "
        "seed, each at its best rate: accuracy on digits at most 0.02 below, and loss on text at "
        "most 0.05 nats above that of the model with LayerNorm. Held if both are so; held in "
        "direction if stability holds with any gap above 0; did not hold otherwise."
    ),
    judge=_judge,
)

PAPER = Paper(
    slug="sigma-reparam",
    title=(
        "Stabilizing Transformer Training by Preventing Attention Entropy Collapse (sigmaReparam)"
    ),
    arxiv="2303.06296",
    date="2023-03",
    venue="ICML 2023",
    purpose=(
        "For training a transformer whose loss oscillates or diverges while its attention rows "
        "shrink to a single key. Every linear weight is divided by its largest singular value and "
        "multiplied by one learned scalar, which bounds how fast the logits can grow. Layer norm, "
        "warm-up and weight decay may then be left out. It also gives a lower bound on attention "
        "entropy that can be monitored in any model."
    ),
    claim=(
        "With the reparametrisation the entropy of attention does not collapse, and training stays "
        "stable in settings (no layer norm, no warm-up, high learning rate) where plain "
        "transformers diverge, at the same quality."
    ),
    figures=(
        Figure(
            "ImageNet-1k top-1, ViT-B/16, DeiT recipe -> without LN, warm-up and weight decay, %",
            "81.8 -> about 81.8 to 82.2",
            "recall",
        ),
        Figure("training time saved", "up to 16 %", "3rd"),
        Figure(
            "machine translation, 100 + 100 layers, post-LN",
            "plain diverges or is unstable -> trains, competitive BLEU",
            "3rd",
        ),
        Figure("time per step, speech, post-LN -> with sigmaReparam, ms", "450 -> 510", "3rd"),
        Figure(
            "vision without LayerNorm: accuracy beside that of the ordinary recipe",
            "about equal",
            "recall",
            measurement="digits_accuracy_ours",
        ),
        Figure(
            "entropy of attention where plain models diverge",
            "stays open, theirs collapses",
            "recall",
            measurement="digits_entropy_ours",
        ),
        Figure(
            "lower bound on the entropy of a row (Theorem 3.1)",
            "never violated; exact on the worst row",
            "ran",
        ),
    ),
    extension_points=(
        "torch.nn.utils.parametrize.register_parametrization on nn.Linear and nn.Conv2d",
        "torch.nn.utils.parametrize.remove_parametrizations, to fold into plain weights",
    ),
    symbols=(
        "attending.nn.sigma_reparam.sigma_reparam",
        "attending.nn.sigma_reparam.convert",
        "attending.nn.sigma_reparam.remove",
        "attending.nn.sigma_reparam.spectral_norm_estimate",
        "attending.core.statistics.bounds.entropy_lower_bound",
        "attending.core.statistics.bounds.centred_logit_norm",
        "attending.core.statistics.bounds.global_logit_norm",
    ),
    status="built",
    rule=RULE,
)

_SMALL: dict[str, dict[str, Any]] = {
    "digits": {
        "rates": [1e-3, 3e-3, 1e-2],
        "hidden": 64,
        "layers": 4,
        "heads": 4,
        "rows": 64,
        "steps": 400,
        "measure_every": 50,
        "gamma_init": "one",
    },
    "text": {
        "rates": [3e-3, 3e-2],
        "hidden": 64,
        "layers": 4,
        "heads": 4,
        "rows": 8,
        "context": 64,
        "steps": 300,
        "measure_every": 50,
        "gamma_init": "one",
        "files": 80,
        "held_out_rows": 48,
    },
}
_CHANGES: dict[Scale, dict[str, dict[str, Any]]] = {
    "smoke": {
        "digits": {"rates": [1e-3, 1e-2], "hidden": 16, "layers": 2, "rows": 8, "steps": 4},
        "text": {"hidden": 16, "layers": 2, "rows": 2, "steps": 4, "files": 4, "held_out_rows": 4},
    },
    "small": {"digits": {}, "text": {}},
    # Not run. The width and depth of ViT-S, and steps until neither task improves.
    "full": {
        "digits": {"hidden": 384, "layers": 12, "heads": 6, "steps": 10_000, "rows": 256},
        "text": {
            "hidden": 384,
            "layers": 12,
            "heads": 6,
            "steps": 20_000,
            "rows": 64,
            "context": 256,
            "files": 100_000,
        },
    },
}


def settings(scale: Scale) -> dict[str, Any]:
    """The two tasks: sizes, learning rates and steps. Steps per measurement follow the steps."""
    found = {task: _SMALL[task] | _CHANGES[scale][task] for task in _SMALL}
    for one in found.values():
        one["measure_every"] = max(1, one["steps"] // 8)
    return found


def reproduce(scale: Scale, seed: int, out_dir: Path) -> Reproduction:
    """Train every variant at every rate, on both tasks."""
    from attending.papers._sigma_reparam_training import run

    here = settings(scale)
    # The settings were found in a pilot on seeds 0 and 1; these are others.
    found = run(here, seed + 1000)
    measurements: dict[str, float] = {}
    series = []
    for task, quality in (("digits", "accuracy"), ("text", "loss")):
        rates = here[task]["rates"]
        for variant, name in VARIANTS.items():
            cells = [found[task, variant, rate] for rate in rates]
            high = cells[-1]
            reached = [one.quality for one in cells if math.isfinite(one.quality)]
            best = max if quality == "accuracy" else min
            measurements |= {
                f"{task}_entropy_{variant}": high.lowest_entropy,
                f"{task}_diverged_{variant}": float(high.diverged),
                f"{task}_{quality}_{variant}": best(reached, default=math.nan),
                f"{task}_high_{quality}_{variant}": high.quality,
            }
            panel = f"{task}, learning rate {rates[-1]:g}: lowest layer"
            series.append(Series(name, high.steps, high.entropies, panel, "step", "entropy, nats"))
    return Reproduction(
        slug=PAPER.slug,
        scale=scale,
        seed=seed,
        measurements=measurements,
        series=series,
        settings=here,
    )
