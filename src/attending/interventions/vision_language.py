"""Where the language model is in a model, what its layers are given, and what of it is image."""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from attending.taps.blocks import blocks_of, outermost


def language_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The decoder layers of a model in their order, by their qualified names in it.

    Of a vision-language model of transformers they are those of its language model, which
    `get_decoder()` knows; any other model must have one stack of blocks.

    Raises:
        ValueError: if there is none, or more than one.
    """
    get_decoder: object = getattr(model, "get_decoder", None)
    decoder = get_decoder() if callable(get_decoder) else model
    prefix = next((name for name, module in model.named_modules() if module is decoder), None)
    if prefix is None:
        raise ValueError(
            f"model: {type(model).__name__}.get_decoder() returned a module that is not in it."
        )
    blocks = blocks_of(decoder)
    names = outermost(list(blocks))
    stacks = {name.rpartition(".")[0] for name in names}
    if len(stacks) != 1:
        found = ", ".join(sorted(stacks)) or "none"
        raise ValueError(
            f"model: expected one stack of decoder layers in {type(model).__name__}, found "
            f"{found}. Give the language model itself."
        )
    return {f"{prefix}.{name}" if prefix else name: blocks[name] for name in names}


def layer_number(name: str, layers: Sequence[str]) -> int | None:
    """Which of the layers a module is in, by its name and theirs; None if in none of them."""
    return next((i for i, layer in enumerate(layers) if f"{name}.".startswith(f"{layer}.")), None)


def hidden_argument(
    args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Float[Tensor, "batch tokens dim"]:
    """The residual stream that a decoder layer was called with."""
    hidden = args[0] if args else kwargs.get("hidden_states")
    if not isinstance(hidden, Tensor) or hidden.dim() != 3:
        raise ValueError(
            "model: expected its decoder layers to be called with hidden states "
            f"[batch, tokens, dim] first, got {type(hidden).__name__}."
        )
    return hidden


def image_token_id_of(model: nn.Module) -> int | None:
    """The id of the placeholder that stands for image tokens in `input_ids`, if the model has one.

    Models of transformers keep it in their config, as `image_token_id` or `image_token_index`.
    """
    config = getattr(model, "config", None)
    for name in ("image_token_id", "image_token_index"):
        found = getattr(config, name, None)
        if isinstance(found, int):
            return found
    return None


def image_token_mask(
    model: nn.Module, input_ids: Int[Tensor, "batch tokens"], image_token_id: int | None = None
) -> Bool[Tensor, "batch tokens"]:
    """Which tokens stand for an image, in one span or several.

    Args:
        model: a vision-language model.
        input_ids: its input, in which each token of an image has a place, as processors of
            transformers write it.
        image_token_id: what stands there; by default what the model's config says.

    Raises:
        ValueError: if the config has no such id and none is given.
    """
    wanted = image_token_id_of(model) if image_token_id is None else image_token_id
    if wanted is None:
        raise ValueError(
            f"image_token_id: expected an id, as the config of {type(model).__name__} has no "
            "image_token_id, got None. Give the id, or a mask of the image tokens."
        )
    return input_ids == wanted
