"""Which layers of a model a conversion touches: by class, by name, and who owns a weight."""

import fnmatch
from collections.abc import Callable, Sequence

from torch import nn

Exclude = Sequence[str] | Callable[[str, nn.Module], bool]


def is_layer(module: nn.Module, modules: tuple[type[nn.Module], ...]) -> bool:
    """Whether it is of one of the classes; transformers' `Conv1D` counts as `nn.Linear`."""
    if isinstance(module, modules):
        return True
    # By name, since importing transformers takes seconds.
    return nn.Linear in modules and any(
        kind.__module__ == "transformers.pytorch_utils" and kind.__name__ == "Conv1D"
        for kind in type(module).__mro__
    )


def weight_owners(model: nn.Module) -> dict[int, list[str]]:
    """For each parameter, by its `id`, all names under which modules hold it: tied if several."""
    owners: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(join_names(path, name))
    return owners


def join_names(path: str, name: str) -> str:
    """`path.name`, or the name alone at the root."""
    return f"{path}.{name}" if path else name


def excluder(model: nn.Module, exclude: Exclude) -> Callable[[str, nn.Module], bool]:
    """A function of name and module made of names with wildcards, each of which must match."""
    if callable(exclude):
        return exclude
    if isinstance(exclude, str):
        raise ValueError(f"exclude: expected a sequence of names, got one string; ({exclude!r},).")

    def matches(path: str, pattern: str) -> bool:
        parts = path.split(".")
        above = [".".join(parts[: end + 1]) for end in range(len(parts))]
        return any(fnmatch.fnmatchcase(candidate, pattern) for candidate in (*above, *parts))

    names = [path for path, _ in model.named_modules() if path]
    for pattern in exclude:
        if not any(matches(path, pattern) for path in names):
            raise ValueError(
                f"exclude: {pattern!r} matches no module. Names are those of model.named_modules()."
            )
    return lambda path, _: any(matches(path, pattern) for pattern in exclude)
