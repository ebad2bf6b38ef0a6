"""The patch attention of a vision tower while it runs, whoever runs it.

    tower = vision_tower(model)                       # of LLaVA, CLIP, ...
    with watch_patches(tower, layer=-2) as watch:
        model.get_image_features(pixel_values)        # or the tower itself, or generate
    watch.result.attention                            # [images, patches]

`patch_attention(tower, pixel_values)` runs the tower for you. What is measured, and the two
statistics, are those of `attending.probes.cls_attention`.
"""

import warnings
from collections import deque
from types import TracebackType
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from attending.probes.cls_attention import (
    Reduction,
    Statistic,
    check_reduction,
    cls_attention,
    received_attention,
)
from attending.taps import AttentionCall, Proceed, TapWarning, tap

_CLS_NAMES = {"class_embedding", "cls_token", "class_token", "cls_embedding"}
_EXTRA_NAMES = {"register_tokens", "reg_token", "distillation_token", "dist_token"}


class PatchAttention(NamedTuple):
    """What one forward of a tower says about its patches.

    Attributes:
        attention: `[images, patches]`, or `[images, heads, patches]` with `reduce="none"`.
        statistic: `"cls"`, the attention of the class token, or `"received"`, the mean attention
            that a patch receives from patches.
        name: the attention module whose map it is, as named in the watched module.
    """

    attention: Float[Tensor, "images *heads patches"]
    statistic: Statistic
    name: str


def vision_tower(model: nn.Module) -> nn.Module:
    """The part of a model that sees: its submodule with the config `model.config.vision_config`.

    A model without a `vision_config` is taken for a tower itself.

    Raises:
        ValueError: if the model's config names a vision tower, and no submodule has that config.
    """
    config = getattr(getattr(model, "config", None), "vision_config", None)
    if config is None:
        return model
    for module in model.modules():
        if module is not model and getattr(module, "config", None) is config:
            return module
    for module in model.modules():
        if module is not model and type(getattr(module, "config", None)) is type(config):
            return module
    raise ValueError(
        f"model: expected a submodule with the config of config.vision_config, found none in "
        f"{type(model).__name__}; pass the vision tower itself."
    )


def prefix_tokens(tower: nn.Module) -> tuple[bool, int]:
    """Whether a tower has a class token, and how many tokens stand before its patches.

    Read from the names of its parameters: `class_embedding` (CLIP), `cls_token` (ViT, DINOv2,
    timm), registers and the distillation token of DeiT.
    """
    has_cls, prefix = False, 0
    for name, parameter in tower.named_parameters():
        last = name.rpartition(".")[2]
        if last in _CLS_NAMES:
            has_cls, prefix = True, prefix + 1
        elif last in _EXTRA_NAMES:
            prefix += parameter.shape[-2] if parameter.dim() > 1 else 1
    return has_cls, prefix


def patch_attention(
    tower: nn.Module,
    pixel_values: Tensor,
    layer: int = -2,
    reduce: Reduction = "mean",
    statistic: Statistic | Literal["auto"] = "auto",
) -> PatchAttention:
    """Run a vision tower on images and say which patches are attended to.

    Args:
        tower: a vision tower; `vision_tower(model)` finds that of a larger model.
        pixel_values: what the tower takes, such as `[images, channels, height, width]`.
        layer: as in `watch_patches`.
        reduce: as in `cls_attention`.
        statistic: as in `watch_patches`.
    """
    with torch.no_grad(), watch_patches(tower, layer, reduce, statistic) as watch:
        tower(pixel_values)
    return watch.result


def watch_patches(
    tower: nn.Module,
    layer: int = -2,
    reduce: Reduction = "mean",
    statistic: Statistic | Literal["auto"] = "auto",
) -> "PatchWatch":
    """A context manager that keeps the patch attention of the last forward of a tower.

    Args:
        tower: the vision tower, not the model around it.
        layer: which of its self-attention layers, from 0, or from the end with -1 the last. -2 is
            the layer whose output LLaVA-1.5 takes its features from.
        reduce: as in `cls_attention`.
        statistic: `"cls"`, `"received"`, or `"auto"`: `"cls"` where the tower has a class token,
            `"received"` where it has none.

    Raises:
        ValueError: at once, for an unknown name, or `"cls"` and a tower without a class token;
            after the forward, for a layer that the tower does not have.
        attending.taps.TapError: at the end of the block, if the tower did not run in it.
    """
    return PatchWatch(tower, layer, reduce, statistic)


class PatchWatch:
    """What `watch_patches` returns; `result` holds the last forward's `PatchAttention`."""

    def __init__(
        self,
        tower: nn.Module,
        layer: int,
        reduce: Reduction,
        statistic: Statistic | Literal["auto"],
    ) -> None:
        check_reduction(reduce)
        if statistic not in ("auto", *get_args(Statistic)):
            raise ValueError(f'statistic: expected "auto", "cls" or "received", got {statistic!r}.')
        has_cls, self.prefix = prefix_tokens(tower)
        if statistic == "cls" and not has_cls:
            raise ValueError(
                f'statistic: "cls" needs a class token, and {type(tower).__name__} has none; use '
                '"received", which is a different statistic.'
            )
        wants_cls = has_cls and statistic != "received"
        self.statistic: Statistic = "cls" if wants_cls else "received"
        self.layer, self.reduce = layer, reduce
        self._tap = tap(tower, self._keep)
        self._kept: deque[AttentionCall] = deque(maxlen=-layer if layer < 0 else 1)
        self._forward, self._layers = -1, 0
        self._result: PatchAttention | None = None

    @property
    def result(self) -> PatchAttention:
        """Of the last forward.

        Raises:
            ValueError: if the tower has no such layer, or has not run.
        """
        if self._result is None:
            if len(self._kept) < (self._kept.maxlen or 1):
                raise ValueError(
                    f"layer: expected -{self._layers} to {self._layers - 1}, as a forward of the "
                    f"tower made {self._layers} calls of self-attention, got {self.layer}."
                )
            self._result = self._measure(self._kept[0])
        return self._result

    def __enter__(self) -> "PatchWatch":
        """Begin to watch."""
        self._kept.clear()
        self._forward, self._layers, self._result = -1, 0, None
        self._tap.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop watching, and let go of query and key."""
        with warnings.catch_warnings():
            # SigLIP's pooling head makes no call that a tap sees, and nobody asks for it here.
            warnings.simplefilter("ignore", TapWarning)
            self._tap.__exit__(kind, error, traceback)
        if kind is None:
            _ = self.result
        self._kept.clear()

    def _keep(self, call: AttentionCall, proceed: Proceed) -> Tensor:
        # What is in no layer is no layer: a pooling head, for example.
        if call.layer is not None and not call.is_cross and not call.recomputed:
            if call.forward != self._forward:
                self._kept.clear()
                self._forward, self._layers, self._result = call.forward, 0, None
            if self.layer < 0 or self._layers == self.layer:
                self._kept.append(call)
            self._layers += 1
        return proceed(call)

    def _measure(self, call: AttentionCall) -> PatchAttention:
        measure = cls_attention if self.statistic == "cls" else received_attention
        attention = measure(
            call.query.detach(),
            call.key.detach(),
            reduce=self.reduce,
            prefix=self.prefix,
            attn_mask=call.attn_mask,
            scale=call.scale,
            enable_gqa=call.enable_gqa,
        )
        return PatchAttention(attention, self.statistic, call.name)
