"""llava-shapes with sinks planted: what redistribution does where there are sinks for certain.

The model has none of its own. A sink of a large model has three properties: one channel of its
hidden state is huge, so that the norm makes it the same whatever it was; its key is one that text
queries like; and its value is next to nothing. All three are planted here, in a copy: the first
token and some image tokens, at the same places in all images, get one channel at the input of the
first layer; in every layer the column of the key projection for that channel becomes the mean query
of the last text tokens, and that of the value projection becomes 0. Other tokens hardly have
anything in that channel, so that without the planted tokens the model answers as before.
"""

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from attending.interventions.vision_language import image_token_mask, language_layers
from attending.taps import tap
from attending.zoo.entry import ZooModel

CHANNEL = 7
SIZE = 300.0  # in that channel; others are around 1
STRENGTH = 5.0  # score of a planted token with the mean query
PLACES = 3  # image tokens that are planted
LAST = 6  # tokens of the text whose queries are averaged


def plant(zoo_model: ZooModel, inputs: dict[str, Tensor], seed: int) -> ZooModel:
    """A copy of a model of Llama's kind in which some image tokens and the first token are sinks.

    Args:
        zoo_model: stays as it is.
        inputs: questions, for the mean query.
        seed: of the places.
    """
    model: Any = copy.deepcopy(zoo_model.model)
    layers = language_layers(model)
    with torch.no_grad(), tap(model) as calls:
        model(**inputs)
    image = image_token_mask(model, inputs["input_ids"])
    middle = image.int().argmax(1).float().mean().round().long() + image[0].sum() // 2
    for name, layer in layers.items():
        call = next(one for one in calls if one.name.startswith(f"{name}."))
        _point_keys(model, layer, call.query[:, :, -LAST:], call.softmax_scale, middle)
    generator = torch.Generator().manual_seed(seed)
    places = torch.randperm(int(image[0].sum()), generator=generator)[:PLACES]
    _mark_tokens(zoo_model, model, next(iter(layers.values())), places)
    return replace(zoo_model, model=model)


def _point_keys(model: Any, layer: Any, query: Tensor, scale: float, place: Tensor) -> None:
    """Make the key of a planted token score `STRENGTH` with the mean of the queries."""
    attention, norm = layer.self_attn, layer.input_layernorm.weight
    dim = query.shape[-1]
    kv_heads = attention.k_proj.weight.shape[0] // dim
    mean = query.mean((0, 2)).unflatten(0, (kv_heads, -1)).mean(1)
    cos, sin = (one[0, 0] for one in model.get_decoder().rotary_emb(mean, place.reshape(1, 1)))
    first, second = mean.chunk(2, -1)
    before_rotation = mean * cos + torch.cat([second, -first], -1) * sin
    wanted = STRENGTH / (scale * mean.square().sum(-1, keepdim=True)) * before_rotation
    # After the norm, a channel that holds everything is the square root of the width.
    with torch.no_grad():
        attention.k_proj.weight[:, CHANNEL] = wanted.flatten() / (len(norm) ** 0.5 * norm[CHANNEL])
        attention.v_proj.weight[:, CHANNEL] = 0.0


def _mark_tokens(zoo_model: ZooModel, model: Any, first_layer: Any, places: Tensor) -> None:
    """Hooks that write the channel, as long as the copy lives."""
    ids: list[Tensor] = []

    def look(_: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids[:] = [kwargs["input_ids"]]

    def mark(_: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden = args[0].clone()
        image = image_token_mask(model, ids[0])
        if bool(image.any()):
            rows = torch.arange(len(hidden))[:, None]
            hidden[rows, image.int().argmax(1, keepdim=True) + places, CHANNEL] += SIZE
            hidden[ids[0] == zoo_model.tokenizer.bos_token_id, CHANNEL] += SIZE
        return (hidden, *args[1:]), kwargs

    model.register_forward_pre_hook(look, with_kwargs=True)
    first_layer.register_forward_pre_hook(mark, with_kwargs=True)
