"""AUROC and AUPRO, against golden vectors, scikit-learn and the definition."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attending.probes.anomaly import aupro, auroc, connected_regions

GOLDEN = Path(__file__).parents[1] / "golden" / "decoding-metrics" / "anomaly.npz"


def test_golden():
    with np.load(GOLDEN) as arrays:
        golden = {name: torch.from_numpy(np.asarray(arrays[name])) for name in arrays}
    scores, masks = golden["scores"], golden["masks"]
    close = {"abs": 1e-10}
    assert auroc(scores, masks) == pytest.approx(float(golden["pixel_auroc"]), **close)
    images = auroc(scores.amax((1, 2)), masks.flatten(1).any(1))
    assert images == pytest.approx(float(golden["image_auroc"]), **close)
    assert aupro(scores, masks) == pytest.approx(float(golden["aupro_030"]), **close)
    assert aupro(scores, masks, fpr_limit=0.1) == pytest.approx(float(golden["aupro_010"]), **close)


def drawn(data):
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    shape = [data.draw(st.integers(1, high)) for high in (3, 7, 7)]
    scores = torch.randint(0, 6, shape, generator=generator).double()  # with ties
    masks = torch.rand(shape, generator=generator) < 0.4
    masks[0, 0, 0] = True
    scores = torch.cat([scores, torch.zeros(1, *shape[1:], dtype=torch.float64)])
    masks = torch.cat([masks, torch.zeros(1, *shape[1:], dtype=torch.bool)])
    return scores, masks


@given(st.data())
def test_regions_as_scipy(data):
    from scipy import ndimage

    _, masks = drawn(data)
    found = connected_regions(masks)
    assert torch.equal(found > 0, masks)
    count = 0
    for ours, mask in zip(found, masks, strict=True):
        theirs, number = ndimage.label(mask.numpy(), np.ones((3, 3)))
        pairs = set(zip(ours.flatten().tolist(), theirs.flatten().tolist(), strict=True))
        pairs.discard((0, 0))
        assert len(pairs) == number == len({one for one, _ in pairs})
        count += number
    assert int(found.max()) == count
    assert bool(connected_regions(torch.ones_like(masks))[0].eq(1).all())


@given(st.data())
def test_by_definition_and_monotone(data):
    from sklearn.metrics import roc_auc_score

    scores, masks = drawn(data)
    expected = roc_auc_score(masks.flatten().numpy(), scores.flatten().numpy())
    assert auroc(scores, masks) == pytest.approx(expected, abs=1e-12)
    regions = connected_regions(masks)
    points = [(0.0, 0.0)]
    for threshold in sorted(set(scores.flatten().tolist()), reverse=True):
        passed = scores >= threshold
        overlaps = [passed[regions == n].double().mean() for n in range(1, int(regions.max()) + 1)]
        points.append((float(passed[~masks].double().mean()), float(torch.stack(overlaps).mean())))
    limit = data.draw(st.sampled_from([0.05, 0.3, 1.0]))
    grid = np.linspace(0, limit, 200_001)
    rate, overlap = np.array(points).T
    # Of several points at one rate, what counts from there on is the highest.
    curve = np.interp(grid, rate + 1e-12 * np.arange(len(rate)), overlap)
    assert aupro(scores, masks, fpr_limit=limit) == pytest.approx(curve.mean(), abs=1e-4)
    assert aupro(2 * scores.exp() - 5, masks, fpr_limit=limit) == pytest.approx(
        aupro(scores, masks, fpr_limit=limit), abs=1e-12
    )
    assert aupro(masks.double(), masks, fpr_limit=limit) == pytest.approx(1)


def test_wrong_arguments():
    scores, masks = torch.rand(1, 3, 3), torch.zeros(1, 3, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="labels: expected some of each kind"):
        auroc(scores, masks)
    with pytest.raises(ValueError, match="masks: expected anomalous and normal pixels"):
        aupro(scores, ~masks)
    with pytest.raises(ValueError, match="scores, labels: expected the same shape"):
        auroc(scores, masks[:, :2])
    with pytest.raises(ValueError, match="scores: expected numbers"):
        auroc(scores * torch.nan, masks)
    with pytest.raises(ValueError, match="fpr_limit: expected"):
        aupro(scores, masks, fpr_limit=0)
    with pytest.raises(ValueError, match="scores: expected \\[images, height, width\\]"):
        aupro(scores[0], masks[0])
