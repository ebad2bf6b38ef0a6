"""The entropy band against golden vectors, a loop in float64, and its invariants."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attending.losses.entropy_regularization import entropy_quartiles, entropy_regularization

GOLDEN = Path(__file__).parent.parent / "golden" / "entropy-guided-attention"


def reference(entropies, thresholds, max_entropy, tolerance, semantics, query_mask=None) -> float:
    """The definition, one number at a time."""
    total = 0.0
    for layer, entropy in enumerate(entropies):
        batch, heads, queries = entropy.shape
        ceiling = torch.as_tensor(max_entropy).expand(batch, heads, queries)
        layer_total = 0.0
        for head in range(heads):
            rows = [
                (float(entropy[b, head, i]), float(ceiling[b, head, i]))
                for b in range(batch)
                for i in range(queries)
                if query_mask is None or query_mask[b, i]
            ]
            if semantics == "paper" and rows:
                rows = [tuple(sum(column) / len(rows) for column in zip(*rows, strict=True))]
            for value, top in rows:
                delta = value - float(thresholds[layer][head]) * top
                if abs(delta) > tolerance * top:
                    layer_total += delta**2
        total += layer_total / heads
    return total / len(entropies)


def random_layers(generator, layers: int = 2, batch: int = 2, queries: int = 5):
    heads = [2 + layer for layer in range(layers)]
    entropies = [
        torch.rand(batch, h, queries, generator=generator, dtype=torch.float64) * 3 for h in heads
    ]
    thresholds = [torch.rand(h, generator=generator, dtype=torch.float64) for h in heads]
    return entropies, thresholds


@pytest.mark.parametrize("case", [1, 2])
def test_golden(case: int) -> None:
    data = np.load(GOLDEN / f"entropy_reg_case{case}.npz")
    maps = torch.from_numpy(data["attentions"]).requires_grad_()
    theta = torch.from_numpy(data["theta"]).requires_grad_()
    entropy = -(maps * (maps + 1e-9).log()).sum(-1)  # the official code's, with its eps
    torch.testing.assert_close(entropy, torch.from_numpy(data["entropy"]), rtol=1e-9, atol=1e-12)
    layers = len(maps)

    def loss(semantics):
        value = entropy_regularization(
            list(entropy),
            [theta] * layers,
            max_entropy=math.log(data["context_size"]),
            tolerance=float(data["gamma"]),
            semantics=semantics,
        )
        return float(data["lam"]) * value

    paper = float(loss("paper").detach())
    assert paper == pytest.approx(float(data["loss_paper_mean"]), rel=1e-9)
    official = loss("official")
    assert float(official.detach()) == pytest.approx(float(data["loss_official_sum"]), rel=1e-9)
    official.backward()
    for got, name in ((theta.grad, "grad_theta"), (maps.grad[0], "grad_attn_layer0")):
        expected = torch.from_numpy(data[f"{name}_official"])
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-15)


@given(
    seed=st.integers(0, 2**31),
    batch=st.integers(1, 3),
    queries=st.integers(1, 7),
    layers=st.integers(1, 3),
    tolerance=st.sampled_from((0.0, 0.1, 0.2, 1.0)),
    semantics=st.sampled_from(("paper", "official")),
    ceiling=st.sampled_from(("number", "per_row")),
    masked=st.booleans(),
)
def test_against_the_definition(
    seed, batch, queries, layers, tolerance, semantics, ceiling, masked
) -> None:
    generator = torch.Generator().manual_seed(seed)
    entropies, thresholds = random_layers(generator, layers, batch, queries)
    top = 2.5 if ceiling == "number" else torch.arange(1.0, queries + 1, dtype=torch.float64).log()
    mask = torch.rand(batch, queries, generator=generator) > 0.4 if masked else None
    got = entropy_regularization(
        entropies,
        thresholds,
        max_entropy=top,
        tolerance=tolerance,
        semantics=semantics,
        query_mask=mask,
    )
    expected = reference(entropies, thresholds, top, tolerance, semantics, mask)
    assert float(got) == pytest.approx(expected, rel=1e-9, abs=1e-12)
    # Heads are interchangeable, with their thresholds.
    order = [torch.randperm(e.shape[1], generator=generator) for e in entropies]
    permuted = entropy_regularization(
        [e[:, o] for e, o in zip(entropies, order, strict=True)],
        [t[o] for t, o in zip(thresholds, order, strict=True)],
        max_entropy=top,
        tolerance=tolerance,
        semantics=semantics,
        query_mask=mask,
    )
    torch.testing.assert_close(got, permuted, rtol=1e-12, atol=1e-14)


def test_inside_the_band_there_is_neither_loss_nor_gradient_and_outside_both() -> None:
    entropy = torch.full((1, 1, 4), 0.5 * math.log(8), dtype=torch.float64, requires_grad=True)
    settings = {"max_entropy": math.log(8), "tolerance": 0.2}
    theta = torch.tensor([0.6], dtype=torch.float64, requires_grad=True)
    loss = entropy_regularization([entropy], [theta], **settings)
    assert loss == 0
    loss.backward()
    assert torch.all(entropy.grad == 0)
    assert theta.grad == 0
    theta = torch.tensor([0.71], dtype=torch.float64, requires_grad=True)
    loss = entropy_regularization([entropy], [theta], **settings)
    assert float(loss.detach()) == pytest.approx((0.21 * math.log(8)) ** 2)
    loss.backward()
    assert float(theta.grad) == pytest.approx(2 * 0.21 * math.log(8) ** 2)
    assert torch.all(entropy.grad < 0)  # a step against the gradient raises the entropy


@given(seed=st.integers(0, 2**31), semantics=st.sampled_from(("paper", "official")))
def test_gradient_is_that_of_finite_differences(seed: int, semantics: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    entropies, thresholds = random_layers(generator)
    leaves = [leaf.requires_grad_() for leaf in (*entropies, *thresholds)]

    def loss(*leaves):
        return entropy_regularization(
            leaves[:2], leaves[2:], max_entropy=2.0, tolerance=0.0, semantics=semantics
        )

    assert torch.autograd.gradcheck(loss, leaves)


def test_rows_that_do_not_count_may_hold_anything() -> None:
    entropy = torch.rand(1, 2, 3, dtype=torch.float64)
    spoiled = entropy.clone()
    spoiled[..., 2] = math.nan
    spoiled.requires_grad_()
    mask = torch.tensor([[True, True, False]])
    theta = torch.tensor([0.1, 0.9])
    for semantics in ("paper", "official"):
        settings = {"max_entropy": 1.0, "tolerance": 0.0, "semantics": semantics}
        expected = entropy_regularization([entropy[..., :2]], [theta], **settings)
        got = entropy_regularization([spoiled], [theta], **settings, query_mask=mask)
        torch.testing.assert_close(got, expected)
        got.backward()
        assert spoiled.grad.isfinite().all()
        assert not entropy_regularization([spoiled.detach()], [theta], **settings).isfinite()
    none = entropy_regularization([entropy], [theta], max_entropy=1.0, query_mask=mask & False)
    assert none == 0


def test_one_token_has_no_band() -> None:
    loss = entropy_regularization([torch.zeros(2, 3, 1)], torch.full((1, 3), 0.5), max_entropy=0.0)
    assert loss == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"entropies": []}, "entropies: expected one tensor per layer"),
        ({"entropies": [torch.rand(2, 3)]}, r"entropies\[0\]: expected floats"),
        ({"thresholds": [torch.rand(4)]}, r"thresholds\[0\]: expected \[heads\] = \[3\]"),
        ({"thresholds": []}, "thresholds: expected one tensor"),
        ({"tolerance": -0.1}, "tolerance: expected"),
        ({"tolerance": math.nan}, "tolerance: expected"),
        ({"semantics": "mean"}, "semantics: expected"),
        ({"max_entropy": torch.rand(5)}, "max_entropy: expected"),
        ({"max_entropy": [1.0, 2.0]}, "max_entropy: expected one for all"),
        ({"query_mask": torch.ones(2, 4)}, "query_mask: expected a boolean"),
        ({"query_mask": torch.ones(2, 5, dtype=torch.bool)}, "query_mask: expected a boolean"),
    ],
)
def test_bad_arguments_are_named(change: dict, message: str) -> None:
    good = {
        "entropies": [torch.rand(2, 3, 4)],
        "thresholds": [torch.rand(3)],
        "max_entropy": 1.0,
    }
    entropy_regularization(**good)
    with pytest.raises(ValueError, match=message):
        entropy_regularization(**(good | change))


def test_quartiles() -> None:
    heads = torch.tensor([[0.0, 0.99, 1.0, 1.99], [2.0, 3.0, 3.5, 4.0]])
    assert entropy_quartiles(heads).tolist() == [0.25, 0.25, 0.125, 0.375]
    assert entropy_quartiles(heads, largest=2.0).tolist() == [0.125, 0.125, 0.125, 0.625]
    assert entropy_quartiles(torch.zeros(3)).tolist() == [1, 0, 0, 0]
    with pytest.raises(ValueError, match="head_entropies"):
        entropy_quartiles(torch.tensor([]))
