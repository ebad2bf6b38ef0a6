"""A prompt with images, as the language model gets it, and with only some of their tokens.

    images = see_images(model, inputs["pixel_values"])
    index = outlier_tokens(images.attention, k=10) + images.offset        # or any other choice
    fewer = with_image_tokens(model, images, index, inputs["input_ids"], inputs["attention_mask"])
    model(**fewer)

For models of transformers with a vision tower, `get_image_features`, placeholders in `input_ids`
and one image token for each patch: LLaVA-1.5 and its like.
"""

import inspect
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from attending.probes.cls_attention import Reduction, Statistic
from attending.probes.patch_watch import prefix_tokens, vision_tower, watch_patches


class SeenImages(NamedTuple):
    """Images as a language model gets them, and what their tower looks at.

    Attributes:
        outputs: of `get_image_features`; `pooler_output` has `[tokens, dim]` for each image.
        attention: of the patches, see `attending.probes.cls_attention`.
        statistic: `"cls"`, or `"received"` for a tower without a class token.
        offset: image tokens before the first patch (the class token, where the model keeps it).
    """

    outputs: Any
    attention: Float[Tensor, "images patches"]
    statistic: Statistic
    offset: int


def see_images(
    model: Any,
    pixel_values: Tensor | None,
    image_sizes: Tensor | None = None,
    layer: int = -2,
    reduce: Reduction = "merged",
    statistic: Statistic | Literal["auto"] = "auto",
    **feature_kwargs: Any,
) -> SeenImages:
    """Run the images through the tower and the projector once, and keep what the tower looks at.

    Raises:
        ValueError: without images, and where image tokens are not patches.
    """
    if pixel_values is None:
        raise ValueError(
            "pixel_values: expected images [images, channels, height, width], got None. DAMRO "
            "decodes against parts of an image, so there must be one."
        )
    tower = vision_tower(model)
    if image_sizes is None:
        with watch_patches(tower, layer, reduce, statistic) as watch:
            outputs = model.get_image_features(
                pixel_values=pixel_values, return_dict=True, **feature_kwargs
            )
        attention = watch.result.attention
        sizes = {len(tokens) for tokens in outputs.pooler_output}
        offset = sizes.pop() - attention.shape[-1]
        same = not sizes and len(outputs.pooler_output) == len(attention)
        if same and 0 <= offset <= prefix_tokens(tower)[1]:
            return SeenImages(outputs, attention, watch.result.statistic, offset)
    raise ValueError(
        f"model: expected one image token for each patch of an image, and {type(model).__name__} "
        "regroups, crops or packs them, so that it is not known which token is which patch."
    )


def with_image_tokens(
    model: Any,
    images: SeenImages,
    index: Int[Tensor, "images k"],
    input_ids: Int[Tensor, "batch tokens"],
    attention_mask: Int[Tensor, "batch tokens"] | None = None,
) -> dict[str, Any]:
    """The prompt with only some of the tokens of each image, in the given order.

    Args:
        model: whose config names the placeholder, `image_token_id`.
        images: what `see_images` returned, in the order in which the prompt shows them.
        index: which image tokens to keep, for each image.
        input_ids: the prompt, with a placeholder for each image token.
        attention_mask: of the prompt; left padding.

    Returns:
        `input_ids`, `attention_mask` (left-padded where rows have different numbers of images) and
        `mm_encoder_outputs`, to call the model with.

    Raises:
        ValueError: if the placeholders do not fit the images.
    """
    features = images.outputs.pooler_output
    size = len(features[0])
    placeholder = input_ids == model.config.image_token_id
    counts = placeholder.sum(-1)
    if int(counts.sum()) != size * len(features) or bool((counts % size).any()):
        raise ValueError(
            f"input_ids: expected {size} placeholders (token {model.config.image_token_id}) for "
            f"each of the {len(features)} images, got {counts.tolist()} in the rows."
        )
    # Of each image's placeholders the first k stay.
    place = placeholder.cumsum(-1) - 1
    kept = ~placeholder | (place % size < index.shape[1])
    if attention_mask is not None:
        kept &= attention_mask.bool()
    lengths = kept.sum(-1).tolist()
    filler = 0 if model.config.image_token_id else 1
    ids = input_ids.new_full((len(input_ids), max(lengths)), filler)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        ids[row, -length:] = input_ids[row, kept[row]]
        mask[row, -length:] = 1
    tokens = [
        feature[one] for feature, one in zip(features, index.to(features[0].device), strict=True)
    ]
    encoded = {"image": BaseModelOutputWithPooling(pooler_output=tokens)}
    return {"input_ids": ids, "attention_mask": mask, "mm_encoder_outputs": encoded}


def repeated_images(model: Any, outputs: Any, input_ids: Tensor, times: int) -> Any:
    """Image features for prompts each of which became `times` rows."""
    if times == 1:
        return outputs
    features = list(outputs.pooler_output)
    counts = (input_ids == model.config.image_token_id).sum(-1) // len(features[0])
    rows, start = [], 0
    for count in counts.tolist():
        rows += features[start : start + count] * times
        start += count
    return BaseModelOutputWithPooling(pooler_output=rows)


def check_sees_images(model: Any) -> None:
    """Raise ValueError unless it generates from images and placeholders, as LLaVA does."""
    accepts = inspect.signature(model.forward).parameters if isinstance(model, nn.Module) else {}
    config = getattr(model, "config", None)
    if (
        not callable(getattr(model, "generate", None))
        or not callable(getattr(model, "get_image_features", None))
        or not isinstance(getattr(config, "image_token_id", None), int)
        or "mm_encoder_outputs" not in accepts
    ):
        raise ValueError(
            "model: expected a vision-language model of transformers with generate, "
            "get_image_features, a config with image_token_id and a forward that takes "
            f"mm_encoder_outputs (such as LlavaForConditionalGeneration), got "
            f"{type(model).__name__}."
        )
