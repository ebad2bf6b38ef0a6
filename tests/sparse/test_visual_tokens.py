import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from attending.core.statistics import effective_rank
from attending.sparse.visual_tokens import (
    METHODS,
    adaptive_threshold,
    agile,
    attention_cover,
    cosine_distance,
    div_prune,
    farthest_points,
    most_attended,
    select_tokens,
    vis_pruner,
)
from tests.sparse import naive

GOLDEN = Path(__file__).parents[1] / "golden" / "agile-pruner"


def problem(images: int, tokens: int, dim: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Features in loose groups, and attention; float64."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(images, 5, dim, generator=generator, dtype=torch.double)
    group = torch.randint(5, (images, tokens), generator=generator)
    features = centres.gather(1, group[..., None].expand(-1, -1, dim))
    features = features + 0.4 * torch.randn(features.shape, generator=generator).double()
    return features, torch.randn(images, tokens, generator=generator).double().softmax(-1)


@pytest.mark.parametrize("name", ["a", "b"])
def test_golden(name: str) -> None:
    stored = np.load(GOLDEN / f"select_{name}.npz")
    features = torch.from_numpy(stored["features"])[None]
    attention = torch.from_numpy(stored["cls_attention"]).mean(1)
    keep, erank_avg = int(stored["num_keep"]), float(stored["erank_avg"])
    rank = float(stored["erank_input"])
    assert effective_rank(features, center=True).item() == pytest.approx(rank, abs=1e-8)
    plain = float(stored["erank_input_uncentred"])
    assert effective_rank(features).item() == pytest.approx(plain, abs=1e-8)

    index = agile(features, attention, keep, erank_avg=erank_avg, tau_max=0.25)
    assert index[0].tolist() == stored["agile_index"].tolist()
    selected = effective_rank(features[0, index[0]], center=True).item()
    assert selected == pytest.approx(float(stored["erank_selected"]), abs=1e-8)
    static = torch.full_like(attention, float(stored["static_tau"]))
    index = attention_cover(features, attention, static, keep)
    assert index[0].tolist() == stored["agile_static_index"].tolist()
    index = div_prune(features, keep)
    assert index[0].tolist() == stored["divprune_index"].tolist()
    index = most_attended(attention, keep)
    assert index[0].tolist() == stored["attention_topk_index"].tolist()
    index = vis_pruner(features, attention, keep)
    assert sorted(index[0].tolist()) == stored["vispruner_mask"].nonzero()[0].tolist()

    # The naive versions, which other tests hold everything to, are right as well.
    one, two = features[0], attention[0]
    assert naive.agile(one, two, keep, erank_avg, 0.25) == (
        stored["agile_index"].tolist(),
        int(stored["agile_count_before_backfill"]),
    )
    assert naive.div_prune(one, keep) == stored["divprune_index"].tolist()

    # In single precision the same, up to ties.
    chosen = select_tokens(features.float(), attention.float(), keep, erank_avg=erank_avg)
    assert chosen[0].tolist() == sorted(stored["agile_index"].tolist())


@given(
    tokens=st.integers(1, 40),
    keep=st.integers(1, 45),
    dim=st.integers(1, 12),
    erank_avg=st.floats(1, 200),
    tau_max=st.floats(0, 2),
)
def test_batches_equal_naive_images(
    tokens: int, keep: int, dim: int, erank_avg: float, tau_max: float
) -> None:
    features, attention = problem(3, tokens, dim)
    few = min(keep, tokens)
    index = agile(features, attention, keep, erank_avg=erank_avg, tau_max=tau_max)
    assert index.shape == (3, few)
    diverse = div_prune(features, keep)
    for image in range(3):
        expected, _ = naive.agile(features[image], attention[image], few, erank_avg, tau_max)
        # With one dimension all distances are 0 or 2 up to rounding.
        if dim > 1 or tau_max == 0:
            assert index[image].tolist() == expected
            if tokens > 1 and dim > 1:
                assert diverse[image].tolist() == naive.div_prune(features[image], few)
        assert len(set(index[image].tolist())) == few
        assert len(set(diverse[image].tolist())) == few


@given(tokens=st.integers(1, 30), keep=st.integers(1, 30), seed=st.integers(0, 9))
def test_selection(tokens: int, keep: int, seed: int) -> None:
    features, attention = problem(2, tokens, 6, seed)
    before = features.clone(), attention.clone()
    for method in METHODS:
        index = select_tokens(features, attention, keep, method)
        assert index.shape == (2, min(keep, tokens))
        assert bool((index.diff(dim=-1) > 0).all())
        assert int(index.min()) >= 0
        assert int(index.max()) < tokens
        if keep >= tokens:
            assert index.tolist() == [list(range(tokens))] * 2
        # Each image by itself, and features times a constant.
        if method != "random":
            for image in (slice(0, 1), slice(1, 2)):
                alone = select_tokens(features[image], attention[image], keep, method)
                assert alone.tolist() == index[image].tolist()
    assert torch.equal(features, before[0])
    assert torch.equal(attention, before[1])


@given(keep=st.integers(1, 24), seed=st.integers(0, 9))
def test_order_of_tokens_does_not_matter(keep: int, seed: int) -> None:
    features, attention = problem(1, 24, 6, seed)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(seed))
    methods = ["agile", "static", "fastervlm", "vispruner", "fps"]
    nearest = (cosine_distance(features)[0] + 9 * torch.eye(24)).amin(-1).sort().values
    if nearest[-1] > nearest[-2]:  # else two tokens are each other's nearest: the earlier is first
        methods.append("divprune")
    for method in methods:
        index = select_tokens(features, attention, keep, method, erank_avg=20.0)
        turned = select_tokens(features[:, order], attention[:, order], keep, method, erank_avg=20)
        assert set(order[turned[0]].tolist()) == set(index[0].tolist()), method


