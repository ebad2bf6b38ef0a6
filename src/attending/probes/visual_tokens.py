"""How diverse the image tokens of a vision-language model are, and how its tower looks at them.

Two numbers of an image, after AgilePruner (Baek et al., arXiv 2603.01236):

- the **effective rank** of its tokens, as the language model gets them: how many directions they
  use. Simple images have few, complex ones many.
- the **entropy of the attention** that the vision tower's class token pays them: low where it looks
  at a few patches.

        tokens = visual_tokens(model, pixel_values)
        tokens.effective_rank, tokens.entropy                   # a number for each image

The paper: pruning by attention does better on simple images (low on both), pruning by diversity on
complex ones. `attending.interventions.visual_token_pruning` prunes, and calibrates itself with
these numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from attending.core.precision import full_precision
from attending.core.statistics import effective_rank
from attending.probes.cls_attention import Statistic
from attending.probes.patch_watch import vision_tower, watch_patches


@dataclass(frozen=True, eq=False)
class VisualTokens:
    """The image tokens of some images.

    Attributes:
        features: as the language model gets them, after the projector.
        attention: that the vision tower pays to each, mean over heads, in the layer that the
            features come from.
        statistic: `"cls"`, the attention of the class token, or `"received"`, the mean attention
            that a patch receives; see `probes.cls_attention`.
    """

    features: Float[Tensor, "images tokens dim"]
    attention: Float[Tensor, "images tokens"]
    statistic: Statistic

    @property
    def effective_rank(self) -> Float[Tensor, "images"]:
        """Of the features less their mean over the tokens, as AgilePruner's code has it."""
        return effective_rank(self.features, center=True)

    @property
    def uncentred_effective_rank(self) -> Float[Tensor, "images"]:
        """Of the features as they are, as AgilePruner's equations have it."""
        return effective_rank(self.features)

    @property
    def entropy(self) -> Float[Tensor, "images"]:
        """`attention_entropy` of the attention, nats."""
        return attention_entropy(self.attention)


@full_precision
def attention_entropy(attention: Float[Tensor, "*batch tokens"]) -> Float[Tensor, "*batch"]:
    """`-sum_i p_i ln p_i` with `p = attention / sum(attention)`: how evenly attention is spread.

    In nats, from 0 (all on one token) to `ln(tokens)`; 0 where there is no attention at all. The
    attention of a class token over patches does not sum to 1, as it looks at itself too; what is
    measured is its spread over the patches.

    Args:
        attention: not negative; computed at least in float32.

    Raises:
        ValueError: for negative or integer values.
    """
    if not attention.is_floating_point() or attention.dim() == 0 or bool((attention < 0).any()):
        raise ValueError(
            "attention: expected a float tensor [..., tokens] without negative values, got "
            f"{attention.dtype} {list(attention.shape)}. Give probabilities, not scores."
        )
    attention = attention.to(torch.promote_types(attention.dtype, torch.float32))
    total = attention.sum(-1, keepdim=True)
    share = attention / total.masked_fill(total == 0, 1.0)
    return -torch.xlogy(share, share).sum(-1)


def visual_tokens(model: nn.Module, pixel_values: Tensor) -> VisualTokens:
    """Look at images with the tower and the projector of a model, without the language model.

    Args:
        model: a vision-language model of transformers with a `get_image_features`, such as
            `LlavaForConditionalGeneration`, that makes one token of each patch.
        pixel_values: what the model takes, `[images, channels, height, width]`.

    Raises:
        ValueError: for another model, or one that does not make a token of each patch.
    """
    get_image_features: Any = getattr(model, "get_image_features", None)
    if get_image_features is None:
        raise ValueError(
            "model: expected a vision-language model of transformers with get_image_features, got "
            f"{type(model).__name__}. Of other models, give features and attention to "
            "statistics.effective_rank and attention_entropy yourself."
        )
    tower = vision_tower(model)
    with torch.no_grad(), watch_patches(tower, attention_layer(model)) as watch:
        output = get_image_features(pixel_values)
    found = getattr(output, "pooler_output", output)
    features = torch.stack(list(found)) if isinstance(found, Sequence) else found
    attention = watch.result.attention
    if not isinstance(features, Tensor) or features.shape[:2] != attention.shape:
        shape = list(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise ValueError(
            f"model: expected a token for each of the patches {list(attention.shape)} of its "
            f"vision tower, got {shape} from get_image_features of {type(model).__name__}. Where "
            "patches are regrouped, attention has to be regrouped too."
        )
    return VisualTokens(features, attention, watch.result.statistic)


def attention_layer(model: nn.Module, vision_feature_layer: int | list[int] | None = None) -> int:
    """The layer of the vision tower whose output the image features are; of several, the last.

    Args:
        model: a LLaVA; its `config.vision_feature_layer` counts hidden states, of which the first
            is the embedding: -2 is the output of the layer before the last, 3 that of layer 2.
        vision_feature_layer: in place of the config's.
    """
    layer = vision_feature_layer
    if layer is None:
        layer = getattr(getattr(model, "config", None), "vision_feature_layer", -1)
    if isinstance(layer, list | tuple):
        layer = layer[-1]
    if not isinstance(layer, int) or layer == 0:
        raise ValueError(
            "vision_feature_layer: expected the output of a layer, which is not 0 (the embedding "
            f"of the patches), got {layer!r}."
        )
    return layer if layer < 0 else layer - 1
