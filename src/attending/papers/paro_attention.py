"""The record of PAROAttention: order the tokens so that attention becomes blocks."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attending.papers._record import Figure, Paper, Rule, Scale, Verdict
from attending.papers._reproduction import Reproduction, Series

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Picture

FULLEST, EMPTIEST = 0.5, 0.1875  # exactly 16 and 6 of 32 blocks, so that a window has as many
PERCENTS = (50, 19)
LEAST_GAIN = 1.0  # dB


def _judge(ours: Mapping[str, Sequence[float]]) -> Verdict:
    def gains(one: str, other: str) -> list[float]:
        pairs = zip(ours[f"psnr_{one}"], ours[f"psnr_{other}"], strict=True)
        return [a - b for a, b in pairs]

    compared = [
        gains(f"paro_{percent}", f"{other}_{percent}")
        for percent in PERCENTS
        for other in ("fhw", "window")
    ]
    groups = [gains(f"{bits}_block", f"{bits}_row") for bits in ("int8", "int4")]
    everywhere = all(gain > 0 for found in (*compared, *groups) for gain in found)
    if everywhere and all(sum(found) / len(found) >= LEAST_GAIN for found in compared):
        return "held"
    if all(sum(found) > 0 for found in compared):
        return "held in direction"
    return "did not hold"


RULE = Rule(
    words=(
        "On wan-shapes, calibrated on other captions; PSNR to the video of dense attention from "
        "the same noise; static masks of 50 % and 19 % of all blocks. Held if in every seed and at "
        "both densities PAROAttention is nearer than the same static masks without an order and "
        "than a sliding window of as many blocks, each by at least 1 dB in the mean over seeds; "
        "and if, with all blocks and quantised to INT8 and to INT4, groups of blocks in its orders "
        "are nearer in every seed than groups of rows. Held in direction if, in the mean over the "
        "seeds, it is nearer than both at both densities. Did not hold otherwise. Orders by the "
        "literal score and by mass, SSIM, relative L2 and time are measured beside it and are not "
        "part of the rule."
    ),
    judge=_judge,
)

PAPER = Paper(
    slug="paro-attention",
    title=(
        "PAROAttention: Pattern-Aware ReOrdering for Efficient Sparse and Quantized Attention in "
        "Visual Generation Models"
    ),
    arxiv="2506.16054",
    date="2025-06-19",
    venue="NeurIPS 2025",
    purpose=(
        "For serving image and video transformers with sparse or quantised attention and next to "
        "no prediction at run time. Each head gets one of six orders of frames, rows and columns, "
        "the one that makes its map blockiest. Then fixed block masks and integers for each block "
        "work well."
    ),
    claim=(
        "With the right order for each head, fixed block masks at 20 to 50 % density and INT8 or "
        "INT4 stay far closer to full attention than other sparse methods do."
    ),
    figures=(
        Figure(
            (
                "PSNR to full attention, CogVideoX-5B, density 0.5: SparseVideoGen / SpargeAttn / "
                "PARO"
            ),
            "18.50 / 16.80 / 29.14",
            "3rd",
        ),
        Figure("same, density 0.3: SpargeAttn / PARO", "15.22 / 22.89", "3rd"),
        Figure("same, density 0.5 without reordering", "26.25", "3rd"),
        Figure("speed-up of attention, A100, density 0.5 / 0.3", "1.73x / 2.71x", "3rd"),
        Figure("end to end", "1.9x to 2.7x", "paper"),
        Figure(
            "gain of reordering at density 0.5, PSNR in dB (paper: CogVideoX-5B)",
            "29.14 - 26.25 = 2.89",
            "3rd",
            measurement="gain_of_order_50",
        ),
        Figure(
            "gain of reordering at density 0.19, PSNR in dB",
            "not given",
            "inferred",
            measurement="gain_of_order_19",
        ),
        Figure(
            "gain of block groups over row groups, INT8, PSNR in dB (paper: of the map alone; "
            "ours: of both products)",
            "30.17 - 27.50 = 2.67",
            "3rd",
            measurement="gain_of_blocks_int8",
        ),
        Figure(
            "PSNR at density 0.5, PAROAttention (paper: CogVideoX-5B)",
            "29.14",
            "3rd",
            measurement="psnr_paro_50",
        ),
        Figure("PSNR of INT8 / INT4, PAROAttention (paper: CogVideoX-5B)", "29.01 / 24.16", "3rd"),
    ),
    extension_points=("diffusers attention processors, or attending.tap with a handler",),
    symbols=(
        "attending.sparse.paro.PAROPlan",
        "attending.sparse.paro.paro_attention",
        "attending.sparse.paro_calibration.PAROCalibration",
        "attending.sparse.axis_order.permute_tokens",
        "attending.sparse.order_scores.order_statistics",
        "attending.sparse.order_scores.combined_score",
        "attending.sparse.static_mask.static_block_mask",
        "attending.sparse.quantised_attention.simulate_quantised_attention",
        "attending.interventions.paro_attention.PAROAttention",
    ),
    rule=RULE,
    status="built",
)

# The paper's eps of 0.001 is 17.55 times the entries of a uniform map of its 17550 tokens. A block
# of 16 tokens is a 32nd of our 512, as one of 64 is a 274th of its.
_SMALL = {
    "videos": 2,
    "calibration_captions": 1,
    "frames": 8,
    "steps": 8,
    "guidance_scale": 1.0,
    "block_size": 16,
    "densities": [FULLEST, EMPTIEST],
    "eps_of_uniform": 17.55,
    "sigma": 0.9,
    "timestep_bins": 10,
}


def settings(scale: Scale) -> dict[str, Any]:
    """What determines a run but its seed. `full` was never run."""
    smoke = {"videos": 1, "steps": 1, "frames": 4}
    full: dict[str, Any] = {"videos": 64, "calibration_captions": 2, "steps": 50, "frames": 16}
    full |= {"guidance_scale": 3.0}
    return {"smoke": _SMALL | smoke, "small": _SMALL, "full": _SMALL | full}[scale]


def reproduce(scale: Scale, seed: int, out_dir: Path) -> Reproduction:
    """Paint videos with wan-shapes in all ways; see `attending.papers._paro_attention_videos`.

    Nothing is trained. The seed decides scenes, noise and what is calibrated on.
    """
    from torch.random import fork_rng

    from attending.papers._paro_attention_videos import measure
    from attending.zoo import load

    settings_here = settings(scale)
    with fork_rng(devices=[]):  # a model of diffusers is filled at random before it is loaded
        wan = load("wan-shapes")
    numbers, _ = measure(wan, seed, **settings_here)
    masks = ("fhw", "window", "literal", "paro", "mass")
    series = tuple(
        Series(
            f"density {percent / 100:.2f}",
            range(len(masks)),
            [numbers[f"psnr_{name}_{percent}"] for name in masks],
            "sparse",
            ", ".join(masks),
            "PSNR (dB)",
        )
        for percent in PERCENTS
    )
    groups = ("row", "fhw", "block", "small")
    series += tuple(
        Series(
            bits,
            range(len(groups)),
            [numbers[f"psnr_{bits}_{name}"] for name in groups],
            "quantised",
            "rows, blocks in the model's order, in PARO's, and small",
            "PSNR (dB)",
        )
        for bits in ("int8", "int4")
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
    """Every seed as a dot, the mean as a bar: sparse at both densities, and quantised."""
    masks = ("window", "fhw", "literal", "paro", "mass")
    panels = [
        (f"{percent} % of the blocks", {name: f"psnr_{name}_{percent}" for name in masks})
        for percent in PERCENTS
    ]
    names = {
        "row": "rows",
        "fhw": "64 x 64, no order",
        "block": "64 x 64, PARO",
        "small": "16 x 16, PARO",
    }
    panels += [
        (
            "all blocks, quantised",
            {
                f"{bits}, {words}": f"psnr_{bits}_{name}"
                for bits in ("int8", "int4")
                for name, words in names.items()
            },
        )
    ]
    axes = figure.subplots(1, len(panels), width_ratios=[5, 5, 8])
    for axis, (title, bars) in zip(axes, panels, strict=True):
        found = [
            [one.measurements[measurement] for one in reproductions]
            for measurement in bars.values()
        ]
        axis.bar(range(len(bars)), [sum(values) / len(values) for values in found], color="#c5cae9")
        for place, values in enumerate(found):
            axis.plot([place] * len(values), values, "o", color="#283593", markersize=4)
        axis.set_xticks(
            range(len(bars)),
            list(bars),
            fontsize=8,
            rotation=30,
            ha="right",
            rotation_mode="anchor",
        )
        axis.set_title(title, fontsize=9)
        axis.set_ylabel("PSNR to dense attention (dB)", fontsize=8)
