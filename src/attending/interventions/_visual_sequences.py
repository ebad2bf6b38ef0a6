"""What redistribution has to remember of running sequences: images, prompts, sinks of each layer.

A sequence begins with a forward whose cache is empty, and goes on with those that bring its cache.
Several may be under way at once, as when two prompts are decoded against each other: each is known
by its cache.
"""

import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from attending.interventions.vision_language import image_token_mask
from attending.taps.where import CACHES, arguments_of


@dataclass(eq=False)
class Sequence:
    """A batch of sequences that is under way; all masks are over the tokens so far.

    Attributes:
        image: which tokens stand for an image.
        real: which are no padding.
        prompt: which may be sinks: those of the prompt.
        sinks: which are, in each layer that has run.
        new: how many tokens the present forward brought.
        has_image: whether there is an image at all.
        brings_prompt: whether a token of the present forward may be a sink. (Both are asked once a
            forward, since on a GPU each question waits for it.)
    """

    image: Bool[Tensor, "batch tokens"]
    real: Bool[Tensor, "batch tokens"]
    prompt: Bool[Tensor, "batch tokens"]
    sinks: dict[int, Bool[Tensor, "batch tokens"]] = field(default_factory=dict)
    new: int = 0
    has_image: bool = False
    brings_prompt: bool = False

    def __post_init__(self) -> None:
        self._ask()

    @property
    def length(self) -> int:
        """Tokens so far, those of the present forward included."""
        return self.image.shape[1]

    def grow(self, past: int, image: Tensor, real: Tensor, prompt: Tensor) -> None:
        """Tokens arrived after the first `past` ones; what came later was taken back."""
        self.image = _append(self.image, past, image)
        self.real = _append(self.real, past, real)
        self.prompt = _append(self.prompt, past, prompt)
        self.new = image.shape[1]
        self._ask()

    def _ask(self) -> None:
        past = self.length - self.new
        self.brings_prompt = bool(self.prompt[:, past:].any())
        self.has_image = self.has_image or bool(self.image.any())

    def mark(self, layer: int, sinks: Bool[Tensor, "batch tokens"]) -> None:
        """What the present forward found in a layer."""
        past = self.length - self.new
        kept = self.sinks.get(layer)
        kept = self.image.new_zeros(len(sinks), past) if kept is None else kept
        sinks = sinks & self.prompt[:, past:]
        self.sinks[layer] = _append(kept, past, sinks)


class Sequences:
    """All sequences of a run, and which one the present forward goes on with."""

    def __init__(
        self,
        model: nn.Module,
        image_token_id: int | None,
        image_mask: Bool[Tensor, "batch tokens"] | None,
        prompt_length: int | Int[Tensor, " batch"] | None,
    ) -> None:
        self.model = model
        self.image_token_id = image_token_id
        self.image_mask = image_mask
        self.prompt_length = prompt_length
        self.present: Sequence | None = None
        self._of_cache: weakref.WeakKeyDictionary[object, Sequence] = weakref.WeakKeyDictionary()

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """A forward of the model begins: a pre-hook."""
        given = arguments_of(module, args, kwargs)
        cache = cache_of(given)
        past = _length_of(cache)
        ids, embeddings = given.get("input_ids"), given.get("inputs_embeds")
        source = ids if isinstance(ids, Tensor) else embeddings
        if not isinstance(source, Tensor):
            raise ValueError(
                "input_ids: expected the tokens of the model in a tensor, as input_ids or "
                f"inputs_embeds, got {type(source).__name__}."
            )
        batch, new = source.shape[:2]
        places = torch.arange(past, past + new, device=source.device).expand(batch, new)
        if self.prompt_length is None:
            # What is generated comes alone; an image that comes later is part of a new question.
            is_prompt = past == 0 or given.get("pixel_values") is not None
            prompt = torch.full_like(places, is_prompt, dtype=torch.bool)
        else:
            limit = torch.as_tensor(self.prompt_length, device=source.device).reshape(-1)
            prompt = places < match_batch(limit, batch, "prompt_length")[:, None]
        image = self._image(ids if isinstance(ids, Tensor) else None, source, past)
        image = image if self.image_mask is not None else image & prompt
        real = _real(given.get("attention_mask"), image, past)
        if past == 0:
            self.present = Sequence(image, real, prompt, new=new)
            return
        sequence = self._of_cache.get(cache) if cache is not None else None
        sequence = self.present if sequence is None else sequence
        if sequence is None or sequence.length < past:
            raise ValueError(
                "model: expected the whole sequence to run within the block, got a cache of "
                f"{past} tokens that were seen outside of it, whose sinks are not known. Enter the "
                "block before the prompt runs."
            )
        self.present = sequence
        sequence.grow(past, image, real, prompt)

    def belongs_to(self, cache: object) -> None:
        """The present sequence is the one of this cache."""
        if cache is not None and self.present is not None:
            self._of_cache[cache] = self.present

    def _image(self, ids: Tensor | None, source: Tensor, past: int) -> Bool[Tensor, "batch tokens"]:
        batch, new = source.shape[:2]
        if self.image_mask is not None:
            if past == 0 and self.image_mask.shape[1] > new and self.prompt_length is None:
                raise ValueError(
                    f"image_mask: expected [batch, tokens] for the {new} tokens of the sequence, "
                    f"got {list(self.image_mask.shape)}."
                )
            mask = match_batch(self.image_mask.to(source.device), batch, "image_mask")
            mask = mask[:, past : past + new]
            return torch.nn.functional.pad(mask, (0, new - mask.shape[1]))
        if ids is not None:
            return image_token_mask(self.model, ids, self.image_token_id)
        if past:  # generated tokens, which come as embeddings after a prompt of embeddings
            return torch.zeros(batch, new, dtype=torch.bool, device=source.device)
        raise ValueError(
            "image_mask: expected a mask of the image tokens, as the model was given inputs_embeds "
            "and no input_ids, in which they could be found, got None. Pass image_mask where the "
            "method is called with the model."
        )


def cache_of(given: Mapping[str, Any]) -> object:
    """The cache among the arguments of a model or a layer, under any of its names."""
    for name in CACHES:
        if given.get(name) is not None:
            return given[name]
    return None


def _length_of(cache: object) -> int:
    length = getattr(cache, "get_seq_length", None)
    if cache is not None and not callable(length):
        raise ValueError(
            "model: expected a cache that knows its length, as those of transformers do "
            f"(get_seq_length), got {type(cache).__name__}."
        )
    return int(length()) if callable(length) else 0


def match_batch(tensor: Tensor, batch: int, name: str) -> Tensor:
    """A tensor with a row for each sequence, also where each was copied for beams or samples."""
    if len(tensor) == batch:
        return tensor
    if len(tensor) == 0 or batch % len(tensor):
        raise ValueError(
            f"{name}: expected one row for each of the {batch} sequences, or for equal shares of "
            f"them, got {list(tensor.shape)}."
        )
    return tensor.repeat_interleave(batch // len(tensor), 0)


def _append(kept: Tensor, past: int, new: Tensor) -> Tensor:
    return torch.cat([match_batch(kept[:, :past], len(new), "model"), new], 1)


def _real(mask: object, image: Tensor, past: int) -> Bool[Tensor, "batch tokens"]:
    if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] >= past + image.shape[1]:
        return mask[:, past : past + image.shape[1]].to(image.device).bool()
    return torch.ones_like(image)
