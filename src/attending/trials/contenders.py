"""Who takes part in a trial: the plain model, methods, and stacks of methods.

A method is anything that, called with a model, gives a context manager within which the model works
otherwise: an intervention, a way to decode, or a function of your own with
`contextlib.contextmanager`. A contender that cannot run does not end the trial: why it cannot is
its note.
"""

import dataclasses
import inspect
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Literal, TypeAlias, TypeVar

from torch import Tensor, nn

from attending.report.text import printable
from attending.taps import TapError

Method: TypeAlias = Callable[[nn.Module], AbstractContextManager[Any]]
"""Called with a model, a context manager within which the model works otherwise."""

Methods: TypeAlias = Mapping[str, "Method | list[Method] | tuple[Method, ...] | None"]
"""By name; a list or tuple nests its methods, the first outermost; None is the plain model."""

Status = Literal["ran", "not applicable", "failed"]
Result = TypeVar("Result")

PLAIN = "none"
# How the library and its methods say that they are not for this model. Anything else is a fault.
_REFUSALS = (ValueError, ImportError, NotImplementedError, TapError)
_LONG = 40  # characters of a parameter that are still shown


@dataclasses.dataclass(eq=False)
class Contender:
    """One row of a trial, as it runs.

    Attributes:
        name: as the user called it.
        stack: its methods, the outermost first; empty for the plain model.
        status: whether it (still) runs.
        heard: what its blocks warned of and why it stopped, each once, and in what parts of the
            trial.
        counts: what its methods counted in their last block.
    """

    name: str
    stack: tuple[Method, ...]
    status: Status = "ran"
    heard: dict[str, set[str]] = dataclasses.field(default_factory=dict)
    counts: dict[str, float] = dataclasses.field(default_factory=dict)

    def note(self, text: str, part: str = "") -> None:
        """Keep a note, in one line and once."""
        line = " ".join(text.split())
        if line:
            self.heard.setdefault(line, set()).add(part)

    def notes(self, parts: Collection[str]) -> list[str]:
        """The notes; those of some of the trial's parts and not of others name them.

        Args:
            parts: of the trial, such as "forward pass" and "generation".
        """
        found = []
        for line, where in self.heard.items():
            some = [part for part in parts if part in where]
            everywhere = "" in where or len(some) == len(parts) or self.status != "ran"
            found.append(line if everywhere else f"in {' and '.join(some)}: {line}")
        return found

    def run(
        self,
        model: nn.Module,
        work: Callable[[], Result],
        prompt_length: int | Tensor | None = None,
        *,
        part: str = "",
        quiet: tuple[type[Exception], ...] = (),
    ) -> Result | None:
        """Do the work within the contender's block.

        Args:
            model: of the trial.
            work: called within the block.
            prompt_length: how many tokens of each sequence, padding before them included, are the
                prompt, for methods that look for something in the prompt only and would else take
                the whole for it.
            part: of the trial, for the notes.
            quiet: warnings that are no note here, and errors that are none if they come when the
                work is done: that a block was of no use for it.

        Returns:
            What the work returned; None if the block could not run, which the notes then say.

        Raises:
            Exception: what the work raised, if this is the plain model: the trial has no ground.
        """
        done: list[Result] = []
        try:
            with self._noted(part, quiet), ExitStack() as blocks:
                runs = [
                    blocks.enter_context(_block(method, model, prompt_length))
                    for method in self.stack
                ]
                done.append(work())
                self.counts = _counts(self.stack, runs)
            return done[0]
        except Exception as error:
            if done and isinstance(error, quiet):
                return done[0]
            if not self.stack:
                raise
            self.status = "not applicable" if isinstance(error, _REFUSALS) else "failed"
            message = str(error) or "no message"
            known = self.status == "not applicable"
            self.note(message if known else f"{type(error).__name__}: {message}")
            return None

    @contextmanager
    def _noted(self, part: str, quiet: tuple[type[Exception], ...]) -> Iterator[None]:
        """Warnings for the user become notes; those for developers go on as they would."""
        caught: list[warnings.WarningMessage] = []
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", UserWarning)
                yield
        finally:
            for one in caught:
                if issubclass(one.category, quiet):
                    continue
                if issubclass(one.category, UserWarning):
                    self.note(str(one.message), part)
                else:
                    warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)


