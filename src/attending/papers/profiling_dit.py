"""The record of ProfilingDiT: cache the blocks that look at the background."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attending.papers._record import Figure, Paper, Rule, Scale, Verdict
from attending.papers._reproduction import Reproduction, Series

OURS = "background_stepwise"
SLACK = 0.05  # how many of all block calls TeaCache may compute more or fewer than ours


def _judge(ours: Mapping[str, Sequence[float]]) -> Verdict:
    def gains(other: str) -> list[float]:
        pairs = zip(ours[f"psnr_{OURS}"], ours[f"psnr_{other}"], strict=True)
        return [mine - theirs for mine, theirs in pairs]

    spent = zip(ours[f"computed_{OURS}"], ours["computed_teacache"], strict=True)
    if not all(abs(mine - theirs) <= SLACK for mine, theirs in spent):
        return "out of reach here"
    rivals = ("teacache", "foreground_stepwise")
    in_every_seed = all(gain > 0 for rival in rivals for gain in gains(rival))
    in_the_mean = all(sum(gains(rival)) > 0 for rival in rivals)
    others = ("background_uniform", "background_inverse", "all_blocks", "fewer_steps")
    if in_every_seed and all(sum(gains(other)) > 0 for other in others):
        return "held"
    return "held in direction" if in_the_mean else "did not hold"


RULE = Rule(
    words=(
        "wan-shapes paints held-out captions in 30 steps; each method's videos are compared by "
        "PSNR with those without a cache from the same noise. ProfilingDiT caches the 4 of 8 "
        "blocks that attend least to the foreground, with its stepwise schedule. Held if in "
        "every seed it is nearer than caching the other 4 blocks with the same schedule, and "
        "nearer than TeaCache whose threshold is set so that it computes as many blocks; and if "
        "in the mean over the seeds it is also nearer than its own blocks with the uniform and "
        "with the inverse schedule, than all blocks cached at evenly spread steps, and than a "
        "sampler with fewer steps and no cache, all at equal block calls. Held in direction if "
        "in the mean it is nearer than the other blocks and TeaCache. Out of reach here if "
        f"TeaCache could not be set to within {SLACK} of the same share of block calls. Did not "
        "hold otherwise. FORA, Pyramid Attention Broadcast, First Block Cache, SSIM, relative "
        "error and time are measured beside it and are not part of the rule."
    ),
    judge=_judge,
)

PAPER = Paper(
    slug="profiling-dit",
    title=("Model Reveals What to Cache: Profiling-Based Feature Reuse for Video Diffusion Models"),
    arxiv="2504.03140",
    date="2025-04-04",
    venue="ICCV 2025",
    purpose=(
        "Makes video diffusion transformers about twice as fast without training. Some blocks "
        "attend to the foreground and some to the background, and which is which hardly changes "
        "over steps and prompts. Blocks of the background reuse their last change for several "
        "steps; the others are computed anew."
    ),
    claim=(
        "Caching background blocks, and computing them more often towards the end, is about as "
        "fast as TeaCache and much closer to the video without a cache."
    ),
    figures=(
        Figure(
            "LPIPS, HunyuanVideo, TeaCache slow / fast / ProfilingDiT",
            "0.1720 / 0.1830 / 0.1203",
            "paper",
        ),
        Figure(
            "PSNR, same (ours: wan-shapes, ProfilingDiT)",
            "21.91 / 21.60 / 26.44",
            "paper",
            f"psnr_{OURS}",
        ),
        Figure(
            "speed-up, same (ours: CPU time of ProfilingDiT by that without a cache)",
            "1.66x / 2.31x / 1.87x",
            "paper",
            f"cpu_ratio_{OURS}",
        ),
        Figure(
            "LPIPS and speed-up, Wan2.1, TeaCache / ProfilingDiT",
            "0.2913, 2.00x / 0.1256, 2.01x",
            "paper",
        ),
        Figure("LPIPS when caching foreground / background blocks", "0.1449 / 0.1203", "paper"),
        Figure(
            "PSNR when caching foreground / background blocks (ours: foreground)",
            "24.23 / 26.44",
            "paper",
            "psnr_foreground_stepwise",
        ),
        Figure(
            "PSNR of background blocks, stepwise / uniform / inverse (ours: uniform)",
            "26.44 / 25.22 / 24.49",
            "paper",
            "psnr_background_uniform",
        ),
        Figure(
            "PSNR of TeaCache on Wan2.1, of ProfilingDiT (ours: TeaCache)",
            "16.17, 22.02",
            "paper",
            "psnr_teacache",
        ),
    ),
    extension_points=("diffusers ModelHook on transformer blocks, as cache configurations do",),
    symbols=(
        "attending.interventions.feature_cache.ProfilingCache",
        "attending.interventions.feature_cache.TeaCache",
        "attending.interventions.output_cache.FORA",
        "attending.interventions.diffusers_caches.PyramidAttentionBroadcast",
        "attending.interventions.diffusers_caches.FirstBlockCache",
        "attending.interventions.cache_schedule.DecreasingSteps",
        "attending.interventions.drift_schedule.DriftSteps",
        "attending.interventions.drift_calibration.calibrate_drift",
        "attending.probes.block_profile.profile_blocks",
    ),
    rule=RULE,
    status="built",
)

_SMALL = {
    "steps": 30,
    "warmup": 3,
    "interval": 3,
    "longest": 6.0,
    "cached": 4,
    "videos": 2,
    "frames": 8,
    "clips": 4,
    "levels": 10,
    "lists": ["background", "foreground", "mixed"],
}


def settings(scale: Scale) -> dict[str, Any]:
    """What determines a run but its seed. `full` was never run."""
    return {
        "smoke": {
            **_SMALL,
            "steps": 3,
            "warmup": 1,
            "videos": 1,
            "frames": 4,
            "clips": 1,
            "levels": 2,
            "lists": ["background", "foreground"],
        },
        "small": _SMALL,
        "full": {
            **_SMALL,
            "steps": 50,
            "warmup": 6,
            "interval": 6,
            "longest": 12.0,
            "videos": 32,
            "clips": 32,
        },
    }[scale]


def reproduce(scale: Scale, seed: int, out_dir: Path) -> Reproduction:
    """Profile wan-shapes and paint with all caches; `attending.papers._profiling_dit_experiment`.

    Nothing is trained. The seed decides scenes and noise.
    """
    from attending.papers._profiling_dit_experiment import measure
    from attending.zoo import load

    settings_here = settings(scale)
    numbers, profile, moves = measure(load("wan-shapes"), seed, **settings_here)
    series = [
        Series(
            "received by the foreground",
            range(len(profile.names)),
            profile.ratio.tolist(),
            "R of blocks",
            "block",
            "share of the foreground above uniform",
        ),
        Series(
            "prediction",
            range(1, len(moves) + 1),
            moves.tolist(),
            "moves of the prediction",
            "step",
            "mean absolute difference",
        ),
    ]
    return Reproduction(
        slug=PAPER.slug,
        scale=scale,
        seed=seed,
        measurements=numbers,
        series=tuple(series),
        settings=settings_here,
    )


def plot(reproductions: Sequence[Reproduction], figure: Any) -> None:
    """How near each method comes, and what it computes; R of the blocks; moves of predictions."""
    near, ratio, moves = figure.subplots(1, 3, width_ratios=(1.6, 1, 1))
    names = [
        name.removeprefix("psnr_")
        for name in reproductions[0].measurements
        if name.startswith("psnr_")
    ]
    for place, name in enumerate(names):
        found = [one.measurements[f"psnr_{name}"] for one in reproductions]
        near.plot(found, [place] * len(found), ".", color="C0")
        near.plot(sum(found) / len(found), place, "|", color="C0", markersize=14)
    shares = [reproductions[0].measurements[f"computed_{name}"] for name in names]
    labels = [
        f"{name.replace('_', ' ')} ({share:.0%})" for name, share in zip(names, shares, strict=True)
    ]
    near.set_yticks(range(len(names)), labels, fontsize="small")
    near.invert_yaxis()
    near.set_xlabel("PSNR to no cache, dB (share computed)")
    for axes, number in ((ratio, 0), (moves, 1)):
        for one in reproductions:
            series = one.series[number]
            axes.plot(series.x, series.y, marker=".", label=f"seed {one.seed}")
            axes.set_title(series.panel, fontsize="small")
            axes.set_xlabel(series.x_label)
            axes.set_ylabel(series.y_label, fontsize="small")
    ratio.legend(fontsize="small")