@given(keep=st.integers(1, 24), tau=st.floats(0, 2), seed=st.integers(0, 20))
def test_walk_covers_what_it_removes(keep: int, tau: float, seed: int) -> None:
    features, attention = problem(1, 24, 6, seed)
    thresholds = torch.full_like(attention, tau)
    index = attention_cover(features, attention, thresholds, keep)[0].tolist()
    kept, walked = naive.cover(features[0], attention[0], [tau] * 24, keep)
    assert index == kept
    distance = cosine_distance(features)[0]
    if walked < keep or keep == 24:  # the list ran out: all others had been removed
        others = [i for i in range(24) if i not in kept[:walked]]
        assert all(min(distance[i, j] for j in kept[:walked]) < tau for i in others)
    for i, j in itertools.combinations(kept[:walked], 2):
        assert distance[i, j] >= tau


@given(keep=st.integers(1, 20), seed=st.integers(0, 20))
def test_small_thresholds_leave_the_most_attended(keep: int, seed: int) -> None:
    features, attention = problem(2, 20, 6, seed)
    wanted = most_attended(attention, keep).tolist()
    assert agile(features, attention, keep, tau_max=0.0).tolist() == wanted
    distance = cosine_distance(features) + 9 * torch.eye(20)
    below = float(distance.min()) * 0.99
    assert agile(features, attention, keep, tau_max=below).tolist() == wanted
    # Also among duplicates: nothing is closer than 0.
    doubled = features[:, [0, 0, *range(2, 20)]]
    assert agile(doubled, attention, keep, tau_max=0.0).tolist() == wanted


@pytest.mark.parametrize("keep", [2, 3, 4])
def test_div_prune_is_within_a_factor_of_the_best(keep: int) -> None:
    for seed in range(10):
        features, _ = problem(1, 9, 4, seed)
        distance = cosine_distance(features)[0]

        def smallest(index: tuple[int, ...], distance: Tensor = distance) -> float:
            return min(float(distance[i, j]) for i, j in itertools.combinations(index, 2))

        best = max(map(smallest, itertools.combinations(range(9), keep)))
        assert smallest(tuple(div_prune(features, keep)[0].tolist())) >= best / 4 - 1e-12
        start = torch.tensor([seed % 9])
        assert smallest(tuple(farthest_points(features, keep, start)[0].tolist())) >= best / 4


