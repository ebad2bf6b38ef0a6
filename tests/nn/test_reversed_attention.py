"""Reversed attention against the golden vectors, its definition, and what it conserves."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from attending.core.statistics import column_mass
from attending.nn import reversed_attention as module
from attending.nn.message_pruning import kept_tokens, prune_by_message
from attending.nn.reversed_attention import (
    ReversedAttention,
    dependency_mask,
    reversed_attention,
)
from tests.nn import reference_reversed_attention as reference

GOLDEN = Path(__file__).parents[1] / "golden" / "dependency-vit"
TIGHT = {"rtol": 1e-10, "atol": 1e-10}


def load(case: str) -> dict[str, Tensor]:
    with np.load(GOLDEN / f"{case}.npz") as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


def golden_layer(data: dict[str, Tensor]) -> ReversedAttention:
    layer = ReversedAttention(
        12,
        int(data["num_heads"]),
        selector_temperature=float(data["head_selector_temperature"]),
        controller_bias=None,
        dtype=torch.float64,
    )
    weights = data["qkv__weight"].chunk(3)
    for projection, weight in zip((layer.q_proj, layer.k_proj, layer.v_proj), weights, strict=True):
        projection.weight.data = weight
    layer.out_proj.weight.data, layer.out_proj.bias.data = data["proj__weight"], data["proj__bias"]
    layer.head_selector.weight.data = data["head_selector__weight"]
    layer.message_controller[0].weight.data = data["message_controller__fc1__weight"]
    layer.message_controller[2].weight.data = data["message_controller__fc2__weight"]
    return layer


def test_golden() -> None:
    data = load("reversed_attention")
    layer = golden_layer(data)
    found = layer(data["x"], data["message_in"], need_dependency=True)
    torch.testing.assert_close(found.output, data["out"], **TIGHT)
    torch.testing.assert_close(found.message, data["message_out"], **TIGHT)
    torch.testing.assert_close(found.dependency, data["dependency_mask"], **TIGHT)
    gates, _ = layer.gates(data["x"], data["message_in"])
    expected = data["head_probs"].mT * data["message_out"][:, None]
    torch.testing.assert_close(gates, expected, **TIGHT)
    query, key, value = layer.project(data["x"])
    mass = column_mass(query, key, gates).sum(1)
    torch.testing.assert_close(mass, data["received_mass"], **TIGHT)
    torch.testing.assert_close(
        reversed_attention(query, key, value, sender_weights=gates),
        data["reversed_attention"] @ value,
        **TIGHT,
    )
    single = layer.float()(data["x"].float(), data["message_in"].float())
    torch.testing.assert_close(single.output.double(), data["out"], rtol=2e-5, atol=2e-5)


def test_golden_of_the_reference() -> None:
    """So that the reference, which all else is held to, is held to the vectors."""
    data = load("reversed_attention")
    layer = golden_layer(data)
    query, key, _ = layer.project(data["x"])
    visible = torch.ones(6, 6, dtype=torch.bool)
    found = reference.shares(query[1, 2], key[1, 2], visible, 4**-0.5)
    torch.testing.assert_close(found, data["forward_attention"][1, 2], **TIGHT)


def test_golden_pruning() -> None:
    data = load("token_prune")
    keep = kept_tokens(20, int(data["prune_index"]), float(data["prune_ratio"]))
    assert keep == int(data["n_keep"])
    kept = prune_by_message(data["x"], data["message"], keep)
    assert torch.equal(kept.indices, data["keep_indices_sorted"])
    assert torch.equal(kept.hidden, data["x_kept"])


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Tensor]:
    """Odd sizes, length 1, GQA, cross lengths, masks with empty rows and columns."""
    kv_heads = draw(st.integers(1, 2))
    batch, heads = draw(st.integers(1, 2)), kv_heads * draw(st.integers(1, 2))
    queries = draw(st.integers(1, 7))
    keys = draw(st.sampled_from([queries, 1, 5]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    dim, value_dim = draw(st.integers(1, 9)), draw(st.integers(1, 11))
    kind = draw(st.sampled_from(["none", "keys", "pairs"]))
    visible = torch.ones(batch, heads, queries, keys, dtype=torch.bool)
    mask = None
    if kind == "keys":
        mask = torch.rand(batch, 1, 1, keys, generator=generator) < 0.7
    elif kind == "pairs":
        mask = torch.rand(batch, heads, queries, keys, generator=generator) < 0.6
    if mask is not None:
        visible = mask.expand(batch, heads, queries, keys)
    return {
        "query": normal(batch, heads, queries, dim) * 2,
        "key": normal(batch, kv_heads, keys, dim),
        "value": normal(batch, kv_heads, queries, value_dim),
        "weights": normal(batch, heads, queries),
        "mask": mask,
        "visible": visible,
        "dense_bytes": draw(st.sampled_from([-1, 2**23])),  # fused, or with the map
    }


def run(problem: dict[str, Tensor], **changes: Tensor) -> Tensor:
    given_here = problem | changes
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "DENSE_BYTES", given_here["dense_bytes"])
        return apply(given_here)


def apply(given_here: dict[str, Tensor]) -> Tensor:
    return reversed_attention(
        given_here["query"],
        given_here["key"],
        given_here["value"],
        sender_weights=given_here["weights"],
        attn_mask=given_here["mask"],
        scale=0.7,
        enable_gqa=True,
    )


def expected(problem: dict[str, Tensor]) -> Tensor:
    weights, visible = problem["weights"], problem["visible"]
    if visible.shape[2] == visible.shape[3]:  # a token hidden from all sends nothing
        weights = weights * visible.any(2)
    return reference.whole(
        problem["query"], problem["key"], problem["value"], weights, visible, 0.7
    )


@given(problems())
@settings(max_examples=60)
def test_definition(problem: dict[str, Tensor]) -> None:
    want = expected(problem)
    torch.testing.assert_close(run(problem), want, **TIGHT)
    half = {name: problem[name].bfloat16() for name in ("query", "key", "value")}
    rounded = problem | {name: one.double() for name, one in half.items()}
    found = run(problem, **half)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), expected(rounded), rtol=2e-2, atol=2e-2)


@given(problems())
@settings(max_examples=40)
def test_gradients_are_those_of_the_definition(problem: dict[str, Tensor]) -> None:
    names = ("query", "key", "value", "weights")
    found, want = [], []
    for function, into in ((run, found), (expected, want)):
        leaves = {name: problem[name].clone().requires_grad_() for name in names}
        output = function(problem | leaves)
        cotangent = torch.linspace(-1, 2, output.numel(), dtype=output.dtype).view(output.shape)
        into += torch.autograd.grad(output, list(leaves.values()), cotangent, allow_unused=True)
    for name, ours, theirs in zip(names, found, want, strict=True):
        theirs = torch.zeros_like(ours) if theirs is None else theirs
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9, msg=name)


@given(problems())
def test_columns_sum_to_the_gates(problem: dict[str, Tensor]) -> None:
    arguments = {"sender_weights": problem["weights"], "attn_mask": problem["mask"]}
    mask = dependency_mask(
        problem["query"], problem["key"], **arguments, scale=0.7, enable_gqa=True
    )
    gates = problem["weights"] * problem["visible"].any(-1)
    if gates.shape[-1] == mask.shape[-2]:
        gates = gates * problem["visible"].any(2)
    torch.testing.assert_close(mask.sum(1), gates.sum(1), **TIGHT)


@given(st.integers(1, 9), st.integers(0, 99))
def test_a_symmetric_map_is_ordinary_attention(tokens: int, seed: int) -> None:
    """Queries = keys on a circle of equal neighbourhoods: all rows have the same normaliser."""
    torch.manual_seed(seed)
    angle = torch.arange(tokens, dtype=torch.float64) * 2 * torch.pi / tokens
    query = torch.stack([angle.cos(), angle.sin()], -1)[None, None] * 3
    value = torch.randn(1, 1, tokens, 5, dtype=torch.float64)
    torch.testing.assert_close(
        reversed_attention(query, query, value),
        scaled_dot_product_attention(query, query, value),
        **TIGHT,
    )


def test_it_is_the_gradient_of_ordinary_attention_by_its_values() -> None:
    query, key, value = torch.randn(3, 1, 2, 1100, 8).unbind(0)  # fused
    values = torch.zeros_like(value).requires_grad_()
    output = scaled_dot_product_attention(query, key, values)
    (gradient,) = torch.autograd.grad(output, values, value)
    torch.testing.assert_close(reversed_attention(query, key, value), gradient)


def test_one_token_sends_to_itself() -> None:
    query, key, value = torch.randn(3, 1, 2, 1, 4).unbind(0)
    torch.testing.assert_close(reversed_attention(query, key, value), value)


@pytest.mark.parametrize("dense_bytes", [-1, 2**23])
def test_a_float_mask_has_a_gradient(dense_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DENSE_BYTES", dense_bytes)
    tensors = torch.randn(3, 1, 2, 5, 4, dtype=torch.float64).unbind(0)
    bias = torch.randn(5, 5, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda b: reversed_attention(*tensors, attn_mask=b), bias)


def test_padding_changes_nothing() -> None:
    torch.manual_seed(1)
    layer = ReversedAttention(8, 2, controller_bias=None)
    hidden = torch.randn(1, 9, 8)
    visible = torch.arange(9)[None, None, None] < 6
    padded = layer(hidden, attn_mask=visible, need_dependency=True)
    alone = layer(hidden[:, :6], need_dependency=True)
    for name in ("output", "message"):
        torch.testing.assert_close(getattr(padded, name)[:, :6], getattr(alone, name))
    torch.testing.assert_close(padded.dependency[:, :6, :6], alone.dependency)
    assert not padded.message[:, 6:].any()
    assert not padded.dependency[:, :, 6:].any()
    assert not padded.dependency[:, 6:].any()


def test_padding_may_send_if_it_is_no_padding() -> None:
    tensors = torch.randn(3, 1, 1, 4, 3).unbind(0)
    mask = torch.tensor([True, True, False, False])
    silent = reversed_attention(*tensors, attn_mask=mask)
    loud = reversed_attention(*tensors, attn_mask=mask, padding_sends=True)
    total = tensors[2].sum(2)
    torch.testing.assert_close(loud.sum(2), total)
    torch.testing.assert_close(silent.sum(2), tensors[2][:, :, :2].sum(2))


def test_long_sequences_keep_no_map(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither forward nor backward makes a tensor of tokens x tokens."""
    from torch.utils._python_dispatch import TorchDispatchMode

    tokens, largest = 2048, 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            found = function(*args, **(kwargs or {}))
            if isinstance(found, Tensor):
                largest = max(largest, found.untyped_storage().nbytes())
            return found

    leaves = [one.requires_grad_() for one in torch.randn(3, 1, 2, tokens, 8).unbind(0)]
    with Watch():
        torch.autograd.grad(reversed_attention(*leaves).sum(), leaves)
    assert largest < 2 * tokens * tokens * 4 / 3


