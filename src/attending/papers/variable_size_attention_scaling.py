"""The record of entropy-aware scaling: attention at another size than in training."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from attending.papers._record import Figure, Paper, Rule, Scale, Verdict
from attending.papers._reproduction import Reproduction, Series

KINDS = ("none", "normalized", "log", "constant")
STEADY = 0.5  # of the drift without scaling


def _judge(ours: Mapping[str, Sequence[float]]) -> Verdict:
    def gains(better: str, worse: str) -> list[float]:
        return [a - b for a, b in zip(ours[better], ours[worse], strict=True)]

    drifts = zip(ours["drift_normalized"], ours["drift_none"], strict=True)
    steady = all(scaled <= STEADY * plain for scaled, plain in drifts)
    images = gains("accuracy_off_size_normalized", "accuracy_off_size_none")
    text = gains("nats_beyond_none", "nats_beyond_normalized")
    if steady and all(gain > 0 for gain in (*images, *text)):
        return "held"
    return "held in direction" if steady and sum(images) > 0 and sum(text) > 0 else "did not hold"


RULE = Rule(
    words=(
        "Entropy: in every seed the normalised entropy of the vision transformer, mean over its "
        "layers, drifts over the sizes at most half as much with the paper's scaling as without. "
        "Quality: the accuracy at sizes other than that of training, mean over the sizes, is "
        "higher with scaling than without, and the nats per token that llama-stdlib needs beyond "
        "the length of training are fewer. Held if the entropy is so and the quality in every "
        "seed; held in direction if the entropy is so and both qualities are in the mean over the "
        "seeds; did not hold otherwise. The other kinds of scaling are measured beside it."
    ),
    judge=_judge,
)

PAPER = Paper(
    slug="variable-size-attention-scaling",
    title=("Training-free Diffusion Model Adaptation for Variable-Sized Text-to-Image Synthesis"),
    arxiv="2306.08645",
    date="2023-06-14",
    venue="NeurIPS 2023",
    purpose=(
        "For sampling a text-to-image model at another size or shape than it was trained for. With "
        "fewer tokens attention's entropy falls and objects are cut off, with more it rises and "
        "they repeat. One number, the scale of the scores, is changed so that entropy stays as in "
        "training. It fits wherever the number of keys has changed."
    ),
    claim=(
        "Scaling the scores by the root of the ratio of log token numbers, now to training, keeps "
        "normalised entropy as in training and improves images at sizes above and below it."
    ),
    figures=(
        Figure(
            "FID and CLIP at sizes below and above training",
            "better at nearly all sizes; no table at hand",
            "recall",
        ),
        Figure(
            "FID at 4 times the pixels, without -> with, measured by others",
            "29.89 -> 29.95",
            "3rd",
        ),
        Figure("time", "1x", "3rd"),
        Figure(
            "drift of normalised entropy over the sizes, with scaling over without (ours: a vision "
            "transformer on digits)",
            "constant in theory",
            "recall",
            measurement="drift_ratio",
        ),
        Figure(
            "accuracy at other sizes, with scaling minus without (ours: digits, of 8 x 8 in "
            "training)",
            "none: the paper has images, judged by FID",
            "inferred",
            measurement="accuracy_gain",
        ),
        Figure(
            "nats per token beyond the length of training, without scaling minus with (ours: "
            "llama-stdlib)",
            "none: the paper has no language models",
            "inferred",
            measurement="nats_gain",
        ),
    ),
    extension_points=(
        "attending.tap with a handler, for transformers, diffusers and timm",
        "diffusers attention processors with base_sequence_length (Lumina)",
    ),
    symbols=(
        "attending.nn.logit_scale.logit_scale",
        "attending.nn.logit_scale.proportional_attention",
        "attending.interventions.logit_scaling.LogitScaling",
        "attending.probes.entropy_curve.entropy_curve",
    ),
    rule=RULE,
    status="built",
)

_SMALL = {
    "sides": [5, 6, 8, 12, 16],
    "dim": 32,
    "layers": 2,
    "heads": 2,
    "rows": 64,
    "steps": 900,
    "rate": 3e-3,
    "lengths": [512, 1024, 2048],
    "texts": 2,
}


def settings(scale: Scale) -> dict[str, Any]:
    """What determines a run but its seed. `full` was never run."""
    return {
        "smoke": {**_SMALL, "sides": [6, 8], "steps": 2, "lengths": [32, 64], "texts": 1},
        "small": _SMALL,
        "full": {**_SMALL, "dim": 128, "layers": 6, "heads": 4, "steps": 20_000, "texts": 10},
    }[scale]


def reproduce(scale: Scale, seed: int, out_dir: Path) -> Reproduction:
    """Show digits of other sizes to a vision transformer, and long files to a language model.

    See `attending.papers._variable_size_attention_scaling_images` and `..._text`.
    """
    from attending.papers import _variable_size_attention_scaling_images as images
    from attending.papers import _variable_size_attention_scaling_text as text

    settings_here = settings(scale)
    sides, lengths = settings_here["sides"], settings_here["lengths"]
    numbers: dict[str, float] = {}
    series = []
    for kind, seen in images.run(seed, KINDS, sides, settings_here).items():
        by_side = dict(zip(sides, seen.accuracy, strict=True))
        off = [value for side, value in by_side.items() if side != images.TRAINED]
        numbers[f"accuracy_off_size_{kind}"] = sum(off) / len(off)
        numbers |= {f"accuracy_{kind}_{side}": value for side, value in by_side.items()}
        numbers[f"drift_{kind}"] = float(seen.curve.drift.mean())
        numbers[f"slope_{kind}"] = float(seen.curve.slope.mean())
        keys = seen.curve.keys.mean(1).tolist()
        shares = seen.curve.normalized.mean(1).tolist()
        series.append(Series(kind, keys, shares, "digits: entropy / ln N", "keys", ""))
        series.append(Series(kind, keys, seen.accuracy, "digits: accuracy", "keys", ""))
    for kind, read in text.run(seed, KINDS, lengths, settings_here["texts"]).items():
        weights = [end - start for start, end in pairwise(lengths)]
        beyond = sum(w * nats for w, nats in zip(weights, read.nats[1:], strict=True))
        numbers[f"nats_beyond_{kind}"] = beyond / sum(weights)
        numbers[f"nats_within_{kind}"] = read.nats[0]
        numbers[f"text_drift_{kind}"] = float(read.curve.drift.mean())
        shares = read.curve.normalized.mean(1).tolist()
        series.append(Series(kind, lengths, shares, "text: entropy / ln N", "tokens", ""))
        series.append(Series(kind, lengths, read.nats, "text: nats per token", "tokens", ""))
    numbers["drift_ratio"] = numbers["drift_normalized"] / numbers["drift_none"]
    numbers["accuracy_gain"] = (
        numbers["accuracy_off_size_normalized"] - numbers["accuracy_off_size_none"]
    )
    numbers["nats_gain"] = numbers["nats_beyond_none"] - numbers["nats_beyond_normalized"]
    return Reproduction(
        slug=PAPER.slug,
        scale=scale,
        seed=seed,
        measurements=numbers,
        series=tuple(series),
        settings=settings_here,
    )
