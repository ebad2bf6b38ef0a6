"""Frame masks on wan-shapes: what they cost layer by layer, and what that does to videos.

8 frames of 64 tokens, 8 layers. A mask with k reference frames and a window of radius k keep
equally many pairs of frames, so every comparison is at equal cost:

- evenly spaced references (the paper's), the first k frames, random frames, a window, in the
  relative error of the output of attention, each layer alone;
- videos under the masks that the search chose, under the same k in all layers, and under windows of
  the same radius as the k that the search chose, in all layers or layer by layer;
- the chosen masks after a short distillation.

Calibration and distillation use scenes that no measured video shows.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from attending.conversion.distill_denoiser import distill_denoiser
from attending.core.block_plan import BlockPlan
from attending.core.blocks import block_statistics
from attending.core.state import attention_state
from attending.interventions.frame_reference_attention import FrameReferenceAttention
from attending.interventions.layer_search import LayerSearch, frame_planner, search_layer_masks
from attending.papers._video_trial import Method, VideoTrial, video_trial
from attending.sparse.frame_masks import frame_reference_mask, frame_window_mask
from attending.taps import AttentionCall, Proceed, tap
from attending.zoo.entry import ZooModel
from attending.zoo.shapes_motion import make_moving_scenes, render_videos
from attending.zoo.video_tasks import SHIFT

FRAMES, TOKENS = 8, 64
KS = (1, 2, 3, 4)
CALIBRATION_SEED, DISTILLATION_SEED = 500_000, 600_000  # of scenes; trials count from 0
Batch = dict[str, Any]


def noisy_batch(
    wan: ZooModel, videos: int, scene_seed: int, levels: Float[Tensor, " videos"], seed: int
) -> Batch:
    """Videos of scenes with so much noise as `levels` say, as the model is called on them."""
    scenes = make_moving_scenes(videos, scene_seed, FRAMES, min_objects=1, max_objects=2)
    clean = 2 * render_videos(scenes).transpose(1, 2) - 1
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed))
    sigma = levels.view(-1, 1, 1, 1, 1)
    with torch.no_grad():
        captions = wan.processor([scene.caption for scene in scenes])
    return {
        "hidden_states": sigma * noise + (1 - sigma) * clean,
        "timestep": 1000 * levels,
        "encoder_hidden_states": captions,
    }


def calibration(wan: ZooModel, videos: int, seed: int) -> Batch:
    """Videos at levels of noise that are spread over the sampler's."""
    share = (torch.arange(videos) + 0.5) / videos
    levels = SHIFT * share / (1 + (SHIFT - 1) * share)
    return noisy_batch(wan, videos, CALIBRATION_SEED + seed, levels, seed)


def mask_families(seed: int) -> dict[str, Bool[Tensor, "frames frames"]]:
    """Masks by name, `family:k`."""
    generator = torch.Generator().manual_seed(seed)
    masks = {}
    for k in KS:
        for placement in ("even", "first"):
            masks[f"{placement}:{k}"] = frame_reference_mask(FRAMES, k, placement=placement)
        for draw in ("random", "random2"):
            masks[f"{draw}:{k}"] = frame_reference_mask(
                FRAMES, k, placement="random", generator=generator
            )
        masks[f"window:{k}"] = frame_window_mask(FRAMES, k)
    return masks


def search(
    wan: ZooModel, batch: Batch, masks: Mapping[str, Tensor], probe: Any = "attention"
) -> LayerSearch:
    """The errors of all masks in all layers."""
    return search_layer_masks(
        wan.model,
        lambda: wan.model(**batch),
        {name: frame_planner(mask, TOKENS) for name, mask in masks.items()},
        threshold=0.0,
        metric="mse",
        probe=probe,
    )


def mean_errors(found: LayerSearch) -> dict[str, float]:
    """The mean relative error over the layers, by family and k; both random draws together."""
    layers = found.relative_mse.values()
    means = {name: sum(layer[name] for layer in layers) / len(layers) for name in found.candidates}
    for k in KS:
        means[f"random:{k}"] = (means[f"random:{k}"] + means.pop(f"random2:{k}")) / 2
    return means


def tile_mass(wan: ZooModel, batch: Batch) -> Float[Tensor, " distances"]:
    """Mean attention mass of a tile by the distance of its frames, over layers, heads and frames.

    A map that looks at all tokens alike has 1 / 8 everywhere.
    """
    plan = BlockPlan.from_block_mask(
        torch.ones(FRAMES, FRAMES, dtype=torch.bool),
        block_size=TOKENS,
        query_length=FRAMES * TOKENS,
        key_length=FRAMES * TOKENS,
    )
    tiles: list[Tensor] = []

    def look(call: AttentionCall, proceed: Proceed) -> Tensor:
        if not call.is_cross:
            scale = call.softmax_scale
            state = attention_state(call.query, call.key, call.value, scale=scale)
            mass = block_statistics(call.query, call.key, plan, state.lse, scale=scale).mass
            tiles.append(mass.unflatten(2, (FRAMES, TOKENS)).mean((0, 1, 3)))
        return proceed(call)

    with torch.no_grad(), tap(wan.model, look):
        wan.model(**batch)
    tile = torch.stack(tiles).mean(0)
    return torch.stack(
        [
            torch.cat([tile.diagonal(distance), tile.diagonal(-distance)]).mean()
            for distance in range(FRAMES)
        ]
    )


