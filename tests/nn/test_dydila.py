"""The focused kernel and DyDiLA against vectors, their formulas, and their invariants."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from attending.nn.dydila import DyDiLA, token_differential_linear_attention
from attending.nn.focused_attention import focused_kernel, focused_linear_attention
from attending.nn.hard_routing import hard_choice
from attending.nn.linear_attention import linear_attention
from tests.core.problems import assert_close
from tests.nn import reference_dydila as reference
from tests.nn import reference_linear_attention

GOLDEN = Path(__file__).parents[1] / "golden" / "dydila"


def load(case: str) -> tuple[DyDiLA, dict[str, Tensor]]:
    with np.load(GOLDEN / f"{case}.npz") as file:
        data = {name: torch.from_numpy(file[name]) for name in file.files}
    layer = DyDiLA(
        data["x"].shape[-1],
        int(data["heads"]),
        num_projections=len(data["wq_bank"]),
        num_kernels=len(data["gamma_q"]),
        num_differences=len(data["lam_q"]),
        normalize="none",
        convolution=None,
        dtype=torch.float64,
    )
    names = {"query": "q", "key": "k", "other_query": "qp", "other_key": "kp"}
    with torch.no_grad():
        for name, weight in (("q_proj", "wq"), ("k_proj", "wk"), ("v_proj", "wv")):
            getattr(layer, name).weight.copy_(data[weight].T)
        for name, letter in (("query", "q"), ("key", "k")):
            other = getattr(layer, f"other_{name}")
            other.bank.copy_(data[f"w{letter}_bank"])
            other.router.weight.copy_(data[f"r{letter}_proj"].T)
            difference = getattr(layer, f"{name}_difference")
            # The vectors have a bank for each; the adaptation that we follow shares one.
            difference.values = torch.nn.Parameter(data[f"lam_{letter}"])
            difference.router.weight.copy_(data[f"r_diff_{letter}"].T)
        for name, letter in names.items():
            layer.powers[name].values.copy_(data[f"gamma_{letter}"])
            layer.powers[name].router.weight.copy_(data[f"r_kernel_{letter}"].T)
    return layer, data


@pytest.mark.parametrize("case", ["dydila_a", "dydila_lambda0"])
def test_golden(case: str) -> None:
    layer, data = load(case)
    query, key, other_query, other_key, asked, held = layer.features(data["x"])
    close = {"rtol": 1e-10, "atol": 1e-10}
    for found, name in ((query, "q_t"), (key, "k_t"), (other_query, "qp_t"), (other_key, "kp_t")):
        torch.testing.assert_close(found, data[f"ref_{name}"], **close)
    difference = query - asked[..., None] * other_query
    torch.testing.assert_close(difference, data["ref_q_diff"], **close)
    torch.testing.assert_close(key - held[..., None] * other_key, data["ref_k_diff"], **close)
    torch.testing.assert_close(layer.attend(data["x"]), data["ref_out"], **close)
    single = layer.float().attend(data["x"].float()).double()
    torch.testing.assert_close(single, data["ref_out"], rtol=1e-4, atol=1e-4)


def test_golden_without_difference_is_focused_linear_attention() -> None:
    layer, data = load("dydila_lambda0")
    query, key, *_ = layer.features(data["x"])
    value = layer.v_proj(data["x"])[:, None]  # one head
    plain = linear_attention(query, key, value, normalize=False)
    assert torch.equal(layer.attend(data["x"]), plain)


vectors = st.lists(st.floats(-50, 50, allow_nan=False, width=32), min_size=1, max_size=7)


@given(vectors, st.floats(0.5, 40))
def test_the_kernel(numbers: list[float], power: float) -> None:
    vector = torch.tensor(numbers, dtype=torch.float64)
    ours = focused_kernel(vector, power)
    torch.testing.assert_close(ours.norm(), vector.relu().norm(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(focused_kernel(vector, 1.0), vector.relu(), rtol=1e-10, atol=1e-12)
    if not ((vector > 0) & (vector < 1e-3)).any():  # where powers by the formula underflow
        exact = reference.focused_kernel(vector, power)
        torch.testing.assert_close(ours, exact, rtol=1e-9, atol=1e-9)
    single = focused_kernel(vector.float(), power)
    assert single.isfinite().all()
    assert_close(single, ours, torch.float32)


def test_the_kernel_at_its_limits() -> None:
    vector = torch.tensor([1.0, 3.0, 2.9, -7.0])
    sharp = focused_kernel(vector, 2000.0)
    torch.testing.assert_close(sharp, torch.tensor([0.0, vector.relu().norm(), 0.0, 0.0]))
    assert (focused_kernel(-torch.ones(2, 3), 3.0) == 0).all()
    half = focused_kernel(vector.bfloat16(), 3.0)
    assert half.dtype == torch.bfloat16
    assert_close(half, focused_kernel(vector, 3.0), torch.bfloat16)
    vector = torch.tensor([[0.0, -1.0, 2.0, 1e-30], [-1.0, -1.0, -1.0, -1.0]], requires_grad=True)
    power = torch.tensor([3.0, 3.0], requires_grad=True)
    grads = torch.autograd.grad(focused_kernel(vector, power).sin().sum(), (vector, power))
    assert all(grad.isfinite().all() for grad in grads)


def test_gradients_of_the_kernel() -> None:
    vector = torch.randn(5, 6, dtype=torch.float64)
    vector = torch.where(vector.abs() < 0.1, 0.5, vector).requires_grad_()
    power = torch.tensor([1.0, 1.5, 3.0, 3.0, 6.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(focused_kernel, (vector, power))


def test_focused_linear_attention_equals_its_map() -> None:
    query, key, value = torch.randn(2, 4, 9, 6), torch.randn(2, 2, 9, 6), torch.randn(2, 2, 9, 3)
    for is_causal in (True, False):
        ours = focused_linear_attention(query, key, value, is_causal=is_causal, enable_gqa=True)
        features = (
            torch.stack([reference.focused_kernel(v, 3.0) for v in t.flatten(0, 2)]).view(t.shape)
            for t in (query, key)
        )
        exact = reference_linear_attention.linear_attention(*features, value, None, is_causal)
        assert_close(ours, exact, torch.float32)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**31), st.booleans())
def test_the_difference_is_four_maps(queries: int, keys: int, seed: int, masked: bool) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    query, other_query = draw(2, 3, queries, 4), draw(2, 3, queries, 4)
    key, other_key, value = draw(2, 3, keys, 4), draw(2, 3, keys, 4), draw(2, 3, keys, 5)
    asked, held = draw(2, 3, queries), draw(2, 3, keys)
    visible = torch.rand(2, keys, generator=generator) > 0.4 if masked else None
    call = (query, key, value, other_query, other_key, asked, held)
    mask = None if visible is None else visible[:, None, None]
    for normalize in ("none", "count", "sum"):
        ours = token_differential_linear_attention(*call, attn_mask=mask, normalize=normalize)
        for batch in range(2):
            for head in range(3):
                at = (batch, head)
                one = (query[at], key[at], other_query[at], other_key[at], asked[at], held[at])
                whole = reference.differential_map(*one)
                if visible is not None:
                    whole = whole * visible[batch]
                if normalize == "count":
                    count = keys if visible is None else max(int(visible[batch].sum()), 1)
                    whole = whole / count
                elif normalize == "sum":
                    total = whole.sum(-1, keepdim=True)
                    if (total.abs() < 1e-3).any():
                        continue
                    whole = whole / total
                torch.testing.assert_close(ours[at], whole @ value[at], rtol=1e-8, atol=1e-8)


def test_a_hard_choice_has_the_gradient_of_a_soft_one() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0], [0.0, 0.0, -1.0]], requires_grad=True)
    chosen = hard_choice(logits)
    assert torch.equal(chosen, torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]))
    weights = torch.randn(2, 3)
    torch.testing.assert_close(
        torch.autograd.grad((chosen * weights).sum(), logits),
        torch.autograd.grad((logits.softmax(-1) * weights).sum(), logits),
    )


def test_every_parameter_of_the_layer_learns() -> None:
    layer = DyDiLA(16, 2)
    layer(torch.randn(2, 9, 16)).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        # Banks that start equal leave their routers without a reason to move at first.
        equal = "router" in name and ("powers" in name or "difference" in name)
        assert bool(parameter.grad.abs().max() > 0) or equal, name


def test_blind_to_the_order_without_the_convolution() -> None:
    hidden, order = torch.randn(1, 12, 8), torch.randperm(12)
    plain = DyDiLA(8, 2, convolution=None)
    torch.testing.assert_close(plain(hidden[:, order]), plain(hidden)[:, order])
    layer = DyDiLA(8, 2)
    whole = layer(hidden, grid=(3, 4))
    assert not torch.allclose(layer(hidden[:, order], grid=(3, 4)), whole[:, order])
    assert not torch.allclose(layer(hidden, grid=(2, 6)), whole)


def test_padding_and_one_token() -> None:
    layer = DyDiLA(8, 2, convolution=None).double()
    hidden = torch.randn(2, 7, 8, dtype=torch.float64)
    visible = torch.tensor([True] * 5 + [False] * 2)[None, None, None]
    cut = layer(hidden[:, :5])
    torch.testing.assert_close(layer(hidden, attn_mask=visible)[:, :5], cut)
    assert layer(hidden[:, :1]).shape == (2, 1, 8)
    assert DyDiLA(8, 2)(hidden[:, :1].float()).isfinite().all()


def test_bfloat16() -> None:
    layer = DyDiLA(16, 2)
    hidden = torch.randn(2, 16, 16)
    output = layer.bfloat16()(hidden.bfloat16())
    assert output.dtype == torch.bfloat16
    assert output.isfinite().all()


def test_arguments_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match="num_heads: expected a divisor"):
        DyDiLA(10, 3)
    with pytest.raises(ValueError, match="num_kernels: expected at least 1"):
        DyDiLA(8, 2, num_kernels=0)
    with pytest.raises(ValueError, match="normalize: expected one of"):
        DyDiLA(8, 2, normalize="rms")
    with pytest.raises(ValueError, match="convolution: expected an odd size"):
        DyDiLA(8, 2, convolution=2)
    with pytest.raises(ValueError, match="power_init: expected at least 1"):
        DyDiLA(8, 2, power_init=0.5)
    with pytest.raises(ValueError, match=r"grid: expected .* no square"):
        DyDiLA(8, 2)(torch.randn(1, 7, 8))
    with pytest.raises(ValueError, match="grid: expected a height and width of 7"):
        DyDiLA(8, 2)(torch.randn(1, 7, 8), grid=(2, 3))
    with pytest.raises(ValueError, match="power: expected a number above 0"):
        focused_kernel(torch.randn(3), -1.0)
    with pytest.raises(ValueError, match="power: expected a number or a shape"):
        focused_kernel(torch.randn(3, 4), torch.ones(4))
    tensor = torch.rand(1, 2, 3, 4)
    with pytest.raises(ValueError, match="other_key: expected"):
        token_differential_linear_attention(
            tensor, tensor, tensor, tensor, tensor[:, :, :2], torch.ones(3), torch.ones(3)
        )


def test_the_gradient_of_the_kernel_can_be_differentiated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("attending.nn.focused_attention.PIECE", 8)  # several pieces
    torch.manual_seed(2)
    vector = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)
    power = (1.5 + torch.rand(5, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(focused_kernel, (vector, power))
    assert torch.autograd.gradgradcheck(focused_kernel, (vector, power))
