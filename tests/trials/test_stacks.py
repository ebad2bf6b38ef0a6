"""Methods nest: each pair runs in both orders, or the one that cannot says why."""

import itertools
from typing import Any

import pytest
import torch

import attending as at
from attending import zoo
from attending.interventions.visual_attention_redistribution import VisualAttentionRedistribution
from attending.trials import ShapesPope, Trial
from attending.trials.methods import stack_of
from attending.zoo import shapes

METHODS = {
    "act": "act:layers=1/2/3,alpha=1,beta=0",
    "var": "var:tau=2,skip_first=1",
    "agile": "agile:keep=16",
    "fastv": "fastv:keep=16,layer=1",
    "damro": "damro:k=4",
    "momentum": "momentum:alpha=1",
    "contrastive": "contrastive-search:top_k=2",
    "scale": "logit-scale:n_train=40,kind=log",
}
# What the one that refuses says.
REFUSED = {
    ("agile", "damro"): "a second pruning of the same features is not possible",
    ("damro", "agile"): "a second pruning of the same features is not possible",
    ("var", "fastv"): "Pruning within the language model (fastv, sparsevlm)",
    ("fastv", "var"): "Pruning within the language model (fastv, sparsevlm)",
    ("contrastive", "damro"): "custom_generate: expected none within contrastive search",
}


@pytest.fixture(scope="module")
def trial() -> Trial:
    seeing = zoo.load("llava-shapes")
    inputs = seeing.processor(shapes.make_scenes(4, 1), shapes.DESCRIBE)
    methods: dict[str, Any] = {}
    for name, text in METHODS.items():
        ((method, learns),) = stack_of(text)
        found: Any = method
        if learns:
            data = inputs if isinstance(method, VisualAttentionRedistribution) else [inputs]
            found = found.calibrate(seeing.model, data)
        methods[name] = found
    pairs = {
        f"{one} {other}": [methods[one], methods[other]]
        for one, other in itertools.permutations(METHODS, 2)
    }
    task = ShapesPope(seeing, scenes=1, seed=3)
    torch.manual_seed(0)
    return at.trial(seeing.model, task, pairs, repeats=1)


@pytest.mark.slow
@pytest.mark.parametrize("pair", list(itertools.permutations(METHODS, 2)), ids=" ".join)
def test_a_pair(trial: Trial, pair: tuple[str, str]) -> None:
    row = trial[" ".join(pair)]
    if pair in REFUSED:
        assert row.status == "not applicable", row.notes
        assert REFUSED[pair] in row.notes[0]
    else:
        assert row.status == "ran", row.notes
        assert set(row.samples) == set(trial.plain.samples)
