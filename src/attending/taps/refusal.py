"""What a tap cannot see, said before, and what it did not see, said after."""

import re
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from attending.taps.where import ATTENTION

SDPA = "torch.nn.functional.scaled_dot_product_attention"
_BYPASS = re.compile("eager|flash|flex")  # the names of transformers' other implementations
# Diffusers' processors that multiply matrices themselves or call another package.
_BYPASSING_PROCESSORS = {
    "AttnProcessor": "AttnProcessor2_0",
    "SlicedAttnProcessor": "AttnProcessor2_0",
    "XFormersAttnProcessor": "AttnProcessor2_0",
    "AttnAddedKVProcessor": "AttnAddedKVProcessor2_0",
    "SlicedAttnAddedKVProcessor": "AttnAddedKVProcessor2_0",
    "XFormersAttnAddedKVProcessor": "AttnAddedKVProcessor2_0",
}


class TapError(RuntimeError):
    """A tap saw no attention call. The message says why, and what to set."""


class TapWarning(UserWarning):
    """A tap saw attention calls, but some attention modules ran without making one."""


def refuse_what_bypasses(model: nn.Module) -> None:
    """Raise ValueError if the model's attention cannot reach a tap, with what to do instead."""
    for name, module in model.named_modules():
        _refuse_compiled(model, name, module)
        _refuse_processor(model, name, getattr(module, "processor", None))
    _refuse_implementation(model)


def _refuse_compiled(model: nn.Module, name: str, module: nn.Module) -> None:
    label = _label(model, name)
    if type(module).__module__.startswith("torch._dynamo"):
        raise ValueError(
            f"{label} was compiled by torch.compile, and a tap does not see into compiled code; "
            "tap and run the original, which it keeps as `_orig_mod`"
        )
    if module._compiled_call_impl is not None or hasattr(
        module.__dict__.get("forward"), "_torchdynamo_orig_callable"
    ):
        raise ValueError(
            f"{label} was compiled in place, and a tap does not see into compiled code; tap the "
            "model before it is compiled, or a copy that was not"
        )
    if isinstance(module, torch.jit.ScriptModule):
        raise ValueError(
            f"{label} is TorchScript, and a tap does not see into it; tap the model from which it "
            "was made"
        )


def _refuse_processor(model: nn.Module, name: str, processor: object) -> None:
    """Diffusers keeps the code of an attention module in its processor."""
    kind = type(processor)
    backend = getattr(processor, "_attention_backend", None)
    backend = str(getattr(backend, "value", backend))
    if backend != "None" and "native" not in backend:
        raise ValueError(
            f'{_label(model, name)} uses the attention backend "{backend}", which never calls '
            f'{SDPA}; call model.set_attention_backend("native") first'
        )
    if kind.__module__.startswith("diffusers.") and kind.__name__ in _BYPASSING_PROCESSORS:
        raise ValueError(
            f"{_label(model, name)} uses {kind.__name__}, which never calls {SDPA}; call "
            f"model.set_attn_processor({_BYPASSING_PROCESSORS[kind.__name__]}()) first"
        )


def _refuse_implementation(model: nn.Module) -> None:
    """Transformers names the implementation in a config, and a part may have its own config."""
    attention = list(_transformers_attention(model, "", None, None))
    bypassing = [found for found in attention if _BYPASS.search(found[2])]
    if not bypassing:
        return
    for name, module, implementation, owner in bypassing:
        if _can_use_sdpa(owner):
            raise ValueError(
                f'{type(model).__name__} runs with attn_implementation="{implementation}" in '
                f"{name or 'itself'} ({type(module).__name__}), which never calls {SDPA}; call "
                'model.set_attn_implementation("sdpa") first'
            )
    # The author of a model that does not come with transformers may well call the function from
    # attention that goes by "eager"; and what no setting can change must not hide the rest.
    if len(bypassing) == len(attention) and all(
        type(owner).__module__.startswith("transformers.") for *_, owner in bypassing
    ):
        name, module, implementation, owner = bypassing[0]
        version = getattr(sys.modules.get("transformers"), "__version__", "")
        raise ValueError(
            f'{type(module).__name__} ({name}) of {type(owner).__name__} has only an "'
            f'{implementation}" implementation in transformers {version}, which never calls '
            f"{SDPA}; no setting changes that, and a tap cannot see it"
        )


