"""How well a language model compresses text, in bits per byte, and how well bz2 and xz do.

Bits per byte does not depend on the tokenizer, so it compares models with each other and with
ordinary compressors: a model that assigns a text probability p could store it in -log2 p bits.
"""

import bz2
import lzma
import math

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor, nn


@torch.no_grad()
def total_nats(
    model: nn.Module,
    tokens: Int[Tensor, " length"],
    *,
    bos: int,
    context: int,
    stride: int,
    rows: int = 8,
) -> float:
    """The sum of ``-log p`` over a document, each token predicted from what precedes it.

    The document is read in overlapping windows: after the first, each window scores only its last
    ``stride`` tokens, so every one of those sees at least ``context - stride`` tokens before it.

    Args:
        model: A causal language model of transformers.
        tokens: The document, without ``bos``.
        bos: The token in front of every window.
        context: Tokens predicted per window.
        stride: How far the window moves; ``context`` means no overlap.
        rows: Windows per forward pass.
    """
    if not 1 <= stride <= context:
        raise ValueError(f"expected 1 <= stride <= context, got stride {stride}, context {context}")
    count = 1 + max(0, math.ceil((len(tokens) - context) / stride))
    nats = 0.0
    for first in range(0, count, rows):
        starts = [stride * i for i in range(first, min(first + rows, count))]
        windows = [tokens[start : start + context] for start in starts]
        targets = torch.full((len(windows), context), -100)  # -100: cross_entropy skips it
        inputs = torch.full((len(windows), context), bos)
        for row, window in enumerate(windows):
            new = 0 if starts[row] == 0 else context - stride
            targets[row, new : len(window)] = window[new:]
            inputs[row, 1 : len(window)] = window[:-1]
        width = max(len(window) for window in windows)
        device = next(model.parameters()).device
        logits = model(input_ids=inputs[:, :width].to(device), use_cache=False).logits
        nats += F.cross_entropy(
            logits.float().flatten(0, 1), targets[:, :width].to(device).flatten(), reduction="sum"
        ).item()
    return nats


def bits_per_byte(nats: float, size: int) -> float:
    """Turn a total of nats over ``size`` bytes into bits per byte."""
    return nats / math.log(2.0) / size


def compression_baselines(held_out: list[str], training: list[str]) -> dict[str, float]:
    """Bits per byte of general compressors on the held-out texts.

    Returns:
        ``bz2`` and ``xz``, each file by itself; ``xz_together``, all files in one stream; and
        ``xz_after_training_text``, what the held-out files add to the archive of the training
        text: the fair rival, since like the model it has read that text before.
    """
    files = [text.encode("utf-8") for text in held_out]
    size = sum(len(file) for file in files)
    whole, corpus = b"".join(files), "".join(training).encode("utf-8")
    # The dictionary spans the whole corpus, so that xz can copy from any of it.
    filters = [
        {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 64 * 2**20}
    ]

    def xz(data: bytes) -> int:
        return len(lzma.compress(data, format=lzma.FORMAT_XZ, filters=filters))

    return {
        "bz2": 8 * sum(len(bz2.compress(file)) for file in files) / size,
        "xz": 8 * sum(xz(file) for file in files) / size,
        "xz_together": 8 * xz(whole) / size,
        "xz_after_training_text": 8 * (xz(corpus + whole) - xz(corpus)) / size,
    }
