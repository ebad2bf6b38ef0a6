"""Training-free edits of a running model: one file per method.

An intervention is a dataclass of its hyper-parameters. Called with a model it is a context manager:
within the block the model is changed, afterwards it is bit for bit what it was. The block yields a
`Run`, which counts what was changed, and warns if that was nothing.

    with AttentionCalibration(heads={2: (0, 3)})(model) as run:
        model.generate(**inputs)
    print(run)

Blocks nest like functions: the outer one edits first, and the inner one edits what it made.
`save_settings` and `load_settings` keep a method, and what was calibrated of it, as JSON.

- `attending.interventions.intervention`: what all of them have in common, and how to write one.
- `attending.interventions.edit`: `edit_masses`, from groups of keys to an edited call.
- `attending.interventions.settings`: methods on disk.
- `attending.interventions.sparse_run`: what the methods that leave out blocks have in common.
- `attending.interventions.block_sparse`: self-attention over the blocks that a planner chooses.
- `attending.interventions.sparsed`: blocks chosen once in a denoising loop and reused (SparseD).
- `attending.interventions.rectified_attention`: a few blocks, the rest estimated from pooled ones.
- `attending.interventions.circular_window`: image tokens look at a circle around them (CLEAR).
- `attending.interventions.frame_reference_attention`: frames of a video see a few others, by layer;
  `layer_search` finds the sparsest plan that each layer can afford (Efficient-vDiT).
- `attending.interventions.paro_attention`: an order of the tokens for each head, and fixed blocks.
- `attending.interventions.attention_calibration`: damp the attention sinks of a prompt (ACT).
- `attending.interventions.head_selection`: which heads are worth calibrating, from data.
- `attending.interventions.visual_attention_redistribution`: from sinks to the image (VAR).
- `attending.interventions.visual_token_pruning`: fewer image tokens.
- `attending.interventions.logit_scaling`: attention at other lengths than those of training.
- `attending.interventions.hierarchical_attention`: attention tied along a tree, in chosen layers of
  a pretrained encoder.
- `attending.interventions.feature_cache`: reuse features from step to step of a denoiser
  (ProfilingDiT, TeaCache); `output_cache` (FORA) and `diffusers_caches` stand beside it, and
  `cache_schedule` and `drift_schedule` say when to compute, `drift_calibration` sets TeaCache.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from attending.interventions.attention_calibration import (
        AttentionCalibration as AttentionCalibration,
    )
    from attending.interventions.block_sparse import BlockSparse as BlockSparse
    from attending.interventions.cache_schedule import CacheSchedule as CacheSchedule
    from attending.interventions.cache_schedule import DecreasingSteps as DecreasingSteps
    from attending.interventions.cache_schedule import FixedSteps as FixedSteps
    from attending.interventions.cache_schedule import UniformSteps as UniformSteps
    from attending.interventions.circular_window import CircularWindow as CircularWindow
    from attending.interventions.diffusers_caches import FirstBlockCache as FirstBlockCache
    from attending.interventions.diffusers_caches import (
        PyramidAttentionBroadcast as PyramidAttentionBroadcast,
    )
    from attending.interventions.drift_calibration import calibrate_drift as calibrate_drift
    from attending.interventions.drift_schedule import DriftSteps as DriftSteps
    from attending.interventions.edit import edit_masses as edit_masses
    from attending.interventions.feature_cache import ProfilingCache as ProfilingCache
    from attending.interventions.feature_cache import TeaCache as TeaCache
    from attending.interventions.frame_reference_attention import (
        FrameReferenceAttention as FrameReferenceAttention,
    )
    from attending.interventions.head_selection import select_heads as select_heads
    from attending.interventions.hierarchical_attention import (
        HierarchicalAttention as HierarchicalAttention,
    )
    from attending.interventions.intervention import Intervention as Intervention
    from attending.interventions.intervention import InterventionWarning as InterventionWarning
    from attending.interventions.intervention import Run as Run
    from attending.interventions.intervention import with_counters as with_counters
    from attending.interventions.layer_search import search_layer_masks as search_layer_masks
    from attending.interventions.logit_scaling import LogitScaling as LogitScaling
    from attending.interventions.output_cache import FORA as FORA
    from attending.interventions.paro_attention import PAROAttention as PAROAttention
    from attending.interventions.rectified_attention import RectifiedAttention as RectifiedAttention
    from attending.interventions.settings import load_settings as load_settings
    from attending.interventions.settings import save_settings as save_settings
    from attending.interventions.sparse_run import SparseRun as SparseRun
    from attending.interventions.sparse_run import sparse_calls as sparse_calls
    from attending.interventions.sparsed import SparseD as SparseD
    from attending.interventions.visual_attention_redistribution import (
        VisualAttentionRedistribution as VisualAttentionRedistribution,
    )
    from attending.interventions.visual_token_pruning import (
        VisualTokenPruning as VisualTokenPruning,
    )
    from attending.interventions.visual_token_pruning import (
        prune_visual_tokens as prune_visual_tokens,
    )

_MODULES = {
    "AttentionCalibration": "attention_calibration",
    "BlockSparse": "block_sparse",
    "CacheSchedule": "cache_schedule",
    "CircularWindow": "circular_window",
    "DecreasingSteps": "cache_schedule",
    "DriftSteps": "drift_schedule",
    "FORA": "output_cache",
    "FirstBlockCache": "diffusers_caches",
    "FixedSteps": "cache_schedule",
    "FrameReferenceAttention": "frame_reference_attention",
    "HierarchicalAttention": "hierarchical_attention",
    "Intervention": "intervention",
    "InterventionWarning": "intervention",
    "LogitScaling": "logit_scaling",
    "PAROAttention": "paro_attention",
    "ProfilingCache": "feature_cache",
    "PyramidAttentionBroadcast": "diffusers_caches",
    "RectifiedAttention": "rectified_attention",
    "Run": "intervention",
    "SparseD": "sparsed",
    "SparseRun": "sparse_run",
    "TeaCache": "feature_cache",
    "UniformSteps": "cache_schedule",
    "VisualAttentionRedistribution": "visual_attention_redistribution",
    "VisualTokenPruning": "visual_token_pruning",
    "calibrate_drift": "drift_calibration",
    "edit_masses": "edit",
    "load_settings": "settings",
    "prune_visual_tokens": "visual_token_pruning",
    "save_settings": "settings",
    "search_layer_masks": "layer_search",
    "select_heads": "head_selection",
    "sparse_calls": "sparse_run",
    "with_counters": "intervention",
}

__all__ = list(_MODULES)


def __getattr__(name: str) -> object:
    """A name from its module, loaded when it is first used."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; see help({__name__})")
    found = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted([*__all__, *globals()])
