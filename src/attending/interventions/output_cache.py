"""FORA: reuse the outputs of attention and feed-forward layers, and compute the gates anew.

with FORA(interval=3)(model) as run:
    pipeline(prompt)
"""

import re
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import Tensor, nn

from attending.interventions._block_layout import stacks_of
from attending.interventions._cache_forwards import Forwards, Proceed, refuse_compiled
from attending.interventions._cache_loop import CacheLoop
from attending.interventions._cache_run import Branch, CacheRun
from attending.interventions.cache_schedule import UniformSteps
from attending.interventions.feature_cache import caching
from attending.interventions.intervention import Counted
from attending.taps.where import ATTENTION

Part = Literal["attention", "feed_forward"]
FEED_FORWARD = re.compile("FeedForward|MLP|Mlp|FFN")  # in the name of a class
FEED_FORWARD_NAME = re.compile(r"(ff|ffn|mlp|feed_forward)(_|\d|$)")  # what a block calls it


@dataclass(frozen=True)
class FORA:
    """Compute attention and feed-forward layers every `interval` steps, reuse their outputs else.

    At step s of a branch all is computed if `s < warmup` or `(s - warmup) mod interval = 0`.
    Otherwise each layer returns what it returned last. Norms, modulations, gates and residual sums
    of the blocks are computed at every step, so the gates of the present time act on outputs of an
    earlier one: this is where it differs from caching whole blocks.

    What is cached are modules: the outermost ones in each block that are named after attention
    (self- and cross-attention both) or a feed-forward network. In nearly all blocks that
    is before the gate, as in the paper. A feed-forward that a block writes out in lines of its own
    (Flux's single blocks, Hunyuan's) is no module and is computed at every step; `run.total` counts
    only what could be reused.

    Source: FORA (Selvaraju et al., arXiv 2407.01425), from its code.

    Attributes:
        interval: 1 computes every step.
        warmup: first steps that are computed in any case.
        parts: which layers: `"attention"`, `"feed_forward"`.
        steps: of one generation in each branch; needed only for models whose forward takes no
            `timestep`.
        stacks: which lists of blocks; None for those that diffusers' own caches work on.

    Raises:
        ValueError: for an interval below 1, a negative warm-up, or no or unknown parts.
    """

    interval: int
    warmup: int = 0
    parts: tuple[Part, ...] = ("attention", "feed_forward")
    steps: int | None = None
    stacks: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        _ = self.schedule  # checks the numbers
        if not self.parts or not set(self.parts) <= set(get_args(Part)):
            raise ValueError(
                f"parts: expected some of {', '.join(get_args(Part))}, got {self.parts!r}."
            )

    @property
    def schedule(self) -> UniformSteps:
        """When to compute."""
        return UniformSteps(self.interval, self.warmup)

    def __call__(self, model: nn.Module) -> Counted[CacheRun]:
        """The context manager within which layers of the model are reused.

        Args:
            model: the denoiser.

        Raises:
            ValueError: if the blocks cannot be found or have no such layers, the model is compiled,
                or nothing would tell one generation from the next.

        Warns:
            InterventionWarning: on exit, if nothing was reused.
        """
        refuse_compiled(model)
        layers = [
            layer
            for stack in stacks_of(model, self.stacks).values()
            for block in stack
            for layer in parts_of(block, self.parts)
        ]
        if not layers:
            raise ValueError(
                f"model: expected blocks with modules of attention or feed-forward, found none in "
                f"{type(model).__name__}. Cache whole blocks instead: ProfilingCache(None, ...)."
            )

        def install(run: CacheRun, forwards: Forwards, loop: CacheLoop) -> None:
            run.unit = "calls of layers"
            _OutputCache(layers, self.schedule, run).install(forwards, loop)

        return caching(model, install, name="FORA", steps=self.steps)


def parts_of(block: nn.Module, parts: tuple[Part, ...]) -> list[nn.Module]:
    """The outermost attention and feed-forward modules of a block.

    Args:
        block: one of the model's.
        parts: which of the two.
    """
    found: list[nn.Module] = []
    for name, child in block.named_children():
        kind = type(child).__name__
        if ATTENTION.search(kind):
            found += [child] if "attention" in parts else []
        elif FEED_FORWARD.search(kind) or FEED_FORWARD_NAME.match(name):
            found += [child] if "feed_forward" in parts else []
        else:
            found += parts_of(child, parts)
    return found


class _OutputCache:
    """The outputs of layers, by branch."""

    def __init__(self, layers: list[nn.Module], schedule: UniformSteps, run: CacheRun) -> None:
        self.layers, self.run = layers, run
        self._decide = schedule.start()
        self._stored: dict[Branch, dict[int, Any]] = {}
        self._computing = True
        self._reused = False

    def install(self, forwards: Forwards, loop: CacheLoop) -> None:
        self._loop = loop
        loop.on_restart(self._forget)
        loop.on_begin(self._begin)
        loop.on_end(lambda: self.run.called(loop.branch, loop.step, self._reused))
        for number, layer in enumerate(self.layers):
            forwards.around(layer, self._stand_in(number))

    def _forget(self) -> None:
        self._stored.clear()
        self.run.generations += 1

    def _begin(self) -> None:
        self._computing = self._decide(self._loop.step)
        self._reused = False

    def _stand_in(self, number: int) -> Any:
        def stand_in(proceed: Proceed, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if not self._loop.running:
                return proceed(*args, **kwargs)
            stored = self._stored.setdefault(self._loop.branch, {})
            self.run.total += 1
            if not self._computing and number in stored:
                self._reused = True
                return _copied(stored[number])
            self.run.computed += 1
            output = proceed(*args, **kwargs)
            stored[number] = _copied(output)
            return output

        return stand_in


def _copied(output: Any) -> Any:
    """A copy that nobody writes into: a block may multiply its gate into what it is given."""
    if isinstance(output, Tensor):
        return output.detach().clone()
    if isinstance(output, tuple | list):
        return type(output)(_copied(value) for value in output)
    return output
