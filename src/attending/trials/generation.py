"""What a model writes after the beginnings of the inputs, and how varied that is."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from attending.probes.text import rep_n
from attending.taps.running import first_tensor
from attending.trials.samples import Measure

MEASURES = (
    Measure(
        "diversity",
        "Diversity",
        "",
        "Product of 1 - rep-n for n = 2, 3, 4 over the tokens of a text: 1 if no n-gram repeats.",
        "higher",
        "mean",
        "text",
    ),
    Measure(
        "same_text",
        "Same text",
        "share",
        "The share of places at which the text has the token that the plain model wrote there.",
        None,
        "mean",
        "text",
        True,
    ),
    Measure(
        "new_tokens",
        "New tokens",
        "tokens",
        "How many tokens were written per text, the end of the text included.",
        None,
        "mean",
        "text",
    ),
)
_ONLY_FORWARD = {"labels", "decoder_input_ids", "decoder_attention_mask", "position_ids"}


@dataclass(frozen=True)
class Written:
    """What was written after one batch of prompts: the new tokens of each."""

    texts: tuple[tuple[int, ...], ...]

    @property
    def tokens(self) -> int:
        """Of all texts together."""
        return sum(map(len, self.texts))


def generate_settings(model: nn.Module, generate: int | Mapping[str, Any]) -> dict[str, Any]:
    """The keyword arguments of `generate`; a number stands for so many tokens, greedily.

    Raises:
        ValueError: if the model cannot generate, or there is no such setting.
    """
    able = getattr(model, "can_generate", None)
    if not hasattr(model, "generate") or (callable(able) and not able()):
        raise ValueError(
            f"generate: expected a model that can generate, got {type(model).__name__}. Leave "
            "generate out, or load the model with its language head (AutoModelForCausalLM)."
        )
    if isinstance(generate, bool) or not isinstance(generate, int | Mapping):
        raise ValueError(
            "generate: expected a number of tokens or a mapping of arguments of model.generate, "
            f"got {generate!r}."
        )
    settings: dict[str, Any]
    if isinstance(generate, Mapping):
        settings = dict(generate)
    else:
        if generate < 1:
            raise ValueError(f"generate: expected at least 1 token, got {generate}.")
        settings = {"max_new_tokens": generate, "do_sample": False, "num_beams": 1}
    config = getattr(model, "generation_config", None)
    if "pad_token_id" not in settings and getattr(config, "pad_token_id", None) is None:
        settings["pad_token_id"] = min(ends_of(model), default=0)
    return settings


def ends_of(model: nn.Module) -> set[int]:
    """The tokens with which a text of the model ends."""
    end = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = end if isinstance(end, list | tuple) else [end]
    return {int(one) for one in ends if one is not None}


def prompts_of(batches: Sequence[Any], length: int | None) -> list[dict[str, Any]]:
    """The batches as `generate` takes them: named, padded on the left, and not too long.

    Args:
        batches: of the model's forward.
        length: only the first tokens of each sequence. A batch that holds more than tokens, such
            as images, is taken whole.

    Raises:
        ValueError: if a batch has no token ids.
    """
    if length is not None and length < 1:
        raise ValueError(f"prompt_tokens: expected at least 1 or None, got {length}.")
    found = []
    for batch in batches:
        given = dict(batch) if isinstance(batch, Mapping) else {"input_ids": first_tensor(batch)}
        ids = given.get("input_ids")
        if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.dim() != 2:
            raise ValueError(
                "generate: expected inputs with input_ids [batch, tokens] to go on from, got "
                f"{', '.join(given) if isinstance(batch, Mapping) else type(batch).__name__}."
            )
        given = {name: value for name, value in given.items() if name not in _ONLY_FORWARD}
        mask = given.get("attention_mask")
        mask = torch.ones_like(ids) if mask is None else mask
        whole = set(given) - {"input_ids", "attention_mask"}
        given["input_ids"], given["attention_mask"] = _left(ids, mask, None if whole else length)
        found.append(given)
    return found


def _left(ids: Tensor, mask: Tensor, length: int | None) -> tuple[Tensor, Tensor]:
    """The first tokens of each sequence that are no padding, padded on the left."""
    lengths = mask.long().sum(1)
    longest = int(lengths.max())
    longest = longest if length is None else min(longest, length)
    new_ids, new_mask = ids[:, :longest].clone(), torch.zeros_like(mask[:, :longest])
    for row in range(len(ids)):
        kept = ids[row][mask[row].bool()][:longest]
        new_ids[row, : longest - len(kept)] = ids[row][0]  # any token: it is masked
        new_ids[row, longest - len(kept) :] = kept
        new_mask[row, longest - len(kept) :] = 1
    return new_ids, new_mask


def written(model: Any, prompt: Mapping[str, Any], settings: Mapping[str, Any]) -> Written:
    """Let the model go on from a batch of prompts."""
    sequences: Int[Tensor, "batch tokens"] = _sequences(model.generate(**prompt, **settings))
    ids = prompt["input_ids"]
    start, ends = ids.shape[1], ends_of(model)
    if bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False)):
        start = 1  # of the decoder's own sequence, after its start token
    elif sequences.shape[1] < start or not torch.equal(sequences[:, :start], ids):
        start = 0
    return Written(tuple(tuple(_until(row, ends)) for row in sequences[:, start:].tolist()))


def _sequences(found: Any) -> Tensor:
    sequences: Tensor = found if isinstance(found, Tensor) else found.sequences
    return sequences


def _until(tokens: list[int], ends: set[int]) -> list[int]:
    for place, token in enumerate(tokens):
        if token in ends:
            return tokens[: place + 1]
    return tokens


def diversity_of(text: Sequence[int]) -> float:
    """The diversity of one text, of those n for which it has n-grams."""
    rates = [rep_n([list(text)], n) for n in (2, 3, 4)] if text else []
    return math.prod(1 - rate for rate in rates if not math.isnan(rate))


def sameness(text: Sequence[int], other: Sequence[int]) -> float:
    """The share of places with the same token, out of the places of the longer one."""
    longest = max(len(text), len(other))
    same = sum(a == b for a, b in zip(text, other, strict=False))
    return same / longest if longest else 1.0


def samples_text(settings: Mapping[str, Any], model: Any) -> bool:
    """Whether chance decides what is written."""
    default = getattr(getattr(model, "generation_config", None), "do_sample", False)
    return bool(settings.get("do_sample", default))
