"""The experiment of PALM: its task, its models, and its rule."""

import pytest
import torch

from attending.papers import _partial_attention_lm_translation as translation
from attending.papers.partial_attention_lm import RULE, settings


def test_the_answers_are_in_the_source() -> None:
    generator = torch.Generator().manual_seed(0)
    language = torch.randperm(translation.WORDS, generator=generator)
    tokens, answers = translation.batch(5, 16, 9, language, generator)
    assert tokens.shape == (5, 25)
    for row in range(5):
        for step in range(9):
            word = tokens[row, tokens[row, 16 + step] - translation.WORDS]
            assert answers[row, step] == language[word]


def test_models_have_about_as_many_parameters() -> None:
    sizes = [
        sum(p.numel() for p in translation.build(kind, 16, settings("small")).parameters())
        for kind in translation.KINDS
    ]
    assert max(sizes) < 1.01 * min(sizes)


def test_a_run_measures_every_step() -> None:
    found = translation.run("palm", 0, settings("smoke"))
    for curve in (found.accuracy, found.mass, found.ratio, found.sensitivity):
        assert curve.shape == (32,)
    assert float(found.mass[0]) == pytest.approx(16 / 17, abs=0.02)  # untrained: nearly even


def numbers(**changes: float) -> dict[str, list[float]]:
    plain = {
        "late_over_early_mass_lm": 0.5,
        "late_accuracy_lm": 0.4,
        "late_accuracy_palm": 0.9,
        "late_over_early_sensitivity_lm": 0.7,
        "late_over_early_sensitivity_palm": 1.0,
    }
    return {name: [value] * 3 for name, value in (plain | changes).items()}


def test_the_rule() -> None:
    judge = RULE.judge
    assert judge(numbers()) == "held"
    mixed = numbers()
    mixed["late_over_early_sensitivity_palm"] = [0.6, 1.0, 1.0]
    assert judge(mixed) == "held in direction"
    assert judge(numbers(late_over_early_sensitivity_palm=0.6)) == "did not hold"
    assert judge(numbers(late_accuracy_palm=0.3)) == "did not hold"
    assert judge(numbers(late_over_early_mass_lm=0.9)) == "did not hold"
    assert judge(numbers(late_accuracy_palm=float("nan"))) == "did not hold"
