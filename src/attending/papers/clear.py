"""The record of CLEAR: attention within a radius, for pretrained diffusion transformers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attending.papers._record import Figure, Paper, Rule, Scale, Verdict
from attending.papers._reproduction import Reproduction, Series

RADII = (2, 3, 4)
TRAINED_RADIUS = 2


def _judge(ours: Mapping[str, Sequence[float]]) -> Verdict:
    def better(one: str, other: str) -> list[float]:
        pairs = zip(ours[f"relative_l2_{one}"], ours[f"relative_l2_{other}"], strict=True)
        return [theirs - mine for mine, theirs in pairs]

    small = f"circle_{TRAINED_RADIUS}"
    recovered = ours["recovered_distilled"]
    gain_over_matching = better("distilled", "flow_matching")
    by_radius = [better(f"circle_{radius}", f"rows_{radius}") for radius in RADII]
    gain_over_rows = [sum(gains) for gains in zip(*by_radius, strict=True)]
    in_every_seed = (
        all(share >= 0.5 for share in recovered)
        and all(gain > 0 for gain in gain_over_matching)
        and all(gain > 0 for gain in gain_over_rows)
        and all(gain > 0 for gain in better(f"circle_{max(RADII)}", small))
        and all(speed >= 2 for speed in ours["attention_speedup"])
    )
    if in_every_seed:
        return "held"
    in_the_mean = sum(recovered) > 0 and sum(gain_over_matching) > 0 and sum(gain_over_rows) > 0
    return "held in direction" if in_the_mean else "did not hold"


RULE = Rule(
    words=(
        "On wan-shapes, by the relative L2 error of generated videos to those of full attention "
        "from the same noise. Held if in every seed a few dozen steps of distillation of the "
        "attention projections take away at least half of the error of a circle of radius 2; the "
        "distilled model is nearer to full attention than the one fine-tuned as long by flow "
        "matching alone; circles (summed over radii 2, 3 and 4) are nearer than as many tokens in "
        "raster order in each frame; radius 4 is nearer than radius 2; and attention over an image "
        "of 64 x 64 tokens with 512 of text, radius 8, is at least twice as fast as full attention "
        "here. Held in direction if in the mean over the seeds distillation takes error away, more "
        "than flow matching alone, and circles are nearer than raster order. Did not hold "
        "otherwise. Strided and sequence windows, PSNR, SSIM and the velocity on held-out videos "
        "are measured beside it and are not part of the rule."
    ),
    judge=_judge,
)

PAPER = Paper(
    slug="clear",
    title="CLEAR: Conv-Like Linearization Revs Pre-Trained Diffusion Transformers Up",
    arxiv="2412.16112",
    date="2024-12-20",
    venue="NeurIPS 2025",
    purpose=(
        "For owners of a text-to-image transformer such as FLUX who want images of 2K to 8K at a "
        "cost that grows linearly with the number of pixels. Each image token attends only to "
        "tokens within a circle, and to all text tokens. A short distillation of the attention "
        "weights makes up for the loss; the radius trades quality for speed."
    ),
    claim=(
        "A pretrained diffusion transformer keeps its quality with attention limited to a small "
        "circle, after a short distillation, and becomes several times faster at high resolution."
    ),
    figures=(
        Figure("attention FLOPs saved at 8192 x 8192, radius 8", "99.5 %", "paper"),
        Figure("speed-up of 8K generation", "6.3x", "paper"),
        Figure(
            "GFLOPs of an attention layer at 1024 x 1024, full -> radius 8 / 16 / 32",
            "260.9 -> 63.5 / 86.6 / 154.1",
            "ran",
        ),
        Figure("fine-tuning", "10K self-generated samples, 10K iterations", "paper"),
        Figure(
            "ours: time of full attention over that within radius 8, 64 x 64 tokens and 512 of "
            "text, one core",
            "-",
            "inferred",
            "attention_speedup",
        ),
        Figure(
            "ours: relative L2 to full attention, wan-shapes, radius 2, without training",
            "-",
            "inferred",
            "relative_l2_circle_2",
        ),
        Figure("ours: the same, distilled", "-", "inferred", "relative_l2_distilled"),
        Figure(
            "ours: the same, fine-tuned by flow matching alone",
            "-",
            "inferred",
            "relative_l2_flow_matching",
        ),
        Figure(
            "ours: share of that error taken away by distillation",
            "-",
            "inferred",
            "recovered_distilled",
        ),
        Figure("ours: share of the map that radius 2 sees", "-", "inferred", "density_circle_2"),
    ),
    extension_points=(
        "attending.tap with a handler, for FLUX, SD3 and Wan of diffusers",
        "a training loop for the distillation",
        "torch.distributed, for rows of an image on several devices",
    ),
    symbols=(
        "attending.sparse.circular_window.circular_window_attention",
        "attending.sparse.circular_window.circular_window_mask",
        "attending.sparse.circular_window.log_length_scale",
        "attending.sparse.square_tiles.circular_window_plan",
        "attending.sparse.halo_exchange.halo_window_attention",
        "attending.interventions.circular_window.CircularWindow",
        "attending.conversion.linearize.linearize",
        "attending.conversion.linearize.distillation_step",
        "attending.losses.linearization.linearization_loss",
    ),
    rule=RULE,
    status="built",
)

# The rate was chosen on seed 50, on weights of wan-shapes that were half trained: 1e-3, 3e-3, 6e-3.
_SMALL = {
    "radii": list(RADII),
    "trained_radius": TRAINED_RADIUS,
    "train_steps": 60,
    "train_videos": 2,
    "learning_rate": 3e-3,
    "videos": 2,
    "frames": 8,
    "steps": 10,
    "guidance_scale": 1.0,
    "held_out_videos": 6,
    "tokens_side": 64,
    "text_tokens": 512,
    "speed_radius": 8,
}


def settings(scale: Scale) -> dict[str, Any]:
    """What determines a run but its seed. `full` was never run."""
    smoke = {
        "train_steps": 1,
        "train_videos": 1,
        "videos": 1,
        "frames": 2,
        "steps": 1,
        "held_out_videos": 1,
        "tokens_side": 16,
        "text_tokens": 8,
    }
    full = {"train_steps": 4000, "train_videos": 16, "videos": 64, "frames": 16, "steps": 30}
    return {"smoke": _SMALL | smoke, "small": _SMALL, "full": _SMALL | full}[scale]


def reproduce(scale: Scale, seed: int, out_dir: Path) -> Reproduction:
    """Circles in wan-shapes, and two students; see `attending.papers._clear_videos`.

    The seed decides scenes, noise and training batches. Students are trained on videos of the world
    of shapes, not on the model's own as in the paper.
    """
    from attending.papers._clear_videos import circle, key, measure
    from attending.zoo import load

    settings_here = settings(scale)
    numbers, _, losses = measure(load("wan-shapes"), seed, **settings_here)
    radii = settings_here["radii"]
    panel = "error to full attention"
    series = [
        Series(
            name,
            [numbers[f"density_{key(label(radius))}"] for radius in radii],
            [numbers[f"relative_l2_{key(label(radius))}"] for radius in radii],
            panel,
            "share of the map",
            "relative L2",
        )
        for name, label in (("circles", circle), ("rows", lambda radius: f"rows {radius}"))
    ]
    density = numbers[f"density_{key(circle(settings_here['trained_radius']))}"]
    series += [
        Series(
            name,
            [density],
            [numbers[f"relative_l2_{key(name)}"]],
            panel,
            "share of the map",
            "relative L2",
        )
        for name in losses
    ]
    series += [
        Series(name, range(len(values)), values, "training", "step", "error of the velocity")
        for name, values in losses.items()
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
    """Error by share of the map with the students as points, and the losses of their training."""
    left, right = figure.subplots(1, 2)
    colors = {"circles": "C0", "rows": "C1", "distilled": "C2", "flow matching": "C3"}
    for number, one in enumerate(reproductions):
        for series in one.series:
            axis = left if series.panel == "error to full attention" else right
            axis.plot(
                list(series.x),
                list(series.y),
                marker="o" if axis is left else None,
                color=colors[series.name],
                alpha=0.7,
                label=series.name if number == 0 else None,
            )
    left.set(xlabel="share of the map", ylabel="relative L2 to full attention")
    left.set_title("windows, and radius 2 trained")
    right.set(xlabel="step", ylabel="error of the velocity", title="training at radius 2")
    for axis in (left, right):
        axis.legend()
