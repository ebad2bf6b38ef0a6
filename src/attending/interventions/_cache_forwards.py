"""Functions that stand in for the forward of modules, and leave no trace.

In models of diffusers they are `ModelHook`s in its `HookRegistry`, so that they go together with
offloading, layerwise casting and what else lies there. Elsewhere the instance gets a `forward` of
its own for the time being.
"""

import functools
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from torch import nn

Proceed = Callable[..., Any]
Around = Callable[[Proceed, tuple[Any, ...], dict[str, Any]], Any]
"""Stands in for a forward: gets the real one, and the arguments."""


def is_diffusers_model(model: nn.Module) -> bool:
    """Whether a model is one of diffusers, without importing diffusers for one that is not."""
    return any(
        cls.__name__ == "ModelMixin" and cls.__module__.startswith("diffusers.")
        for cls in type(model).__mro__
    )


def refuse_compiled(model: nn.Module) -> None:
    """Raise ValueError for a compiled model: what stands in for its blocks would not be seen."""
    compiled = next(
        (
            name or "the model itself"
            for name, module in model.named_modules()
            if type(module).__name__ == "OptimizedModule"
            or getattr(module, "_compiled_call_impl", None) is not None
        ),
        None,
    )
    if compiled is not None:
        raise ValueError(
            f"model: expected a model that is not compiled, as a compiled one does not ask which "
            f"blocks to run; {compiled} is. Give the model from before torch.compile."
        )


class Forwards(ExitStack):
    """The forwards of a model that are stood in for while a block runs.

    Args:
        model: whose modules they are of.
        name: of the hooks in diffusers' registries; made unique.
    """

    def __init__(self, model: nn.Module, name: str) -> None:
        super().__init__()
        refuse_compiled(model)
        self.model = model
        self.name = f"attending.{name}.{id(self):x}"
        self.of_diffusers = is_diffusers_model(model)

    def around(self, module: nn.Module, function: Around) -> None:
        """Let a function stand in for the forward of a module."""
        if self.of_diffusers:
            self._hook(module, _around_hook(function))
        else:
            self._patch(module, function)

    def contexts(self, on_reset: Callable[[], object]) -> Callable[[], str | None]:
        """Follow diffusers' `cache_context`, if the model is one of diffusers.

        Args:
            on_reset: called when a pipeline of diffusers says that its generation has ended.

        Returns:
            A function that gives the name of the context that is open, None if none is.
        """
        if not self.of_diffusers:
            return lambda: None
        hook = _context_hook(on_reset)
        self._hook(self.model, hook)
        return lambda: hook.contexts.name

    def keep_clean(self, *modules: nn.Module) -> None:
        """Undo on exit what diffusers leaves on modules when its hooks are gone."""
        for module in modules:
            had = {name for name in _LEFT_BEHIND if name in module.__dict__}
            self.callback(_clean, module, had)

    def _hook(self, module: nn.Module, hook: Any) -> None:
        from diffusers.hooks import HookRegistry

        self.keep_clean(module)
        registry = HookRegistry.check_if_exists_or_initialize(module)
        registry.register_hook(hook, self.name)
        _forget_registries(self.model)
        self.callback(registry.remove_hook, self.name, recurse=False)

    def _patch(self, module: nn.Module, function: Around) -> None:
        before = module.__dict__.get("forward")
        forward = module.forward

        @functools.wraps(forward)
        def stands_in(*args: Any, **kwargs: Any) -> Any:
            return function(forward, args, kwargs)

        module.__dict__["forward"] = stands_in

        def undo() -> None:
            if before is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = before

        self.callback(undo)


_LEFT_BEHIND = ("_cache_config", "_diffusers_hook", "forward")


def _clean(module: nn.Module, had: set[str]) -> None:
    registry = module.__dict__.get("_diffusers_hook")
    _forget_registries(module)
    for name in _LEFT_BEHIND[:1] if registry is not None and registry.hooks else _LEFT_BEHIND:
        if name not in had:
            module.__dict__.pop(name, None)


def _forget_registries(model: nn.Module) -> None:
    """Diffusers keeps a list of the hooks below a model; it is made anew when next needed."""
    registry = model.__dict__.get("_diffusers_hook")
    if registry is not None and getattr(registry, "_child_registries_cache", None) is not None:
        registry._child_registries_cache = None


def _around_hook(function: Around) -> Any:
    from diffusers.hooks import ModelHook

    class AroundHook(ModelHook):  # type: ignore[misc]
        def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return function(self.fn_ref.original_forward, args, kwargs)

    return AroundHook()


def _context_hook(on_reset: Callable[[], object]) -> Any:
    from diffusers.hooks import ModelHook
    from diffusers.hooks.hooks import StateManager

    class Contexts(StateManager):  # type: ignore[misc]
        # Only notes the name. What it is given is a name or, from diffusers 0.40 on, an object.
        def __init__(self) -> None:
            super().__init__(object)
            self.name: str | None = None

        def set_context(self, context: Any) -> None:
            self.name = None if context is None else str(getattr(context, "name", context))

    class ContextHook(ModelHook):  # type: ignore[misc]
        _is_stateful = True

        def __init__(self) -> None:
            super().__init__()
            self.contexts = Contexts()

        def reset_state(self, module: nn.Module) -> nn.Module:
            on_reset()
            return module

    return ContextHook()
