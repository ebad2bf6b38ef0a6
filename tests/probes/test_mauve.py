"""MAUVE, against golden vectors, a numerical integral, and sets of which it is known."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attending.probes.mauve import (
    divergence_curve,
    frontier_integral,
    mauve_from_features,
    mauve_from_histograms,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "decoding-metrics" / "mauve_histogram.npz"

histograms = st.integers(1, 9).flatmap(
    lambda size: st.tuples(
        *[st.lists(st.integers(0, 9), min_size=size, max_size=size).filter(any) for _ in "pq"]
    )
)


def test_golden():
    with np.load(GOLDEN) as arrays:
        found = {name: torch.from_numpy(np.asarray(arrays[name])) for name in arrays}
    settings = {"scaling": float(found["scaling"]), "points": int(found["points"])}
    for row, (p, q) in enumerate(zip(found["p"], found["q"], strict=True)):
        curve = divergence_curve(p, q, **settings)
        ours = {tuple(point) for point in curve.numpy().round(9).tolist()}
        theirs = {tuple(point) for point in found["curve"][row].numpy().round(9).tolist()}
        assert ours == theirs
        score = mauve_from_histograms(p, q, **settings)
        assert score == pytest.approx(float(found["mauve"][row]), abs=1e-10)
        integral = frontier_integral(p, q)
        assert integral == pytest.approx(float(found["frontier_integral"][row]), abs=1e-10)


@given(histograms)
def test_invariants_of_histograms(pair):
    p, q = (torch.tensor(one) for one in pair)
    score, integral = mauve_from_histograms(p, q), frontier_integral(p, q)
    assert 0 < score <= 1 + 1e-12
    assert -1e-12 <= integral <= 1 + 1e-12
    assert mauve_from_histograms(q, p) == pytest.approx(score, abs=1e-12)
    assert frontier_integral(q, p) == pytest.approx(integral, abs=1e-12)
    assert mauve_from_histograms(3 * p, q) == pytest.approx(score, abs=1e-12)
    assert mauve_from_histograms(p.flip(0), q.flip(0)) == pytest.approx(score, abs=1e-12)
    assert mauve_from_histograms(p, 2 * p) == pytest.approx(1, abs=1e-12)
    assert frontier_integral(p, 2 * p) == pytest.approx(0, abs=1e-12)


@given(histograms)
def test_frontier_integral_is_that_integral(pair):
    p, q = (torch.tensor(one).double() / sum(one) for one in pair)
    # Gauss-Legendre does not like the logarithm at the ends; the midpoint rule bears it.
    weight = ((torch.arange(20_000).double() + 0.5) / 20_000)[:, None]
    mixture = weight * p + (1 - weight) * q
    divergences = [
        (torch.xlogy(one, one) - torch.xlogy(one, mixture)).sum(-1, keepdim=True) for one in (p, q)
    ]
    integrand = 2 * (weight * divergences[0] + (1 - weight) * divergences[1])
    assert frontier_integral(p, q) == pytest.approx(float(integrand.mean()), abs=1e-6)


def test_features_of_the_same_and_of_different_texts():
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(6, 16, generator=generator)

    def texts(some):
        return centers[some] + 0.1 * torch.randn(len(some), 16, generator=generator)

    people = texts(torch.randint(0, 6, (200,), generator=generator))
    alike = texts(torch.randint(0, 6, (200,), generator=generator))
    narrow = texts(torch.randint(0, 2, (200,), generator=generator))
    settings = {"num_clusters": 6}
    near = mauve_from_features(people, alike, **settings)
    half = mauve_from_features(people, narrow, **settings)
    far = mauve_from_features(people, -people, num_clusters=12)
    assert mauve_from_features(people, people).mauve == pytest.approx(1)
    assert near.mauve > 0.9 > half.mauve > far.mauve
    assert near.frontier_integral < half.frontier_integral < far.frontier_integral
    assert near.p.sum() == pytest.approx(1)
    smoothed = mauve_from_features(people, narrow, **settings, smoothing=0.5)
    assert smoothed.q.min() == pytest.approx(0.5 / (200 + 6 * 0.5))
    # Directions count, not lengths; and the same seed gives the same.
    scaled = mauve_from_features(people * torch.rand(200, 1), narrow, **settings)
    assert scaled.mauve == pytest.approx(half.mauve)


def test_texts_that_are_all_the_same():
    same = torch.ones(20, 3)
    with pytest.warns(match="distinct clusters"):  # scikit-learn says so
        assert mauve_from_features(same, same).mauve == pytest.approx(1)


def test_principal_components_as_scikit_learn():
    from sklearn.decomposition import PCA

    from attending.probes.mauve import _principal

    features = torch.randn(30, 8, dtype=torch.float64) * torch.arange(1, 9)
    unit = torch.nn.functional.normalize(features, dim=-1).numpy()
    theirs = PCA(n_components=0.9, svd_solver="full").fit_transform(unit)
    torch.testing.assert_close(_principal(features, 0.9).abs(), torch.from_numpy(theirs).abs())


def test_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    with pytest.raises(ImportError, match=r"attending\[mauve\]"):
        mauve_from_features(torch.rand(4, 2), torch.rand(4, 2))


def test_wrong_arguments():
    p = torch.tensor([1.0, 2.0])
    with pytest.raises(ValueError, match="q: expected the clusters of p, 2, got 3"):
        mauve_from_histograms(p, torch.ones(3))
    with pytest.raises(ValueError, match="q: expected the clusters of p, 2, got 3"):
        frontier_integral(p, torch.ones(3))
    for wrong in (-p, p[None], 0 * p, p[:0], p * torch.nan):
        with pytest.raises(ValueError, match="p: expected a histogram"):
            mauve_from_histograms(wrong, wrong)
    with pytest.raises(ValueError, match="scaling, points"):
        mauve_from_histograms(p, p, scaling=0)
    features = torch.rand(4, 2)
    with pytest.raises(ValueError, match="q_features: expected"):
        mauve_from_features(features, torch.rand(4, 3))
    with pytest.raises(ValueError, match="q_features: expected finite"):
        mauve_from_features(features, features * torch.inf)
    with pytest.raises(ValueError, match="num_clusters: expected from 1 to"):
        mauve_from_features(features, features, num_clusters=9)
    with pytest.raises(ValueError, match="explained_variance"):
        mauve_from_features(features, features, explained_variance=0)
