"""What a LLaVA makes of images, and which of its tokens are kept, image by image.

`get_image_features` is called by the model's forward, or by `generate` long before it, which then
copies the features for beams. So for a while a LLaVA gets a `get_image_features` that remembers,
for each image that it returns, what is kept of it. What it returns is unchanged.
"""

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from attending.probes.patch_watch import prefix_tokens, vision_tower, watch_patches
from attending.probes.visual_tokens import attention_layer
from attending.taps import AttentionCall, Proceed, TapWarning, tap


@dataclass(frozen=True)
class Needs:
    """What a selector looks at besides the features.

    Attributes:
        attention: of which layer: that of the features, the last one with heads merged, or none.
        keys: whether it needs the keys of that layer and the features before the projector.
    """

    attention: Literal["features", "last", None]
    keys: bool = False


@dataclass(frozen=True, eq=False)
class Seen:
    """What a selector gets to see of some images of one size.

    Attributes:
        features: image tokens as the language model gets them.
        attention: of the tower; None if not needed.
        hidden: what the projector got; None if not needed.
        key: of the tower, with the heads averaged (attention of the features) or side by side (of
            the last layer); None if not needed.
        project: the projector.
    """

    features: Float[Tensor, "images tokens dim"]
    attention: Float[Tensor, "images tokens"] | None
    hidden: Float[Tensor, "images tokens width"] | None
    key: Float[Tensor, "images tokens key_dim"] | None
    project: Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class KeptImage:
    """What is kept of one image.

    Attributes:
        tokens: for the language model.
        index: from which tokens of the image they come; -1 for one in which many are merged.
        before: how many tokens the image had.
    """

    tokens: Float[Tensor, "kept dim"]
    index: Int[Tensor, "kept"]
    before: int


Choose = Callable[[Seen], list[KeptImage]]


class Images:
    """What is kept of each image whose features are still in use."""

    def __init__(self) -> None:
        self._kept = WeakIdKeyDictionary()

    def __getitem__(self, features: Tensor) -> KeptImage:
        found: KeptImage | None = self._kept.get(features)
        if found is None:
            raise ValueError(
                "mm_encoder_outputs: expected image features that get_image_features of this model "
                "returned within the block, got others. Give pixel_values, or call it within the "
                "block; a second pruning of the same features is not possible."
            )
        return found

    def remember(self, features: Tensor, kept: KeptImage) -> None:
        """Keep what belongs to an image as long as its features live."""
        self._kept[features] = kept


@contextmanager
def watched_features(
    model: nn.Module, needs: Needs, choose: Choose, is_mine: Callable[[], bool]
) -> Iterator[Images]:
    """While open, what the `get_image_features` of a LlavaModel returns is looked at and chosen.

    Args:
        model: a `LlavaModel` of transformers.
        needs: what is looked at.
        choose: what is kept of images.
        is_mine: whether a call is one of the block's thread.
    """
    images = Images()
    lively: Any = model
    tower, projector = vision_tower(model), lively.multi_modal_projector
    original = lively.get_image_features
    was_set = "get_image_features" in model.__dict__

    @functools.wraps(original)
    def get_image_features(*args: Any, **kwargs: Any) -> Any:
        if not is_mine():
            return original(*args, **kwargs)
        layer = attention_layer(model, kwargs.get("vision_feature_layer"))
        with _looking(tower, projector, needs, layer) as look:
            output = original(*args, **kwargs)
        found = list(getattr(output, "pooler_output", output))
        if len({one.shape for one in found}) > 1:
            raise ValueError(
                "image_sizes: expected images with the same number of tokens, got "
                f"{sorted({len(one) for one in found})} tokens. Prune images of different sizes in "
                "calls of their own."
            )
        for features, kept in zip(found, choose(look(torch.stack(found))), strict=True):
            images.remember(features, kept)
        return output

    lively.get_image_features = get_image_features
    try:
        yield images
    finally:
        if was_set:
            lively.get_image_features = original
        else:
            del lively.get_image_features


@contextmanager
def _looking(
    tower: nn.Module, projector: nn.Module, needs: Needs, layer: int
) -> Iterator[Callable[[Tensor], Seen]]:
    """Look on while images go through tower and projector."""
    inputs: list[Tensor] = []
    keys: list[Tensor] = []  # of each layer of the tower
    last = needs.attention == "last"

    def hold(module: nn.Module, args: tuple[Any, ...]) -> None:
        inputs.append(args[0])

    def look_at_keys(call: AttentionCall, proceed: Proceed) -> Tensor:
        if call.layer is not None and not call.is_cross:
            keys.append(call.key.detach())
        return proceed(call)

    with ExitStack() as stack:
        watch = None
        if needs.attention is not None:
            where, reduce = (-1, "merged") if last else (layer, "mean")
            watch = stack.enter_context(watch_patches(tower, where, reduce))  # type: ignore[arg-type]
        if needs.keys:
            stack.callback(projector.register_forward_pre_hook(hold).remove)
            # SigLIP's pooling head makes no call that a tap sees, and nobody asks for it here.
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore", TapWarning)
            stack.enter_context(tap(tower, look_at_keys))

        def seen(features: Tensor) -> Seen:
            attention = None if watch is None else watch.result.attention
            if attention is not None and attention.shape != features.shape[:2]:
                raise ValueError(
                    "vision_feature_select_strategy: expected a token for each of the "
                    f"{attention.shape[1]} patches of the tower, got {features.shape[1]} tokens. "
                    'Of a tower with a class token it must be "default".'
                )
            key = None
            if needs.keys:
                key = keys[-1 if last else layer]
                key = key.transpose(1, 2).flatten(2) if last else key.mean(1)
                key = key[:, prefix_tokens(tower)[1] :]
            hidden = inputs[0] if inputs else None
            return Seen(features, attention, hidden, key, projector)

        yield seen
