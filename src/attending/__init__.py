"""attending: see, repair, replace and speed up attention, from one small core.

The names below are all there is to know to begin with; `help()` on each is its manual. They are
imported when first used, so that `import attending` costs what torch costs and no more.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from attending import conversion as conversion
    from attending import core as core
    from attending import decoding as decoding
    from attending import diffusion as diffusion
    from attending import interventions as interventions
    from attending import losses as losses
    from attending import nn as nn
    from attending import papers as papers
    from attending import probes as probes
    from attending import zoo as zoo
    from attending.core import bias as bias
    from attending.core import statistics as statistics
    from attending.core.block_plan import BlockPlan as BlockPlan
    from attending.core.blocks import block_sparse_attention as block_sparse_attention
    from attending.core.state import AttentionState as AttentionState
    from attending.core.state import attention_state as attention_state
    from attending.core.state import biased_attention_state as biased_attention_state
    from attending.core.state import merge as merge
    from attending.core.state import reweigh as reweigh
    from attending.diagnosis import Diagnosis as Diagnosis
    from attending.diagnosis import Thresholds as Thresholds
    from attending.diagnosis import diagnose as diagnose
    from attending.monitor import AttentionMonitor as AttentionMonitor
    from attending.nn.registration import register_attention as register_attention
    from attending.taps import AttentionCall as AttentionCall
    from attending.taps import TapError as TapError
    from attending.taps import tap as tap
    from attending.trials import Trial as Trial
    from attending.trials import trial as trial

__version__ = "0.1.0"

# name: (module, attribute in it, or None for the module itself)
_PUBLIC = {
    "core": ("attending.core", None),
    "nn": ("attending.nn", None),
    "losses": ("attending.losses", None),
    "interventions": ("attending.interventions", None),
    "conversion": ("attending.conversion", None),
    "decoding": ("attending.decoding", None),
    "diffusion": ("attending.diffusion", None),
    "bias": ("attending.core.bias", None),
    "papers": ("attending.papers", None),
    "probes": ("attending.probes", None),
    "zoo": ("attending.zoo", None),
    "statistics": ("attending.core.statistics", None),
    "AttentionState": ("attending.core.state", "AttentionState"),
    "attention_state": ("attending.core.state", "attention_state"),
    "biased_attention_state": ("attending.core.state", "biased_attention_state"),
    "merge": ("attending.core.state", "merge"),
    "BlockPlan": ("attending.core.block_plan", "BlockPlan"),
    "block_sparse_attention": ("attending.core.blocks", "block_sparse_attention"),
    "reweigh": ("attending.core.state", "reweigh"),
    "tap": ("attending.taps", "tap"),
    "AttentionCall": ("attending.taps", "AttentionCall"),
    "TapError": ("attending.taps", "TapError"),
    "diagnose": ("attending.diagnosis", "diagnose"),
    "Diagnosis": ("attending.diagnosis", "Diagnosis"),
    "Thresholds": ("attending.diagnosis", "Thresholds"),
    "trial": ("attending.trials", "trial"),
    "Trial": ("attending.trials", "Trial"),
    "AttentionMonitor": ("attending.monitor", "AttentionMonitor"),
    "register_attention": ("attending.nn.registration", "register_attention"),
}

__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str) -> object:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'attending' has no attribute {name!r}; see help(attending)")
    module_name, attribute = _PUBLIC[name]
    module = import_module(module_name)
    found = module if attribute is None else getattr(module, attribute)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted(__all__)
