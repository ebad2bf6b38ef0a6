"""The record of DAMRO: decoding against the image tokens that everything looks at."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attending.papers._record import Figure, Paper, Rule, Scale, Verdict
from attending.papers._reproduction import Reproduction, Series

LOST_RECALL = 0.05
CONTROLS = ("random", "cut")


def _judge(ours: Mapping[str, Sequence[float]]) -> Verdict:
    def gains(measure: str, other: str) -> list[float]:
        pairs = zip(ours[f"{measure}_damro"], ours[f"{measure}_{other}"], strict=True)
        return [damro - without for damro, without in pairs]

    f1, chair = gains("pope_f1", "sample"), gains("chair_i", "sample")
    in_every_seed = (
        all(gain > 0 for gain in f1)
        and all(gain < 0 for gain in chair)
        and all(gain >= -LOST_RECALL for gain in gains("recall", "sample"))
    )
    beats_controls = all(
        sum(gains("pope_f1", control)) > 0 and sum(gains("chair_i", control)) < 0
        for control in CONTROLS
    )
    if in_every_seed and beats_controls:
        return "held"
    return "held in direction" if sum(f1) > 0 and sum(chair) < 0 else "did not hold"


RULE = Rule(
    words=(
        "On llava-shapes, against plain sampling, the paper's baseline. Held if in every seed "
        "sampling with DAMRO has a higher F1 on POPE (its three kinds of questions together) and a "
        "lower CHAIR_i of captions, with a recall of objects that is at most 0.05 lower; and if, "
        "in the mean over the seeds, both are also better than with the same contrast against as "
        "many random image tokens, and than with adaptive plausibility alone (alpha = 0): else it "
        "is not the outliers that do it. Held in direction if the mean F1 is higher and the mean "
        "CHAIR_i lower than those of plain sampling. Did not hold otherwise. Greedy decoding, VCD "
        "and other numbers of tokens are measured beside it and are not part of the rule."
    ),
    judge=_judge,
)

PAPER = Paper(
    slug="damro",
    title="DAMRO: Dive into the Attention Mechanism of LVLM to Reduce Object Hallucination",
    arxiv="2410.04514",
    date="2024-10-06",
    venue="EMNLP 2024",
    purpose=(
        "For vision-language models that name objects which are not in the image. The image "
        "encoder's class token attends to a handful of background patches, and the language model "
        "inherits that. A second branch sees only these patches, and its logits are subtracted "
        "from those of the first. No training, one more forward pass."
    ),
    claim=(
        "Contrasting with the outlier tokens reduces object hallucination on LLaVA-1.5, LLaVA-NeXT "
        "and InstructBLIP."
    ),
    figures=(
        Figure(
            "POPE F1 with DAMRO minus that of plain sampling (ours: llava-shapes; the paper's: "
            "LLaVA-1.5-7B)",
            ".0424",
            "paper",
            measurement="f1_gain",
        ),
        Figure(
            "CHAIR_i of plain sampling minus that with DAMRO (ours: llava-shapes; the paper's: "
            "LLaVA-1.5-7B)",
            ".036",
            "paper",
            measurement="chair_i_gain",
        ),
        Figure("POPE accuracy, LLaVA-1.5-7B, base / VCD / DAMRO", "82.08 / 84.98 / 85.31", "paper"),
        Figure(
            "POPE accuracy, LLaVA-NeXT-7B, base / VCD / DAMRO", "84.57 / 87.50 / 87.87", "paper"
        ),
        Figure(
            "POPE accuracy, InstructBLIP-7B, base / VCD / DAMRO", "78.85 / 82.56 / 81.77", "paper"
        ),
        Figure("CHAIR C_S, LLaVA-1.5-7B, base / VCD / DAMRO", "12.4 / 7.6 / 6.0", "paper"),
        Figure("seconds with DAMRO / without, greedy, same length", "-", "inferred", "cost"),
    ),
    extension_points=(
        "transformers generate, through a LogitsProcessor with a second forward pass",
    ),
    symbols=(
        "attending.decoding.damro.DAMRO",
        "attending.decoding.damro.damro_generate",
        "attending.decoding.contrastive.contrastive_logits",
        "attending.decoding.contrastive.ContrastiveLogitsProcessor",
        "attending.probes.cls_attention.cls_attention",
        "attending.probes.cls_attention.outlier_tokens",
        "attending.probes.patch_watch.watch_patches",
    ),
    rule=RULE,
    status="built",
)

# k, alpha and beta are those of the official scripts for InstructBLIP on these two benchmarks; for
# LLaVA-1.5 they are not known. 4 of our 64 patches are a larger share than 4 of its 257. Scenes of
# 5 or 6 objects, as with fewer the model is seldom wrong.
_SMALL = {
    "pope_scenes": 18,
    "captions": 56,
    "min_objects": 5,
    "tokens": 64,
    "k": 4,
    "other_k": [1, 10],
    "alpha_pope": 0.5,
    "alpha_chair": 1.5,
    "beta": 0.1,
}


def settings(scale: Scale) -> dict[str, Any]:
    """What determines a run but its seed. `full` was never run."""
    return {
        "smoke": {**_SMALL, "pope_scenes": 1, "captions": 2, "tokens": 4, "other_k": []},
        "small": _SMALL,
        "full": {**_SMALL, "pope_scenes": 500, "captions": 500, "tokens": 96},
    }[scale]


def reproduce(scale: Scale, seed: int, out_dir: Path) -> Reproduction:
    """Let llava-shapes answer and describe, in all ways; see `attending.papers._damro_experiment`.

    Nothing is trained. The seed decides scenes, questions and sampling.
    """
    from attending.papers._damro_experiment import WAYS, measure
    from attending.zoo import load

    settings_here = settings(scale)
    numbers = measure(load("llava-shapes"), seed, **settings_here)
    numbers["f1_gain"] = numbers["pope_f1_damro"] - numbers["pope_f1_sample"]
    numbers["chair_i_gain"] = numbers["chair_i_sample"] - numbers["chair_i_damro"]
    places = range(len(WAYS))
    series = tuple(
        Series(
            name,
            places,
            [numbers[f"{measurement}_{way}"] for way in WAYS],
            panel,
            ", ".join(way.replace("_", " ") for way in WAYS),
            "share",
        )
        for name, measurement, panel in (
            ("F1", "pope_f1", "POPE"),
            ("accuracy", "pope_accuracy", "POPE"),
            ("CHAIR_i", "chair_i", "captions"),
            ("CHAIR_s", "chair_s", "captions"),
            ("recall", "recall", "captions"),
        )
    )
    return Reproduction(
        slug=PAPER.slug,
        scale=scale,
        seed=seed,
        measurements=numbers,
        series=series,
        settings=settings_here,
    )
