"""Scores to maps: golden vectors, plain references, what holds for any scores, and refusals."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attending.nn.birkhoff import birkhoff_distance, birkhoff_projection, orthostochastic
from attending.nn.normalizers import check_support, norm_softmax, sinkhorn, softmax
from tests.nn import reference_doubly_stochastic as reference

GOLDEN = Path(__file__).parent.parent / "golden" / "quantum-doubly-stochastic"
SQUARE = {
    "sinkhorn": partial(sinkhorn, iterations=5),
    "orthostochastic": orthostochastic,
    "birkhoff": birkhoff_projection,
}
EXACT = {name: SQUARE[name] for name in ("orthostochastic", "birkhoff")}
sizes, seeds = st.integers(1, 9), st.integers(0, 2**31 - 1)


def golden(name):
    with np.load(GOLDEN / f"{name}.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


def matrices(seed, *shape, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, dtype=torch.float64, generator=generator)


def close(ours, expected, tolerance=1e-10):
    torch.testing.assert_close(ours, expected, atol=tolerance, rtol=tolerance)


def test_golden():
    vectors = golden("sinkhorn")
    for half_steps in (1, 2, 3, 5, 21):
        ours = sinkhorn(vectors["scores"], iterations=half_steps)
        close(ours, vectors[f"sinkhorn_ot_{half_steps}"])
    ours = sinkhorn(vectors["scores"], iterations=4, temperature=0.5)
    close(ours, vectors["sinkhorn_ot_4_eps0p5"])
    close(sinkhorn(vectors["scores"], iterations=2001), vectors["sinkhorn_limit"])
    vectors = golden("qr_orthostochastic")
    close(orthostochastic(vectors["M"]), vectors["P"])
    vectors = golden("birkhoff_projection")
    close(birkhoff_projection(vectors["M"]), vectors["P"], 1e-7)
    vectors = golden("normsoftmax")
    cap = float(vectors["head_dim"]) ** 0.5
    close(norm_softmax(vectors["raw_scores"], cap=cap), vectors["softmax_var"])
    ours = norm_softmax(vectors["raw_scores"], cap=cap, statistic="std")
    close(ours, vectors["softmax_std"])


@settings(max_examples=25, deadline=None)
@given(seeds, sizes, sizes, st.integers(1, 8), st.sampled_from([0.1, 3.0, 30.0]))
def test_sinkhorn_is_its_plain_form(seed, queries, keys, half_steps, scale):
    scores = matrices(seed, 2, queries, keys, scale=scale)
    ours = sinkhorn(scores, iterations=half_steps)
    for mine, one in zip(ours, scores, strict=True):
        close(mine, reference.sinkhorn(one, half_steps))
    even = torch.ones(2, keys, dtype=torch.float64) * queries / keys
    if half_steps % 2:
        close(ours.sum(-1), torch.ones(2, queries, dtype=torch.float64))
    else:
        close(ours.sum(-2), even)


@settings(max_examples=15, deadline=None)
@given(seeds, st.integers(2, 8))
def test_plain_forms_of_the_others(seed, size):
    scores = matrices(seed, size, size)
    close(orthostochastic(scores), reference.gram_schmidt(scores), 1e-6)
    for statistic in ("variance", "std"):
        ours = norm_softmax(4 * scores, cap=1.7, statistic=statistic)
        close(ours, reference.norm_softmax(4 * scores, 1.7, statistic))


@pytest.mark.parametrize("size", [1, 2, 6])
def test_projection_is_that_of_dykstra(size):
    scores = matrices(size, size, size)
    close(birkhoff_projection(scores), reference.dykstra(scores, 3000), 1e-7)


def test_one_half_step_is_softmax_and_large_scores_stay_finite():
    scores = matrices(0, 3, 7, 7)
    close(sinkhorn(scores, iterations=1), torch.softmax(scores, -1))
    for function in (sinkhorn, softmax, partial(norm_softmax, cap=8.0)):
        large = (1e4 * scores.float()).requires_grad_()
        found = function(large)
        found.square().sum().backward()
        assert bool(found.isfinite().all())
        assert bool(large.grad.isfinite().all())


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(sorted(EXACT)), seeds, sizes, st.sampled_from([0.01, 1.0, 50.0]))
def test_rows_and_columns_sum_to_one(name, seed, size, scale):
    found = EXACT[name](matrices(seed, 2, size, size, scale=scale))
    one = torch.ones(2, size, dtype=torch.float64)
    assert bool((found >= 0).all())
    close(found.sum(-1), one, 1e-8)
    close(found.sum(-2), one, 1e-8)


@settings(max_examples=20, deadline=None)
@given(seeds, st.integers(1, 7))
def test_the_projection_is_idempotent_and_does_not_stretch(seed, size):
    first, second = matrices(seed, 2, size, size)
    projected = birkhoff_projection(torch.stack([first, second]))
    close(birkhoff_projection(projected), projected, 1e-8)
    assert (projected[0] - projected[1]).norm() <= (first - second).norm() + 1e-8
    close(birkhoff_distance(projected), torch.zeros(2, dtype=torch.float64), 1e-7)


def test_laws_of_the_qr_map():
    scores = matrices(1, 6, 6)
    orthogonal = torch.linalg.qr(scores).Q
    close(orthostochastic(orthogonal), orthogonal.square())
    close(orthostochastic(3.0 * scores), orthostochastic(scores))
    order = torch.tensor([3, 0, 5, 1, 2, 4])
    close(orthostochastic(scores[order]), orthostochastic(scores)[order])
    moved = orthostochastic(scores[:, order])
    assert not torch.allclose(moved, orthostochastic(scores)[:, order], atol=1e-2)


def test_sinkhorn_does_not_see_numbers_per_row_and_column():
    scores, row, column = matrices(2, 5, 5), matrices(3, 5, 1), matrices(4, 1, 5)
    close(sinkhorn(scores + row), sinkhorn(scores))
    close(sinkhorn(scores + row + column, iterations=401), sinkhorn(scores, iterations=401), 1e-9)


def test_the_qr_map_of_fewer_dimensions_than_tokens():
    factors = matrices(5, 2, 3, 8, 2)
    scores = (factors[0] @ factors[1].mT).float().requires_grad_()
    found = orthostochastic(scores)
    found[..., 3].sum().backward()
    assert bool(scores.grad.isfinite().all())
    close(found.sum(-2), torch.ones(3, 8), 1e-5)
    state = torch.get_rng_state()
    assert torch.equal(orthostochastic(scores), found)  # the same noise every time
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(orthostochastic(scores[1:2]), found[1:2])
    full = matrices(6, 8, 8)
    alone = orthostochastic(full)
    assert torch.equal(orthostochastic(torch.stack([full, torch.ones_like(full)]))[0], alone)


@pytest.mark.parametrize("name", sorted(SQUARE))
def test_gradients(name):
    scores = matrices(7, 2, 4, 4).requires_grad_()
    assert torch.autograd.gradcheck(SQUARE[name], (scores,))


def test_gradients_of_the_row_stochastic_ones():
    scores = (3 * matrices(8, 2, 3, 5)).requires_grad_()
    visible = torch.ones(3, 5, dtype=torch.bool).tril(1)
    for function in (softmax, partial(norm_softmax, cap=2.0)):
        assert torch.autograd.gradcheck(lambda s, f=function: f(s, visible), (scores,))
    function = partial(norm_softmax, cap=2.0, statistic="std")
    assert torch.autograd.gradcheck(lambda s: function(s, visible), (scores,))


@pytest.mark.parametrize("half_steps", [4, 5])
def test_the_truncated_gradient_takes_the_potentials_as_constants(half_steps):
    scores = matrices(9, 2, 6, 6).requires_grad_()
    weights = matrices(10, 2, 6, 6)
    found = sinkhorn(scores, iterations=half_steps, gradient="truncated")
    (ours,) = torch.autograd.grad((weights * found).sum(), scores)
    before = sinkhorn(scores.detach(), iterations=half_steps - 1).log()
    # What the half-steps before have added to the scores, without a gradient.
    added = before - scores.detach()
    last = torch.softmax(scores + added, -1 if half_steps % 2 else -2)
    close(last, found)
    (expected,) = torch.autograd.grad((weights * last).sum(), scores)
    close(ours, expected)
    full = sinkhorn(scores, iterations=half_steps)
    (exact,) = torch.autograd.grad((weights * full).sum(), scores)
    assert not torch.allclose(ours, exact, atol=1e-2)


@pytest.mark.parametrize("name", sorted(SQUARE))
def test_padding_is_as_if_it_were_not_there(name):
    scores = matrices(11, 6, 6)
    tokens = torch.tensor([False, True, True, False, True, True])
    visible = tokens[:, None] & tokens
    noisy = torch.where(visible, scores, 1e3 * matrices(12, 6, 6)).requires_grad_()
    found = SQUARE[name](noisy, visible)
    close(found[tokens][:, tokens], SQUARE[name](scores[tokens][:, tokens]), 1e-9)
    assert bool((found[~visible] == 0).all())
    (grad,) = torch.autograd.grad(found[1].square().sum(), noisy)
    assert bool((grad[~visible] == 0).all())
    nothing = torch.zeros_like(visible)
    assert bool((SQUARE[name](scores, nothing) == 0).all())


def test_patterns_of_sinkhorn():
    scores = matrices(13, 6, 6)
    blocks = torch.block_diag(torch.ones(2, 2), torch.ones(4, 4)).bool()
    ours = sinkhorn(scores, blocks)
    close(ours[:2, :2], sinkhorn(scores[:2, :2]))
    close(ours[2:, 2:], sinkhorn(scores[2:, 2:]))
    window = torch.ones(6, 6, dtype=torch.bool).tril(1).triu(-1)
    close(sinkhorn(scores, window), reference.sinkhorn(scores, 21, window))
    causal = torch.ones(6, 6, dtype=torch.bool).tril()
    with pytest.raises(ValueError, match=r"no causal mask: .*only the identity"):
        sinkhorn(scores, causal)
    with pytest.raises(ValueError, match="attn_mask: expected padding, or a symmetric pattern"):
        check_support(causal.flip(1))
    for function in (orthostochastic, birkhoff_projection):
        with pytest.raises(ValueError, match=r"attn_mask: .*nothing else"):
            function(scores, blocks)


@pytest.mark.parametrize("statistic", ["variance", "std"])
def test_norm_softmax_over_what_is_visible(statistic):
    scores = 3 * matrices(14, 5, 5)
    causal = torch.ones(5, 5, dtype=torch.bool).tril()
    causal[2] = False
    found = norm_softmax(scores, causal, cap=2.0, statistic=statistic)
    for row in (1, 3, 4):
        seen = scores[row : row + 1, : row + 1]
        close(found[row : row + 1, : row + 1], reference.norm_softmax(seen, 2.0, statistic))
    assert float(found[0, 0]) == 1.0  # one key, no spread
    assert bool((found[2] == 0).all())
    constant = torch.full((2, 4), 7.0, requires_grad=True)
    even = norm_softmax(constant, cap=2.0, statistic=statistic)
    close(even, torch.full((2, 4), 0.25))
    even[0, 0].backward()
    assert bool(constant.grad.isfinite().all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    scores = matrices(15, 2, 5, 5).to(dtype)
    for function in (*SQUARE.values(), softmax, partial(norm_softmax, cap=2.0)):
        found = function(scores)
        assert found.dtype == torch.float32
        close(found, function(scores.float()))


def test_nothing_to_do():
    for function in SQUARE.values():
        assert function(torch.zeros(2, 0, 0)).shape == (2, 0, 0)
        close(function(torch.randn(3, 1, 1)), torch.ones(3, 1, 1), 1e-6)


def test_wrong_arguments():
    scores = torch.randn(2, 4, 4)
    for match, call in {
        "scores: expected floats": lambda: softmax(torch.ones(4, 4, dtype=torch.long)),
        "scores: expected floats.*single": lambda: softmax(torch.ones(4)),
        "visible: expected booleans": lambda: softmax(scores, torch.ones(4, 4)),
        "visible: .*last two": lambda: softmax(scores, torch.ones(1, 4, dtype=torch.bool)),
        "iterations: expected": lambda: sinkhorn(scores, iterations=0),
        "temperature: expected": lambda: sinkhorn(scores, temperature=0.0),
        "gradient: expected": lambda: sinkhorn(scores, gradient="none"),
        "cap: expected": lambda: norm_softmax(scores, cap=0.0),
        "statistic: expected": lambda: norm_softmax(scores, cap=1.0, statistic="range"),
        "as many queries as keys.*the QR": lambda: orthostochastic(scores[:, 1:]),
        "as many queries as keys.*projection": lambda: birkhoff_projection(scores[:, 1:]),
        "noise: expected": lambda: orthostochastic(scores, noise=-1.0),
        "tolerance, max_iterations": lambda: birkhoff_projection(scores, tolerance=0.0),
        "scores: expected finite": lambda: birkhoff_projection(scores / 0.0),
        "not within tolerance after 1": lambda: birkhoff_projection(
            100 * matrices(0, 12, 12), max_iterations=1
        ),
    }.items():
        with pytest.raises(ValueError, match=match):
            call()
