"""A pretrained diffusion transformer made local for good: CLEAR.

    student = linearize(copy.deepcopy(model), radius=8)       # FLUX, SD3, Wan
    optimizer = torch.optim.AdamW(p for p in student.parameters() if p.requires_grad)
    for clean, inputs in batches:                              # samples of the model itself
        noise, sigma = torch.randn_like(clean), torch.rand(len(clean), 1, 1)
        noisy = (1 - sigma) * clean + sigma * noise
        loss = distillation_step(student, model, {"hidden_states": noisy, **inputs}, noise - clean)
        loss.total.backward()
        optimizer.step(), optimizer.zero_grad()
    student.save_pretrained(folder)
    student = load_linearized(FluxTransformer2DModel, folder)

The student stays what it was to everything that uses it: the class, the names of its weights, its
pipeline, `save_pretrained`, `at.tap`. It has one more part, `circular_window`, with the setting and
the learned weights of down-sampling, and its `forward` runs within a tap.

Source: CLEAR (arXiv 2412.16112). There: 10K samples that FLUX.1-dev generated, 10K iterations,
Prodigy with rate 1, batches of 32, gradients clipped at 1, guidance input 3.5, uniform times. Of
the image stream (and of single-stream blocks) the projections of query, key, value and output are
trained, and the weights of the down-sampling; norms, MLPs and the text stream are frozen.
"""

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from attending.conversion._saved_model import load_weights
from attending.conversion.distill_denoiser import prediction_of
from attending.interventions.circular_window import HAS_MASK, CircularWindow
from attending.interventions.image_run import place_of_tokens
from attending.losses.linearization import (
    Linearization,
    linearization_loss,
    watch_attention_outputs,
)
from attending.sparse._grid_window import Grid
from attending.sparse.image_tokens import ImageTokens
from attending.taps import AttentionCall, Handler, Proceed, tap

Model = TypeVar("Model", bound=nn.Module)

CONFIG = "attending_circular_window"  # the entry in the model's config
_PROJECTIONS = ("to_q", "to_k", "to_v", "to_qkv", "to_out")


def linearize(
    model: Model,
    radius: float,
    *,
    grid: Grid | None = None,
    text_first: bool | None = None,
    frame_radius: int | None = None,
    down_factor: int | None = None,
    log_length: bool = False,
    freeze: bool = True,
) -> Model:
    """Limit a model's attention to circles, in place, and mark what is to be trained.

    Without training the model now computes what `CircularWindow` with the same arguments would.

    Args:
        model: a transformer of diffusers.
        radius, grid, text_first, frame_radius, down_factor, log_length: as in `CircularWindow`.
            With `down_factor` each layer learns how to down-sample, starting from the mean.
        freeze: let only the projections of self-attention require gradients (`to_q`, `to_k`,
            `to_v`, `to_out`; not those of the text stream, `add_q_proj` and so on) and the weights
            of down-sampling. False leaves `requires_grad` alone.

    Returns:
        The same model.

    Raises:
        ValueError: for a model without such attention, or that was linearized before. The model is
            then as it was. Later, in forward: if the grid cannot be read, or a call over the tokens
            of the image has a mask.
    """
    settings = CircularWindow(
        radius, grid, text_first, frame_radius, down_factor, log_length=log_length
    )
    if is_linearized(model):
        raise ValueError(
            "model: expected one that was not linearized before; undo it with "
            "restore_full_attention, or start from a fresh one."
        )
    names = self_attention_modules(model)
    like = next(model.get_submodule(names[0]).parameters())
    model.add_module("circular_window", _Window(settings, names, like))
    model.forward = _LocalForward(model)
    if freeze:
        model.requires_grad_(False)
        for parameter in attention_parameters(model):
            parameter.requires_grad_(True)
    if hasattr(model, "register_to_config"):
        cast(Any, model).register_to_config(**{CONFIG: settings_of(settings)})
    return model


def restore_full_attention(model: Model) -> Model:
    """Take out what `linearize` put in; weights stay as they are trained.

    Raises:
        ValueError: for a model that is not linearized, or whose forward was wrapped since.
    """
    _window(model)
    outside = model.__dict__.get("forward")
    if not isinstance(outside, _LocalForward):
        raise ValueError(
            f"model: expected the forward that linearize gave it, got {outside!r}. Take off first "
            "what was put around it since."
        )
    if outside.own is None:
        del model.__dict__["forward"]
    else:
        model.forward = outside.own
    del model.circular_window
    if hasattr(model, "register_to_config"):
        cast(Any, model).register_to_config(**{CONFIG: None})
    return model


def is_linearized(model: nn.Module) -> bool:
    """Whether `linearize` has changed the model."""
    return isinstance(getattr(model, "circular_window", None), _Window)


def load_linearized(model_class: Any, folder: str | Path) -> Any:
    """Load a linearized model that `save_pretrained` wrote.

    (`from_pretrained` of the class itself makes a model with full attention of it.)

    Args:
        model_class: of diffusers, such as `FluxTransformer2DModel`.
        folder: with its config and safetensors.

    Returns:
        The model, in evaluation mode, with the parameters trainable that `linearize` marks.

    Raises:
        ValueError: if the folder holds no linearized model, or lacks weights.
    """
    config = dict(model_class.load_config(folder))
    settings = config.pop(CONFIG, None)
    if settings is None:
        raise ValueError(
            f"folder: expected a model of linearize, saved by save_pretrained, got {str(folder)!r}."
        )
    if settings["grid"] is not None:
        settings["grid"] = tuple(settings["grid"])
    model = linearize(model_class.from_config(config), **settings)
    load_weights(model, folder)
    return model.eval()


