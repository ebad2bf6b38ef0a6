"""Does a vision-language model see what is there: POPE for answers, CHAIR for captions.

Both ask about objects only, and both need to know what is in each image. POPE asks yes/no questions
and is plain binary classification. CHAIR looks at what a free caption names.

    found = answer_questions(...)                         # "Yes, there is a red circle."
    print(pope_scores(found, [question.answer for question in questions]))

    mentions = count_mentions(captions, names)            # [captions, objects]
    print(chair(mentions, truth))                         # truth: is the object in the image?

Sources: POPE, Li et al. 2305.10355 (repository RUCAIBox/POPE); CHAIR, Rohrbach et al. 1809.02156
(repository LisaAnne/Hallucination). CHAIR's own front end (COCO's 80 classes, its synonyms and its
rules for words) is not here: `count_mentions` takes your words, and `chair` takes any matrix.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

AnswerParser = Literal["official", "first_word"]

_NO_WORDS = frozenset({"No", "no", "not"})
_FIRST_WORD = re.compile(r"[a-z]+")


class PopeScores(NamedTuple):
    """Binary classification in which "yes" is the positive class.

    Attributes:
        accuracy: right answers / questions.
        precision: right "yes" / said "yes"; nan if the model never says yes.
        recall: right "yes" / questions whose answer is yes; nan if there is none.
        f1: `2 P R / (P + R)`; 0 if no "yes" is right, nan if none was said and none was due.
        yes_ratio: said "yes" / questions. Far above the share of yes labels: the model hallucinates
            by agreeing.
        unparsed: share of answers that are neither yes nor no; they count as wrong. 0 with the
            official parser, for which everything that is not no is yes.
    """

    accuracy: float
    precision: float
    recall: float
    f1: float
    yes_ratio: float
    unparsed: float


class ChairScores(NamedTuple):
    """What captions name that is not there.

    Attributes:
        chair_i: hallucinated mentions / mentions, pooled over captions; nan without a mention.
        chair_s: captions with a hallucinated mention / captions.
        recall: objects of the truth that their caption names / objects of the truth; nan if there
            are none. CHAIR falls when captions get short: read it beside this.
        mentions: how many mentions were counted, all captions together.
    """

    chair_i: float
    chair_s: float
    recall: float
    mentions: int


def parse_yes_no(answer: str, parser: AnswerParser = "official") -> bool | None:
    """What a free answer to a yes/no question says.

    Args:
        answer: the model's text, without the question.
        parser: "official" is POPE's rule: of the text before the first ".", commas dropped, split
            at spaces: no if one of the words is "No", "no" or "not", else yes. So "NO", "none", ""
            and plain nonsense count as yes. "first_word" takes the first word, in any case, and
            nothing but yes and no.

    Returns:
        True for yes, False for no, None ("first_word" only) for neither.
    """
    if parser == "official":
        words = answer.split(".", 1)[0].replace(",", "").split(" ")
        return _NO_WORDS.isdisjoint(words)
    if parser == "first_word":
        first = _FIRST_WORD.search(answer.lower())
        return {"yes": True, "no": False}.get(first.group() if first else "")
    raise ValueError(f"parser: expected 'official' or 'first_word', got {parser!r}.")


def pope_scores(
    answers: Sequence[str | bool],
    labels: Sequence[str | bool],
    parser: AnswerParser = "official",
) -> PopeScores:
    """Accuracy, precision, recall, F1 and yes-ratio of answers to "Is there a ... in the image?".

    Args:
        answers: what the model said, one text a question, or already True for yes.
        labels: the truth, "yes" or "no", or True for yes.
        parser: how texts are read, see `parse_yes_no`.

    Raises:
        ValueError: if the lengths differ, there is nothing, or a label is neither yes nor no.
    """
    if len(answers) != len(labels) or not len(labels):
        raise ValueError(
            "answers: expected one for each label and at least one, got "
            f"{len(answers)} answers and {len(labels)} labels."
        )
    said = [
        parse_yes_no(answer, parser) if isinstance(answer, str) else bool(answer)
        for answer in answers
    ]
    truth = [_label(label) for label in labels]
    pairs = list(zip(said, truth, strict=True))
    right_yes = sum(word is True and label for word, label in pairs)
    yes, positives = sum(word is True for word in said), sum(truth)
    return PopeScores(
        accuracy=sum(word is label for word, label in pairs) / len(pairs),
        precision=_share(right_yes, yes),
        recall=_share(right_yes, positives),
        f1=_share(2 * right_yes, yes + positives),
        yes_ratio=yes / len(pairs),
        unparsed=sum(word is None for word in said) / len(pairs),
    )


def count_mentions(
    captions: Sequence[str], names: Sequence[str] | Mapping[str, Sequence[str]]
) -> Int[Tensor, "captions objects"]:
    """How often each caption names each object.

    Whole words in any case, with or without a plural s or es. Where names overlap the longest wins:
    with "red circle" and "circle", "a red circle" is one mention of the first. Spaces within a name
    match any white space. Nothing is said about negation: "no circle" mentions a circle.

    Args:
        captions: the texts.
        names: the objects, such as "red circle"; or for each object all the words for it (its own
            name is not added).

    Returns:
        Counts, whole numbers; columns in the order of `names`.

    Raises:
        ValueError: for no names, an empty name, or a name that stands for two objects.
    """
    words = names if isinstance(names, Mapping) else {name: [name] for name in names}
    objects: dict[str, int] = {}
    for column, name in enumerate(words):
        for word in words[name]:
            key = " ".join(word.lower().split())
            if not key or objects.setdefault(key, column) != column:
                raise ValueError(
                    "names: expected words that stand for one object each, got "
                    f"{word!r} for {name!r}" + (", and for another object too." if key else ".")
                )
    if not objects or len(words) != len(names):
        raise ValueError(f"names: expected at least one, each once, got {list(names)!r}.")
    longest_first = sorted(objects, key=lambda key: (-len(key), key))
    any_name = "|".join(r"\s+".join(map(re.escape, key.split())) for key in longest_first)
    pattern = re.compile(rf"(?<!\w)({any_name})(?:e?s)?(?!\w)")
    counts = torch.zeros(len(captions), len(words), dtype=torch.int64)
    for row, caption in enumerate(captions):
        for match in pattern.finditer(caption.lower()):
            counts[row, objects[" ".join(match.group(1).split())]] += 1
    return counts


def chair(
    mentions: Int[Tensor, "captions objects"] | Bool[Tensor, "captions objects"],
    truth: Bool[Tensor, "captions objects"],
    *,
    sets: bool = False,
) -> ChairScores:
    """CHAIR of captions, per mention and per caption.

        CHAIR_i = hallucinated mentions / mentions
        CHAIR_s = captions with at least one hallucinated mention / captions

    Args:
        mentions: how often each caption names each object, from `count_mentions` or your own words.
        truth: whether the object is in the caption's image.
        sets: count an object once a caption, as some re-implementations do. The official code
            counts every mention. CHAIR_s is the same either way.

    Raises:
        ValueError: for shapes that differ, no captions, negative counts, or a truth of other than
            booleans.
    """
    if mentions.dim() != 2 or mentions.shape != truth.shape or not mentions.shape[0]:
        raise ValueError(
            "mentions: expected [captions, objects], the shape of truth, and at least one caption, "
            f"got {list(mentions.shape)} and truth {list(truth.shape)}."
        )
    if truth.dtype != torch.bool:
        raise ValueError(
            f"truth: expected booleans, got {truth.dtype}. Counts become so with truth > 0."
        )
    if mentions.is_floating_point() or (mentions.dtype != torch.bool and (mentions < 0).any()):
        raise ValueError(
            "mentions: expected whole numbers from 0, or booleans, got "
            f"{mentions.dtype}{'' if mentions.is_floating_point() else ' with negative ones'}."
        )
    named = mentions > 0
    counts = (named if sets else mentions).to(torch.int64)
    hallucinated = counts.masked_fill(truth, 0)
    total = int(counts.sum())
    return ChairScores(
        chair_i=_share(int(hallucinated.sum()), total),
        chair_s=float((hallucinated > 0).any(1).double().mean()),
        recall=_share(int((named & truth).sum()), int(truth.sum())),
        mentions=total,
    )


def _label(label: str | bool) -> bool:
    if not isinstance(label, str):
        return bool(label)
    word = label.strip().lower()
    if word not in ("yes", "no"):
        raise ValueError(f"labels: expected 'yes' or 'no', or True for yes, got {label!r}.")
    return word == "yes"


def _share(part: int, whole: int) -> float:
    return part / whole if whole else math.nan
