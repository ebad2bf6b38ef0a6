"""What is said of a scene: captions, and questions with their right answers."""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from attending.zoo._shapes_world import COLORS, KINDS, SHAPES

if TYPE_CHECKING:
    from attending.zoo.shapes import Scene

DESCRIBE = "Describe the image."
LIST = "List the objects."
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six")
POPE_KINDS = ("random", "popular", "adversarial")
# Centres closer than this, as a fraction of the side, are neither left of nor above each other.
CLEARLY = 0.1


@dataclass(frozen=True)
class Question:
    """A question about one scene of a list.

    Attributes:
        scene: Index of the scene.
        text: The question.
        answer: The right answer, in lower case: "yes", "no" or a number word.
        kind: What was asked: ``random``, ``popular``, ``adversarial``, ``count`` or ``spatial``.
    """

    scene: int
    text: str
    answer: str
    kind: str = ""


def with_article(phrase: str) -> str:
    """``a`` or ``an`` before a phrase, by its first letter: an orange star, a red one."""
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def listing(parts: Sequence[str]) -> str:
    """``a, b and c``."""
    *first, last = parts
    return f"{', '.join(first)} and {last}" if first else last


def full_caption(scene: "Scene") -> str:
    """All objects from left to right with size and texture, and the background."""
    parts = []
    for thing in sorted(scene.objects, key=lambda thing: thing.x):
        texture = "" if thing.texture == "solid" else f"{thing.texture} "
        size = "" if thing.size == "medium" else f"{thing.size} "
        parts.append(with_article(f"{size}{texture}{thing.name}"))
    seen = listing(parts) if parts else "nothing"
    return f"{seen} on {with_article(scene.background)} background."


def short_caption(scene: "Scene") -> str:
    """The names of all objects from left to right."""
    things = sorted(scene.objects, key=lambda thing: thing.x)
    return f"{listing([with_article(thing.name) for thing in things]) if things else 'nothing'}."


def mentions(caption: str) -> list[str]:
    """The kinds of objects that a caption names, in its order, each as often as it is named.

    A kind is a colour followed by a shape, plural or not; other words are no objects.
    """
    words = [word.strip(".,;:!?") for word in caption.lower().split()]
    pairs = (f"{color} {shape}" for color, shape in pairwise(words))
    singular = {name: name for name in KINDS} | {plural(name): name for name in KINDS}
    return [singular[pair] for pair in pairs if pair in singular]


def plural(name: str) -> str:
    """Circles, crosses."""
    return f"{name}es" if name.endswith("s") else f"{name}s"


def presence_question(name: str) -> str:
    """POPE's question, with a proper article."""
    return f"Is there {with_article(name)} in the image?"


def pope_questions(
    scenes: Sequence["Scene"],
    kind: str = "random",
    seed: int = 0,
    *,
    per_scene: int = 3,
    reference: Sequence["Scene"] | None = None,
) -> list[Question]:
    """Ask of each scene for objects that it has and for as many that it has not, as POPE does.

    For each scene, up to ``per_scene`` of its objects are drawn at random and asked for ("yes").
    Each is followed by a question for an absent kind ("no"):

    - ``random``: any absent kind, all alike;
    - ``popular``: the absent kinds that most scenes of ``reference`` have, the most frequent first;
    - ``adversarial``: the absent kind that most often occurs together with the object just asked
      for, among the scenes of ``reference``.

    No kind is asked for twice of one scene, and half of the answers are "yes".  Ties are broken at
    random.

    Args:
        scenes: What is asked about.
        kind: ``"random"``, ``"popular"`` or ``"adversarial"``.
        seed: Decides the objects drawn and the ties.
        per_scene: Pairs of questions per scene; a scene with fewer objects gets fewer.
        reference: Scenes in which kinds are counted; ``None`` counts in ``scenes``, as POPE does.

    Source: "Evaluating Object Hallucination in Large Vision-Language Models", arXiv:2305.10355.
    Its generator replaces every letter "a" of the template before a vowel; this one does not.
    """
    if kind not in POPE_KINDS:
        raise ValueError(f"expected kind to be one of {', '.join(POPE_KINDS)}, got {kind!r}")
    if per_scene < 1:
        raise ValueError(f"expected per_scene of at least 1, got {per_scene}")
    draws = random.Random(seed)
    frequency: Counter[str] = Counter()
    together: Counter[tuple[str, str]] = Counter()
    for scene in scenes if reference is None else reference:
        frequency.update(scene.names)
        together.update((a, b) for a in scene.names for b in scene.names if a != b)
    questions = []
    for index, scene in enumerate(scenes):
        absent = [name for name in KINDS if name not in scene.names]
        draws.shuffle(absent)  # `max` takes the first of equals
        for name in draws.sample(scene.names, min(per_scene, len(scene.names))):
            if kind == "random":
                other = absent[0]
            elif kind == "popular":
                other = max(absent, key=lambda candidate: frequency[candidate])
            else:
                other = max(absent, key=lambda candidate: together[name, candidate])
            absent.remove(other)
            questions.append(Question(index, presence_question(name), "yes", kind))
            questions.append(Question(index, presence_question(other), "no", kind))
    return questions


