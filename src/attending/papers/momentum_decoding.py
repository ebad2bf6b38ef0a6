"""The record of momentum decoding: text as a walk that may not go round in circles."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from attending.papers._record import Figure, Paper, Rule, Scale, Verdict
from attending.papers._reproduction import Reproduction, Series

MARGIN_DIVERSITY = 0.02
MARGIN_COHERENCE = 0.05  # nats a token
COST = 1.10  # of greedy search
COST_IN_DIRECTION = 1.25


def _judge(ours: Mapping[str, Sequence[float]]) -> Verdict:
    def wins(left: str, right: str, margin: float = 0.0) -> bool:
        return all(a >= b - margin for a, b in zip(ours[left], ours[right], strict=True))

    if (
        wins("diversity_momentum", "diversity_contrastive", MARGIN_DIVERSITY)
        and wins("coherence_momentum", "coherence_contrastive", MARGIN_COHERENCE)
        and all(cost <= COST for cost in ours["cost_momentum"])
        and wins("cost_contrastive", "cost_momentum")
    ):
        return "held"
    mean = {name: fmean(numbers) for name, numbers in ours.items()}
    middle = (mean["diversity_greedy"] + mean["diversity_nucleus"]) / 2
    in_direction = (
        mean["diversity_momentum"] >= middle
        and mean["coherence_momentum"] >= mean["coherence_nucleus"]
        and mean["cost_momentum"] <= min(COST_IN_DIRECTION, mean["cost_contrastive"])
    )
    return "held in direction" if in_direction else "did not hold"


RULE = Rule(
    words=(
        "Of continuations of held-out files by llama-stdlib, in every seed: the diversity of "
        "momentum decoding is at least that of contrastive search less 0.02, its coherence (mean "
        "log-probability under the model itself) at least that of contrastive search less 0.05 "
        "nats, its time at most 1.10 times that of greedy search and at most that of contrastive "
        "search. Held if all of these are so. Held in direction if, of the means over the seeds, "
        "its diversity is at least midway from greedy search to nucleus sampling, its coherence "
        "at least that of nucleus sampling, and its time at most 1.25 times that of greedy search "
        "and at most that of contrastive search. Did not hold otherwise. What people think of the "
        "texts, which is the paper's own measure, is not measured here."
    ),
    judge=_judge,
)

PAPER = Paper(
    slug="momentum-decoding",
    title="Momentum Decoding: Open-ended Text Generation As Graph Exploration",
    arxiv="2212.02175",
    date="2022-12-05",
    venue=None,
    purpose=(
        "Deterministic decoding for any causal language model that must not repeat itself. It "
        "takes the greedy token unless that would walk an earlier path again; then a resistance "
        "that grows with the length of the loop lets another of the top candidates pass. One "
        "forward pass for each token, as with greedy search."
    ),
    claim=(
        "Text is as good and as diverse as that of contrastive search, at about the cost of greedy "
        "search."
    ),
    figures=(
        Figure(
            "preferred by people to contrastive decoding / equal / not, Wikinews, %",
            "57.0 / 3.0 / 40.0",
            "ran",
        ),
        Figure(
            "preferred by people to contrastive search / equal / not, Wikinews, %",
            "40.7 / 8.0 / 51.3",
            "ran",
        ),
        Figure(
            "diversity x100, GPT2-XL, momentum (ours x1, here and below: llama-stdlib)",
            "97.2",
            "ran",
            measurement="diversity_momentum",
        ),
        Figure("same, contrastive search", "92.4", "ran", measurement="diversity_contrastive"),
        Figure("same, nucleus", "95.3", "ran", measurement="diversity_nucleus"),
        Figure("same, top-k", "92.3", "ran", measurement="diversity_top_k"),
        Figure("seconds for a continuation, momentum / contrastive search", "8.18 / 12.13", "ran"),
        Figure(
            "time of contrastive search over that of momentum decoding",
            "1.48",
            "ran",
            measurement="contrastive_over_momentum",
        ),
    ),
    extension_points=("transformers generate, through a LogitsProcessor",),
    symbols=(
        "attending.decoding.momentum.MomentumDecoding",
        "attending.decoding.momentum.MomentumLogitsProcessor",
        "attending.decoding.walk.circular_depth",
        "attending.decoding.resistance.penalties",
        "attending.decoding.contrastive_search.ContrastiveSearch",
    ),
    rule=RULE,
    status="built",
)

_SMALL = {
    "prompts": 32,
    "batch": 8,
    "prompt_tokens": 32,
    "new_tokens": 200,
    "contrastive_alpha": 0.6,
    "contrastive_top_k": 5,
}


def settings(scale: Scale) -> dict[str, Any]:
    """What determines a run but its seed. `full` was never run."""
    return {
        "smoke": {**_SMALL, "prompts": 2, "batch": 2, "new_tokens": 8},
        "small": _SMALL,
        "full": {**_SMALL, "prompts": 500, "new_tokens": 256},
    }[scale]


def reproduce(scale: Scale, seed: int, out_dir: Path) -> Reproduction:
    """Continue held-out files in six ways; see `attending.papers._momentum_decoding_experiment`."""
    from attending.papers._momentum_decoding_experiment import run

    settings_here = settings(scale)
    found = run(seed, **settings_here)
    numbers: dict[str, float] = {}
    for name, one in found.items():
        numbers[f"diversity_{name}"] = one.diversity
        numbers[f"token_diversity_{name}"] = one.token_diversity
        numbers[f"rep_4_{name}"] = one.rep_4
        numbers[f"coherence_{name}"] = one.coherence
        numbers[f"greedy_ratio_{name}"] = one.greedy_ratio
        if name not in ("people", "greedy"):
            numbers[f"cost_{name}"] = one.seconds / found["greedy"].seconds
    numbers["contrastive_over_momentum"] = found["contrastive"].seconds / found["momentum"].seconds
    return Reproduction(
        slug=PAPER.slug,
        scale=scale,
        seed=seed,
        measurements=numbers,
        series=tuple(
            Series(
                name.replace("_", "-"),
                [one.coherence],
                [one.diversity],
                "continuations of held-out files",
                "coherence, nats a token",
                "diversity of words",
            )
            for name, one in found.items()
        ),
        settings=settings_here,
    )


def plot(reproductions: Sequence[Reproduction], figure: Any) -> None:
    """Diversity over coherence, a mark for each seed, and the time over that of greedy search."""
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    names = [name.removeprefix("diversity_") for name in reproductions[0].measurements]
    ways = [
        name for name in dict.fromkeys(names) if f"rep_4_{name}" in reproductions[0].measurements
    ]
    for name in ways:
        left.plot(
            [one.measurements[f"coherence_{name}"] for one in reproductions],
            [one.measurements[f"diversity_{name}"] for one in reproductions],
            "*" if name == "people" else "o",
            label=name.replace("_", "-"),
        )
    left.set(xlabel="coherence, nats a token", ylabel="diversity of words", ylim=(0, 1))
    left.legend(fontsize="small")
    timed = [name for name in ways if f"cost_{name}" in reproductions[0].measurements]
    costs = [fmean(one.measurements[f"cost_{name}"] for one in reproductions) for name in timed]
    right.barh([name.replace("_", "-") for name in timed], costs, color="0.6")
    right.axvline(1, color="0.2", linewidth=1)
    right.set(xlabel="time over that of greedy search")
