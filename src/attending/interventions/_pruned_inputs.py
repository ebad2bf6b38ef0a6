"""The inputs of a model without some of their tokens: ids, embeddings, masks, positions, labels.

`generate` and the user go on counting all tokens. What is given to the model, and what its cache
holds, is the shorter sequence; `Shortened` knows which of the whole it is.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from attending.interventions._visual_sequences import cache_of, match_batch

Positions = Literal["compact", "original"]


@dataclass(frozen=True, eq=False)
class Shortened:
    """Which tokens of a batch of sequences the language model has got.

    Attributes:
        index: their places in the whole sequence, those of the cache first.
        real: False where a place only fills up a row in which more was dropped.
        length: tokens of the whole sequence so far.
    """

    index: Int[Tensor, "batch kept"]
    real: Bool[Tensor, "batch kept"]
    length: int

    def cut(self, cached: int) -> "Shortened":
        """After the last tokens, which were generated, have been taken back from the cache."""
        gone = self.index.shape[1] - cached
        if gone <= 0:
            return self
        return Shortened(self.index[:, :cached], self.real[:, :cached], self.length - gone)


def untouched(batch: int, length: int, device: torch.device) -> Shortened:
    """Sequences of which nothing was dropped."""
    index = torch.arange(length, device=device).expand(batch, length)
    return Shortened(index, torch.ones_like(index, dtype=torch.bool), length)


def shorten(
    given: Mapping[str, Any],
    drop: Bool[Tensor, "batch tokens"],
    before: Shortened | None,
    *,
    positions: Positions,
    filler: int,
) -> tuple[dict[str, Any], Shortened]:
    """The arguments of a model without the dropped tokens.

    Where rows drop differently many, the shorter ones are filled up with masked tokens, on the side
    where the batch is padded (left, if it is not).

    Args:
        given: the arguments by name; those that have a place for each token are changed.
        drop: which of the new tokens the model does not get.
        before: what its cache holds.
        positions: `"compact"` counts what is left; `"original"` leaves gaps.
        filler: the id of a filling token.

    Returns:
        The arguments to call the model with instead, and what the cache will hold then.
    """
    batch, new = drop.shape
    start = 0 if before is None else before.length
    mask = _mask(given.get("attention_mask"), batch, start + new)
    index, real = _left_over(drop, right=mask is not None and not bool(mask[:, -1].all()))
    if before is None:
        past = untouched(batch, 0, drop.device)
    else:
        past = Shortened(
            match_batch(before.index, batch, "attention_mask"),
            match_batch(before.real, batch, "attention_mask"),
            before.length,
        )
    after = Shortened(
        torch.cat([past.index, start + index], 1), torch.cat([past.real, real], 1), start + new
    )
    changed = dict(given)
    changed["attention_mask"] = _shorter_mask(mask, after, always=positions == "original")
    changed["position_ids"] = _shorter_positions(
        given.get("position_ids"), after, index, real, positions
    )
    for name, fill in (("input_ids", filler), ("labels", -100)):
        if isinstance(given.get(name), Tensor):
            changed[name] = given[name].gather(1, index).masked_fill(~real, fill)
    embeddings = given.get("inputs_embeds")
    if isinstance(embeddings, Tensor):
        places = index[..., None].expand(-1, -1, embeddings.shape[-1])
        changed["inputs_embeds"] = embeddings.gather(1, places).masked_fill(~real[..., None], 0.0)
    return {name: value for name, value in changed.items() if value is not None}, after


def placeholders(
    given: Mapping[str, Any], image_token_id: int, embedding: Callable[[], Tensor]
) -> Bool[Tensor, "batch tokens"]:
    """Which of the new tokens stand for image tokens, by ids or, without ids, by embeddings."""
    ids, embeddings = given.get("input_ids"), given.get("inputs_embeds")
    if isinstance(ids, Tensor):
        return ids == image_token_id
    if isinstance(embeddings, Tensor):
        return (embeddings == embedding().to(embeddings)).all(-1)
    raise ValueError("input_ids: expected ids or inputs_embeds in a tensor, got neither.")


def images_in(given: Mapping[str, Any]) -> int:
    """How many images a LLaVA is given, as pixels or as features."""
    encoded = (given.get("mm_encoder_outputs") or {}).get("image")
    if encoded is not None:
        return len(encoded.pooler_output)
    pixels = given.get("pixel_values")
    return 0 if pixels is None else len(pixels)


def cache_in(given: Mapping[str, Any], output: Any) -> object:
    """The cache of a forward: the one it was given, or the one it made."""
    cache = cache_of(given)
    if cache is None:
        values = output.values() if isinstance(output, Mapping) else output
        cache = next((one for one in values if hasattr(one, "get_seq_length")), None)
    return cache


def _left_over(drop: Tensor, right: bool) -> tuple[Tensor, Tensor]:
    """The places that are left, filled up to one width, and which of these are real."""
    count = (~drop).sum(-1, keepdim=True)
    width = int(count.max())
    order = drop.to(torch.uint8).sort(dim=-1, stable=True).indices[:, :width]  # what is left first
    place = torch.arange(width, device=drop.device).expand(len(drop), width)
    if right:
        return order, place < count
    shift = width - count
    return order.gather(1, (place - shift).clamp_min(0)), place >= shift


def _mask(mask: object, batch: int, length: int) -> Tensor | None:
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        shape = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"attention_mask: expected a mask [batch, tokens] of padding, got {shape}. A static "
            "cache makes transformers build the whole mask beforehand; use a dynamic one."
        )
    if tuple(mask.shape) != (batch, length):
        raise ValueError(
            f"attention_mask: expected {[batch, length]}, with a place for every token of the "
            f"prompt, the image tokens that were pruned included, got {list(mask.shape)}."
        )
    return mask


def _shorter_mask(mask: Tensor | None, after: Shortened, always: bool) -> Tensor | None:
    if mask is None:
        # Without a mask transformers takes gaps in the positions for the seams of packed texts.
        if not always and bool(after.real.all()):
            return None
        return after.real.long()
    return mask.gather(1, after.index) * after.real.to(mask.dtype)


def _shorter_positions(
    given: object, after: Shortened, index: Tensor, real: Tensor, positions: Positions
) -> Tensor | None:
    width = index.shape[1]
    whole = after.index[:, -width:]
    if isinstance(given, Tensor):
        found = given.expand(len(index), -1).gather(1, index)
    elif positions == "original":
        return whole
    else:
        return None  # the model counts what it gets
    if positions == "compact":
        rank = after.real.cumsum(-1)[:, -width:] - 1
        found = found - (whole - rank)
    return found.masked_fill(~real, 0).clamp_min(0)  # of padding behind what was dropped
