"""Sparse attention and feature caches side by side: videos of wan-shapes, and the time they take.

    python benchmarks/videos.py [--quick] [--frames 16] [--steps 20] [--seeds 0 1 2]
    python benchmarks/videos.py --forward     # only single forwards: windows over plain

All paint the same captions from the same noise. The sparse methods keep about the same share of the
blocks of every map (`density` says how much it was), the caches compute about half of the blocks of
the model, "half the steps" takes half of the sampler's steps; "window" is blocks near the diagonal.
PSNR, SSIM and relative error are against the videos of the plain model, which is no measure of how
good those are. Times are of the whole sampling over the plain one's from the same seed, processor
time of one thread. At this size (64 tokens a frame) attention is a small part of the model, so
little can be saved by making it sparse: see `sparse.py` for the attention alone.
"""

import argparse
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _measure import RESULTS, interleaved, machine, ratio, write
from rich.console import Console
from torch.nn.functional import scaled_dot_product_attention

from attending import zoo
from attending.interventions.block_sparse import BlockSparse
from attending.interventions.cache_schedule import UniformSteps
from attending.interventions.circular_window import CircularWindow
from attending.interventions.diffusers_caches import FirstBlockCache, PyramidAttentionBroadcast
from attending.interventions.feature_cache import ProfilingCache, TeaCache
from attending.interventions.frame_reference_attention import FrameReferenceAttention
from attending.interventions.output_cache import FORA
from attending.interventions.paro_attention import PAROAttention
from attending.interventions.rectified_attention import RectifiedAttention
from attending.interventions.sparsed import SparseD
from attending.papers._video_trial import VideoTrial, video_trial
from attending.sparse.frame_masks import frame_reference_mask
from attending.sparse.window import window_plan
from attending.taps import tap
from attending.zoo.entry import ZooModel
from attending.zoo.shapes_motion import make_moving_scenes
from attending.zoo.video_tasks import make_videos

TOKENS = 64  # a frame
BLOCK = 32
CALIBRATION_SEED = 9000  # of scenes that are not painted
HALF = "half the steps"


def sparse_methods(wan: ZooModel, frames: int, steps: int, share: float) -> dict[str, Any]:
    """Methods that keep about this share of the blocks of a map, the warm-up of none of them."""
    tokens = frames * TOKENS
    blocks = tokens // BLOCK
    plan = window_plan(tokens, tokens, block_size=BLOCK, width=round(share * blocks))
    references = min(
        range(1, frames),
        key=lambda k: abs(float(frame_reference_mask(frames, k).float().mean()) - share),
    )
    scene = make_moving_scenes(1, CALIBRATION_SEED, frames, min_objects=2, max_objects=2)[0]
    sample = partial(
        make_videos,
        wan,
        [scene.caption],
        seed=CALIBRATION_SEED,
        frames=frames,
        steps=steps,
        guidance_scale=3.0,
    )
    paro = PAROAttention.calibrate(
        wan.model,
        sample,
        (frames, 8, 8),
        steps=steps,
        density=share,
        block_size=BLOCK,
        eps=0.1 / tokens,
        criterion="mass",
    )
    rectified = partial(
        RectifiedAttention,
        block_size=BLOCK,
        drop=1 - share,
        top_p=None,
        dense_layers=0,
        dense_steps=0,
        neighbors=False,
    )
    return {
        "window": BlockSparse(lambda call, moment: plan),
        "SparseD": SparseD(skip=0.0, select=share, block_size=BLOCK, steps=steps),
        "kept blocks alone": rectified(rectify="none"),
        "Rectified SpaAttn": rectified(rectify="ipar+gapr"),
        "rectified by rows": rectified(rectify="row"),
        "PAROAttention": paro,
        f"Efficient-vDiT, {references} frames": FrameReferenceAttention(
            frame_reference_mask(frames, references), tokens_per_frame=TOKENS
        ),
        "CLEAR, radius 4": CircularWindow(radius=4.0),
    }


