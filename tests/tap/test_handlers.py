"""What a handler may do, in which order handlers run, and what is refused of them."""

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from attending.taps import AttentionCall, Handler, Proceed, tap
from tests.tap.probes import (
    Toy,
    ToyAttention,
    hidden,
    hotter,
    identity,
    left_as_it_was,
    shifted,
)

LOW, HIGH = -4, 4


def test_the_outermost_tap_sees_a_call_first() -> None:
    model, order = Toy(1), []

    def named(name: str) -> Handler:
        def handler(call: AttentionCall, proceed: Proceed) -> Tensor:
            order.append(f"{name} in")
            output = proceed(call)
            order.append(f"{name} out")
            return output

        return handler

    with tap(model, named("a")), tap(model, named("b")), tap(model, named("c")):
        model(hidden())
    assert order == ["a in", "b in", "c in", "c out", "b out", "a out"]


def test_a_recording_outside_sees_what_the_model_asked_and_inside_what_became_of_it() -> None:
    model, x = Toy(1), hidden()
    with tap(model) as outside, tap(model, hotter), tap(model) as inside:
        model(x)
    with tap(model) as plain:
        model(x)
    assert outside[0].scale == plain[0].scale is None
    assert inside[0].scale == pytest.approx(3 * plain[0].softmax_scale)
    assert torch.equal(outside[0].query, inside[0].query)


@given(
    st.lists(st.tuples(st.integers(LOW, HIGH), st.integers(LOW, HIGH)), max_size=4),
    st.integers(0, 4),
)
def test_nested_taps_compose_like_functions(maps: list[tuple[int, int]], split: int) -> None:
    """Nested taps are one tap with the composition; and so is any way to bracket them."""
    model, x = ToyAttention().double(), hidden().double()

    def affine(factor: int, offset: int) -> Handler:
        def handler(call: AttentionCall, proceed: Proceed) -> Tensor:
            return factor * proceed(replace(call, value=call.value + offset)) - offset

        return handler

    def compose(handlers: list[Handler]) -> Handler:
        if not handlers:
            return identity
        first, rest = handlers[0], compose(handlers[1:])
        return lambda call, proceed: first(call, lambda changed: rest(changed, proceed))

    def run(handlers: list[Handler]) -> Tensor:
        if not handlers:
            return model(x)
        with tap(model, handlers[0]):
            return run(handlers[1:])

    handlers = [affine(*pair) for pair in maps]
    nested = run(handlers)
    assert torch.equal(nested, run([compose(handlers)]))
    assert torch.equal(nested, run([compose(handlers[:split]), compose(handlers[split:])]))


def test_order_matters_and_is_kept() -> None:
    model, x = Toy(), hidden()

    def both(outer: Handler, inner: Handler) -> Tensor:
        with tap(model, outer), tap(model, inner):
            return model(x)

    def by_hand(call: AttentionCall, proceed: Proceed) -> Tensor:
        return hotter(call, lambda changed: shifted(changed, proceed))

    with tap(model, by_hand):
        expected = model(x)
    assert torch.equal(both(hotter, shifted), expected)
    assert not torch.allclose(both(shifted, hotter), expected)


def test_the_same_tap_entered_twice_runs_twice() -> None:
    model, x = Toy(1), hidden()
    doubled = tap(model, lambda call, proceed: 2 * proceed(call))
    plain = model(x)
    with left_as_it_was(model):
        with doubled:
            once = model(x)
            with doubled:
                twice = model(x)
            assert torch.equal(model(x), once)
        with doubled:
            assert torch.equal(model(x), once)
    torch.testing.assert_close(once - x, 2 * (plain - x))
    torch.testing.assert_close(twice - x, 4 * (plain - x))

    recording = tap(model)
    with recording as outer:
        model(x)
        with recording as inner:
            model(x)
    assert [call.forward for call in outer] == [0, 1]
    assert [call.forward for call in inner] == [0]


def test_taps_of_a_model_and_of_its_part_name_a_call_each_in_its_own_way() -> None:
    model, x = Toy(), hidden()
    part = model.layers[1]
    with tap(model) as whole, tap(part) as piece, tap(nn.Sequential(model)) as around:
        model(x)
    assert [call.name for call in whole] == ["layers.0", "layers.1"]
    assert [(call.name, call.layer, call.index) for call in piece] == [("", None, 0)]
    assert [call.name for call in around] == ["0.layers.0", "0.layers.1"]


def test_proceed_may_be_called_never_or_more_than_once() -> None:
    model, x = Toy(1), hidden()
    with tap(model, lambda call, proceed: torch.zeros_like(call.query)), tap(model) as inner:
        assert torch.equal(model(x), x)
    assert inner == []
    twice = tap(model, lambda call, proceed: proceed(call) + proceed(call))
    with tap(model) as outer, twice, tap(model) as inner:
        model(x)
    assert (len(outer), len(inner)) == (1, 2)


