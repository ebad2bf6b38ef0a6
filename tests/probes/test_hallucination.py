"""POPE and CHAIR, against golden vectors, by hand, and as identities."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attending.probes.hallucination import chair, count_mentions, parse_yes_no, pope_scores

GOLDEN = Path(__file__).parents[1] / "golden" / "decoding-metrics" / "hallucination.npz"


def golden():
    with np.load(GOLDEN) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays}


def test_golden_pope():
    arrays = golden()
    words = [{1: "Yes", 0: "No"}[int(one)] for one in arrays["pope_pred"]]
    found = pope_scores(words, [bool(one) for one in arrays["pope_label"]])
    assert found[:5] == pytest.approx(arrays["pope_acc_prec_rec_f1_yes"].tolist(), abs=1e-10)
    assert found.unparsed == 0


def test_golden_chair():
    arrays = golden()
    found = chair(arrays["mentions"], arrays["ground_truth"])
    once = chair(arrays["mentions"], arrays["ground_truth"], sets=True)
    assert found.chair_i == pytest.approx(float(arrays["chair_i"]), abs=1e-10)
    assert found.chair_s == once.chair_s == pytest.approx(float(arrays["chair_s"]), abs=1e-10)
    assert once.chair_i == pytest.approx(float(arrays["chair_i_set"]), abs=1e-10)


@pytest.mark.parametrize(
    ("answer", "official", "first_word"),
    [
        ("Yes, there is a dog.", True, True),
        ("No, there is no dog.", False, False),
        ("There is, no, a dog", False, None),  # the comma goes
        ("Yes. But not a dog.", True, True),  # the text after the first full stop goes
        ("it is not there", False, None),
        ("NO", True, False),  # a quirk of the official rule, and so are the next three
        ("none", True, None),
        ("no\nnever", True, False),
        ("", True, None),
        (" **No** way", True, False),
    ],
)
def test_parsers(answer, official, first_word):
    assert parse_yes_no(answer) is official
    assert parse_yes_no(answer, "first_word") is first_word


@given(st.lists(st.tuples(st.sampled_from(["yes", "no", "?"]), st.booleans()), min_size=1))
def test_pope_identities(pairs):
    answers, labels = [one for one, _ in pairs], [other for _, other in pairs]
    found = pope_scores(answers, labels, parser="first_word")
    positives = sum(labels) / len(labels)
    right_yes = sum(one == "yes" and other for one, other in pairs) / len(pairs)
    right_no = sum(one == "no" and not other for one, other in pairs) / len(pairs)
    assert found.accuracy == pytest.approx(right_yes + right_no)
    if found.yes_ratio:
        assert found.precision * found.yes_ratio == pytest.approx(right_yes)
    if positives:
        assert found.recall * positives == pytest.approx(right_yes)
    if found.yes_ratio and right_yes:
        harmonic = 2 * found.precision * found.recall / (found.precision + found.recall)
        assert found.f1 == pytest.approx(harmonic)
    assert found.unparsed == answers.count("?") / len(pairs)


def test_a_model_that_never_says_yes():
    found = pope_scores(["no", "no"], ["yes", "no"])
    assert found.accuracy == 0.5
    assert math.isnan(found.precision)
    assert found.f1 == found.recall == found.yes_ratio == 0


def test_mentions_of_captions():
    names = ["red circle", "circle", "bus"]
    captions = [
        "A Red  circle, two red\ncircles and a circle.",
        "Two buses; nothing encircled, no redcircle.",
        "",
    ]
    assert count_mentions(captions, names).tolist() == [[2, 1, 0], [0, 0, 1], [0, 0, 0]]
    words = {"round": ["circle", "disc", "red circle"], "vehicle": ["bus", "car"]}
    assert count_mentions(captions, words).tolist() == [[3, 0], [0, 1], [0, 0]]


@given(st.data())
def test_chair_invariants(data):
    captions, objects = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 5))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    mentions = torch.randint(0, 3, (captions, objects), generator=generator)
    truth = torch.rand(captions, objects, generator=generator) < 0.5
    found = chair(mentions, truth)
    assert found.mentions == int(mentions.sum())
    if found.mentions:
        assert found.chair_s >= (found.chair_i > 0) / captions
        assert (found.chair_i == 0) == (found.chair_s == 0)
        honest = chair(mentions, truth | (mentions > 0))
        assert honest.chair_i == honest.chair_s == 0
    # The order of captions and objects does not matter, nor does a repeated set of captions.
    again = chair(mentions.flip(0, 1).repeat(2, 1), truth.flip(0, 1).repeat(2, 1))
    assert again[:3] == pytest.approx(found[:3], nan_ok=True)
    assert chair(mentions > 0, truth) == chair(mentions, truth, sets=True)


def test_nothing_mentioned():
    found = chair(torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, 3, dtype=torch.bool))
    assert math.isnan(found.chair_i)
    assert (found.chair_s, found.recall, found.mentions) == (0, 0, 0)


def test_wrong_arguments():
    with pytest.raises(ValueError, match="answers: expected one for each label"):
        pope_scores(["yes"], [])
    with pytest.raises(ValueError, match="labels: expected 'yes' or 'no'"):
        pope_scores(["yes"], ["maybe"])
    with pytest.raises(ValueError, match="parser: expected"):
        pope_scores(["yes"], ["yes"], parser="last_word")
    with pytest.raises(ValueError, match="names: expected words that stand for one object"):
        count_mentions(["a"], {"a": ["x"], "b": ["X"]})
    with pytest.raises(ValueError, match="names: expected words"):
        count_mentions(["a"], [" "])
    with pytest.raises(ValueError, match="names: expected at least one"):
        count_mentions(["a"], [])
    with pytest.raises(ValueError, match="mentions: expected"):
        chair(torch.zeros(2, 3, dtype=torch.int64), torch.ones(3, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="truth: expected booleans"):
        chair(torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="mentions: expected whole numbers"):
        chair(torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool))
