"""Sparse attention that has to know where the tokens of the picture are, in any denoiser."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

from torch import nn
from typing_extensions import TypeVar

from attending.interventions.intervention import Counted
from attending.interventions.sparse_run import SparseRun, sparse_calls
from attending.sparse._grid_window import Grid
from attending.sparse.image_tokens import ImageTokens, read_image_tokens, text_comes_first
from attending.taps import Handler
from attending.taps.where import arguments_of


@dataclass(eq=False, kw_only=True)
class ImageRun(SparseRun):
    """What was left out within one `with` block, and where the picture is.

    Attributes:
        tokens: where they are in the call of the model that runs or ran last.
    """

    tokens: ImageTokens | None = None


class Placed(Protocol):
    """What a method says of the tokens; what is None is read from the model and its inputs."""

    @property
    def grid(self) -> Grid | None:
        """Tokens along (time,) height and width."""
        ...

    @property
    def text_first(self) -> bool | None:
        """Whether text in the same sequence precedes the picture."""
        ...


RunT = TypeVar("RunT", bound=ImageRun, default=ImageRun)


def place_of_tokens(
    method: Placed, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> ImageTokens:
    """Where the tokens are in a call of the model: as set, else as its inputs tell.

    Raises:
        ValueError: if the grid is neither set nor can be read.
    """
    if method.grid is None:
        found = read_image_tokens(model, arguments_of(model, args, kwargs))
    else:
        found = ImageTokens(method.grid, text_comes_first(model))
    return found if method.text_first is None else replace(found, text_first=method.text_first)


def image_calls(
    model: nn.Module,
    method: Placed,
    start: Callable[[RunT], Handler],
    *,
    name: str,
    new_run: Callable[..., RunT] = ImageRun,  # type: ignore[assignment]
) -> Counted[RunT]:
    """The context manager of a method on the self-attention of pictures; see `sparse_calls`.

    Args:
        model: the denoiser.
        method: says where the tokens are; `run.tokens` is renewed from it whenever the model runs.
        start: called on every entry with a fresh run; returns the handler of self-attention.
        name: of the method, for the report.
        new_run: makes the run, from the name and `clock=`.
    """

    @contextmanager
    def around(run: RunT) -> Iterator[None]:
        def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            run.tokens = place_of_tokens(method, module, args, kwargs)

        hook = model.register_forward_pre_hook(look, with_kwargs=True, prepend=True)
        try:
            yield
        finally:
            hook.remove()

    return sparse_calls(model, start, name=name, new_run=new_run, around=around)
