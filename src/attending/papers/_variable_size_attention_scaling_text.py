"""`llama-stdlib`, trained on 512 tokens, reads held-out source files four times as long.

One forward over 2048 tokens, as the model is or with its logits scaled row by row. Rows within the
length of training keep the factor 1, so the two differ in the tokens after the 512th only. Rotary
positions, which were not trained beyond 512 either, are left as they are.
"""

import zlib
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from attending import zoo
from attending.interventions.logit_scaling import LogitScaling
from attending.probes.entropy_curve import EntropyCurve, entropy_curve
from attending.zoo.recipes.stdlib_text import read_documents, split

HELD_OUT_PER_MILLE = 40  # as in the recipe of the model
LAST = 16  # rows at the end of each length whose entropy is measured


class Found(NamedTuple):
    """What became of one way to scale: nats per token in each segment, and the entropy."""

    nats: list[float]
    curve: EntropyCurve


def run(seed: int, kinds: Sequence[str], lengths: Sequence[int], texts: int) -> dict[str, Found]:
    """Read held-out files with every kind of scaling ("none" among them).

    Args:
        seed: chooses the files.
        kinds: of `LogitScaling`, and "none".
        lengths: the first is that of training; segments end at each of them.
        texts: how many files.
    """
    loaded = zoo.load("llama-stdlib")
    ids = _texts(seed, loaded, lengths[-1], texts)
    trained = {"input_ids": ids[:, : lengths[0]]}
    by_length = {length: {"input_ids": ids[:, :length]} for length in lengths}
    found = {}
    for kind in kinds:
        if kind == "none":
            curve = entropy_curve(loaded.model, by_length, last=LAST)
            found[kind] = Found(_nats(loaded.model, ids, lengths), curve)
            continue
        scaling = LogitScaling(kind=kind).calibrate(loaded.model, trained)  # type: ignore[arg-type]
        with scaling(loaded.model):
            curve = entropy_curve(loaded.model, by_length, last=LAST)
            found[kind] = Found(_nats(loaded.model, ids, lengths), curve)
    return found


def _texts(seed: int, loaded: Any, length: int, count: int) -> Tensor:
    """The beginnings of files that are long enough, chosen by a checksum of seed and path."""
    _, held_out = split(read_documents(), HELD_OUT_PER_MILLE)
    rows = []
    for document in sorted(held_out, key=lambda one: zlib.crc32(f"{seed} {one.path}".encode())):
        if len(document.text) < length:  # a token has at least one character
            continue
        ids = loaded.tokenizer(document.text[: 20 * length], add_special_tokens=False)["input_ids"]
        if len(ids) >= length:
            rows.append([loaded.model.config.bos_token_id, *ids[: length - 1]])
        if len(rows) == count:
            return torch.tensor(rows)
    raise ValueError(
        f"texts: expected at most {len(rows)}, as many held-out files have {length} tokens, got "
        f"{count}."
    )


@torch.no_grad()
def _nats(model: Any, ids: Tensor, lengths: Sequence[int]) -> list[float]:
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    losses = cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    ends = [0, *(length - 1 for length in lengths)]
    return [float(losses[:, start:end].mean()) for start, end in pairwise(ends)]