def test_what_a_handler_calls_itself_is_not_tapped() -> None:
    model, other, x = Toy(1), Toy(1), hidden()
    count = 0

    def handler(call: AttentionCall, proceed: Proceed) -> Tensor:
        nonlocal count
        count += 1
        other(x)
        return scaled_dot_product_attention(call.query, call.key, call.value)

    plain = model(x)
    with warnings.catch_warnings(action="error"), tap(model, handler), tap(other, handler):
        assert torch.equal(model(x), plain)
        assert count == 1
        other(x)
    assert count == 2


def test_a_handler_may_tap_another_model() -> None:
    model, other, x = Toy(1), Toy(2), hidden()
    inside: list[AttentionCall] = []

    def handler(call: AttentionCall, proceed: Proceed) -> Tensor:
        with tap(other) as calls:
            other(x)
        inside.extend(calls)
        return proceed(call)

    with tap(model, handler):
        model(x)
    assert [call.name for call in inside] == ["layers.0", "layers.1"]


@pytest.mark.parametrize(
    ("handler", "kind", "message"),
    [
        (lambda call, proceed: None, TypeError, r"got NoneType \(a `return proceed\(call\)`"),
        (lambda call, proceed: (proceed(call),), TypeError, "Tensor, .* got tuple"),
        (lambda call, proceed: proceed(call)[..., :-1], ValueError, r"\[2, 2, 5, 4\]"),
        (lambda call, proceed: proceed(call).transpose(1, 2), ValueError, r"\[2, 5, 2, 4\]"),
        (lambda call, proceed: proceed(call)[:, :1], ValueError, r"\[2, 1, 5, 4\]"),
        (lambda call, proceed: proceed(call)[:1], ValueError, r"\[1, 2, 5, 4\]"),
        (lambda call, proceed: proceed(call.query), TypeError, "takes an AttentionCall"),
        (lambda call, proceed: 1 / 0, ZeroDivisionError, "division"),
    ],
)
def test_garbage_is_refused_and_leaves_no_trace(
    handler: Callable[..., Any], kind: type[Exception], message: str
) -> None:
    model, x = Toy(), hidden()
    plain = model(x)
    with left_as_it_was(model), tap(model) as calls:
        with pytest.raises(kind, match=message), tap(model, handler):
            model(x)
        assert torch.equal(model(x), plain)
    assert [call.name for call in calls] == ["layers.0", "layers.0", "layers.1"]
    assert [call.forward for call in calls] == [0, 1, 1]


def test_an_output_may_have_more_keys_values_or_another_value_dim() -> None:
    """A handler may give keys of its own, and what it returns is held to the call it got."""
    model, x = Toy(1), hidden()

    def register(call: AttentionCall, proceed: Proceed) -> Tensor:
        key = torch.cat([call.key, torch.zeros_like(call.key[:, :, :1])], dim=2)
        value = torch.cat([call.value, torch.zeros_like(call.value[:, :, :1])], dim=2)
        wide = torch.cat([value, value], dim=-1)
        return proceed(replace(call, key=key, value=wide))[..., : call.value.shape[-1]]

    with tap(model, register), tap(model) as calls:
        model(x)
    assert (calls[0].key_length, calls[0].value.shape[-1]) == (6, 8)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_dropout_passes(dropout: float) -> None:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=8, attention_probs_dropout_prob=dropout,
    )  # fmt: skip
    model, ids = BertModel(config), torch.tensor([[3, 4, 5]])
    for training in (True, False):
        model.train(training)
        torch.manual_seed(1)
        plain = model(ids).last_hidden_state
        torch.manual_seed(1)
        with tap(model) as calls:
            watched = model(ids).last_hidden_state
        assert calls[0].dropout_p == (dropout if training else 0.0)
        assert torch.equal(watched, plain)


def test_every_way_to_pass_the_arguments() -> None:
    class Positional(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            mask = torch.zeros(3, 3)
            output = scaled_dot_product_attention(x, x, x, mask, 0.0, False, scale=0.5)
            return output + scaled_dot_product_attention(query=x, value=x, key=x, is_causal=True)

    model, x = Positional(), torch.randn(1, 2, 3, 4)
    plain = model(x)
    with tap(model) as calls:
        assert torch.equal(model(x), plain)
    assert calls[0].attn_mask is not None
    assert (calls[0].scale, calls[0].is_causal) == (0.5, False)
    assert (calls[1].attn_mask, calls[1].scale, calls[1].is_causal) == (None, None, True)
    assert "mask [3, 3]" in repr(calls[0])
    assert "causal" in repr(calls[1])


def test_not_a_model_or_not_a_handler() -> None:
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got dict; of a pipe"):
        tap({})  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="handler must be callable, got int"):
        tap(Toy(), 3)  # type: ignore[call-overload]
