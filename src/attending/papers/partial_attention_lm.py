"""The record of PALM: a path of attention that sees the source only."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attending.papers._record import Figure, Paper, Rule, Scale, Verdict
from attending.papers._reproduction import Reproduction, Series

FALLEN = 0.8  # of the mass at the first quarter of the steps


def _judge(ours: Mapping[str, Sequence[float]]) -> Verdict:
    def gains(what: str) -> list[float]:
        pairs = zip(ours[f"{what}_palm"], ours[f"{what}_lm"], strict=True)
        return [palm - lm for palm, lm in pairs]

    falls = all(ratio <= FALLEN for ratio in ours["late_over_early_mass_lm"])
    accuracy, influence = gains("late_accuracy"), gains("late_over_early_sensitivity")
    if falls and all(gain > 0 for gain in (*accuracy, *influence)):
        return "held"
    in_direction = falls and sum(accuracy) > 0 and sum(influence) > 0
    return "held in direction" if in_direction else "did not hold"


RULE = Rule(
    words=(
        "On looking words up in a source for longer than in training, where late and early are the "
        "last and the first quarter of the target's steps. Falls: in every seed the mass of the "
        "causal language model's attention on the source is late at most 0.8 of what it is early. "
        "Level: the sensitivity of the final states to the source, late over early, is larger with "
        "the added path than in the causal language model of the same number of parameters. "
        "Improves: so is the late accuracy. Held if all three are so in every seed; held in "
        "direction if the mass falls in every seed and the other two are so in the mean over the "
        "seeds; did not hold otherwise. That the mass of the added path itself is 1 at every step "
        "is by construction and not judged; a prefix-LM is measured beside it."
    ),
    judge=_judge,
)

PAPER = Paper(
    slug="partial-attention-lm",
    title=(
        "Decoder-Only or Encoder-Decoder? Interpreting Language Model as a Regularized "
        "Encoder-Decoder"
    ),
    arxiv="2304.04052",
    date="2023-04-08",
    venue=None,
    purpose=(
        "For translation, summaries or answers over documents with decoder-only models, where "
        "attention to the source fades as the answer grows. A second attention has only the source "
        "as keys, so its mass cannot be diluted. A curve of the mass on the source shows the "
        "fading in any model."
    ),
    claim=(
        "Attention to the source falls with each generated token in a decoder-only model and stays "
        "level in an encoder-decoder; the added path keeps it level and improves the output."
    ),
    figures=(
        Figure(
            "against a decoder-only model, translation, summaries, data to text (ours: late "
            "accuracy of looking words up, with the path minus without)",
            "better throughout; no table at hand",
            "paper",
            measurement="late_accuracy_gain",
        ),
        Figure("against an encoder-decoder with more parameters", "close or better", "paper"),
        Figure(
            "attention to the source over generated tokens, decoder-only / with the path (ours: "
            "mass of the decoder-only model's self-attention, late over early)",
            "falls / stays level",
            "paper",
            measurement="late_over_early_mass_lm",
        ),
        Figure(
            "sensitivity to the source, late over early, with the path (ours; see the other "
            "measurements for the decoder-only model)",
            "stays level",
            "3rd",
            measurement="late_over_early_sensitivity_palm",
        ),
    ),
    extension_points=(
        "forward hooks on the decoder layers of transformers",
        "attention_mask and position_ids of any decoder, for the layout",
        "attending.tap, for the curve in any model",
    ),
    symbols=(
        "attending.nn.partial_attention.PartialAttention",
        "attending.nn.source_target_layout.source_target_layout",
        "attending.models.partial_attention_lm.PartialAttentionLM",
        "attending.models.regularized_encoder_decoder.RegularizedEncoderDecoder",
        "attending.conversion.partial_attention.add_partial_attention",
        "attending.probes.source_attention.source_attention_curve",
        "attending.probes.source_attention.source_sensitivity",
    ),
    rule=RULE,
    status="built",
)

_SMALL = {
    "source": 16,
    "target": 24,
    "long_target": 96,
    "dim": 48,
    "depth": 2,
    "heads": 2,
    "rows": 32,
    "steps": 300,
    "rate": 3e-3,
    "measure_every": 25,
    "test_rows": 128,
    "sensitive_rows": 8,
}


def settings(scale: Scale) -> dict[str, Any]:
    """What determines a run but its seed. `full` was never run."""
    tiny = {"long_target": 32, "steps": 3, "test_rows": 4, "sensitive_rows": 1}
    return {
        "smoke": {**_SMALL, **tiny},
        "small": _SMALL,
        "full": {**_SMALL, "source": 64, "target": 128, "long_target": 512, "dim": 256, "depth": 6},
    }[scale]


def reproduce(scale: Scale, seed: int, out_dir: Path) -> Reproduction:
    """Train a causal LM, a prefix-LM and PALM to look words up in a source.

    See `attending.papers._partial_attention_lm_translation`.
    """
    from attending.papers._partial_attention_lm_translation import KINDS, run

    settings_here = settings(scale)
    quarter = settings_here["long_target"] // 4
    numbers: dict[str, float] = {}
    series = []
    for kind in KINDS:
        found = run(kind, seed, settings_here)
        steps = range(1, settings_here["long_target"] + 1)
        for name in ("accuracy", "mass", "ratio", "sensitivity"):
            curve = getattr(found, name)
            early, late = float(curve[:quarter].mean()), float(curve[-quarter:].mean())
            numbers[f"early_{name}_{kind}"], numbers[f"late_{name}_{kind}"] = early, late
            numbers[f"late_over_early_{name}_{kind}"] = late / early if early else float("nan")
            series.append(Series(kind, steps, curve.tolist(), _PANELS[name], "step", ""))
        numbers[f"parameters_{kind}"] = found.parameters
        numbers[f"loss_{kind}"] = found.curve[-1][1]
    numbers["late_accuracy_gain"] = numbers["late_accuracy_palm"] - numbers["late_accuracy_lm"]
    return Reproduction(
        slug=PAPER.slug,
        scale=scale,
        seed=seed,
        measurements=numbers,
        series=tuple(series),
        settings=settings_here,
    )


_PANELS = {
    "accuracy": "accuracy",
    "mass": "mass of self-attention on the source",
    "ratio": "mass over that of even attention",
    "sensitivity": "sensitivity to the source",
}
