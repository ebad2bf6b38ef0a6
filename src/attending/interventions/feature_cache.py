"""Feature caches for denoisers: what hardly changes from step to step is not computed anew.

Consecutive steps of a sampler ask a diffusion transformer nearly the same question. A cache lets
most steps reuse what parts of the model computed at an earlier one:

    with ProfilingCache(blocks=(0, 2, 4, 5), schedule=UniformSteps(6, warmup=6))(model) as run:
        pipeline(prompt)
    print(run)      # ProfilingCache: reused in 36 of 50 calls of the model; computed 992 of ...

| method | reuses | when |
| --- | --- | --- |
| `ProfilingCache` | what chosen blocks add to the states | any `CacheSchedule` |
| `TeaCache` | what all blocks add | `DriftSteps`, by the modulated input of the first block |
| `FORA` | outputs of attention and feed-forward, gates computed anew | every `interval` steps |
| `PyramidAttentionBroadcast` | outputs of attention | diffusers' own hook |
| `FirstBlockCache` | what all blocks but the first add | diffusers' own hook |

The first two live here, `FORA` in `attending.interventions.output_cache` and the last two, which
switch on what diffusers has, in `attending.interventions.diffusers_caches`. All work on any model
of diffusers, and the first three on any model with a `ModuleList` of blocks: of one stream of
states or two (SD3, Flux, HunyuanVideo), with guidance in separate calls or in one batch, with a
sampler of any order. Each generation begins with nothing stored. What is stored is detached:
gradients flow through the states, not through what was reused.

Memory: one tensor of the size of the states for each run of consecutive blocks, each stream and
each branch of guidance. Limit: with a share c of the steps computed, no cache is faster than 1 / c.

Source: ProfilingDiT (Ma et al., arXiv 2504.03140) and its code; TeaCache (Liu et al., arXiv
2411.19108) and its code.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

from attending.interventions._block_layout import stacks_of
from attending.interventions._cache_forwards import Forwards, Proceed, refuse_compiled
from attending.interventions._cache_loop import CacheLoop
from attending.interventions._cache_run import CacheRun
from attending.interventions._drift_signal import block_input, modulated_input
from attending.interventions._residual_cache import ResidualCache, Signal
from attending.interventions.cache_schedule import (
    CacheSchedule,
    DecreasingSteps,
    FixedSteps,
    UniformSteps,
)
from attending.interventions.drift_schedule import DriftSteps
from attending.interventions.intervention import Counted

AnySchedule = FixedSteps | UniformSteps | DecreasingSteps | DriftSteps | CacheSchedule

BlockSignal = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Tensor]
"""A signal of your own: gets the first block and its arguments, returns a tensor."""

SIGNALS: dict[str, Signal] = {"modulated": modulated_input, "input": block_input}


@dataclass(frozen=True)
class ProfilingCache:
    """Reuse what some blocks add to the states: the cache of ProfilingDiT.

    Of each maximal run of consecutive blocks [a..b] among `blocks` it stores, at the steps that are
    computed,

        Delta = output of b - input of a            (eq. 9; one for each stream)

    and at the others adds Delta to the input of a, skipping the run; the other blocks are computed.
    Delta is overwritten, not accumulated: eq. 10 of the paper adds up, its code does not.

    Which blocks: ProfilingDiT caches those that attend to the background;
    `attending.probes.profile_blocks` finds them. Its constants are, for Wan2.1-14B, blocks (0, 2-7,
    10-20, 25-32, 37, 38) with `UniformSteps(6, warmup=6)`; for HunyuanVideo two caches, nested:

        outer = ProfilingCache(range(6, 20), UniformSteps(6, warmup=6), stack="transformer_blocks")
        inner = ProfilingCache(single, FixedSteps((6, 18, 26, 32, 38, 42, 46, 48), warmup=6),
                               stack="single_transformer_blocks")
        with outer(model), inner(model):
            ...

    Differs from the official code: a run may begin at block 0; the step after the warm-up is always
    computed; nothing is written in place; one block of a dual-stream model is cached as well as
    several; nothing is left over from the generation before.

    Attributes:
        blocks: which, as numbers in the list of blocks; None for all. None at all changes nothing.
        schedule: when to compute.
        stack: the name of the ModuleList; None if the model has only one of the usual names.
        signal: for schedules by drift, as in `TeaCache`.
        steps: of one generation in each branch; needed only for models whose forward takes no
            `timestep`.

    Raises:
        ValueError: for blocks that are no whole numbers from 0.
    """

    blocks: tuple[int, ...] | None
    schedule: AnySchedule = field(default_factory=lambda: UniformSteps(6, warmup=6))
    stack: str | None = None
    signal: Literal["modulated", "input"] | BlockSignal = "modulated"
    steps: int | None = None

    def __post_init__(self) -> None:
        if self.blocks is not None:
            object.__setattr__(self, "blocks", tuple(self.blocks))
            for block in self.blocks:
                if isinstance(block, bool) or not isinstance(block, int) or block < 0:
                    raise ValueError(f"blocks: expected whole numbers from 0, got {block!r}.")
        if not isinstance(self.schedule, CacheSchedule):
            raise ValueError(
                "schedule: expected a CacheSchedule such as UniformSteps(6), got "
                f"{self.schedule!r}."
            )
        _signal(self.signal)

    def __call__(self, model: nn.Module) -> Counted[CacheRun]:
        """The context manager within which blocks of the model are reused.

        Args:
            model: the denoiser, `pipeline.transformer`.

        Raises:
            ValueError: if its blocks cannot be found, or it has not so many, or it is compiled, or
                nothing would tell one generation from the next.

        Warns:
            InterventionWarning: on exit, if nothing was reused.
        """
        refuse_compiled(model)
        names = None if self.stack is None else (self.stack,)
        stacks = stacks_of(model, names)
        if len(stacks) > 1 and self.blocks is not None:
            raise ValueError(
                f"stack: expected to be told which list of blocks is meant, one of "
                f"{', '.join(stacks)}, as {type(model).__name__} has {len(stacks)}; got None. Nest "
                "two caches to have blocks of two."
            )
        cached = {name: _chosen(self.blocks, len(stack), name) for name, stack in stacks.items()}

        def install(run: CacheRun, forwards: Forwards, loop: CacheLoop) -> None:
            signal = _signal(self.signal)
            ResidualCache(model, stacks, cached, self.schedule, signal, run).install(forwards, loop)

        return caching(model, install, name="ProfilingCache", steps=self.steps)


@dataclass(frozen=True)
class TeaCache:
    """Reuse what all blocks add, until the model's input has drifted far enough.

    `DriftSteps` has the rule. The signal is what the first attention of the first block is given:
    the states, normalised and modulated by the time. Each branch of guidance has its own drift, as
    in the code for Wan2.1.

    Attributes:
        threshold: of the accumulated drift: more is faster. In the paper's units (with its
            coefficients) 0.1 to 0.2.
        coefficients: of the polynomial that turns the drift of the signal into that of the output,
            highest power first. They belong to a model. HunyuanVideo: (733.226126, -401.131952,
            67.5869174, -3.149878, 0.0961237896). `calibrate_drift` fits them to a model. None
            takes the drift as it is.
        signal: `"modulated"`; `"input"`, the embedded sample; or a function `(block, args, kwargs)
            -> tensor` of the first block, such as `lambda block, args, kwargs: args[2]` for the
            embedding of the time in Wan.
        warmup: first steps that are computed in any case; at least 1.
        until: from this step on, all are computed; TeaCache computes the last, `steps - 1`.
        steps: as in `ProfilingCache`.
        stacks: which lists of blocks; None for those that diffusers' own caches work on.

    Raises:
        ValueError: as `DriftSteps`.
    """

    threshold: float
    coefficients: tuple[float, ...] | None = None
    signal: Literal["modulated", "input"] | BlockSignal = "modulated"
    warmup: int = 1
    until: int | None = None
    steps: int | None = None
    stacks: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        _signal(self.signal)
        _ = self.schedule  # checks the numbers

    @property
    def schedule(self) -> DriftSteps:
        """When to compute."""
        polynomial = (1.0, 0.0) if self.coefficients is None else self.coefficients
        return DriftSteps(self.threshold, polynomial, self.warmup, self.until)

    def __call__(self, model: nn.Module) -> Counted[CacheRun]:
        """The context manager within which the blocks of the model are reused.

        Args:
            model: the denoiser.

        Raises:
            ValueError: as `ProfilingCache`. Within the block, if the first block has no attention.

        Warns:
            InterventionWarning: on exit, if nothing was reused.
        """
        refuse_compiled(model)
        stacks = stacks_of(model, self.stacks)
        cached = {name: frozenset(range(len(stack))) for name, stack in stacks.items()}

        def install(run: CacheRun, forwards: Forwards, loop: CacheLoop) -> None:
            signal = _signal(self.signal)
            ResidualCache(model, stacks, cached, self.schedule, signal, run).install(forwards, loop)

        return caching(model, install, name="TeaCache", steps=self.steps)


Install = Callable[[CacheRun, Forwards, CacheLoop], None]


def caching(
    model: nn.Module, install: Install, *, name: str, steps: int | None = None
) -> Counted[CacheRun]:
    """What the caches return when called: changes the model on entry, and restores it on exit."""
    CacheLoop(model, Forwards(model, name), steps)  # says at once what it would say on entry

    def opened(block: ExitStack) -> CacheRun:
        run = CacheRun(name)
        forwards = block.enter_context(Forwards(model, name))
        loop = CacheLoop(model, forwards, steps)
        install(run, forwards, loop)
        block.enter_context(loop)
        return run

    return Counted(opened, name=name)


def _chosen(blocks: Sequence[int] | None, count: int, name: str) -> frozenset[int]:
    chosen = frozenset(range(count) if blocks is None else blocks)
    if too_far := [block for block in sorted(chosen) if block >= count]:
        raise ValueError(
            f"blocks: expected numbers below {count}, as {name} has so many, got {too_far[0]}."
        )
    return chosen


def _signal(signal: str | BlockSignal) -> Signal:
    if isinstance(signal, str):
        if signal not in SIGNALS:
            raise ValueError(
                f"signal: expected one of {', '.join(SIGNALS)}, or a function, got {signal!r}."
            )
        return SIGNALS[signal]
    if not callable(signal):
        raise ValueError(f"signal: expected a name or a function, got {signal!r}.")

    def asked(
        block: nn.Module, proceed: Proceed, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        return signal(block, args, kwargs)

    return asked