def test_under_autocast_gates_stay_exact() -> None:
    layer = ReversedAttention(16, 4)
    layer.head_selector.weight.data.mul_(30)
    hidden = torch.randn(2, 7, 16)
    plain = layer(hidden)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = layer(hidden)
    assert torch.equal(found.message, plain.message)
    torch.testing.assert_close(found.output.float(), plain.output, rtol=0.05, atol=0.05)


def test_the_layer_trains() -> None:
    layer = ReversedAttention(16, 4)
    hidden = torch.randn(2, 7, 16)
    found = layer(hidden, torch.full((2, 7), 0.5))
    (found.output.square().sum() + found.message.sum()).backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@given(st.integers(1, 200), st.floats(0.0, 0.24))
def test_numbers_of_kept_tokens(tokens: int, ratio: float) -> None:
    left = [tokens]
    for point in range(1, 5):
        left.append(kept_tokens(left[-1], point, ratio))
    assert all(1 <= later <= before for before, later in itertools.pairwise(left))


def test_kept_tokens_of_the_paper() -> None:
    left = [196]
    for point in range(1, 5):
        left.append(kept_tokens(left[-1], point))
    assert left == [196, 164, 132, 100, 69]


def test_pruning_keeps_the_first_among_equals_and_passes_gradients() -> None:
    hidden = torch.arange(10.0).view(1, 5, 2).requires_grad_()
    kept = prune_by_message(hidden, torch.tensor([[1.0, 0.5, 0.5, 0.5, 2.0]]), 3)
    assert kept.indices.tolist() == [[0, 1, 4]]
    kept.hidden.sum().backward()
    assert hidden.grad.sum(-1).tolist() == [[2, 2, 0, 0, 2]]
    by_rank = prune_by_message(hidden, torch.ones(1, 5), 2, rank=torch.arange(5.0)[None])
    assert by_rank.indices.tolist() == [[3, 4]]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"is_causal": True}, "no causal form"),
        ({"value": torch.zeros(1, 2, 3, 4)}, "value: expected batch"),
        ({"sender_weights": torch.ones(4)}, "sender_weights"),
        ({"sender_weights": torch.ones(3, 5)}, "sender_weights"),
        ({"attn_mask": torch.ones(3, 3, dtype=torch.bool)}, "attn_mask"),
    ],
)
def test_refusals(arguments: dict[str, object], word: str) -> None:
    tensors = torch.randn(3, 1, 2, 5, 4).unbind(0)
    given_here = dict(zip(("query", "key", "value"), tensors, strict=True)) | arguments
    with pytest.raises(ValueError, match=word):
        reversed_attention(**given_here)


def test_refusals_of_the_layer_and_of_pruning() -> None:
    with pytest.raises(ValueError, match="num_heads"):
        ReversedAttention(10, 3)
    with pytest.raises(ValueError, match="selector_temperature"):
        ReversedAttention(8, 2, selector_temperature=0.0)
    with pytest.raises(ValueError, match="keep"):
        prune_by_message(torch.zeros(1, 3, 2), torch.zeros(1, 3), 4)
    with pytest.raises(ValueError, match="rank"):
        prune_by_message(torch.zeros(1, 3, 2), torch.zeros(1, 3), 2, torch.zeros(1, 2))
    with pytest.raises(ValueError, match="point"):
        kept_tokens(10, 7)
