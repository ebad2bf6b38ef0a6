"""What the tokens of a batch are: their ids for each attention call, their text, their class."""

import string
from collections.abc import Callable, Collection, Mapping
from typing import Any, Protocol

import torch
from jaxtyping import Int
from torch import Tensor, nn

from attending.taps import AttentionCall

TokenClasses = Mapping[str, Collection[int]] | Callable[[str], str]

OTHER = "other"
_NOT_TEXT = ("vision", "visual", "image", "audio", "pixel")
_SIGNS = frozenset(string.punctuation + "«»“”‘’…–—、。，！？：；（）")


class Tokenizer(Protocol):
    """What is asked of a tokenizer; those of transformers can do it."""

    all_special_ids: Any

    def decode(self, token_ids: Any, **kwargs: Any) -> Any:
        """Text of token ids."""

    def convert_ids_to_tokens(self, ids: Any, **kwargs: Any) -> Any:
        """Entries of the vocabulary."""


class TokenReader:
    """Tokens as people read them, and the classes whose attention is summed up.

    Without a tokenizer a token is called by its id, and the only classes are given ones.
    """

    def __init__(self, tokenizer: Tokenizer | None, classes: TokenClasses | None) -> None:
        self.tokenizer = tokenizer
        self._special = set(getattr(tokenizer, "all_special_ids", ()))
        self._texts: dict[int, str] = {}
        self._classes: dict[int, str] = {}
        self._classify: Callable[[int], str] | None = None
        if isinstance(classes, Mapping):
            by_id = {int(token): name for name, tokens in classes.items() for token in tokens}
            self._classify = lambda token: by_id.get(token, OTHER)
        elif callable(classes):
            named = classes
            self._classify = lambda token: str(named(self.text(token)))
        elif classes is not None:
            raise ValueError(
                "token_classes: expected a mapping of class names to token ids, or a function from "
                f"a token's text to its class, got {type(classes).__name__}."
            )
        elif tokenizer is not None:
            self._classify = self._kind

    @property
    def has_classes(self) -> bool:
        """Whether tokens have classes at all."""
        return self._classify is not None

    def text(self, token: int) -> str:
        """The text of one token, with the space in front of it if it has one."""
        if token not in self._texts:
            self._texts[token] = self._read(token)
        return self._texts[token]

    def class_of(self, token: int) -> str:
        """The class of one token."""
        if self._classify is None:
            return OTHER
        if token not in self._classes:
            self._classes[token] = self._classify(token)
        return self._classes[token]

    def _read(self, token: int) -> str:
        if self.tokenizer is None:
            return f"#{token}"
        entry = str(self.tokenizer.convert_ids_to_tokens(token))
        text = str(self.tokenizer.decode([token], clean_up_tokenization_spaces=False))
        if not text or "\ufffd" in text:  # a part of a character
            return entry
        return f" {text}" if entry.startswith("▁") and not text.startswith(" ") else text

    def _kind(self, token: int) -> str:
        """The default classes, by what the token is made of."""
        if token in self._special:
            return "special"
        text = self.text(token)
        if text.isspace():
            return "whitespace"
        return "punctuation" if set(text.strip()) <= _SIGNS else "words"


def key_ids(
    call: AttentionCall, batch: object, encoder: str | None, batch_size: int
) -> Int[Tensor, "batch keys"] | None:
    """The token ids of the keys of a call, None where the keys are no tokens of a text.

    Args:
        call: of the forward that got the batch.
        batch: the input of the model.
        encoder: the qualified name of the encoder of an encoder-decoder model.
        batch_size: the number of sequences of the call.
    """
    if any(word in call.name.lower() for word in _NOT_TEXT):
        return None
    name = "input_ids"
    if encoder is not None and not call.is_cross and not lies_in(call.name, encoder):
        name = "decoder_input_ids"
    ids = batch.get(name) if isinstance(batch, Mapping) else batch
    if isinstance(ids, tuple | list) and ids:
        ids = ids[0]
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_floating_point():
        return None
    return ids.cpu() if ids.shape == (batch_size, call.key_length) else None


def lies_in(name: str, module: str) -> bool:
    """Whether a qualified name is that of a module or of a part of it."""
    return name == module or name.startswith(f"{module}.")


def encoder_of(model: nn.Module) -> str | None:
    """The name of the encoder of an encoder-decoder model of transformers; None for others."""
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return None
    get_encoder: Any = getattr(model, "get_encoder", None)
    encoder = None if get_encoder is None else get_encoder()
    return next((name for name, module in model.named_modules() if module is encoder), None)


def decoder_padding(batch: object) -> Tensor | None:
    """True for the decoder tokens that are no padding, as far as the batch tells."""
    mask = batch.get("decoder_attention_mask") if isinstance(batch, Mapping) else None
    return mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None


def class_indices(
    reader: TokenReader, ids: Int[Tensor, "batch keys"], names: list[str]
) -> Int[Tensor, "batch keys"]:
    """The class of each token as an index into `names`, which grows by classes not met before."""
    known = {}
    for token in ids.unique().tolist():
        name = reader.class_of(token)
        if name not in names:
            names.append(name)
        known[token] = names.index(name)
    return torch.tensor([[known[token] for token in row] for row in ids.tolist()])
