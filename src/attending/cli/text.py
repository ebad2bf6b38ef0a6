"""From a text to the batches that a model reads: windows of tokens, padded on the right.

A text longer than the model's context is cut into windows of nearly equal length, so that none is a
scrap of a few tokens, for which entropies and sinks mean something else. Every window gets the
special tokens that the tokenizer puts around a whole text.
"""

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from attending.cli.errors import CommandError
from attending.cli.loading import LoadedModel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH_TOKENS = 2048  # real tokens and padding that go through the model at once
# Enough characters to hold that many tokens. To tokenize a gigabyte for a few thousand tokens would
# take minutes, and gigabytes.
CHARACTERS_PER_TOKEN = 64


@dataclass(frozen=True)
class Batches:
    """What the model reads.

    Attributes:
        inputs: Keyword arguments of the model's forward, a dictionary for each batch.
        tokens: How many tokens that is, special tokens included and padding not.
        whole: Whether the text was read to its end.
    """

    inputs: list[dict[str, Tensor]]
    tokens: int
    whole: bool


def batches(loaded: LoadedModel, text: str, max_tokens: int, longest: int | None = None) -> Batches:
    """The first `max_tokens` tokens of the text, as the model takes them.

    An encoder-decoder reads each window twice: the encoder as it is, the decoder shifted by one
    behind its start token, as when it is trained to restore the text.

    Args:
        loaded: Its tokenizer and context decide the windows.
        text: Anything that is not only whitespace.
        max_tokens: At most so many, special tokens included.
        longest: Windows of at most so many tokens, special ones included, even where the model
            could hold more.

    Raises:
        CommandError: The text has no tokens, or not one token fits.
    """
    cut = text[: CHARACTERS_PER_TOKEN * max_tokens]
    ids, prefix, suffix = _encode(loaded.tokenizer, cut)
    if not ids:
        raise CommandError(f"the tokenizer of {loaded.name} finds no token in the text; give more")
    longest = int(min(_context(loaded), max_tokens, longest or max_tokens))
    special = len(prefix) + len(suffix)
    if longest <= special:
        raise CommandError(
            f"--max-tokens {max_tokens} leaves no room beside the {special} special tokens of "
            f"{loaded.name}; give more"
        )
    full, rest = divmod(max_tokens, longest)
    kept = ids[: full * (longest - special) + max(0, rest - special)]
    count = math.ceil(len(kept) / (longest - special))
    ends = [round(len(kept) * index / count) for index in range(count + 1)]
    windows = [
        torch.tensor([*prefix, *kept[start:end], *suffix])
        for start, end in itertools.pairwise(ends)
    ]
    together = max(1, BATCH_TOKENS // max(map(len, windows)))
    return Batches(
        inputs=[
            _batch(loaded, windows[start : start + together]) for start in range(0, count, together)
        ],
        tokens=sum(map(len, windows)),
        whole=len(cut) == len(text) and len(kept) == len(ids),
    )


def _encode(
    tokenizer: "PreTrainedTokenizerBase", text: str
) -> tuple[list[int], list[int], list[int]]:
    """The tokens of the text, and the special tokens that stand before and after them."""
    bare = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    dressed = list(tokenizer(text, verbose=False)["input_ids"])
    extra = len(dressed) - len(bare)
    for before in range(extra + 1):
        if dressed[before : before + len(bare)] == bare:
            return bare, dressed[:before], dressed[before + len(bare) :]
    return bare, [], []


def _context(loaded: LoadedModel) -> float:
    """The longest input that the model was made for; infinite if nothing says so."""
    limits = [float(loaded.tokenizer.model_max_length)]  # 1e30 where it is unknown
    config = loaded.model.config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
        limit = getattr(config, name, None)
        if isinstance(limit, int) and limit > 0:
            limits.append(limit)
    for name, module in loaded.model.named_modules():
        # RoBERTa and its kin count positions from behind that of padding.
        if (
            isinstance(module, nn.Embedding)
            and module.padding_idx is not None
            and name.endswith("position_embeddings")
        ):
            limits.append(module.num_embeddings - module.padding_idx - 1)
    return min(limits)


def _batch(loaded: LoadedModel, windows: list[Tensor]) -> dict[str, Tensor]:
    config: Any = loaded.model.config
    tokenizer: Any = loaded.tokenizer
    # Padding is masked, so any token will do for a model that has none for it.
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    ids = pad_sequence(windows, batch_first=True, padding_value=padding)
    lengths = torch.tensor([len(window) for window in windows])
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    inputs = {"input_ids": ids, "attention_mask": mask}
    if config.is_encoder_decoder:
        start = _first_known(
            getattr(config, "decoder_start_token_id", None),
            getattr(loaded.model.generation_config, "decoder_start_token_id", None),
            tokenizer.bos_token_id,
            padding,
        )
        first = torch.full_like(ids[:, :1], start)
        inputs["decoder_input_ids"] = torch.cat([first, ids[:, :-1]], dim=1)
        inputs["decoder_attention_mask"] = mask
    return {name: value.to(loaded.model.device) for name, value in inputs.items()}


def _first_known(*candidates: int | None) -> int:
    return next(candidate for candidate in candidates if candidate is not None)
