"""Offline filtering: the scores are those of each head calibrated alone."""

from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from attending.interventions.attention_calibration import AttentionCalibration
from attending.interventions.head_selection import HeadScores, select_heads
from attending.interventions.settings import load_settings, save_settings
from tests.interventions.tiny import make_causal

METHOD = AttentionCalibration(layers=(1, 2), alpha=1.5, min_observers=3)


def likelihood(model: nn.Module, ids: Tensor) -> float:
    assert not model.training
    assert not torch.is_grad_enabled()
    return -float(model(ids, labels=ids).loss)


def test_each_head_alone(tmp_path: Path) -> None:
    model, ids = make_causal(), torch.randint(3, 50, (2, 12))
    model.train()
    found = select_heads(model, ids, likelihood, METHOD, progress=False)
    assert model.training
    assert set(found.scores) == {1, 2}
    model.eval()
    with torch.no_grad():
        assert found.baseline == likelihood(model, ids)
        for layer, head in product((1, 2), range(4)):
            alone = AttentionCalibration(heads={layer: (head,)}, alpha=1.5, min_observers=3)
            with alone(model) as run:
                assert likelihood(model, ids) == pytest.approx(found.scores[layer][head], abs=1e-6)
            assert run.heads == {(layer, head)}
    assert found.evaluations == 9
    assert load_settings(HeadScores, save_settings(found, tmp_path / "scores.json")) == found


def test_heads_without_sinks_are_not_run() -> None:
    model, ids = make_causal(), torch.randint(3, 50, (2, 12))
    runs = []

    def count(model: nn.Module, ids: Tensor) -> float:
        runs.append(1)
        return likelihood(model, ids)

    method = AttentionCalibration(layers=(1,), threshold=0.999)
    found = select_heads(model, ids, count, method, progress=False)
    assert len(runs) == found.evaluations == 1
    assert found.scores == {1: (found.baseline,) * 4}
    with pytest.raises(ValueError, match="data: expected some head to improve"):
        method.calibrate(model, ids, likelihood, progress=False)


def test_calibrate_takes_the_heads_that_help() -> None:
    model, ids = make_causal(), torch.randint(3, 50, (2, 12))
    found = select_heads(model, ids, likelihood, METHOD, progress=False)
    best = max(score for scores in found.scores.values() for score in scores)
    assert best > found.baseline
    chosen = METHOD.calibrate(model, ids, likelihood, progress=False)
    assert chosen.heads == found.selected()
    assert chosen.layers is None
    assert chosen.alpha == METHOD.alpha


def test_selected() -> None:
    scores = HeadScores(0.5, {1: (0.6, 0.5, 0.4), 3: (0.55, 0.7, 0.51)}, 7)
    assert scores.selected() == {1: (0,), 3: (0, 1, 2)}
    assert scores.selected(margin=0.04) == {1: (0,), 3: (0, 1)}
    assert scores.selected(most=2) == {1: (0,), 3: (1,)}
    assert scores.selected(margin=0.5) == {}


def test_bad_input_is_named() -> None:
    model = make_causal()
    with pytest.raises(ValueError, match="method: expected one without heads"):
        select_heads(model, None, likelihood, AttentionCalibration(heads={1: (0,)}))
    with pytest.raises(ValueError, match="metric: expected a finite number"):
        select_heads(
            model,
            torch.ones(1, 4).long(),
            lambda model, ids: likelihood(model, ids) * float("nan"),
            METHOD,
            progress=False,
        )
