"""The record of Combiner: every position at sparse cost, through summaries of regions."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attending.papers._record import Figure, Paper, Rule, Scale, Verdict
from attending.papers._reproduction import Reproduction, Series

LAYOUTS = ("fixed", "logsparse", "axial")
VARIANTS = ("softmax", *(name for layout in LAYOUTS for name in (layout, f"combiner_{layout}")))


def _judge(ours: Mapping[str, Sequence[float]]) -> Verdict:
    gaps = {
        layout: [
            sparse - full
            for sparse, full in zip(
                ours[f"bits_{layout}"], ours[f"bits_combiner_{layout}"], strict=True
            )
        ]
        for layout in LAYOUTS
    }
    if all(gap > 0 for found in gaps.values() for gap in found):
        return "held"
    return "held in direction" if all(sum(found) > 0 for found in gaps.values()) else "did not hold"


RULE = Rule(
    words=(
        "Bits per pixel on new images. Held if in every seed each of the three layouts (fixed, "
        "logsparse, axial) has fewer bits with summaries than without; held in direction if that "
        "is so of the mean over the seeds for each layout; did not hold otherwise."
    ),
    judge=_judge,
)

PAPER = Paper(
    slug="combiner",
    title="Combiner: Full Attention Transformer with Sparse Computation Cost",
    arxiv="2107.05768",
    date="2021-07",
    venue="NeurIPS 2021",
    purpose=(
        "For training a transformer on long sequences at less than quadratic cost while every head "
        "can still reach every position. A query attends directly to some keys, and to the others "
        "through one summary for each region, as a conditional expectation. Several layouts of "
        "regions exist: fixed, logarithmic, axial. It is made for training from scratch."
    ),
    claim=(
        "With the same sparse layout, adding the regions through their summaries improves on plain "
        "sparse attention, at the same order of cost."
    ),
    figures=(
        Figure(
            "CIFAR-10 bits per dimension, 6 layers, Axial -> Combiner-Axial",
            "3.666 -> 3.050",
            "paper",
        ),
        Figure("same, Logsparse -> Combiner-Logsparse", "4.253 -> 3.366", "paper"),
        Figure("same, Fixed -> Combiner-Fixed", "3.408 -> 3.321", "paper"),
        Figure(
            "Wiki-40B perplexity at 2k tokens, Transformer / Combiner-Axial",
            "17.26 / 17.56",
            "paper",
        ),
        Figure("Long Range Arena mean, Transformer / Combiner-Fixed", "57.87 / 58.34", "paper"),
        Figure(
            "of three sparse layouts, those that summaries improve (ours: digits, bits per pixel)",
            "3",
            "paper",
            measurement="layouts_improved",
        ),
    ),
    extension_points=(
        "transformers.AttentionInterface, for models with a fixed length",
        "an attention module to train with",
    ),
    symbols=(
        "attending.nn.combiner.combiner_attention",
        "attending.nn.combiner.combiner_map",
        "attending.nn.combiner.CombinerAttention",
        "attending.nn.combiner_plans.FixedPlan",
        "attending.nn.partition_tree.PartitionTree",
    ),
    rule=RULE,
    status="built",
)

_SMALL = {
    "dim": 64,
    "heads": 4,
    "layers": 2,
    "batch": 32,
    "steps": 200,
    "learning_rate": 3e-3,
    "test_images": 300,
    "looks": 5,
}


def settings(scale: Scale) -> dict[str, Any]:
    """What determines a run but its seed. `full` was never run."""
    return {
        "smoke": {**_SMALL, "dim": 16, "steps": 6, "batch": 8, "test_images": 16, "looks": 2},
        "small": _SMALL,
        "full": {**_SMALL, "dim": 256, "layers": 6, "batch": 128, "steps": 10_000, "looks": 20},
    }[scale]


def reproduce(scale: Scale, seed: int, out_dir: Path) -> Reproduction:
    """Model digits pixel by pixel with three sparse layouts, with and without summaries.

    See `attending.papers._combiner_experiment`.
    """
    from attending.papers._combiner_experiment import run

    settings_here = settings(scale)
    found = run(VARIANTS, seed, **settings_here)
    numbers: dict[str, float] = {
        "layouts_improved": sum(
            found[f"combiner_{layout}"].bits < found[layout].bits for layout in LAYOUTS
        )
    }
    series = []
    for variant, one in found.items():
        numbers[f"bits_{variant}"] = one.bits
        steps, bits = zip(*one.curve, strict=True)
        series.append(
            Series(variant.replace("_", " "), steps, bits, "digits", "step", "bits per pixel")
        )
    return Reproduction(
        slug=PAPER.slug,
        scale=scale,
        seed=seed,
        measurements=numbers,
        series=tuple(series),
        settings=settings_here,
    )