def caches(steps: int) -> dict[str, Any]:
    """Caches that compute about half of the blocks."""
    uniform = UniformSteps(2, warmup=2)
    return {
        "all blocks, every 2nd step": ProfilingCache(None, uniform),
        "TeaCache": TeaCache(threshold=0.08, until=steps - 1, warmup=2),
        "FORA": FORA(2, warmup=2),
        "PAB": PyramidAttentionBroadcast(spatial=2, timesteps=(0.0, 900.0)),
        "First Block Cache": FirstBlockCache(threshold=0.1),
    }


def figures_of(trial: VideoTrial) -> dict[str, Any]:
    """Means over the seeds, and the PSNR of each."""
    found = {}
    for name in trial.methods:
        one: dict[str, Any] = {
            figure: trial.mean(name, figure)
            for figure in ("psnr", "ssim", "relative_l2", "cpu_ratio")
        }
        one["psnr of seeds"] = trial.values(name, "psnr")
        if all("density" in score.stats for score in trial.scores if score.method == name):
            one["density"] = trial.mean(name, "density")
        found[name] = one
    return found


def forwards(wan: ZooModel, frames: int, rounds: int) -> dict[str, float]:
    """A forward within windows, and the self-attention of one alone, over a plain forward."""
    tokens, generator = frames * TOKENS, torch.Generator().manual_seed(0)
    inputs = {
        "hidden_states": torch.randn(2, 3, frames, 32, 32, generator=generator),
        "timestep": torch.full((2,), 500.0),
        "encoder_hidden_states": wan.processor(["a red circle on a plain background."] * 2),
    }
    with tap(wan.model) as calls, torch.no_grad():
        wan.model(**inputs)
    maps = [(call.query, call.key, call.value) for call in calls if not call.is_cross]

    def within(method: Any) -> None:
        with nullcontext() if method is None else method(wan.model):
            wan.model(**inputs)

    def attention() -> None:
        for query, key, value in maps:
            scaled_dot_product_attention(query, key, value)

    jobs: dict[str, Callable[[], object]] = {"plain": lambda: within(None)}
    for block, width in ((32, 12), (64, 6), (128, 3), (64, 3)):
        plan = window_plan(tokens, tokens, block_size=block, width=width * frames // 16)
        method = BlockSparse(lambda call, moment, plan=plan: plan)
        jobs[f"density {plan.density:.2f}, blocks of {block}"] = partial(within, method)
    jobs["self-attention alone"] = attention
    with torch.no_grad():
        seconds = interleaved(jobs, rounds)
    return {name: ratio(seconds, name, "plain") for name in jobs}


def main() -> None:
    """Paint, print, write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few steps: does it run at all?")
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--share", type=float, default=0.375, help="of blocks to keep")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--videos", type=int, default=2, help="for each seed")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="results/benchmarks/videos.json by default")
    parser.add_argument("--forward", action="store_true", help="only time single forwards")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.quick:
        arguments.frames, arguments.steps, arguments.seeds, arguments.videos = 8, 4, [0], 1
    console = Console()
    console.print(machine())
    out = arguments.out or RESULTS / "videos.json"
    wan = zoo.load("wan-shapes")
    figures: dict[str, Any] = {
        "forward over plain": forwards(wan, arguments.frames, 1 if arguments.quick else 7)
    }
    console.print(figures)
    if arguments.forward:
        write("videos", figures, out)
        return
    methods = sparse_methods(wan, arguments.frames, arguments.steps, arguments.share)
    methods |= caches(arguments.steps) | {HALF: None}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a cache that reused nothing shows it in its density
        trial = video_trial(
            methods,
            seeds=arguments.seeds,
            videos_per_seed=arguments.videos,
            steps=arguments.steps,
            frames=arguments.frames,
            steps_of={HALF: arguments.steps // 2},
            wan=wan,
        )
    console.print(trial.table())
    settings = {name: getattr(arguments, name) for name in ("frames", "steps", "share", "seeds")}
    write("videos", figures | {"settings": settings, "figures": figures_of(trial)}, out)
    console.print(f"wrote {out}")


if __name__ == "__main__":
    main()
