"""The record of ACT: damping attention sinks that are not the first token's."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attending.papers._record import Figure, Paper, Rule, Scale, Verdict
from attending.papers._reproduction import Reproduction, Series

VARIANTS = ("none", "all", "selected", "random")
LEAST_GAIN = 0.01  # of the share of right answers, mean over seeds


def _judge(ours: Mapping[str, Sequence[float]]) -> Verdict:
    rows = {name: ours[f"test_accuracy_{name}"] for name in VARIANTS}
    gains = [a - b for a, b in zip(rows["selected"], rows["none"], strict=True)]
    over_random = [a - b for a, b in zip(rows["selected"], rows["random"], strict=True)]
    mean = sum(gains) / len(gains)
    if all(gain >= 0 for gain in gains) and mean >= LEAST_GAIN and sum(over_random) > 0:
        return "held"
    return "held in direction" if mean > 0 else "did not hold"


RULE = Rule(
    words=(
        "On questions of files that were not used for the choice of heads: held if calibrating the "
        "selected heads never lowers the share of right answers in any seed, raises it by at least "
        "1 point in the mean over seeds, and by more than as many random heads do; held in "
        "direction if it raises the mean over seeds at all; did not hold otherwise. If no head "
        "helps on the calibration half, none is calibrated, and the gain is 0."
    ),
    judge=_judge,
)

PAPER = Paper(
    slug="attention-calibration-act",
    title=(
        "Unveiling and Harnessing Hidden Attention Sinks (Attention Calibration Technique, ACT)"
    ),
    arxiv="2406.15765",
    date="2024-06",
    venue="ICML 2024",
    purpose=(
        "For a frozen language model that should do better on classification and multiple choice "
        "without training. In a set of heads chosen beforehand, keys that draw too much attention, "
        "except the first sink, keep a part of it, and the rest goes to the other keys of the row. "
        "The same edit moves mass off any columns."
    ),
    claim=(
        "Calibrating sinks beyond the first token, in the right heads and at inference only, "
        "raises accuracy."
    ),
    figures=(
        Figure(
            "Llama-30B, mean accuracy over data sets, gain in points (ours: llama-stdlib, a cloze "
            "of eight choices, selected heads on other files)",
            "up to +7.30 %",
            "paper",
            measurement="gain_selected",
        ),
        Figure(
            "LLaMA-2-7B-chat, heads that are calibrated for multiple choice, of 928 (ours: of 30)",
            "74",
            "ran",
            measurement="selected_heads",
        ),
        Figure("Hellaswag, one model", "up to +13.26 %", "3rd"),
        Figure("MMLU", "up to +7.3 %", "3rd"),
    ),
    extension_points=(
        "attending.tap with a handler, around scaled_dot_product_attention",
        "transformers.AttentionInterface",
    ),
    symbols=(
        "attending.interventions.attention_calibration.AttentionCalibration",
        "attending.interventions.attention_calibration.calibrate_attention",
        "attending.interventions.head_selection.select_heads",
        "attending.interventions.prompt_sinks.SinkRule",
        "attending.interventions.edit.edit_masses",
        "attending.core.groups.group_states",
    ),
    rule=RULE,
    status="built",
)

_SMALL: dict[str, Any] = {
    "calibration": 120,
    "test": 240,
    "context": 64,
    "answer": 4,
    "passages": 48,
    "random_draws": 3,
    "layers": None,
}


def settings(scale: Scale) -> dict[str, Any]:
    """What determines a run but its seed. `full` was never run."""
    return {
        "smoke": {
            **_SMALL,
            "calibration": 3,
            "test": 3,
            "context": 32,
            "passages": 1,
            "random_draws": 1,
            "layers": (3,),
        },
        "small": _SMALL,
        "full": {**_SMALL, "calibration": 900, "test": 2000, "passages": 400, "random_draws": 10},
    }[scale]


def reproduce(scale: Scale, seed: int, out_dir: Path) -> Reproduction:
    """Choose heads of llama-stdlib on a cloze, and test them on other files.

    See `attending.papers._attention_calibration_act_experiment`.
    """
    from attending.papers._attention_calibration_act_experiment import run

    settings_here = settings(scale)
    found = run(seed, **settings_here)
    numbers: dict[str, float] = {"selected_heads": float(found.heads)}
    for name in VARIANTS:
        numbers[f"test_accuracy_{name}"] = found.accuracy[name]
        numbers[f"calibration_accuracy_{name}"] = found.calibration_accuracy[name]
        numbers[f"answer_log_probability_{name}"] = found.likelihood[name]
        numbers[f"nats_per_token_{name}"] = found.nats[name]
    for name in VARIANTS[1:]:
        numbers[f"gain_{name}"] = 100 * (found.accuracy[name] - found.accuracy["none"])
    alone = sorted(
        100 * (score - found.scores.baseline)
        for scores in found.scores.scores.values()
        for score in scores
    )
    places = tuple(range(len(VARIANTS)))
    return Reproduction(
        slug=PAPER.slug,
        scale=scale,
        seed=seed,
        measurements=numbers,
        series=(
            Series(
                "one head calibrated",
                tuple(range(len(alone))),
                alone,
                panel="accuracy on the calibration half",
                x_label="head, by its gain",
                y_label="points gained",
            ),
            *(
                Series(
                    half,
                    places,
                    tuple(100 * shares[name] for name in VARIANTS),
                    panel="heads calibrated: 0 none, 1 all, 2 selected, 3 random",
                    x_label="which heads",
                    y_label="right answers, %",
                )
                for half, shares in (
                    ("calibration half", found.calibration_accuracy),
                    ("test half", found.accuracy),
                )
            ),
        ),
        settings=settings_here,
    )