def self_attention_modules(model: nn.Module) -> list[str]:
    """The names of the self-attention modules of a transformer of diffusers, in its order.

    Raises:
        ValueError: if it has none.
    """
    names = [
        name
        for name, module in model.named_modules()
        if hasattr(module, "to_q")
        and hasattr(module, "to_k")
        and not getattr(module, "is_cross_attention", False)
    ]
    if not names:
        raise ValueError(
            "model: expected a transformer of diffusers, with attention modules that have to_q and "
            f"to_k, got {type(model).__name__}."
        )
    return names


def attention_parameters(model: nn.Module) -> list[nn.Parameter]:
    """What CLEAR trains of a linearized model: projections of self-attention, and down-sampling.

    Raises:
        ValueError: for a model that is not linearized.
    """
    window = _window(model)
    found = list(window.parameters())
    for name in window.names:
        for part, module in model.get_submodule(name).named_children():
            if part in _PROJECTIONS:
                found += module.parameters()
    return found


def distillation_step(
    student: nn.Module,
    teacher: nn.Module,
    inputs: Mapping[str, Any],
    target: Float[Tensor, "*shape"],
    *,
    layers: Sequence[str] | None = None,
    prediction_weight: float = 0.5,
    attention_weight: float = 0.5,
) -> Linearization:
    """The loss of one batch: run teacher and student on it and compare.

    Args:
        student: of `linearize`.
        teacher: the model as it was. (Its weights must not be the student's: the student is a
            `copy.deepcopy`.)
        inputs: of both models' forward; the noisy sample and its time are among them.
        target: the velocity, noise minus clean data.
        layers: of which attention is compared; None for all that are windowed, as the paper says
            [recall]. `official_layers` has those of the code.
        prediction_weight, attention_weight: see `linearization_loss`. Where both are 0 the teacher
            does not run: flow matching alone.

    Raises:
        ValueError: for a student that is not linearized or a teacher that is, or layers that are
            not in the models.
    """
    names = list(_window(student).names) if layers is None else list(layers)
    if is_linearized(teacher) or teacher is student:
        raise ValueError(
            "teacher: expected the model with full attention, got one that is linearized. Make the "
            "student of a copy.deepcopy of it."
        )
    if prediction_weight == 0 and attention_weight == 0:
        found = prediction_of(student(**inputs))
        return linearization_loss(
            found, target, found.detach(), prediction_weight=0.0, attention_weight=0.0
        )
    with torch.no_grad(), watch_attention_outputs(teacher, names) as wanted:
        wished = prediction_of(teacher(**inputs))
    with watch_attention_outputs(student, names) as seen:
        found = prediction_of(student(**inputs))
    return linearization_loss(
        found,
        target,
        wished,
        seen,
        wanted,
        prediction_weight=prediction_weight,
        attention_weight=attention_weight,
    )


def settings_of(window: CircularWindow) -> dict[str, Any]:
    """The arguments of `linearize` that make this window, as a config holds them."""
    settings = dataclasses.asdict(window)
    del settings["base_length"]
    if settings["grid"] is not None:
        settings["grid"] = list(settings["grid"])
    return settings


class _Window(nn.Module):
    """What a linearized model has more: the setting, and weights of down-sampling by layer."""

    def __init__(self, settings: CircularWindow, names: Sequence[str], like: Tensor) -> None:
        super().__init__()
        self.settings, self.names = settings, tuple(names)
        factor = settings.down_factor
        weights = {}
        if factor is not None:
            mean = torch.full((factor, factor), factor**-2, dtype=like.dtype, device=like.device)
            weights = {_key(name): nn.Parameter(mean.clone()) for name in names}
        self.pool_weights = nn.ParameterDict(weights)

    def extra_repr(self) -> str:
        return repr(self.settings)

    def handler(self, tokens: ImageTokens) -> Handler:
        """Of one forward, which may be run again in parts by checkpointing later on."""

        def attend(call: AttentionCall, proceed: Proceed) -> Tensor:
            if call.is_cross:
                return proceed(call)
            reason = self.settings.why_dense(call, tokens)
            if reason == HAS_MASK:
                raise ValueError(
                    "attention_mask: expected none over the tokens of the image, as a local model "
                    f"has no place for it, got one in {call!r}."
                )
            if reason is not None:
                return proceed(call)
            weight = self.pool_weights.get(_key(call.name))
            return self.settings.attend(call, proceed, tokens, weight)

        return attend


def _key(name: str) -> str:
    return name.replace(".", "__")  # a ParameterDict takes no dots


def _window(model: nn.Module) -> _Window:
    if not is_linearized(model):
        raise ValueError(f"model: expected one of linearize, got a plain {type(model).__name__}.")
    return cast(_Window, model.circular_window)


class _LocalForward:
    """The forward of a linearized model; of a copy of the model, when it is copied with it."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.own: Callable[..., Any] | None = model.__dict__.get("forward")
        self.__signature__ = inspect.signature(model.forward)  # for those who ask

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        window = _window(self.model)
        tokens = place_of_tokens(window.settings, self.model, args, kwargs)
        with tap(self.model, window.handler(tokens)):
            if self.own is not None:
                return self.own(*args, **kwargs)
            return type(self.model).forward(self.model, *args, **kwargs)
