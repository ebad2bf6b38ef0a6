"""Checks the import floors of the house: imports point only downward.

    python tools/check_floors.py [FOLDER]

FOLDER is the package, `src/attending` by default. What does not hold is listed with its file and
line, and the exit code is 1. Imports are read from the source, nothing is run. They count wherever
they stand, in functions and under `TYPE_CHECKING` too: a name in an annotation is knowledge too.

1. A room imports from lower floors and from itself. Between two rooms of one floor it takes an
   entry in `NEIGHBOURS`, with its reason; on the top floor they may use each other freely.
2. `core` imports torch, jaxtyping and the standard library.
3. Packages that are not installed with the core are imported in functions only, so that
   `import attending` works, and is quick, without them.
4. Nobody imports from `attending` itself but `__version__`: it is the public face of the house, and
   inside a name is imported from where it lives.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PACKAGE = "attending"
FLOORS = {
    "__main__": 5,
    "cli": 5,
    "diagnosis": 5,
    "monitor": 5,
    "report": 5,
    "trials": 5,
    "papers": 4,
    "conversion": 3,
    "decoding": 3,
    "diffusion": 3,
    "interventions": 3,
    "models": 3,
    "probes": 3,
    "zoo": 3,
    "losses": 2,
    "nn": 2,
    "sparse": 2,
    "taps": 2,
    "core": 1,
}
TOP = max(FLOORS.values())

# (room, room that it may import from), both on one floor, with the reason. Never both ways.
NEIGHBOURS: set[tuple[str, str]] = {
    ("losses", "taps"),  # a loss on what a model computes inside has to see it
    ("decoding", "probes"),  # DAMRO decodes against what a probe finds
    ("conversion", "interventions"),  # what an intervention tries, a conversion makes permanent
    ("zoo", "diffusion"),  # the card of a denoiser shows what it writes
    ("interventions", "probes"),  # image tokens are pruned by what probes see in a vision tower
}

CORE_MAY_IMPORT = {"jaxtyping", "torch"}
# The dependencies of pyproject.toml, and what transformers always brings along.
ALWAYS_INSTALLED = {
    "huggingface_hub",
    "jaxtyping",
    "jinja2",
    "numpy",
    "plotly",
    "rich",
    "safetensors",
    "tokenizers",
    "torch",
    "tqdm",
    "transformers",
    "typer",
    "typing_extensions",
}


class Import(NamedTuple):
    """One imported module: its full name, where it stands, and whether importing us runs it."""

    module: str
    line: int
    at_import: bool


class Violation(NamedTuple):
    """A line that does not keep the rules; prints as `file:line: why`."""

    path: Path
    line: int
    why: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.why}"


def check_package(folder: Path) -> list[Violation]:
    """All violations under the folder of the package, by file and line."""
    return [
        violation
        for path in sorted(folder.rglob("*.py"))
        if path != folder / "__init__.py"
        for violation in check_file(path, folder)
    ]


def check_file(path: Path, folder: Path) -> list[Violation]:
    """The violations of one file of the package."""
    inside = path.relative_to(folder).with_suffix("").parts
    room = inside[0]
    if room not in FLOORS:
        why = f"the house has no room {room!r}; give it a floor in tools/check_floors.py"
        return [Violation(path, 1, why)]
    parents = (PACKAGE, *inside[:-1])  # the package that relative imports start from
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    found = []
    for imported in sorted(set(imports(tree, parents)), key=lambda one: (one.line, one.module)):
        why = objection(room, imported)
        if why is not None:
            found.append(Violation(path, imported.line, why))
    return found


def objection(room: str, imported: Import) -> str | None:
    """Why this room may not have this import, or None if it may."""
    top, _, rest = imported.module.partition(".")
    if top == PACKAGE:
        return _objection_inside(room, rest.partition(".")[0])
    if top in sys.stdlib_module_names:
        return None
    if room == "core" and top not in CORE_MAY_IMPORT:
        return f"core knows torch and nothing else, but imports {top}"
    if imported.at_import and top not in ALWAYS_INSTALLED:
        return f"{top} is optional: import it in the function that needs it"
    return None


def _objection_inside(room: str, other: str) -> str | None:
    if other in (room, "__version__"):
        return None
    if other not in FLOORS:
        name = f"{PACKAGE}.{other}" if other else PACKAGE
        return f"{name} is the public face; import the name from the room where it lives"
    mine, theirs = FLOORS[room], FLOORS[other]
    if theirs > mine:
        return f"{room} (floor {mine}) imports upward from {other} (floor {theirs})"
    if theirs == mine < TOP and (room, other) not in NEIGHBOURS:
        return f"{room} imports from {other} next door on floor {mine}"
    return None


def imports(tree: ast.AST, parents: tuple[str, ...]) -> Iterator[Import]:
    """Every import of a module, relative ones made absolute, `import_module("...")` included."""
    for node, at_import in _walk(tree, True):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, at_import)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = parents[: len(parents) - node.level + 1]
                base = ".".join([*above, *([base] if base else [])])
            # Of the package itself, names are rooms: `from attending import zoo`.
            if base == PACKAGE:
                for alias in node.names:
                    yield Import(f"{base}.{alias.name}", node.lineno, at_import)
            else:
                yield Import(base, node.lineno, at_import)
        elif isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else None
            name = node.func.id if isinstance(node.func, ast.Name) else name
            argument = node.args[0] if node.args else None
            if (
                name in ("import_module", "__import__")
                and isinstance(argument, ast.Constant)
                and isinstance(argument.value, str)
            ):
                yield Import(argument.value, node.lineno, at_import)


def _walk(node: ast.AST, at_import: bool) -> Iterator[tuple[ast.AST, bool]]:
    """All nodes below, each with whether it runs when the module is imported."""
    yield node, at_import
    if isinstance(node, ast.If) and _is_type_checking(node.test):
        for child in node.body:
            yield from _walk(child, False)
        for child in node.orelse:
            yield from _walk(child, at_import)
        return
    in_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
    for child in ast.iter_child_nodes(node):
        yield from _walk(child, at_import and not in_function)


def _is_type_checking(test: ast.expr) -> bool:
    name = test.attr if isinstance(test, ast.Attribute) else getattr(test, "id", None)
    return name == "TYPE_CHECKING"


def main(arguments: list[str]) -> int:
    """Prints what does not hold; returns the exit code."""
    default = Path(__file__).resolve().parents[1] / "src" / PACKAGE
    folder = Path(arguments[0]) if arguments else default
    if not folder.is_dir():
        print(f"{folder}: no such folder")
        return 2
    found = check_package(folder)
    for violation in found:
        print(violation)
    print(f"floors: {len(found)} violations" if found else "floors: all imports point downward")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
