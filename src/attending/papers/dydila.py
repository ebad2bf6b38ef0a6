"""The record of DyDiLA: linear attention with routed projections and a subtracted second map."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attending.papers._record import Figure, Paper, Rule, Scale, Verdict
from attending.papers._reproduction import Reproduction, Series

OTHERS = ("softmax", "relu", "focused", "dydila_undifferenced")


def _judge(ours: Mapping[str, Sequence[float]]) -> Verdict:
    def below(figure: str, other: str) -> bool:
        pairs = zip(ours[f"{figure}_dydila"], ours[f"{figure}_{other}"], strict=True)
        return all(one < theirs for one, theirs in pairs)

    if not (below("similarity", "relu") and below("loss", "relu")):
        return "did not hold"
    better = all(below("loss", other) for other in OTHERS)
    drawn = all(below("distance", other) for other in ("relu", "softmax"))
    return "held" if better and drawn else "held in direction"


RULE = Rule(
    words=(
        "Small class-conditional diffusion transformers over digits. Held in direction if in every "
        "seed the rows of the maps are less alike with DyDiLA than with ReLU linear attention, and "
        "the held-out loss is lower. Held if in every seed its loss is also below that with "
        "softmax, with the focused kernel, and with DyDiLA without the difference, and its Frechet "
        "distance below that with ReLU linear attention and that with softmax. Did not hold "
        "otherwise."
    ),
    judge=_judge,
)

PAPER = Paper(
    slug="dydila",
    title="Dynamic Differential Linear Attention (DyDiLA)",
    arxiv="2601.13683",
    date="2026-01-20",
    venue=None,
    purpose=(
        "For building diffusion transformers with linear attention, whose maps come out too "
        "smooth. Tokens are routed to one of several projections and kernels, and a second set of "
        "queries and keys, weighted token by token, is subtracted from the first. It is trained "
        "from scratch."
    ),
    claim=(
        "The three parts make linear attention less smooth and the images better than those of "
        "earlier linear and softmax diffusion transformers."
    ),
    figures=(
        Figure(
            "ImageNet-1K generation against LiT and DiT",
            "better on several metrics; the tables are not at hand",
            "paper",
        ),
        Figure(
            "smoothness of the maps against plain linear attention (ours: mean cosine between "
            "rows, DyDiLA minus ReLU)",
            "less over-smoothed",
            "paper",
            measurement="similarity_over_relu",
        ),
    ),
    extension_points=("replacement of attention modules in diffusers transformers",),
    symbols=(
        "attending.nn.dydila.DyDiLA",
        "attending.nn.dydila.token_differential_linear_attention",
        "attending.nn.hard_routing.RoutedProjection",
        "attending.nn.focused_attention.focused_kernel",
        "attending.nn.linear_attention.linear_attention",
        "attending.models.linear_dit.LinearDiT",
        "attending.probes.oversmoothing.linear_row_similarity",
        "attending.probes.oversmoothing.softmax_row_similarity",
    ),
    rule=RULE,
    status="built",
)

_SMALL = {
    "dim": 32,
    "depth": 3,
    "heads": 2,
    "rows": 32,
    "steps": 200,
    "rate": 3e-3,
    "measure_every": 50,
    "classifier_steps": 300,
    "drawn": 250,
    "draw_steps": 10,
}


def settings(scale: Scale) -> dict[str, Any]:
    """What determines a run but its seed. `full` was never run."""
    return {
        "smoke": {
            **_SMALL,
            "dim": 8,
            "depth": 1,
            "steps": 4,
            "measure_every": 2,
            "classifier_steps": 5,
            "drawn": 40,
            "draw_steps": 2,
        },
        "small": _SMALL,
        "full": {
            **_SMALL,
            "dim": 128,
            "depth": 6,
            "heads": 4,
            "rows": 256,
            "steps": 20_000,
            "rate": 1e-3,
            "measure_every": 1000,
            "classifier_steps": 2000,
            "drawn": 500,
            "draw_steps": 50,
        },
    }[scale]


def reproduce(scale: Scale, seed: int, out_dir: Path) -> Reproduction:
    """Train a diffusion transformer over digits for each kind of attention.

    See `attending.papers._dydila_training`.
    """
    from attending.papers._dydila_training import run

    settings_here = settings(scale)
    found = run(seed, settings_here)
    numbers: dict[str, float] = {}
    series = []
    for kind, one in found.items():
        for measured in ("loss", "distance", "similarity", "parameters"):
            numbers[f"{measured}_{kind}"] = getattr(one, measured)
        steps, losses = zip(*one.curve, strict=True)
        series.append(
            Series(kind.replace("_", " "), steps, losses, "held-out loss", "step", "per pixel")
        )
    numbers["similarity_over_relu"] = numbers["similarity_dydila"] - numbers["similarity_relu"]
    return Reproduction(
        slug=PAPER.slug,
        scale=scale,
        seed=seed,
        measurements=numbers,
        series=tuple(series),
        settings=settings_here,
    )