def _transformers_attention(
    module: nn.Module, name: str, config: object, owner: nn.Module | None
) -> Iterator[tuple[str, nn.Module, str, nn.Module]]:
    """Attention modules with their implementation and the innermost model that can change it."""
    own = getattr(module, "config", None)
    config = own if isinstance(getattr(own, "_attn_implementation", None), str) else config
    owner = module if hasattr(module, "set_attn_implementation") else owner
    by_torch = type(module).__module__.startswith("torch.nn.")
    attends = ATTENTION.search(type(module).__name__) is not None and not by_torch
    if attends and config is not None and owner is not None:
        yield name, module, str(getattr(config, "_attn_implementation", "")), owner
    for part, child in module.named_children():
        yield from _transformers_attention(child, f"{name}.{part}".lstrip("."), config, owner)


def _can_use_sdpa(owner: Any) -> bool:
    if not getattr(owner, "_supports_sdpa", False):
        return False
    can_set = getattr(owner, "_can_set_attn_implementation", None)
    return can_set is None or bool(can_set())


def why_no_call(model: nn.Module, ran: bool, elsewhere: bool, missed: dict[str, nn.Module]) -> str:
    """Why a tap saw no call, and what to set.

    Args:
        model: the tapped model.
        ran: whether it, or a part of it, ran.
        elsewhere: whether it ran in another thread than that of the tap.
        missed: attention modules that ran without a call.
    """
    kind = type(model).__name__
    if not ran:
        message = f"the tap saw no attention call: no forward of {kind} ran inside the `with` block"
        if elsewhere:
            message += (
                "; it ran in another thread, but a tap sees the calls of the thread that entered it"
            )
        return message
    message = f"the tap saw no attention call: {kind} ran, but never called {SDPA}"
    implementation = _implementation(model)
    if implementation is not None:
        message += f' (config._attn_implementation is "{implementation}")'
    return f"{message}. {_advice(model, missed)}"


def why_missed(model: nn.Module, missed: dict[str, nn.Module]) -> str:
    """That some attention modules ran unseen, and what to set."""
    return (
        f"the tap did not see all of {type(model).__name__}: {_names(missed)} ran without a call "
        f"of {SDPA}. {_advice(model, missed)}"
    )


def _advice(model: nn.Module, missed: dict[str, nn.Module]) -> str:
    advice = []
    if any(isinstance(module, nn.MultiheadAttention) for module in missed.values()):
        advice.append("call nn.MultiheadAttention with need_weights=False")
    others = [m for m in missed.values() if not isinstance(m, nn.MultiheadAttention)]
    implementation = next(filter(None, map(_implementation, (model, *others))), None)
    if hasattr(model, "set_attn_processor") or hasattr(model, "set_attention_backend"):
        advice.append(
            "call model.set_attn_processor(AttnProcessor2_0()), or "
            'model.set_attention_backend("native")'
        )
    elif implementation == "sdpa" and others:
        advice.append("its attention has no other code in this version of transformers")
    elif implementation not in (None, "sdpa") and (
        _can_use_sdpa(model) or not hasattr(model, "set_attn_implementation")  # a part of a model
    ):
        advice.append('call model.set_attn_implementation("sdpa")')
    if not advice:
        return "Only attention that calls this function can be tapped."
    text = " or ".join(advice)
    return text[0].upper() + text[1:] + "."


def _implementation(module: nn.Module) -> str | None:
    return getattr(getattr(module, "config", None), "_attn_implementation", None)


def _names(modules: dict[str, nn.Module]) -> str:
    shown = [f"{name or 'it'} ({type(module).__name__})" for name, module in modules.items()]
    return ", ".join(shown[:4]) + (f" and {len(shown) - 4} more" if len(shown) > 4 else "")


def _label(model: nn.Module, name: str) -> str:
    return f"{name} of {type(model).__name__}" if name else type(model).__name__
