"""The record of SparseD: one sparse pattern for each head, reused over denoising steps."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attending.papers._record import Figure, Paper, Rule, Scale, Verdict
from attending.papers._reproduction import Reproduction, Series

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Picture

LOST_NATS = 0.02
LOST_RIGHT = 0.02
LEARNED = 0.9


def _judge(ours: Mapping[str, Sequence[float]]) -> Verdict:
    if not all(right >= LEARNED for right in ours["recall_right_dense"]):
        return "out of reach here"

    def gaps(one: str, other: str) -> list[float]:
        return [a - b for a, b in zip(ours[one], ours[other], strict=True)]

    recall_lost = gaps("recall_right_dense", "recall_right_sparsed")
    over_window = gaps("recall_right_sparsed", "recall_right_window")
    ratios = ours["attention_seconds_ratio"]
    if (
        all(gap <= LOST_NATS for gap in gaps("text_nats_sparsed", "text_nats_dense"))
        and all(gap < 0 for gap in gaps("text_kl_sparsed", "text_kl_window"))
        and all(lost <= LOST_RIGHT for lost in recall_lost)
        and all(gap > 0 for gap in over_window)
        and all(ratio < 1 for ratio in ratios)
    ):
        return "held"
    if (
        sum(recall_lost) <= LOST_RIGHT * len(recall_lost)
        and sum(over_window) > 0
        and sum(ratios) < len(ratios)
    ):
        return "held in direction"
    return "did not hold"


RULE = Rule(
    words=(
        "Against dense attention, and against a sliding window that keeps at least as many blocks, "
        "in the steps that are sparse, at the canvases that dense attention saw. Held if in every "
        "seed (1) on held-out source text mdlm-stdlib gives the real tokens at masked places at "
        "most 0.02 nats less with SparseD than dense, and its distributions there are nearer to "
        "dense ones (KL) than with the window; (2) where values have to be recalled from far back "
        "in a prompt, by a model that learned to, the share that is right is at most 0.02 below "
        "dense attention's and above the window's; and (3) the attention of the loop at 4096 "
        "tokens takes less processor time than dense, its choice of blocks included. Held in "
        "direction if (2) and (3) hold in the mean of the seeds. Did not hold otherwise. Out of "
        "reach if dense attention itself recalls less than 0.9. The isolated choice, the pattern "
        "of the first step, one ranking of all blocks and a window with a sink are measured beside "
        "it and are not part of the rule, nor is the time of mdlm-stdlib, whose 512 tokens are too "
        "few to save any."
    ),
    judge=_judge,
)

PAPER = Paper(
    slug="sparsed",
    title="SparseD: Sparse Attention for Diffusion Language Models",
    arxiv="2509.24014",
    date="2025-09-28",
    venue="ICLR 2026",
    purpose=(
        "For long contexts in diffusion language models, where every denoising step attends over "
        "prompt and answer. Patterns differ between heads but hardly between steps, so each head's "
        "blocks are chosen once and reused. The first steps use full attention, because they "
        "matter most, and prompt and answer are chosen from separately."
    ),
    claim=(
        "With full attention in the first fifth of the steps and one pattern afterwards, quality "
        "is that of full attention, and long contexts run faster."
    ),
    figures=(
        Figure("speed-up end to end, 64k tokens, 1024 steps", "1.50x", "code"),
        Figure("speed-up end to end, 64k tokens, 128 steps", "1.23x to 1.25x", "3rd"),
        Figure(
            "MMLU, GSM8K, HumanEval and RULER against full attention",
            "within about 0.3 points",
            "3rd",
        ),
        Figure("RULER-4k, full / sliding window", "above 90 / about 40", "3rd"),
        Figure("recall from far back, share right, dense", "-", "inferred", "recall_right_dense"),
        Figure(
            "recall from far back, share right, SparseD", "-", "inferred", "recall_right_sparsed"
        ),
        Figure(
            "recall from far back, share right, sliding window",
            "-",
            "inferred",
            "recall_right_window",
        ),
        Figure("KL from dense, source text, SparseD, nats", "-", "inferred", "text_kl_sparsed"),
        Figure("KL from dense, source text, window, nats", "-", "inferred", "text_kl_window"),
        Figure("KL from dense, source text, one ranking, nats", "-", "inferred", "text_kl_joint"),
        Figure(
            "processor time of attention over dense, 4096 tokens, 16 steps",
            "-",
            "inferred",
            "attention_seconds_ratio",
        ),
        Figure(
            "the same if only what is computed cost time (the card's bound)",
            "-",
            "inferred",
            "attention_bound",
        ),
        Figure(
            "processor time over dense, mdlm-stdlib as a whole, 512 tokens",
            "-",
            "inferred",
            "text_seconds_ratio",
        ),
    ),
    extension_points=(
        "transformers.AttentionInterface, with a state for each layer",
        "the loop over denoising steps, which gives the step",
    ),
    symbols=(
        "attending.sparse.sparsed.sparsed_mask",
        "attending.sparse.sparsed.sparsed_plan",
        "attending.sparse.block_scores.block_probabilities",
        "attending.interventions.sparsed.SparseD",
    ),
    rule=RULE,
    status="built",
)

# skip and select are the paper's. 512 tokens are what the model was trained on; blocks of 16 make
# 32 of them, where the paper's 128 make 512 of 64k. Sizes were chosen with seed 1000.
_LOOP = {"steps": 16, "skip": 0.2, "select": 0.3}
_SMALL = {
    **_LOOP,
    "block_size": 16,
    "text": {"prompt": 384, "answer": 128, "gaps": 64, "rows": 4},
    "recall": {"prompt": 448, "answer": 64, "gaps": 32, "rows": 8},
    "training": {"lengths": [64, 256, 512], "steps": [260, 30, 60]},
    "speed": {"tokens": 4096, "answer": 512, "block_size": 128},
}


def settings(scale: Scale) -> dict[str, Any]:
    """What determines a run but its seed. `full` was never run."""
    return {
        "smoke": {
            **_SMALL,
            "steps": 4,
            "text": {"prompt": 96, "answer": 32, "gaps": 8, "rows": 1},
            "recall": {"prompt": 56, "answer": 8, "gaps": 4, "rows": 2},
            "training": {"lengths": [64], "steps": [2]},
            "speed": {"tokens": 640, "answer": 128, "block_size": 64},
        },
        "small": _SMALL,
        "full": {
            **_SMALL,
            "steps": 64,
            "text": {"prompt": 384, "answer": 128, "gaps": 64, "rows": 200},
            "recall": {"prompt": 448, "answer": 64, "gaps": 32, "rows": 200},
            "speed": {"tokens": 65536, "answer": 1024, "block_size": 128},
        },
    }[scale]


def reproduce(scale: Scale, seed: int, out_dir: Path) -> Reproduction:
    """Fill gaps in text and recall values with every method; see `_sparsed_trajectory`.

    The seed decides text, gaps, the trained model of the recall and its sequences.
    """
    from attending.papers import _sparsed_recall, _sparsed_speed, _sparsed_text
    from attending.papers._sparsed_trajectory import VARIANTS, WINDOWS, Setup

    settings_here = settings(scale)
    loop = {name: settings_here[name] for name in _LOOP}

    def setup(task: str) -> tuple[Setup, int]:
        sizes = dict(settings_here[task])
        rows = sizes.pop("rows")
        return Setup(**loop, block_size=settings_here["block_size"], **sizes), rows

    training = _sparsed_recall.Training(
        *(tuple(settings_here["training"][name]) for name in ("lengths", "steps"))
    )
    found = {
        "text": _sparsed_text.measure(seed, *setup("text")),
        "recall": _sparsed_recall.measure(seed, *setup("recall"), training),
    }
    numbers = {
        f"{task}_{name}": value for task, values in found.items() for name, value in values.items()
    }
    numbers |= _sparsed_speed.attention_seconds(seed, **loop, **settings_here["speed"])
    ways = (*VARIANTS, *WINDOWS)
    places = range(len(ways))
    label = ", ".join(way.replace("_", " ") for way in ways)
    series = tuple(
        Series(name, places, [numbers[f"{key}_{way}"] for way in ways], panel, label, unit)
        for name, key, panel, unit in (
            ("KL from dense", "text_kl", "source text", "nats"),
            ("KL from dense", "recall_kl", "recall", "nats"),
            ("right", "recall_right", "recall, share right", "share"),
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


def plot(reproductions: Sequence[Reproduction], figure: "Picture") -> None:
    """Distance from dense attention and recall, a bar for each method, a dot for each seed."""
    from attending.papers._sparsed_trajectory import VARIANTS, WINDOWS

    ways = (*VARIANTS, *WINDOWS)
    panels = (
        ("text_kl", "source text", "KL from dense, nats"),
        ("recall_right", "recall from far back", "share right"),
    )
    for axis, (key, title, unit) in zip(figure.subplots(1, 2), panels, strict=True):
        found = [[one.measurements[f"{key}_{way}"] for one in reproductions] for way in ways]
        means = [sum(values) / len(values) for values in found]
        axis.barh(range(len(ways)), means, color="C0", alpha=0.5)
        for place, values in enumerate(found):
            axis.plot(values, [place] * len(values), "o", color="C0", markersize=4)
        if key == "recall_right":
            dense = [one.measurements["recall_right_dense"] for one in reproductions]
            axis.axvline(sum(dense) / len(dense), color="gray", linestyle="--", label="dense")
            axis.legend()
        labels = [way.replace("_", " ") for way in ways]
        axis.set_yticks(range(len(ways)), labels if key == "text_kl" else [""] * len(ways))
        axis.invert_yaxis()
        axis.set(title=title, xlabel=unit)
