"""The record of VAR: attention moved from sinks to the image."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attending.papers._record import Figure, Paper, Rule, Scale, Verdict
from attending.papers._reproduction import Reproduction, Series

DESTROYED = 0.6  # accuracy; guessing has a half


def _judge(ours: Mapping[str, Sequence[float]]) -> Verdict:
    if not all(found == 1 for found in ours["papers_tau"]):
        return "out of reach here"

    def gains(name: str, better: str, worse: str) -> list[float]:
        pairs = zip(ours[f"{name}_{better}"], ours[f"{name}_{worse}"], strict=True)
        return [ours_better - ours_worse for ours_better, ours_worse in pairs]

    answers = gains("pope", "redistributed", "plain")
    captions = gains("chair_i", "plain", "redistributed")
    if (
        all(gain > 0 for gain in answers)
        and all(gain >= 0 for gain in captions)
        and sum(gains("pope", "redistributed", "random")) > 0
        and all(accuracy <= DESTROYED for accuracy in ours["pope_all_heads"])
    ):
        return "held"
    in_direction = (
        sum(answers) > 0
        and sum(captions) >= 0
        and sum(gains("pope", "redistributed", "all_heads")) > 0
    )
    return "held in direction" if in_direction else "did not hold"


RULE = Rule(
    words=(
        "Out of reach here if in some seed no image token of the calibration scenes is a sink at "
        "the paper's threshold, scaled by the width of the model. Otherwise, with the accuracy of "
        "POPE (mean of random, popular and adversarial) and CHAIR per mention: held if in every "
        "seed redistribution raises the accuracy and does not raise CHAIR, is on average more "
        "accurate than with as many random image tokens as sinks, and in all heads brings the "
        "accuracy down to 0.6 or less (guessing has 0.5). Held in direction if on average over "
        "the seeds it raises the accuracy, does not raise CHAIR, and is more accurate than in all "
        "heads. Did not hold otherwise. The accuracies with sinks planted in the model are "
        "measured beside it and are not part of the rule."
    ),
    judge=_judge,
)

PAPER = Paper(
    slug="visual-attention-redistribution",
    title="See What You Are Told: Visual Attention Sink in Large Multimodal Models",
    arxiv="2503.03321",
    date="2025-03-05",
    venue="ICLR 2025",
    purpose=(
        "For vision-language models that should look closer, without training and without more "
        "passes. Some image tokens draw attention whatever the text says; they are known by huge "
        "activations in a few channels of the language model. In heads that look at the image, a "
        "part of the attention on such sinks goes to the other image tokens."
    ),
    claim=(
        "Redistributing attention from sinks to image tokens, in heads that look at the image, "
        "improves answers and reduces hallucination; doing it in all heads destroys the model."
    ),
    figures=(
        Figure(
            "score gained (ours: accuracy of POPE on llava-shapes, a share; the paper's: VizWiz, "
            "LLaVA-1.5-7B, points)",
            "50.0 -> 53.7",
            "3rd",
            measurement="pope_gain",
        ),
        Figure("GQA, LLaVA-1.5-7B, base -> redistributed", "62.0 -> 63.5", "3rd"),
        Figure("MM-Vet, same", "31.1 -> 33.7", "3rd"),
        Figure("VQAv2, same", "78.5 -> 78.6", "3rd"),
        Figure(
            "redistribution in all heads (ours: accuracy of POPE; the paper's: score)",
            "collapses to 0",
            "3rd",
            measurement="pope_all_heads",
        ),
    ),
    extension_points=(
        "attending.tap with a handler, around scaled_dot_product_attention",
        "a forward pre-hook on decoder layers, to find the sinks",
    ),
    symbols=(
        "attending.interventions.visual_attention_redistribution.VisualAttentionRedistribution",
        "attending.interventions.visual_attention_redistribution.select_image_centric_heads",
        "attending.interventions.visual_attention_redistribution.redistribute_attention",
        "attending.interventions.sink_dimensions.find_sink_dimensions",
        "attending.interventions.sink_dimensions.sink_value",
        "attending.interventions.sink_dimensions.KNOWN_SINK_DIMENSIONS",
    ),
    rule=RULE,
    status="built",
)


def settings(scale: Scale) -> dict[str, Any]:
    """What determines a run but its seed. `full` was never run."""
    return {
        "smoke": {"scenes": 2, "per_scene": 1, "captions": 2, "calibration": 2},
        "small": {"scenes": 40, "per_scene": 3, "captions": 40, "calibration": 16},
        "full": {"scenes": 500, "per_scene": 3, "captions": 500, "calibration": 100},
    }[scale]


def reproduce(scale: Scale, seed: int, out_dir: Path) -> Reproduction:
    """Ask llava-shapes about faint scenes, with attention moved and without; let it describe them.

    See `attending.papers._visual_attention_redistribution_shapes`.
    """
    from attending import zoo
    from attending.papers._visual_attention_redistribution_shapes import ARMS, run

    settings_here = settings(scale)
    numbers = run(zoo.load("llava-shapes"), seed, **settings_here)
    numbers["pope_gain"] = numbers["pope_redistributed"] - numbers["pope_plain"]
    names = ", ".join(arm.replace("_", " ") for arm in ARMS)
    places = list(range(len(ARMS)))
    return Reproduction(
        slug=PAPER.slug,
        scale=scale,
        seed=seed,
        measurements=numbers,
        series=tuple(
            Series(label, places, [numbers[f"{name}_{arm}"] for arm in ARMS], panel, names, axis)
            for label, name, panel, axis in (
                ("random", "pope_random", "POPE", "accuracy"),
                ("popular", "pope_popular", "POPE", "accuracy"),
                ("adversarial", "pope_adversarial", "POPE", "accuracy"),
                ("adversarial, sinks planted", "planted", "POPE", "accuracy"),
                ("CHAIR i", "chair_i", "captions", "share"),
                ("CHAIR s", "chair_s", "captions", "share"),
                ("recall", "recall", "captions", "share"),
            )
        ),
        settings=settings_here,
    )


def plot(reproductions: Sequence[Reproduction], figure: Any) -> None:
    """A point for each seed, a line at their mean: questions on the left, captions on the right."""
    arms = ("plain", "redistributed", "random", "all_heads")
    left, right = figure.subplots(1, 2)
    panels = (
        (left, "accuracy", {"pope": "POPE", "planted": "adversarial, sinks planted"}),
        (right, "share", {"chair_i": "CHAIR i", "chair_s": "CHAIR s", "recall": "recall"}),
    )
    for axes, label, names in panels:
        for shift, (name, words) in enumerate(names.items()):
            color = f"C{shift}"
            found = [[one.measurements[f"{name}_{arm}"] for one in reproductions] for arm in arms]
            places = [place + 0.1 * shift for place in range(len(arms))]
            means = [sum(values) / len(values) for values in found]
            axes.plot(places, means, color=color, label=words, marker="_", markersize=14)
            for place, values in zip(places, found, strict=True):
                axes.plot([place] * len(values), values, ".", color=color)
        axes.set_xticks(range(len(arms)), [arm.replace("_", " ") for arm in arms])
        axes.set_ylabel(label)
        axes.legend(fontsize="small", loc="center right")
