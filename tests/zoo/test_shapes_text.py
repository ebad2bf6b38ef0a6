"""Captions and questions: true of their scenes, and posed as POPE poses them."""

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attending.zoo import shapes
from attending.zoo._shapes_text import NUMBERS, with_article
from attending.zoo.recipes.llava_shapes_data import conversations

SCENES = shapes.make_scenes(200, 5)


def asked(question: shapes.Question) -> str:
    """The kind that a yes/no question of POPE asks for."""
    return " ".join(question.text.split()[3:5])


def test_captions_name_what_is_there_from_left_to_right() -> None:
    for scene in SCENES:
        full, short = scene.captions
        ordered = [thing.name for thing in sorted(scene.objects, key=lambda thing: thing.x)]
        assert shapes.mentions(full) == shapes.mentions(short) == ordered
        for thing in scene.objects:
            assert (thing.texture in full) or thing.texture == "solid"
        assert full.endswith(f"{scene.background} background.")


def test_articles() -> None:
    assert with_article("orange star") == "an orange star"
    assert with_article("red star") == "a red star"
    assert shapes.presence_question("orange ring") == "Is there an orange ring in the image?"


def test_mentions() -> None:
    text = "A red circle, two blue crosses and the Green STAR; a red thing, an unseen square."
    assert shapes.mentions(text) == ["red circle", "blue cross", "green star"]
    assert shapes.mentions("") == []


@pytest.mark.parametrize("kind", shapes.POPE_KINDS)
def test_pope_questions_are_true_and_balanced(kind: str) -> None:
    questions = shapes.pope_questions(SCENES, kind, seed=3)
    assert questions == shapes.pope_questions(SCENES, kind, seed=3)
    assert questions != shapes.pope_questions(SCENES, kind, seed=4)
    answers = Counter(question.answer for question in questions)
    assert answers["yes"] == answers["no"]
    assert set(answers) == {"yes", "no"}
    for question in questions:
        there = asked(question) in SCENES[question.scene].names
        assert question.answer == ("yes" if there else "no")
        assert question.kind == kind
    for index, scene in enumerate(SCENES):
        mine = [asked(question) for question in questions if question.scene == index]
        assert len(mine) == len(set(mine)) == 2 * min(3, len(scene.names))


def test_popular_questions_ask_for_the_most_frequent_absent_kinds() -> None:
    frequency = Counter(name for scene in SCENES for name in scene.names)
    questions = shapes.pope_questions(SCENES, "popular")
    for index, scene in enumerate(SCENES):
        no = [asked(q) for q in questions if q.scene == index and q.answer == "no"]
        others = [frequency[n] for n in shapes.KINDS if n not in scene.names and n not in no]
        assert min(frequency[name] for name in no) >= max(others)


def test_adversarial_questions_ask_for_the_usual_company() -> None:
    together: Counter[tuple[str, str]] = Counter()
    for scene in SCENES:
        together.update((a, b) for a in scene.names for b in scene.names if a != b)
    questions = shapes.pope_questions(SCENES, "adversarial")
    for yes, no in zip(questions[::2], questions[1::2], strict=True):
        scene = SCENES[yes.scene]
        before = {asked(q) for q in questions if q.scene == yes.scene and q.answer == "no"}
        free = [n for n in shapes.KINDS if n not in scene.names and n not in before]
        best = max(together[asked(yes), name] for name in free)
        assert together[asked(yes), asked(no)] >= best


def test_adversarial_is_not_random() -> None:
    """The absent kinds that are asked for go with the theme, as measured on many scenes."""
    many = shapes.make_scenes(2000, 8)
    frequency = Counter(name for scene in many for name in scene.names)

    def mean_frequency(kind: str) -> float:
        no = [
            frequency[asked(q)]
            for q in shapes.pope_questions(SCENES, kind, reference=many)
            if q.answer == "no"
        ]
        return sum(no) / len(no)

    random_, popular, adversarial = map(mean_frequency, shapes.POPE_KINDS)
    assert random_ < adversarial < popular


def test_counts_are_true() -> None:
    answers = Counter[str]()
    for question in shapes.count_questions(SCENES, per_scene=3):
        words = question.text.rstrip("?").split()
        scene = SCENES[question.scene]
        if words[2] == "objects":
            truth = len(scene.objects)
        elif words[3] == "objects":
            truth = sum(thing.color == words[2] for thing in scene.objects)
        else:
            truth = sum(words[2] in (f"{o.shape}s", f"{o.shape}es") for o in scene.objects)
        assert question.answer == NUMBERS[truth]
        answers[question.answer] += 1
    assert len(answers) >= 6


def test_spatial_answers_are_true() -> None:
    questions = shapes.spatial_questions(SCENES, per_scene=3)
    for question in questions:
        words = question.text.rstrip("?").split()
        things = {thing.name: thing for thing in SCENES[question.scene].objects}
        first, second = things[" ".join(words[2:4])], things[" ".join(words[-2:])]
        relation = " ".join(words[4:-3])
        across, down = first.x - second.x, first.y - second.y
        value = {"left of": -across, "right of": across, "above": -down, "below": down}[relation]
        assert abs(value) > 0.09
        assert question.answer == ("yes" if value > 0 else "no")
    share = sum(question.answer == "yes" for question in questions) / len(questions)
    assert 0.42 < share < 0.58


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_training_conversations_are_true(seed: int) -> None:
    scene = shapes.make_scene(seed)
    talks = conversations(scene, random.Random(seed), presence=4)
    questions = [pair for pair in talks if pair[0].startswith("Is there")]
    assert len(questions) == 4
    for question, answer in questions:
        assert answer == ("yes" if " ".join(question.split()[3:5]) in scene.names else "no")
    assert talks[0][1] in scene.captions
    where = [pair for pair in talks if pair[0].startswith("Where")]
    ((question, answer),) = where
    name = question.removeprefix("Where is the ").rstrip("?")
    assert answer == next(o.place for o in scene.objects if o.name == name)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"random, popular, adversarial, got 'hard'"):
        shapes.pope_questions(SCENES, "hard")
    with pytest.raises(ValueError, match="per_scene of at least 1"):
        shapes.pope_questions(SCENES, per_scene=0)