def count_questions(
    scenes: Sequence["Scene"], seed: int = 0, *, per_scene: int = 1
) -> list[Question]:
    """Ask how many objects there are, of a shape, of a colour, or at all.

    Half of the questions about a shape or colour are about one that the scene has.
    """
    draws = random.Random(seed)
    questions = []
    for index, scene in enumerate(scenes):
        for _ in range(per_scene):
            text, answer = count_question(scene, draws)
            questions.append(Question(index, text, answer, "count"))
    return questions


def count_question(scene: "Scene", draws: random.Random) -> tuple[str, str]:
    """One question and answer about a number of objects."""
    about = draws.choice(("all", "shape", "color"))
    if about == "all":
        return "How many objects are there?", NUMBERS[len(scene.objects)]
    seen = [getattr(thing, about) for thing in scene.objects]
    options = SHAPES if about == "shape" else COLORS
    word = draws.choice(seen) if seen and draws.random() < 0.5 else draws.choice(options)
    what = plural(word) if about == "shape" else f"{word} objects"
    return f"How many {what} are there?", NUMBERS[seen.count(word)]


def spatial_questions(
    scenes: Sequence["Scene"], seed: int = 0, *, per_scene: int = 1
) -> list[Question]:
    """Ask whether one object is left of, right of, above or below another; half of it is true.

    Only pairs clearly apart in that direction are asked about, so a scene may give no question.
    """
    draws = random.Random(seed)
    questions = []
    for index, scene in enumerate(scenes):
        for _ in range(per_scene):
            found = spatial_question(scene, draws)
            if found is not None:
                questions.append(Question(index, *found, "spatial"))
    return questions


def spatial_question(scene: "Scene", draws: random.Random) -> tuple[str, str] | None:
    """One question and answer about where two objects are, if two are clearly apart."""
    relation, axis, sign = draws.choice(
        (("left of", "x", 1), ("right of", "x", -1), ("above", "y", 1), ("below", "y", -1))
    )
    things = sorted(scene.objects, key=lambda thing: getattr(thing, axis), reverse=sign < 0)
    pairs = [
        (first, second)
        for position, first in enumerate(things)
        for second in things[position + 1 :]
        if abs(getattr(first, axis) - getattr(second, axis)) > CLEARLY
    ]
    if not pairs:
        return None
    first, second = draws.choice(pairs)
    answer = draws.choice(("yes", "no"))
    if answer == "no":
        first, second = second, first
    return f"Is the {first.name} {relation} the {second.name}?", answer


def place_question(scene: "Scene", draws: random.Random) -> tuple[str, str]:
    """One question and answer about the third of the image in which an object is."""
    thing = draws.choice(scene.objects)
    return f"Where is the {thing.name}?", thing.place
