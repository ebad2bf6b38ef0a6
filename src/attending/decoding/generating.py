"""How a generation strategy takes hold of a model: its `generate`, for as long as a block runs.

`generate` of the one model is wrapped, as an attribute of the instance, and the wrapper goes with
the block. Nothing else is touched: no class, no config, no hook. So code that calls
`model.generate`, such as pipelines of transformers, is reached; code that calls
`type(model).generate(model)` is not. Blocks nest: the inner one is asked first and calls the outer
one, which calls the model.
"""

import functools
import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

from torch import nn

Generate = Callable[..., Any]
Change = Callable[[Generate, dict[str, Any]], Any]
"""`change(generate, arguments)`: what happens instead of `generate(**arguments)`."""


@runtime_checkable
class Counts(Protocol):
    """What a strategy reports of a block."""

    @property
    def stats(self) -> dict[str, Any]:
        """Numbers worth printing, by name; `tokens` is how many it had a say in."""
        ...


CountsT = TypeVar("CountsT", bound=Counts)


class DecodingWarning(UserWarning):
    """A block of a strategy ended, and nothing had been generated in it."""


class Generating(AbstractContextManager[CountsT], Generic[CountsT]):
    """A block in which a model generates by a strategy; it yields what the strategy counts.

    It may be entered again, also inside itself; every time it counts anew.

    Args:
        model: one that generates.
        start: called on every entry; returns the counts and the change, which share the state.
        name: of the strategy, for the warning.

    Raises:
        ValueError: if the model has no `generate`.

    Warns:
        DecodingWarning: on exit, if `stats["tokens"]` is 0.
    """

    def __init__(
        self, model: nn.Module, start: Callable[[], tuple[CountsT, Change]], name: str
    ) -> None:
        _generate_of(model)
        self.model = model
        self._start = start
        self._name = name
        self._open: list[tuple[AbstractContextManager[None], CountsT]] = []

    def __enter__(self) -> CountsT:
        counts, change = self._start()
        block = changed_generate(self.model, change)
        block.__enter__()
        self._open.append((block, counts))
        return counts

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        block, counts = self._open.pop()
        block.__exit__(kind, error, traceback)
        if kind is None and not counts.stats["tokens"]:
            warnings.warn(
                f"{self._name} changed nothing: no token was generated within the block by "
                f"generate() of this {type(self.model).__name__}.",
                DecodingWarning,
                stacklevel=2,
            )


@contextmanager
def changed_generate(model: nn.Module, change: Change) -> Iterator[None]:
    """A block in which `model.generate(...)` does `change(generate, arguments)`.

    Args:
        model: one that generates, as those of transformers do.
        change: gets the `generate` that it stands in for and all arguments of the call by name
            (positional ones too), and returns the result. It calls `generate` once, more often, or
            not at all.

    Raises:
        ValueError: if the model has no `generate`.
        RuntimeError: on exit, if another block that was entered later is still open.
    """
    generate = _generate_of(model)
    missing = object()
    before = vars(model).get("generate", missing)
    signature = inspect.signature(generate)

    @functools.wraps(generate)
    def changed(*args: Any, **kwargs: Any) -> Any:
        return change(generate, _by_name(signature, args, kwargs))

    # An attribute of the instance, which hides the method of the class.
    object.__setattr__(model, "generate", changed)
    try:
        yield
    finally:
        if vars(model).get("generate") is not changed:
            raise RuntimeError(
                "model: generate() was changed within the block and not changed back. Leave "
                "blocks in the reverse order of entering them."
            )
        if before is missing:
            object.__delattr__(model, "generate")
        else:
            object.__setattr__(model, "generate", before)


def setting(arguments: dict[str, Any], model: nn.Module, name: str) -> Any:
    """What a setting of generation will be in a call: its argument, else of the configs, or None.

    Args:
        arguments: of `generate`, by name.
        model: whose `generation_config` holds if the call has none of its own.
        name: such as "do_sample".
    """
    configs = (arguments.get("generation_config"), getattr(model, "generation_config", None))
    for value in (arguments.get(name), *(getattr(config, name, None) for config in configs)):
        if value is not None:
            return value
    return None


def refuse_sampling(strategy: str, do_sample: bool | None, num_beams: int | None) -> None:
    """Raise a ValueError for a `generate` that leaves a deterministic strategy no choice."""
    if do_sample or (num_beams or 1) > 1:
        raise ValueError(
            f"do_sample, num_beams: expected neither, as {strategy} chooses every token itself, "
            f"got do_sample={do_sample}, num_beams={num_beams}. Pass do_sample=False, num_beams=1."
        )


def refuse_sampling_call(strategy: str, arguments: dict[str, Any], model: nn.Module) -> None:
    """As `refuse_sampling`, of a call: sampling only if the call itself asks for it."""
    config = arguments.get("generation_config")
    do_sample = arguments.get("do_sample", getattr(config, "do_sample", None))
    refuse_sampling(strategy, do_sample, setting(arguments, model, "num_beams"))


def _generate_of(model: nn.Module) -> Generate:
    generate: Generate | None = getattr(model, "generate", None)
    if not callable(generate):
        raise ValueError(
            f"model: expected one with generate(), as those of transformers that write text, got "
            f"{type(model).__name__}."
        )
    return generate


def _by_name(
    signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    bound = signature.bind(*args, **kwargs).arguments
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            bound.update(bound.pop(parameter.name, {}))
    return bound
