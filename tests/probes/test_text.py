"""Repetition and diversity, against golden vectors, NLTK, brute force and known texts."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attending.probes.text import distinct_n, diversity, rep_n, self_bleu

GOLDEN = Path(__file__).parents[1] / "golden" / "decoding-metrics" / "repetition.npz"

corpora = st.lists(st.lists(st.integers(0, 3), max_size=12), min_size=1, max_size=5)


def golden():
    with np.load(GOLDEN) as arrays:
        found = dict(arrays)
    texts = [row[:length] for row, length in zip(found["tokens"], found["lengths"], strict=True)]
    return texts, found


def test_golden():
    texts, found = golden()
    close = {"abs": 1e-12}
    for index, n in enumerate((2, 3, 4)):
        assert 100 * rep_n(texts, n) == pytest.approx(found["rep_exact"][index], abs=1e-10)
        simctg = 100 * rep_n(texts, n, compat="simctg")
        assert simctg == pytest.approx(found["simctg_rep"][index], abs=1e-10)
        assert self_bleu(texts, n) == pytest.approx(found["self_bleu_2_3_4"][index], **close)
    for index in range(4):
        assert distinct_n(texts, index + 1) == pytest.approx(found["distinct"][index], **close)
    assert diversity(texts) == pytest.approx(float(found["diversity_exact"]), **close)
    simctg = diversity(texts, compat="simctg")
    assert simctg == pytest.approx(float(found["simctg_diversity"]), **close)


def test_words_ids_and_tensors_are_the_same():
    texts, _ = golden()
    words = [" ".join(map(str, row)) for row in texts]
    tensors = [torch.from_numpy(row) for row in texts]
    for measure in (diversity, self_bleu, lambda some: distinct_n(some, 2)):
        assert measure(words) == measure(tensors) == measure([row.tolist() for row in texts])


@given(corpora, st.integers(1, 4))
def test_rep_and_distinct_by_counting(texts, n):
    grams = [[tuple(t[i : i + n]) for i in range(len(t) - n + 1)] for t in texts]
    total = sum(map(len, grams))
    found, shared = rep_n(texts, n), distinct_n(texts, n)
    if not total:
        assert math.isnan(found)
        assert math.isnan(shared)
        return
    repeats = sum(gram in one[:i] for one in grams for i, gram in enumerate(one))
    assert found == pytest.approx(repeats / total)
    assert shared == pytest.approx(len({gram for one in grams for gram in one}) / total)
    own = [sum(g in one[:i] for i, g in enumerate(one)) / len(one) for one in grams if one]
    assert rep_n(texts, n, aggregate="text") == pytest.approx(sum(own) / len(own))


@given(corpora)
def test_diversity_is_a_share(texts):
    found = diversity(texts)
    assert math.isnan(found) or 0 <= found <= 1


@pytest.mark.parametrize("length", [4, 5, 50])
def test_known_texts(length):
    assert diversity([range(length)]) == 1
    assert rep_n([range(length)], 2) == 0
    constant = [[7] * length]
    assert rep_n(constant, 2) == pytest.approx(1 - 1 / (length - 1))
    expected = math.prod(1 / (length - n + 1) for n in (2, 3, 4))
    assert diversity(constant) == pytest.approx(expected)
    assert self_bleu([range(length)] * 3) == pytest.approx(1)
    assert self_bleu([range(length), range(length, 2 * length)]) == 0


@given(st.lists(st.lists(st.integers(0, 4), max_size=9), min_size=2, max_size=6), st.integers(1, 4))
def test_self_bleu_as_nltk(texts, n):
    bleu = pytest.importorskip("nltk.translate.bleu_score")
    smoothing = bleu.SmoothingFunction().method1
    scores = [
        bleu.sentence_bleu(
            texts[:i] + texts[i + 1 :], text, (1 / n,) * n, smoothing_function=smoothing
        )
        for i, text in enumerate(texts)
    ]
    assert self_bleu(texts, n) == pytest.approx(sum(scores) / len(scores), abs=1e-12)


def test_wrong_arguments():
    with pytest.raises(ValueError, match="texts: expected several, got one string"):
        diversity("a b c")
    with pytest.raises(ValueError, match="texts: expected at least one"):
        rep_n([], 2)
    with pytest.raises(ValueError, match="n: expected at least 1"):
        rep_n(["a"], 0)
    with pytest.raises(ValueError, match="compat: expected"):
        rep_n(["a"], 1, compat="mauve")
    with pytest.raises(ValueError, match="aggregate: expected"):
        rep_n(["a"], 1, aggregate="mean")
    with pytest.raises(ValueError, match="texts: expected at least two"):
        self_bleu(["a b"])
    with pytest.raises(ValueError, match="texts: expected one sequence of ids a text"):
        diversity([torch.zeros(2, 3, dtype=torch.int64)])
