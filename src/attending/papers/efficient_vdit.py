"""The record of Efficient-vDiT: video attention that looks at a few reference frames."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attending.papers._record import Figure, Paper, Rule, Scale, Verdict
from attending.papers._reproduction import Reproduction, Series

KS = (1, 2, 3, 4)
FAMILIES = {"even": "evenly spaced references", "first": "the first frames", "random": "random "
            "frames", "window": "a window of frames"}  # fmt: skip
SHOWN = ("searched", "searched_at_output", "uniform", "first", "window", "window_by_layer",
         "distilled")  # fmt: skip


def _judge(ours: Mapping[str, Sequence[float]]) -> Verdict:
    def mean(name: str) -> float:
        return sum(ours[name]) / len(ours[name])

    rises = all(
        more < fewer
        for k in KS[:-1]
        for fewer, more in zip(ours[f"error_even_{k}"], ours[f"error_even_{k + 1}"], strict=True)
    )
    spacing = all(
        mean(f"error_even_{k}") < mean(f"error_{other}_{k}")
        for k in (2, 3)
        for other in ("first", "random")
    )
    pairs = zip(ours["relative_l2_searched"], ours["relative_l2_uniform"], strict=True)
    search_in_every_seed = all(searched < uniform for searched, uniform in pairs)
    search = mean("relative_l2_searched") < mean("relative_l2_uniform")
    window = mean("relative_l2_searched") < mean("relative_l2_window_by_layer")
    if rises and spacing and search_in_every_seed and window:
        return "held"
    return "held in direction" if rises and search else "did not hold"


RULE = Rule(
    words=(
        "On wan-shapes, 8 frames of 64 tokens, without training unless it says so. Held if (1) in "
        "every seed the mean over the layers of the relative error of attention rises as the "
        "reference frames become fewer, 4, 3, 2, 1; and (2) at 2 and at 3 references, evenly "
        "spaced ones have a lower error, in the mean over layers and seeds, than the first frames "
        "and than random ones; and (3) in every seed the videos under the masks that the search "
        "chose (mean squared error at the attention, as the paper; the smallest threshold that "
        "computes no more than 2 references in every layer) are nearer to the dense ones, in "
        "relative L2, than under 2 references in every layer; and (4) in the mean over the seeds "
        "they are nearer than under windows of frames that compute as much, layer by layer. Held "
        "in direction if (1), and (3) in the mean over the seeds. Did not hold otherwise. How near "
        "is near enough is not part of the rule, nor is the search at the output of the model, the "
        "short distillation, or time."
    ),
    judge=_judge,
)

PAPER = Paper(
    slug="efficient-vdit",
    title="Efficient-vDiT: Efficient Video Diffusion Transformers with Attention Tile",
    arxiv="2502.06155",
    date="2025-02-10",
    venue=None,
    purpose=(
        "Makes a pretrained video diffusion transformer fast. Its attention maps repeat frame by "
        "frame, so each layer gets a fixed mask: every frame attends to itself and to a few "
        "reference frames. A search picks the sparsest mask of each layer within an error budget, "
        "and distillation reduces the number of steps."
    ),
    claim=(
        "Masks that are linear in the number of frames, found layer by layer, keep the quality of "
        "the video while attention and sampling become several times faster."
    ),
    figures=(
        Figure("VBench, base -> threshold 0.1", "76.12 -> 76.00", "3rd"),
        Figure("speed-up of the kernel / in total, threshold 0.1", "1.85x / 7.05x", "3rd"),
        Figure("sparsity at threshold 0.1", "45.08 %", "3rd"),
        Figure("CD-FVD, base -> threshold 0.1", "172.64 -> 204.13", "3rd"),
        Figure("sparsity of 2 reference frames of 8 (ours: exact; the paper's: in blocks of 128)",
               "45.47 %", "3rd", measurement="sparsity_uniform"),
        Figure("relative L2 to the dense videos, searched masks", "-", "inferred",
               measurement="relative_l2_searched"),
        Figure("relative L2 to the dense videos, 2 references in every layer", "-", "inferred",
               measurement="relative_l2_uniform"),
        Figure("relative L2 to the dense videos, windows of frames as dense, layer by layer", "-",
               "inferred", measurement="relative_l2_window_by_layer"),
        Figure("relative L2 to the dense videos, searched masks and a short distillation", "-",
               "inferred", measurement="relative_l2_distilled"),
        Figure("attention mass of a frame's own tile over that of another", "clearly above 1",
               "paper", measurement="diagonal_over_other"),
    ),
    extension_points=("diffusers attention processors, a mask for each layer",),
    symbols=(
        "attending.sparse.frame_masks.frame_reference_mask",
        "attending.sparse.frame_masks.expand_frame_mask",
        "attending.interventions.frame_reference_attention.FrameReferenceAttention",
        "attending.interventions.layer_search.search_layer_masks",
        "attending.interventions._layer_errors.Measure",
        "attending.conversion.distill_denoiser.distill_denoiser",
        "attending.losses.distillation.distillation_loss",
        "attending.losses.phased_consistency.PhasedConsistencySolver",
        "attending.losses.multistep_consistency.multistep_consistency_target",
        "attending.sparse.sequence_parallel.head_parallel_attention",
        "attending.sparse.sequence_parallel.key_parallel_attention",
    ),
    rule=RULE,
    status="built",
)  # fmt: skip

_SMALL = {
    "calibration_videos": 6,
    "output_videos": 2,
    "output_ks": [1, 2, 3, 4],
    "uniform_k": 2,
    "videos": 2,
    "steps": 10,
    "distillation_steps": 16,
    "distillation_rate": 2e-4,
}


def settings(scale: Scale) -> dict[str, Any]:
    """What determines a run but its seed. `full` was never run."""
    return {
        "smoke": {
            **_SMALL,
            "calibration_videos": 1,
            "output_videos": 1,
            "output_ks": [2],
            "videos": 1,
            "steps": 1,
            "distillation_steps": 1,
        },
        "small": _SMALL,
        "full": {
            **_SMALL,
            "calibration_videos": 32,
            "output_videos": 16,
            "videos": 32,
            "steps": 20,
            "distillation_steps": 1000,
        },
    }[scale]


def reproduce(scale: Scale, seed: int, out_dir: Path) -> Reproduction:
    """Search, paint and distil with wan-shapes; see `attending.papers._efficient_vdit_experiment`.

    The seed decides the scenes, the noise and the random frames.
    """
    from attending.papers._efficient_vdit_experiment import run
    from attending.zoo import load

    settings_here = settings(scale)
    numbers, curves = run(load("wan-shapes"), seed, **settings_here)
    numbers["sparsity_uniform"] = 100 * (1 - numbers["density_uniform"])
    series = [
        Series(name, KS, curves[family], "one layer sparse", "frames seen, k",
               "relative error of attention")
        for family, name in FAMILIES.items()
    ]  # fmt: skip
    series.append(
        Series("all layers and heads", range(8), curves["mass"], "attention mass of a tile",
               "frames apart", "share of the row")
    )  # fmt: skip
    return Reproduction(
        slug=PAPER.slug,
        scale=scale,
        seed=seed,
        measurements=numbers,
        series=tuple(series),
        settings=settings_here,
    )


def plot(reproductions: Sequence[Reproduction], figure: Any) -> None:
    """Errors by k, mass by distance, and how far the videos are from the dense ones, by method."""
    curves, tiles, videos = figure.subplots(1, 3)
    for family, name in FAMILIES.items():
        for run in reproductions:
            errors = [run.measurements[f"error_{family}_{k}"] for k in KS]
            label = name if run is reproductions[0] else None
            color = f"C{list(FAMILIES).index(family)}"
            curves.plot(KS, errors, marker="o", markersize=3, color=color, label=label)
    curves.set(
        title="one layer sparse", xlabel="k; equal cost at equal k", ylabel="relative error",
        yscale="log", xticks=KS,
    )  # fmt: skip
    curves.legend(fontsize=7)
    for run in reproductions:
        mass = next(one for one in run.series if one.panel == "attention mass of a tile")
        tiles.plot(mass.x, mass.y, marker="o", markersize=3, color="C0")
    tiles.set(title="attention mass of a tile", xlabel="frames apart", ylabel="share of the row")
    for place, name in enumerate(SHOWN):
        values = [run.measurements[f"relative_l2_{name}"] for run in reproductions]
        videos.barh(place, sum(values) / len(values), color="lightgray")
        videos.plot(values, [place] * len(values), "k.", markersize=4)
    videos.set_yticks(range(len(SHOWN)), [name.replace("_", " ") for name in SHOWN], fontsize=8)
    videos.invert_yaxis()
    videos.set(title="videos, all layers sparse", xlabel="relative L2 to dense")
