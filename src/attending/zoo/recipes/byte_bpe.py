"""A small tokenizer of our own: byte-level BPE, which can encode any text and lose none of it."""

from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"


def train_tokenizer(texts: Iterable[str], vocabulary: int, context: int) -> Any:
    """Learn a vocabulary from texts.

    Args:
        texts: The training texts, not the held-out ones.
        vocabulary: How many tokens, among them 256 bytes and three special ones.
        context: The longest input of the model that will use it.

    Returns:
        A ``transformers.PreTrainedTokenizerFast``.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    # Digits stand alone: a small vocabulary has no room for every number in a table.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    # As Llama's own tokenizer does: what a model reads starts with bos, as in training.
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A {BOS} $B",
        special_tokens=[(BOS, tokenizer.token_to_id(BOS))],
    )
    fast: Any = PreTrainedTokenizerFast  # its constructor has no annotations
    return fast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )


def encode_document(tokenizer: Any, text: str) -> Int[Tensor, " length"]:
    """All tokens of a document, then the end token, which a model must predict too.

    Says ``truncation=False`` aloud: a tokenizer remembers the truncation of an earlier call in
    its shared backend, and a text cut short would seem to take very few bits.
    """
    ids = tokenizer(text, add_special_tokens=False, truncation=False, padding=False, verbose=False)
    return torch.tensor([*ids["input_ids"], tokenizer.eos_token_id])
