"""The caches that diffusers itself has, as interventions: they count, and they clean up.

    with FirstBlockCache(threshold=0.1)(pipeline.transformer) as run:
        pipeline(prompt)

`PyramidAttentionBroadcast` and `FirstBlockCache` switch on diffusers' hooks, so the method is
theirs, and they work on the models that diffusers supports. Added here:

- a model called without `cache_context` works: the calls at one timestep are told apart;
- guidance in separate calls works with Pyramid Attention Broadcast, too. Diffusers keeps one state
  for both, so that the call without the condition would be given the attention of the one with it;
- each generation begins anew, whether or not a pipeline says so;
- on exit the model is what it was, without the registries that `disable_cache` leaves behind.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torch import nn

from attending.interventions._cache_forwards import Forwards, Proceed, is_diffusers_model
from attending.interventions._cache_loop import CacheLoop
from attending.interventions._cache_run import Branch, CacheRun
from attending.interventions.cache_schedule import check_whole
from attending.interventions.feature_cache import caching
from attending.interventions.intervention import Counted


@dataclass(frozen=True)
class PyramidAttentionBroadcast:
    """Reuse the outputs of attention for a few steps in the middle of the sampling: diffusers' own.

    Within `timesteps`, each attention layer is computed at every `spatial`-th (`temporal`-th,
    `cross`-th) call and its output reused at the others; outside, always. Feed-forward layers are
    always computed.

    Source: PAB (Zhao et al., arXiv 2408.12588), `diffusers.PyramidAttentionBroadcastConfig`.

    Attributes:
        spatial: for self-attention of the usual blocks; None leaves it alone.
        temporal: for attention over time, in models that have it apart.
        cross: for cross-attention.
        timesteps: between which to reuse, as the model is given them: for Flux, which takes them in
            [0, 1], (0.1, 0.8).

    Raises:
        ValueError: if no kind of attention is chosen, for numbers below 1, or an empty range.
    """

    spatial: int | None = 2
    temporal: int | None = None
    cross: int | None = None
    timesteps: tuple[float, float] = (100.0, 800.0)

    def __post_init__(self) -> None:
        chosen = {"spatial": self.spatial, "temporal": self.temporal, "cross": self.cross}
        for name, number in chosen.items():
            if number is not None:
                check_whole(name, number, 1)
        if all(number is None for number in chosen.values()):
            raise ValueError("spatial, temporal, cross: expected at least one number, got None.")
        low, high = self.timesteps
        if not low < high:
            raise ValueError(f"timesteps: expected a range (low, high), got {self.timesteps}.")

    def __call__(self, model: nn.Module) -> Counted[CacheRun]:
        """The context manager within which attention of the model is reused.

        Args:
            model: one of diffusers, with no other cache enabled.

        Raises:
            ValueError: for another model, or if diffusers finds no such attention in it.

        Warns:
            InterventionWarning: on exit, if nothing was reused.
        """
        _check_model(model)

        def install(run: CacheRun, forwards: Forwards, loop: CacheLoop) -> None:
            from diffusers import PyramidAttentionBroadcastConfig
            from diffusers.hooks.pyramid_attention_broadcast import PyramidAttentionBroadcastState

            run.unit = "calls of attention"
            config = PyramidAttentionBroadcastConfig(
                spatial_attention_block_skip_range=self.spatial,
                temporal_attention_block_skip_range=self.temporal,
                cross_attention_block_skip_range=self.cross,
                spatial_attention_timestep_skip_range=self.timesteps,
                temporal_attention_timestep_skip_range=self.timesteps,
                cross_attention_timestep_skip_range=self.timesteps,
                current_timestep_callback=lambda: loop.timestep,
            )
            hooks = _enabled(model, config, forwards, ("pyramid_attention_broadcast",))
            states: dict[Branch, list[Any]] = {}

            def begin() -> None:
                if loop.branch not in states:
                    states[loop.branch] = [PyramidAttentionBroadcastState() for _ in hooks]
                for (_, hook), state in zip(hooks, states[loop.branch], strict=True):
                    hook.state = state

            def was_reused(hook: Any, before: Any, output: Any) -> bool:
                return before is not None and output is before

            _count(run, forwards, loop, hooks, lambda hook: hook.state.cache, was_reused)
            loop.on_begin(begin)
            loop.on_restart(states.clear)

        return caching(model, install, name="PyramidAttentionBroadcast")


@dataclass(frozen=True)
class FirstBlockCache:
    """Compute the first block, and reuse what all others add while it hardly changes: diffusers'.

    With r = output - input of the first block: the other blocks are computed when

        mean |r - r'| / mean |r'| > threshold

    where r' is that of the last step that was computed. Not accumulated, unlike TeaCache's rule.

    Source: ParaAttention's First Block Cache, `diffusers.FirstBlockCacheConfig`. In diffusers 0.42
    that fails in Flux2, with a TypeError of its own; `TeaCache` works there.

    Attributes:
        threshold: more is faster.

    Raises:
        ValueError: for a negative threshold.
    """

    threshold: float = 0.05

    def __post_init__(self) -> None:
        if not self.threshold >= 0:
            raise ValueError(f"threshold: expected at least 0, got {self.threshold}.")

    def __call__(self, model: nn.Module) -> Counted[CacheRun]:
        """The context manager within which all blocks but the first are reused.

        Args:
            model: one of diffusers that its First Block Cache supports, with no other cache.

        Raises:
            ValueError: for another model.

        Warns:
            InterventionWarning: on exit, if nothing was reused.
        """
        _check_model(model)

        def install(run: CacheRun, forwards: Forwards, loop: CacheLoop) -> None:
            from diffusers import FirstBlockCacheConfig

            names = ("fbc_leader_block_hook", "fbc_block_hook")
            config = FirstBlockCacheConfig(threshold=self.threshold)
            hooks = _enabled(model, config, forwards, names)
            leader = next(hook for _, hook in hooks if hasattr(hook, "threshold"))
            opened = ExitStack()
            cached: Any = model
            forwards.callback(opened.close)

            def begin() -> None:
                if loop.context is None:
                    opened.enter_context(cached.cache_context(f"call {loop.branch}"))

            def was_reused(hook: Any, before: Any, output: Any) -> bool:
                return hook is not leader and not leader.state_manager.get_state().should_compute

            _count(run, forwards, loop, hooks, lambda hook: None, was_reused)
            loop.on_begin(begin)
            loop.on_end(opened.close, failed_too=True)
            # Its own reset would forget the context, too, which is that of the call that begins.
            loop.on_restart(leader.state_manager._state_cache.clear)

        return caching(model, install, name="FirstBlockCache")


Hooked = list[tuple[nn.Module, Any]]


def _check_model(model: nn.Module) -> None:
    if not is_diffusers_model(model) or not hasattr(model, "enable_cache"):
        raise ValueError(
            f"model: expected a model of diffusers that has enable_cache, got "
            f"{type(model).__name__}. TeaCache, ProfilingCache and FORA work on other models."
        )


def _enabled(model: nn.Module, config: Any, forwards: Forwards, names: tuple[str, ...]) -> Hooked:
    """Enable a cache of diffusers for as long as the forwards are open; returns its hooks."""
    forwards.keep_clean(*model.modules())
    cached: Any = model
    cached.enable_cache(config)
    forwards.callback(cached.disable_cache)
    hooks = [
        (module, hook)
        for module in model.modules()
        if (registry := module.__dict__.get("_diffusers_hook")) is not None
        for name, hook in registry.hooks.items()
        if name in names
    ]
    if not hooks:
        raise ValueError(
            f"model: diffusers found nothing in {type(model).__name__} that "
            f"{type(config).__name__} applies to. Use another cache."
        )
    return hooks


def _count(
    run: CacheRun,
    forwards: Forwards,
    loop: CacheLoop,
    hooks: Hooked,
    look: Callable[[Any], Any],
    was_reused: Callable[[Any, Any, Any], bool],
) -> None:
    """Count what the hooks of diffusers compute, from around them."""
    reused: list[bool] = []

    def stand_in(hook: Any) -> Any:
        def counted(proceed: Proceed, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            before = look(hook)
            output = proceed(*args, **kwargs)
            skipped = was_reused(hook, before, output)
            run.total += 1
            run.computed += not skipped
            reused.append(skipped)
            return output

        return counted

    def begin_generation() -> None:
        run.generations += 1

    for module, hook in hooks:
        forwards.around(module, stand_in(hook))
    loop.on_restart(begin_generation)
    loop.on_begin(reused.clear)
    loop.on_end(lambda: run.called(loop.branch, loop.step, any(reused)))