def as_contenders(methods: Methods) -> list[Contender]:
    """The plain model first, then all others in their order.

    Args:
        methods: see `attending.trial`; the plain model is added where it is missing.

    Raises:
        ValueError: for names or methods that are none.
    """
    if not isinstance(methods, Mapping):
        raise ValueError(
            "methods: expected a mapping of names to methods, such as "
            f'{{"none": None, "mine": method}}, got {type(methods).__name__}.'
        )
    plain: list[Contender] = []
    others: list[Contender] = []
    for name, given in methods.items():
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"methods: expected names that are texts, got {name!r}.")
        stack = (
            () if given is None else tuple(given) if isinstance(given, list | tuple) else (given,)
        )
        for method in stack:
            _check(name, method)
        (others if stack or plain else plain).append(Contender(name, stack))
    if not plain and PLAIN in methods:
        raise ValueError(
            f'methods: "{PLAIN}" is the name of the plain model, which is always in a trial; give '
            "the method another name, or enter the plain model under one, as None."
        )
    return [*(plain or [Contender(PLAIN, ())]), *others]


def _check(name: str, method: object) -> None:
    if isinstance(method, type):
        raise ValueError(
            f'methods["{name}"]: expected a method, got the class {method.__name__}; make one: '
            f"{method.__name__}(...)."
        )
    if isinstance(method, nn.Module) or not callable(method):
        raise ValueError(
            f'methods["{name}"]: expected something that, called with a model, gives a context '
            f"manager, or a list of such, or None for the plain model, got {type(method).__name__}."
        )


def takes_prompt_length(method: object) -> bool:
    """Whether a method can be told how much of a sequence is the prompt."""
    try:
        return "prompt_length" in inspect.signature(method).parameters  # type: ignore[arg-type]
    except (TypeError, ValueError):  # no signature to be had
        return False


def _block(
    method: Method, model: nn.Module, prompt_length: int | Tensor | None
) -> AbstractContextManager[Any]:
    if prompt_length is not None and takes_prompt_length(method):
        block: AbstractContextManager[Any] = method(model, prompt_length=prompt_length)  # type: ignore[call-arg]
        return block
    return method(model)


def described(method: object) -> str:
    """A method with those of its parameters that are short and not the default."""
    if not dataclasses.is_dataclass(method):
        name = getattr(method, "__qualname__", None) or type(method).__name__
        return printable(str(name))
    parts = []
    for field in dataclasses.fields(method):
        value = getattr(method, field.name)
        if not field.repr or isinstance(value, Tensor):
            continue
        default = field.default
        if default is not dataclasses.MISSING and type(default) is type(value) and default == value:
            continue
        text = repr(value)
        parts.append(f"{field.name}={text if len(text) <= _LONG else '...'}")
    return printable(f"{type(method).__name__}({', '.join(parts)})")


def _counts(stack: tuple[Method, ...], runs: list[Any]) -> dict[str, float]:
    """The numbers in the `stats` of what the blocks gave; of a stack with the names of methods."""
    found: dict[str, float] = {}
    for method, run in zip(stack, runs, strict=True):
        stats = getattr(run, "stats", None)
        if dataclasses.is_dataclass(stats) and not isinstance(stats, type):
            stats = {field.name: getattr(stats, field.name) for field in dataclasses.fields(stats)}
        if not isinstance(stats, Mapping):
            continue
        prefix = f"{type(method).__name__}." if len(stack) > 1 else ""
        for name, value in stats.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                found[f"{prefix}{name}"] = float(value)
    return found