def test_duplicates_are_never_chosen_twice() -> None:
    features = torch.ones(1, 6, 4)
    assert sorted(div_prune(features, 5)[0].tolist()) == [0, 1, 2, 3, 4]
    index = select_tokens(features, torch.ones(1, 6), 4, "agile", tau_max=2.0)
    assert index.tolist() == [[0, 1, 2, 3]]
    assert div_prune(torch.zeros(2, 1, 4), 3).tolist() == [[0], [0]]


def test_thresholds() -> None:
    tau = adaptive_threshold(torch.tensor([90.0, 180.0]), 30, erank_avg=90.0, tau_max=0.25)
    torch.testing.assert_close(tau[0, :4], torch.tensor([0.01, 0.02, 0.03, 0.04]))
    torch.testing.assert_close(tau[1, :4], torch.tensor([0.02, 0.04, 0.06, 0.08]))
    assert tau.amax().item() == 0.25
    assert int((tau[0] < 0.25).sum()) == 24  # reached at rank 25 erank_avg / erank


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("keep", [1, 5, 7, 19])
def test_vis_pruner_shares(share: float, keep: int) -> None:
    features, attention = problem(2, 20, 6)
    index = vis_pruner(features, attention, keep, attention_share=share)
    important = int(share * keep)
    wanted = most_attended(attention, keep)[:, :important]
    assert index[:, :important].tolist() == wanted.tolist()
    assert all(len(set(row)) == keep for row in index.tolist())


def test_random_is_even_and_seeded() -> None:
    features, attention = problem(400, 8, 3)
    chosen = select_tokens(
        features, attention, 2, "random", generator=torch.Generator().manual_seed(1)
    )
    again = select_tokens(
        features, attention, 2, "random", generator=torch.Generator().manual_seed(1)
    )
    assert torch.equal(chosen, again)
    counts = torch.bincount(chosen.flatten(), minlength=8)
    assert int(counts.min()) > 60
    assert int(counts.max()) < 140


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    features, attention = problem(2, 30, 16)
    features, attention = features.to(dtype), attention.to(dtype)
    for method in METHODS[:-1]:
        index = select_tokens(features, attention, 9, method)
        assert (
            index.tolist() == select_tokens(features.float(), attention.float(), 9, method).tolist()
        )
    with torch.autocast("cpu"):
        inside = select_tokens(features.float(), attention.float(), 9)
    assert inside.tolist() == select_tokens(features.float(), attention.float(), 9).tolist()


FEATURES, ATTENTION = torch.ones(2, 5, 3), torch.ones(2, 5)


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        ("features: expected a float tensor", (FEATURES[0], ATTENTION, 2)),
        ("features: expected a float tensor", (FEATURES.long(), ATTENTION, 2)),
        ("features: expected finite", (FEATURES * torch.nan, ATTENTION, 2)),
        ("attention: expected finite", (FEATURES, ATTENTION * torch.inf, 2)),
        (r"attention: expected \[2, 5\]", (FEATURES, ATTENTION[:, :4], 2)),
        ("keep: expected a whole number", (FEATURES, ATTENTION, 0)),
        ("keep: expected a whole number", (FEATURES, ATTENTION, 2.0)),
        ("method: expected one of agile", (FEATURES, ATTENTION, 2, "best")),
    ],
)
def test_bad_input(message: str, arguments: tuple[Tensor, Tensor, int]) -> None:
    with pytest.raises(ValueError, match=message):
        select_tokens(*arguments)


@pytest.mark.parametrize(
    ("name", "value", "method"),
    [
        ("erank_avg", 0.0, "agile"),
        ("tau_max", -0.1, "agile"),
        ("tau", 2.1, "static"),
        ("attention_share", 1.5, "vispruner"),
    ],
)
def test_bad_parameters(name: str, value: float, method: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: expected a number"):
        select_tokens(FEATURES, ATTENTION, 2, method, **{name: value})
