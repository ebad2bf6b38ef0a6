"""Videos of wan-shapes with PAROAttention, and with what it has to beat at the same density.

Calibrated on captions of other scenes than those that are painted. All static masks are made from
the same two calibration runs:

- `fhw`: static masks with the tokens in the order of the model, so the order is all that differs.
- `paro`: orders by the corrected score, the method as this library has it.
- `literal`: orders by the score as it is printed.
- `mass`: orders by the attention in the fullest blocks; ours.
- `window`: blocks near the diagonal, for all heads, steps and videos.

And with all blocks, quantised: `block` (64 x 64 cells of the map share a scale) in the orders of
`paro`, `fhw` the same without an order, `row` (a query's keys share one), and `small`, `block` with
blocks as small as those of the masks. 64 x 64 cells are more than one of our rows has, and fewer
than one of the paper's.
"""

from collections.abc import Sequence

from attending.core.block_plan import BlockPlan
from attending.interventions.block_sparse import BlockSparse, Planner
from attending.interventions.paro_attention import PAROAttention, watch
from attending.papers._video_trial import Method, VideoTrial, video_trial
from attending.sparse.axis_order import axis_orders
from attending.sparse.paro import Quant
from attending.sparse.paro_calibration import PAROCalibration
from attending.sparse.window import window_plan
from attending.zoo.entry import ZooModel
from attending.zoo.shapes_motion import make_moving_scenes
from attending.zoo.video_tasks import SIDE, make_videos

CALIBRATION_SEED = 9000  # scenes from here on are not painted in the trial
MASKS = ("fhw", "paro", "literal", "mass")


def tokens_of(wan: ZooModel, frames: int) -> tuple[int, int, int]:
    """The grid of tokens of a video."""
    time, height, width = wan.model.config.patch_size
    return frames // time, SIDE // height, SIDE // width


def calibrate(
    wan: ZooModel,
    seed: int,
    *,
    captions: int,
    frames: int,
    steps: int,
    guidance_scale: float,
    block_size: int,
    eps: float,
    sigma: float,
    density: float,
    timestep_bins: int,
) -> dict[str, PAROCalibration]:
    """The calibrations of `MASKS`, all from the same two runs; `density` is that of `mass`."""
    scenes = make_moving_scenes(
        captions, CALIBRATION_SEED + seed, frames, min_objects=1, max_objects=2
    )

    def sample() -> None:
        make_videos(
            wan,
            [scene.caption for scene in scenes],
            seed=1000 * (CALIBRATION_SEED + seed),
            frames=frames,
            steps=steps,
            guidance_scale=guidance_scale,
        )

    def calibration(name: str) -> PAROCalibration:
        return PAROCalibration(
            tokens_of(wan, frames),
            steps=steps,
            block_size=block_size,
            eps=eps,
            sigma=sigma,
            density=density,
            timestep_bins=timestep_bins,
            criterion="mass" if name == "mass" else "literal" if name == "literal" else "corrected",
            candidates=["FHW"] if name == "fhw" else None,
            keep_last=False,  # no block is a part of one here
        )

    found = {name: calibration(name) for name in MASKS}
    watch(wan.model, sample, *found.values())
    return found


def methods_of(
    wan: ZooModel,
    calibrations: dict[str, PAROCalibration],
    densities: Sequence[float],
    *,
    frames: int,
    block_size: int,
) -> dict[str, Method]:
    """By name: `paro_50` is that with half of all blocks, `int8_row` quantised with all."""
    time, height, width = tokens_of(wan, frames)
    tokens = time * height * width
    blocks = -(-tokens // block_size)
    methods: dict[str, Method] = {}
    for density in densities:
        percent = round(100 * density)
        for name, calibration in calibrations.items():
            methods[f"{name}_{percent}"] = PAROAttention(calibration.plan(density))
        plan = window_plan(tokens, tokens, block_size=block_size, width=round(density * blocks))
        methods[f"window_{percent}"] = BlockSparse(_always(plan))
    ordered, plain = (calibrations[name].plan(1.0) for name in ("paro", "fhw"))
    both: tuple[Quant, Quant] = ("int8", "int4")
    for bits in both:
        methods |= {
            f"{bits}_block": PAROAttention(ordered, quant=bits),
            f"{bits}_small": PAROAttention(ordered, quant=bits, quant_block=block_size),
            f"{bits}_fhw": PAROAttention(plain, quant=bits),
            f"{bits}_row": PAROAttention(plain, quant=bits, groups="row"),
        }
    return methods


def _always(plan: BlockPlan) -> Planner:
    return lambda call, moment: plan


def measure(
    wan: ZooModel,
    seed: int,
    *,
    videos: int,
    calibration_captions: int,
    frames: int,
    steps: int,
    guidance_scale: float,
    block_size: int,
    densities: Sequence[float],
    eps_of_uniform: float,
    sigma: float,
    timestep_bins: int,
) -> tuple[dict[str, float], VideoTrial]:
    """All numbers of one seed: of the scenes, the noise and the calibration.

    `eps_of_uniform` is eps in multiples of a uniform map's entries.
    """
    time, height, width = tokens_of(wan, frames)
    calibrations = calibrate(
        wan,
        seed,
        captions=calibration_captions,
        frames=frames,
        steps=steps,
        guidance_scale=guidance_scale,
        block_size=block_size,
        eps=eps_of_uniform / (time * height * width),
        sigma=sigma,
        density=min(densities),
        timestep_bins=timestep_bins,
    )
    methods = methods_of(wan, calibrations, densities, frames=frames, block_size=block_size)
    trial = video_trial(
        methods,
        seeds=(seed,),
        videos_per_seed=videos,
        steps=steps,
        frames=frames,
        guidance_scale=guidance_scale,
        wan=wan,
    )
    numbers: dict[str, float] = {}
    for name in methods:
        for figure in ("psnr", "ssim", "relative_l2", "density"):
            numbers[f"{figure}_{name}"] = trial.mean(name, figure)
    for name in ("paro", "literal", "mass"):
        plan = calibrations[name].plan()
        chosen = [order for layer in plan.layers for order in plan.names(layer)]
        for order in axis_orders(plan.grid):
            numbers[f"heads_{name}_{order}"] = chosen.count(order) / len(chosen)
    for density in densities:
        percent = round(100 * density)
        numbers[f"cpu_ratio_paro_{percent}"] = trial.mean(f"paro_{percent}", "cpu_ratio")
        numbers[f"gain_of_order_{percent}"] = (
            numbers[f"psnr_paro_{percent}"] - numbers[f"psnr_fhw_{percent}"]
        )
    for bits in ("int8", "int4"):
        numbers[f"gain_of_blocks_{bits}"] = (
            numbers[f"psnr_{bits}_block"] - numbers[f"psnr_{bits}_row"]
        )
    return numbers, trial
