"""The record of systematic outliers: where they come from, and attention that needs none."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from attending.papers._record import Figure, Paper, Rule, Scale, Verdict
from attending.papers._reproduction import Reproduction, Series

VARIANTS: tuple[
    Literal["softmax", "fixed_bias", "additive_bias", "attention_bias", "context_scale"], ...
] = ("softmax", "fixed_bias", "additive_bias", "attention_bias", "context_scale")
IMPLICIT = VARIANTS[:3]  # without a scale of their own: the paper finds outliers
EXPLICIT = VARIANTS[3:]  # with a scale that depends on the context: none

SINK = 0.5  # mass on the first token, of the head where it is largest
MASSIVE = 100.0  # largest over median magnitude of the residual stream


def _judge(ours: Mapping[str, Sequence[float]]) -> Verdict:
    seeds = range(len(ours["first_token_softmax"]))

    def attention(seed: int) -> bool:
        least = min(ours[f"first_token_{variant}"][seed] for variant in IMPLICIT)
        most = max(ours[f"first_token_{variant}"][seed] for variant in EXPLICIT)
        return least > SINK and most <= ours["first_token_softmax"][seed] / 2

    def activations(seed: int) -> bool:
        plain, scaled = (ours[f"ratio_{name}"][seed] for name in ("softmax", "context_scale"))
        gaps = (ours[f"gap_w8_{name}"][seed] for name in ("softmax", "context_scale"))
        return plain > MASSIVE and plain >= 2 * scaled and next(gaps) > next(gaps)

    if not all(attention(seed) for seed in seeds):
        return "did not hold"
    return "held" if all(activations(seed) for seed in seeds) else "held in direction"


RULE = Rule(
    words=(
        "Attention: in every seed, the mass on the first token at positions without a task, of the "
        "head where it is largest, is above 0.5 in the models of softmax, fixed bias and additive "
        "bias, and in those of attention bias and context-aware scale at most half of what it is "
        "with softmax. Activations: in every seed, the largest over the median magnitude of the "
        "residual stream exceeds 100 with softmax and is at least twice that with context-aware "
        "scale, and absmax int8 of the weights costs the softmax model more. Held if both are so; "
        "held in direction if only the first is (outliers that never form cannot be shown to be "
        "prevented); did not hold otherwise."
    ),
    judge=_judge,
)

PAPER = Paper(
    slug="systematic-outliers",
    title="Systematic Outliers in Large Language Models",
    arxiv="2502.06415",
    date="2025-02",
    venue="ICLR 2025",
    purpose=(
        "For anyone who quantises, prunes or debugs a language model and meets a few weights, "
        "activations or attention columns that are orders of magnitude too large. Detectors find "
        "the three kinds and show where they coincide. For training a model without them, "
        "attention gets an explicit scale that depends on the input, one gate for each head and "
        "token."
    ),
    claim=(
        "Outliers in weights, activations and attention share their positions and act as an "
        "implicit, context-aware scale of attention's output; give attention such a scale "
        "explicitly and they do not form, while a fixed or additive bias does not help."
    ),
    figures=(
        Figure(
            "GPT-2 perplexity after AbsMax W8 quantisation, default -> with context-aware scale",
            "93.44 -> 29.22",
            "3rd",
        ),
        Figure(
            "GPT-2 perplexity at 50 % sparsity, default -> with context-aware scale",
            "7235 -> 39",
            "3rd",
        ),
        Figure("feature dimensions shared by weight and activation outliers", "100 %", "3rd"),
        Figure("positions shared by activation and attention outliers", "95 %", "3rd"),
        Figure(
            "largest activations of LLaMA2-7B, channels 1415 and 2533, first delimiter",
            "about 2500 and -1500",
            "code",
        ),
        Figure(
            "of five kinds of attention, those whose models grow outliers (ours: put more than "
            "half of a head's idle attention on the first token)",
            "3: softmax, fixed bias, additive bias",
            "3rd",
            measurement="variants_with_sink",
        ),
    ),
    extension_points=(
        "forward hooks on the layers of any transformers model, for the detectors",
        "forward hooks on attention modules and their output projections, for the scale",
        "attending.tap, for the attention that each key receives",
    ),
    symbols=(
        "attending.probes.outliers.find_outliers",
        "attending.probes.outlier_rules.activation_outliers",
        "attending.probes.outlier_rules.weight_outlier_ratios",
        "attending.probes.outlier_rules.attention_outliers",
        "attending.probes.quantization.quantization_probe",
        "attending.nn.context_scale.ContextScale",
        "attending.nn.context_scale.add_context_scale",
        "attending.nn.softmax_with_sink.softmax_with_sink",
        "attending.nn.biased_attention.attention_with_bias",
        "attending.nn.biased_attention.sigmoid_attention",
        "attending.nn.self_attention.SelfAttention",
    ),
    rule=RULE,
    status="built",
)

_SMALL = {
    "vocabulary": 32,
    "triggers": 3,
    "length": 64,
    "dim": 32,
    "heads": 1,
    "layers": 3,
    "batch": 16,
    "steps": 2500,
    "learning_rate": 3e-3,
    "test_sequences": 64,
    "looks": 10,
}


def settings(scale: Scale) -> dict[str, Any]:
    """What determines a run but its seed. `full` was never run."""
    return {
        "smoke": {**_SMALL, "length": 16, "steps": 10, "batch": 8, "test_sequences": 8, "looks": 2},
        "small": _SMALL,
        "full": {**_SMALL, "dim": 64, "layers": 4, "batch": 32, "steps": 30_000, "looks": 30},
    }[scale]


def reproduce(scale: Scale, seed: int, out_dir: Path) -> Reproduction:
    """Train a model for each kind of attention on bigram-backcopy, and look for outliers.

    Most positions of that task ask for no update; see
    `attending.papers._systematic_outliers_experiment`.
    """
    from attending.papers._systematic_outliers_experiment import run

    settings_here = settings(scale)
    found = run(VARIANTS, seed, **settings_here)
    numbers: dict[str, float] = {
        "variants_with_sink": sum(one.first_token > SINK for one in found.values())
    }
    series = []
    for variant, one in found.items():
        name = variant.replace("_", " ")
        for measured in ("first_token", "ratio", "kurtosis", "excess", "gap_w8", "gap_w8a8"):
            numbers[f"{measured}_{variant}"] = getattr(one, measured)
        steps, first, ratio = zip(*one.curve, strict=True)
        series += [
            Series(name, steps, first, "attention to the first token", "step", "share"),
            Series(name, steps, ratio, "residual stream, largest over median", "step", "ratio"),
        ]
    return Reproduction(
        slug=PAPER.slug,
        scale=scale,
        seed=seed,
        measurements=numbers,
        series=tuple(series),
        settings=settings_here,
    )
