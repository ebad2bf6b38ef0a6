"""What ``llava-shapes`` reads in training: a tokenizer of words, and scenes with their answers.

All questions about one image stand in one row behind it, so the image is computed once; a mask
keeps them from seeing each other, so each is answered as if it were alone.
"""

import random
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attending.zoo._shapes_render import render, visible
from attending.zoo._shapes_text import (
    DESCRIBE,
    LIST,
    NUMBERS,
    count_question,
    full_caption,
    place_question,
    plural,
    presence_question,
    short_caption,
    spatial_question,
)
from attending.zoo._shapes_world import (
    BACKGROUNDS,
    COLORS,
    HELD_OUT_SEED,
    KINDS,
    SHAPES,
    SIZES,
    TEXTURES,
    SceneBatch,
    draw,
)
from attending.zoo.shapes import Scene, from_batch

IMAGE = "<image>"
IGNORED = -100
# The seeds below HELD_OUT_SEED are for training: so many recipe's seeds, so many steps of each.
STEPS = 2**20
SEEDS = HELD_OUT_SEED // STEPS

_WORDS = (
    "a",
    "an",
    "above",
    "and",
    "are",
    "at",
    "background",
    "below",
    "bottom",
    "describe",
    "how",
    "image",
    "in",
    "is",
    "left",
    "list",
    "many",
    "middle",
    "nothing",
    "object",
    "objects",
    "of",
    "on",
    "right",
    "the",
    "there",
    "top",
    "what",
    "where",
    "yes",
    "no",
    ".",
    ",",
    "?",
)


def make_tokenizer() -> Any:
    """Words of the world of shapes, lower-cased; anything else is ``<unk>``.

    A ``PreTrainedTokenizerFast`` that pads on the left, as batched generation needs.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<unk>", IMAGE]
    plurals = [plural(shape) for shape in SHAPES]
    lists = (SHAPES, plurals, COLORS, TEXTURES, SIZES, BACKGROUNDS, NUMBERS, _WORDS)
    words = dict.fromkeys([*special, *(word for words in lists for word in words)])
    tokenizer = Tokenizer(
        models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>")
    )
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece(cleanup=True)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", special.index("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": IMAGE},
        padding_side="left",
    )


@dataclass(frozen=True)
class DenseTargets:
    """What each patch of the image shows, and which kinds are in it.

    Attributes:
        shape: Index of the shape seen in the patch, or the number of shapes where there is none;
            likewise the next two.
        color: See ``shape``.
        texture: See ``shape``.
        kinds: 1 for each kind of ``KINDS`` in the scene.
    """

    shape: Int[Tensor, "scenes patches"]
    color: Int[Tensor, "scenes patches"]
    texture: Int[Tensor, "scenes patches"]
    kinds: Float[Tensor, "scenes kinds"]


@dataclass(frozen=True)
class Rows:
    """Text behind the image: one row per scene, several conversations in each.

    Attributes:
        tokens: Token ids of the text alone.
        targets: The next token where it is to be learned, else ``IGNORED``.
        positions: Position of each token, counted within its conversation from 0.
        segments: Number of the conversation from 1; 0 is padding at the end.
    """

    tokens: Int[Tensor, "scenes tokens"]
    targets: Int[Tensor, "scenes tokens"]
    positions: Int[Tensor, "scenes tokens"]
    segments: Int[Tensor, "scenes tokens"]

    def mask(self, prefix: int) -> Bool[Tensor, "scenes 1 length length"]:
        """Who sees whom: all see the ``prefix`` before them, and their own conversation so far."""
        segments = F.pad(self.segments, (prefix, 0), value=-1)
        same = segments[:, :, None] == segments[:, None, :]
        seen = (same | (segments == -1)[:, None, :]).tril()
        return seen[:, None]


def draw_batch(scenes: int, seed: int, step: int) -> SceneBatch:
    """The scenes of one training step, none of which ``make_scenes`` can draw."""
    return draw(scenes, torch.Generator().manual_seed(seed * STEPS + step))


def pixels(batch: SceneBatch, size: int) -> Float[Tensor, "scenes 3 size size"]:
    """Images as the model takes them: colours from -1 to 1."""
    return 2 * render(batch, size) - 1


def dense_targets(batch: SceneBatch, size: int, patch: int) -> DenseTargets:
    """Name for each patch the object that fills most of it, if that is over a quarter."""
    shares = F.avg_pool2d(visible(batch, size).float(), patch).flatten(2)
    share, owner = shares.max(dim=1)
    nothing = share <= 0.25

    def label(values: Tensor, options: int) -> Tensor:
        return values.gather(1, owner).masked_fill(nothing, options)

    kinds = torch.zeros(len(batch.count), len(KINDS))
    kind = batch.color * len(SHAPES) + batch.shape
    kinds.scatter_reduce_(1, kind, batch.used.float(), reduce="amax")
    return DenseTargets(
        shape=label(batch.shape, len(SHAPES)),
        color=label(batch.color, len(COLORS)),
        texture=label(batch.texture, len(TEXTURES)),
        kinds=kinds,
    )


def conversations(scene: Scene, draws: random.Random, presence: int) -> list[tuple[str, str]]:
    """Questions and answers about one scene: a caption, ``presence`` yes/no questions, and more.

    Half of the kinds asked for are absent.  Of these one in three shares shape and colour with
    objects of the scene, but not with the same one; the others are any kinds.
    """
    if draws.random() < 0.75:
        found = [(DESCRIBE, full_caption(scene))]
    else:
        found = [(LIST, short_caption(scene))]
    names = scene.names
    shapes, colors = ({getattr(o, a) for o in scene.objects} for a in ("shape", "color"))
    swapped = [f"{c} {s}" for c in sorted(colors) for s in sorted(shapes)]
    swapped = [name for name in swapped if name not in names]
    absent = [name for name in KINDS if name not in names]
    for _ in range(presence):
        if draws.random() < 0.5:
            found.append((presence_question(draws.choice(names)), "yes"))
        else:
            options = swapped if swapped and draws.random() < 1 / 3 else absent
            found.append((presence_question(draws.choice(options)), "no"))
    found.append(count_question(scene, draws))
    found.append(place_question(scene, draws))
    spatial = spatial_question(scene, draws)
    return found if spatial is None else [*found, spatial]


def make_rows(batch: SceneBatch, tokenizer: Any, seed: int, step: int, presence: int) -> Rows:
    """Write conversations about each scene of a training step."""
    draws = random.Random(2**40 + seed * 2**32 + step)
    talks = [conversations(scene, draws, presence) for scene in from_batch(batch, 32)]
    texts = [text for talk in talks for pair in talk for text in pair]
    ids = iter(tokenizer(texts, add_special_tokens=False)["input_ids"])
    columns: tuple[list[list[int]], ...] = ([], [], [], [])
    for talk in talks:
        tokens, targets, positions, segments = row = ([], [], [], [])  # type: ignore[var-annotated]
        for number, _ in enumerate(talk, start=1):
            question, answer = next(ids), next(ids)
            inputs = [*question, *answer]
            tokens += inputs
            targets += [IGNORED] * (len(question) - 1) + [*answer, tokenizer.eos_token_id]
            positions += range(len(inputs))
            segments += [number] * len(inputs)
        for column, values in zip(columns, row, strict=True):
            column.append(values)
    width = max(len(row) for row in columns[0])
    fillers = (tokenizer.pad_token_id, IGNORED, 0, 0)
    return Rows(
        *(
            torch.tensor([[*row, *[filler] * (width - len(row))] for row in column])
            for column, filler in zip(columns, fillers, strict=True)
        )
    )
