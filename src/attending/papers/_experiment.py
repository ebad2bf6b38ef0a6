"""A paper's record together with the functions that rerun its claim."""

import ast
import hashlib
import inspect
import json
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from attending.papers._record import Paper, Rule, Scale
from attending.papers._reproduction import Reproduction, plain

Reproduce = Callable[[Scale, int, Path], Reproduction]
Settings = Callable[[Scale], Mapping[str, Any]]
Plot = Callable[[Sequence[Reproduction], Any], None]

_NOT_COMPUTED = {"PAPER", "plot"}  # what a module may change without changing its numbers


@dataclass(frozen=True)
class Experiment:
    """What the runner needs of a paper.

    Args:
        paper: The record, with its rule.
        reproduce: `reproduce(scale, seed, out_dir)` makes one run.
        settings: `settings(scale)` says what determines a run but its seed.
        plot: `plot(reproductions, figure)` draws on a matplotlib figure.
        sources: Files of Python source that the numbers depend on.
    """

    paper: Paper
    reproduce: Reproduce
    settings: Settings | None = None
    plot: Plot | None = None
    sources: tuple[Path, ...] = ()

    def __post_init__(self) -> None:
        if self.paper.rule is None:
            raise ValueError(
                f"paper: expected a built paper with a rule, but {self.paper.slug} is "
                f"{self.paper.status}; see `attending papers {self.paper.slug}`"
            )

    @property
    def rule(self) -> Rule:
        """The rule of the verdict."""
        assert self.paper.rule is not None  # __post_init__ has seen to it
        return self.paper.rule

    @classmethod
    def of_module(cls, module: ModuleType) -> "Experiment":
        """The experiment of a paper's module, with the sources that it depends on.

        These are the module itself, `_<its name>_*.py` beside it, and the files in which its
        symbols are written.

        Raises:
            ValueError: The paper is planned, or its module lacks `reproduce`.
            ImportError, AttributeError: A symbol is not there.
        """
        paper: Paper = module.PAPER
        reproduce: Reproduce | None = getattr(module, "reproduce", None)
        if paper.status != "built" or reproduce is None:
            raise ValueError(
                f"slug: {paper.slug} is {paper.status} and cannot be run; `attending papers` lists "
                "what is built"
            )
        here = Path(inspect.getfile(module))
        sources = [here, *here.parent.glob(f"_{here.stem}_*.py")]
        sources += [found for name in paper.symbols if (found := _source_of(name)) is not None]
        return cls(
            paper=paper,
            reproduce=reproduce,
            settings=getattr(module, "settings", None),
            plot=getattr(module, "plot", None),
            sources=tuple(sorted(set(sources))),
        )

    def fingerprint(self, scale: Scale) -> str:
        """What tells a stored run of this very experiment from one of an earlier version.

        It covers the settings, the words of the rule, and the source without comments, docstrings,
        the record and the plot.
        """
        parts = {
            "slug": self.paper.slug,
            "scale": scale,
            "settings": plain(self.settings(scale)) if self.settings is not None else {},
            "rule": self.rule.words,
            "sources": [_what_computes(path) for path in self.sources],
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _source_of(dotted: str) -> Path | None:
    """The file in which a symbol is written, wherever else it may be exported from."""
    symbol = pkgutil.resolve_name(dotted)
    try:
        found = inspect.getsourcefile(symbol)
    except TypeError:  # a constant, or something compiled
        return None
    return None if found is None else Path(found)


def _what_computes(path: Path) -> str:
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    tree.body = [node for node in tree.body if not _NOT_COMPUTED & set(_names_bound(node))]
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            node.body = node.body[1 if ast.get_docstring(node) is not None else 0 :]
    return ast.dump(tree)


def _names_bound(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.Assign):
        return [target.id for target in node.targets if isinstance(target, ast.Name)]
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        return [node.target.id]
    return []
