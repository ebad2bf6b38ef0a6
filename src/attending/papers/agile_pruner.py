"""The record of AgilePruner: choosing visual tokens by attention and by diversity."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attending.papers._record import Figure, Paper, Rule, Scale, Verdict
from attending.papers._reproduction import Reproduction, Series

RIVALS = ("fastervlm", "divprune")


def _judge(ours: Mapping[str, Sequence[float]]) -> Verdict:
    def both(selector: str) -> list[float]:
        pairs = zip(ours[f"simple_{selector}"], ours[f"complex_{selector}"], strict=True)
        return [(simple + rich) / 2 for simple, rich in pairs]

    agile = both("agile")
    ranks = zip(ours["erank_complex"], ours["erank_simple"], strict=True)
    if not all(rich > simple for rich, simple in ranks):
        return "did not hold"
    if all(a > b for rival in RIVALS for a, b in zip(agile, both(rival), strict=True)):
        return "held"
    if all(sum(agile) > sum(both(rival)) for rival in RIVALS):
        return "held in direction"
    return "did not hold"


RULE = Rule(
    words=(
        "llava-shapes answers yes/no questions about simple and complex scenes with 8, 16 and 32 "
        "of 64 image tokens; a selector's accuracy is the mean over these counts and both kinds of "
        "scenes. Held if in every seed AgilePruner, its mean effective rank calibrated on other "
        "scenes, is more accurate than attention alone (FasterVLM) and than diversity alone "
        "(DivPrune). Held in direction if it is in the mean over the seeds. Did not hold "
        "otherwise, or if complex scenes do not have the higher effective rank in every seed, "
        "which the rule adapts to. The other selectors, a random choice, where attention and where "
        "diversity does better, hallucination in lists of objects, and the effective rank of what "
        "is kept are measured beside it and are not part of the rule."
    ),
    judge=_judge,
)

PAPER = Paper(
    slug="agile-pruner",
    title=(
        "AgilePruner: An Empirical Study of Attention and Diversity for Adaptive Visual Token "
        "Pruning in LVLMs"
    ),
    arxiv="2603.01236",
    date="2026-03-01",
    venue="ICLR 2026",
    purpose=(
        "For vision-language models that spend most of their time on image tokens. It keeps T of N "
        "tokens between the projector and the language model, without training: tokens are taken "
        "in the order of their attention, and each removes those too like it. How alike is too "
        "alike follows from the effective rank of the image, so simple images are pruned by "
        "attention and complex ones by diversity."
    ),
    claim=(
        "A threshold that adapts to each image's effective rank keeps more of the model's accuracy "
        "at the same number of tokens than pruning by attention alone or by diversity alone."
    ),
    figures=(
        Figure(
            "mean over 9 tasks at 64 of 576 tokens, LLaVA-1.5-7B, % of the full model (ours, here "
            "and below: share of the full model's accuracy on yes/no questions about shapes, mean "
            "over 8, 16 and 32 of 64 tokens)",
            "96.76",
            "paper",
            measurement="relative_agile",
        ),
        Figure("same, DivPrune", "95.02", "paper", measurement="relative_divprune"),
        Figure("same, VisPruner", "95.07", "paper", measurement="relative_vispruner"),
        Figure(
            "same, VisionZip (ours: merged tokens are numbered anew, which llava-shapes is not "
            "used to)",
            "94.46",
            "paper",
            measurement="relative_visionzip",
        ),
        Figure(
            "same, FastV (ours: more tokens, as the first two of five layers get all)",
            "76.86",
            "paper",
            measurement="relative_fastv",
        ),
        Figure(
            "same, attention alone (FasterVLM; the paper's tables give single tasks)",
            "-",
            "inferred",
            measurement="relative_fastervlm",
        ),
        Figure(
            "same, random tokens (not in the paper)",
            "-",
            "inferred",
            measurement="relative_random",
        ),
        Figure("same at 32 tokens, AgilePruner / DivPrune", "94.02 / 92.16", "paper"),
        Figure(
            "hallucination CHAIR C_S at 64 tokens, FasterVLM, % (ours: lists of objects in complex "
            "scenes, 16 tokens, a share)",
            "45.4",
            "paper",
            measurement="chair_s_complex_fastervlm",
        ),
        Figure("same, DivPrune", "57.4", "paper", measurement="chair_s_complex_divprune"),
        Figure("same, AgilePruner", "52.2", "paper", measurement="chair_s_complex_agile"),
        Figure(
            "recall of objects, FasterVLM, %",
            "69.3",
            "paper",
            measurement="recall_complex_fastervlm",
        ),
        Figure("same, DivPrune", "76.4", "paper", measurement="recall_complex_divprune"),
        Figure("same, AgilePruner", "75.7", "paper", measurement="recall_complex_agile"),
        Figure(
            "mean effective rank of images, LLaVA-1.5-7B (ours: both kinds of scenes)",
            "90",
            "code",
            measurement="erank_avg",
        ),
        Figure(
            "mean effective rank of 64 kept tokens, DivPrune (ours: 16 kept, complex scenes)",
            "21.84",
            "3rd",
            measurement="erank_kept_complex_divprune",
        ),
        Figure("same, VisPruner", "14.35", "3rd", measurement="erank_kept_complex_vispruner"),
        Figure("same, AgilePruner", "20.3", "3rd", measurement="erank_kept_complex_agile"),
        Figure(
            "latency per sample at 64 tokens, full -> pruned, ms on an RTX 4090",
            "172 -> 115",
            "3rd",
        ),
    ),
    extension_points=("between get_image_features and the language model of a transformers LLaVA",),
    symbols=(
        "attending.sparse.visual_tokens.select_tokens",
        "attending.sparse.visual_tokens.agile",
        "attending.sparse.visual_tokens.adaptive_threshold",
        "attending.sparse.visual_tokens.div_prune",
        "attending.sparse.visual_tokens.vis_pruner",
        "attending.sparse.merged_tokens.vision_zip",
        "attending.sparse.merged_tokens.pru_merge",
        "attending.sparse.language_tokens.attention_from",
        "attending.sparse.language_tokens.recycle",
        "attending.interventions.visual_token_pruning.VisualTokenPruning",
        "attending.interventions.visual_token_pruning.prune_visual_tokens",
        "attending.probes.visual_tokens.visual_tokens",
        "attending.probes.visual_tokens.attention_entropy",
    ),
    rule=RULE,
    status="built",
)

_SMALL: dict[str, Any] = {
    "scenes": 24,
    "captions": 24,
    "calibration": 48,
    "keeps": [8, 16, 32],
    "captioned_keep": 16,
}


def settings(scale: Scale) -> dict[str, Any]:
    """What determines a run but its seed. `full` was never run."""
    return {
        "smoke": _SMALL | {"scenes": 2, "captions": 2, "calibration": 2, "keeps": [16]},
        "small": _SMALL,
        "full": _SMALL | {"scenes": 1000, "captions": 500, "keeps": [2, 4, 8, 16, 24, 32, 48]},
    }[scale]


def reproduce(scale: Scale, seed: int, out_dir: Path) -> Reproduction:
    """Ask llava-shapes about scenes of which it sees few tokens.

    See `attending.papers._agile_pruner_shapes`.
    """
    from attending import zoo
    from attending.papers._agile_pruner_shapes import GROUPS, SELECTORS, run

    settings_here = settings(scale)
    numbers = run(zoo.load("llava-shapes"), seed, **settings_here)
    keeps = settings_here["keeps"]
    series = tuple(
        Series(
            selector,
            [numbers[f"kept_{selector}_{keep}"] for keep in keeps],
            [numbers[f"{group}_{selector}_{keep}"] for keep in keeps],
            f"{group} scenes",
            "image tokens, mean over layers",
            "accuracy",
        )
        for group in GROUPS
        for selector in SELECTORS
    )
    return Reproduction(
        slug=PAPER.slug,
        scale=scale,
        seed=seed,
        measurements=numbers,
        series=series,
        settings=settings_here,
    )


_COLOURS = {"agile": "C3", "fastervlm": "C0", "divprune": "C2", "vispruner": "C4", "random": "C7"}


def plot(reproductions: Sequence[Reproduction], figure: Any) -> None:
    """Accuracy against the tokens that a layer gets, mean over the seeds, by kind of scene."""
    runs = [one.measurements for one in reproductions]

    def mean(name: str) -> float:
        return sum(run[name] for run in runs) / len(runs)

    names = dict.fromkeys(one.name for run in reproductions for one in run.series)
    keeps = reproductions[0].settings["keeps"]
    grid = figure.subplots(1, 2, sharey=True)
    for group, axes in zip(("simple", "complex"), grid, strict=True):
        for place, selector in enumerate(names):
            kept = [mean(f"kept_{selector}_{keep}") for keep in keeps]
            found = [mean(f"{group}_{selector}_{keep}") for keep in keeps]
            strong = selector in _COLOURS
            axes.plot(
                kept,
                found,
                color=_COLOURS.get(selector, f"C{place % 10}"),
                linestyle="-" if strong else ":",
                linewidth=2 if strong else 1,
                marker="o",
                markersize=4 if strong else 2,
                label=selector if group == "simple" else None,
            )
        axes.axhline(mean(f"{group}_full"), color="black", linewidth=1, linestyle="--")
        axes.set_title(f"{group} scenes; dashed: all 64 tokens", fontsize=9)
        axes.set_xlabel("image tokens, mean over layers")
        axes.grid(alpha=0.3)
    grid[0].set_ylabel("accuracy, yes/no")
    figure.legend(loc="outside right upper", fontsize=7)