def distilled(
    wan: ZooModel, method: FrameReferenceAttention, seed: int, steps: int, rate: float
) -> nn.Module:
    """A copy of the model that has been trained under the masks for so many steps."""
    student: nn.Module = copy.deepcopy(wan.model)
    generator = torch.Generator().manual_seed(DISTILLATION_SEED + seed)

    def batches() -> Iterator[Batch]:
        for step in range(steps):
            share = torch.rand(2, generator=generator)
            levels = SHIFT * share / (1 + (SHIFT - 1) * share)
            scenes = DISTILLATION_SEED + 1000 * seed + step
            yield noisy_batch(wan, 2, scenes, levels, scenes)

    distill_denoiser(student, wan.model, batches(), around=method, learning_rate=rate)
    return student


@torch.no_grad()
def prediction_error(
    dense: nn.Module, model: nn.Module, method: FrameReferenceAttention, batch: Batch
) -> float:
    """Relative squared error of what a model predicts under masks, to what another does dense."""
    wanted = dense(**batch).sample
    with method(model):
        found = model(**batch).sample
    return float((found - wanted).square().sum() / wanted.square().sum())


def with_weights_of(student: nn.Module, method: Method) -> Method:
    """A method of the trial that computes with another model's weights, and puts the own back."""

    @contextmanager
    def enter(model: nn.Module) -> Iterator[Any]:
        own = copy.deepcopy(model.state_dict())
        model.load_state_dict(student.state_dict())
        try:
            assert method is not None
            context: AbstractContextManager[Any] = method(model)
            with context as run:
                yield run
        finally:
            model.load_state_dict(own)

    return enter


def masked(masks: Mapping[int | str, Tensor] | Tensor) -> FrameReferenceAttention:
    """The intervention on this model."""
    return FrameReferenceAttention(masks, TOKENS)


def run(
    wan: ZooModel,
    seed: int,
    *,
    calibration_videos: int,
    output_videos: int,
    output_ks: Sequence[int],
    uniform_k: int,
    videos: int,
    steps: int,
    distillation_steps: int,
    distillation_rate: float,
) -> tuple[dict[str, float], dict[str, Sequence[float]]]:
    """All numbers of one seed, and the curves: errors by k for each family, mass by distance."""
    masks = mask_families(seed)
    batch = calibration(wan, calibration_videos, seed)
    found = search(wan, batch, masks)
    means = mean_errors(found)
    numbers = {f"error_{name.replace(':', '_')}": value for name, value in means.items()}
    rising = [
        all(layer[f"even:{k}"] > layer[f"even:{k + 1}"] for k in KS[:-1])
        for layer in found.relative_mse.values()
    ]
    numbers["layers_rising"] = sum(rising) / len(rising)
    mass = tile_mass(wan, batch).tolist()
    numbers["diagonal_over_other"] = mass[0] / ((1 - mass[0]) / (FRAMES - 1))

    even = {f"even:{k}": masks[f"even:{k}"] for k in KS}
    chosen = _restricted(found, even)
    uniform = masks[f"even:{uniform_k}"]
    limit = chosen.densities[next(iter(chosen.densities))][f"even:{uniform_k}"]
    threshold = chosen.threshold_for(limit)
    picks = chosen.entries({name: name for name in even}, threshold)
    few = {f"even:{k}": even[f"even:{k}"] for k in output_ks}
    by_output = search(wan, calibration(wan, output_videos, seed), few, "output")
    searched = masked(chosen.entries(even, threshold))
    student = distilled(wan, searched, seed, distillation_steps, distillation_rate)
    trial = _painted(
        wan,
        seed,
        videos,
        steps,
        {
            "searched": searched,
            "searched_at_output": masked(by_output.entries(even, by_output.threshold_for(limit))),
            "uniform": masked(uniform),
            "first": masked(masks[f"first:{uniform_k}"]),
            "window": masked(masks[f"window:{uniform_k}"]),
            "window_by_layer": masked(
                {layer: masks[f"window:{name[-1]}"] for layer, name in picks.items()}
            ),
            "distilled": with_weights_of(student, searched),
        },
    )
    for name in trial.methods[1:]:
        for figure in ("psnr", "ssim", "relative_l2", "density"):
            numbers[f"{figure}_{name}"] = trial.mean(name, figure)
    numbers["threshold"] = threshold
    for k in KS:
        numbers[f"layers_with_{k}"] = sum(name == f"even:{k}" for name in picks.values())
    numbers["layers_dense"] = len(found.mse) - len(picks)
    for name, model in (("searched", wan.model), ("distilled", student)):
        error = prediction_error(wan.model, model, searched, batch)
        numbers[f"prediction_error_{name}"] = error
    curves: dict[str, Sequence[float]] = {
        family: [means[f"{family}:{k}"] for k in KS]
        for family in ("even", "first", "random", "window")
    }
    return numbers, curves | {"mass": mass}


def _restricted(found: LayerSearch, names: Mapping[str, object]) -> LayerSearch:
    """The search with some of its candidates only."""

    def some(table: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
        return {layer: {name: row[name] for name in names} for layer, row in table.items()}

    return replace(
        found,
        mse=some(found.mse),
        relative_mse=some(found.relative_mse),
        densities=some(found.densities),
        candidates={name: found.candidates[name] for name in names},
    )


def _painted(
    wan: ZooModel, seed: int, videos: int, steps: int, methods: Mapping[str, Method]
) -> VideoTrial:
    return video_trial(methods, seeds=(seed,), videos_per_seed=videos, steps=steps, wan=wan)
