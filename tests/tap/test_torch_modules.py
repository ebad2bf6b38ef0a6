"""The attention of plain PyTorch: it reaches the function inside another overridable one."""

import copy
import re
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attending.taps import TapError, TapWarning, tap
from tests.tap.probes import again, hidden, hotter, identity, left_as_it_was


def multihead(**options: Any) -> nn.MultiheadAttention:
    return nn.MultiheadAttention(8, 2, batch_first=True, **options)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("options", [{}, {"add_bias_kv": True}, {"kdim": 6, "vdim": 4}], ids=str)
def test_multihead_attention_without_weights(training: bool, options: dict[str, Any]) -> None:
    model = multihead(**options).train(training)
    query = hidden(length=3)
    key = torch.randn(2, 5, options.get("kdim", 8))
    value = torch.randn(2, 5, options.get("vdim", 8))
    plain = model(query, key, value, need_weights=False)[0]
    with left_as_it_was(model), tap(model) as calls:
        watched = model(query, key, value, need_weights=False)[0]
    assert torch.equal(watched, plain)
    assert [call.name for call in calls] == [""]
    assert calls[0].is_cross
    assert calls[0].query.shape == (2, 2, 3, 4)
    assert calls[0].key_length == 5 + ("add_bias_kv" in options)
    with tap(model, lambda call, proceed: again(call)):
        assert torch.equal(model(query, key, value, need_weights=False)[0], plain)
    with tap(model, hotter):
        assert not torch.allclose(model(query, key, value, need_weights=False)[0], plain)


def test_multihead_attention_of_one_sequence_is_self_attention() -> None:
    model, x = multihead(), hidden()
    with tap(model) as calls:
        model(x, x, x, need_weights=False, is_causal=True, attn_mask=torch.ones(5, 5).triu(1) > 0)
    assert not calls[0].is_cross
    assert calls[0].is_causal


def test_multihead_attention_with_weights_never_calls_the_function() -> None:
    model, x = multihead(), hidden()
    with left_as_it_was(model), pytest.raises(TapError) as error, tap(model):
        model(x, x, x)
    assert "Call nn.MultiheadAttention with need_weights=False." in str(error.value)


def test_one_of_two_with_weights_warns() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.seen, self.unseen = multihead(), multihead()

        def forward(self, x: Tensor) -> Tensor:
            x = self.seen(x, x, x, need_weights=False)[0]
            return self.unseen(x, x, x)[0]

    model = Two()
    message = (
        re.escape("unseen (MultiheadAttention) ran without a call of") + ".*need_weights=False"
    )
    with pytest.warns(TapWarning, match=message) as caught, tap(model) as calls:
        model(hidden())
    assert caught[0].filename == __file__
    assert [call.name for call in calls] == ["seen"]


def encoder(norm_first: bool = False) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True, norm_first=norm_first)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no grad"])
def test_transformer_encoder(norm_first: bool, training: bool, grad: bool) -> None:
    model, x = encoder(norm_first).train(training), hidden()
    with torch.set_grad_enabled(grad):
        plain = model(x)
        with left_as_it_was(model), tap(model) as calls:
            watched = model(x)
        with tap(model, hotter):
            assert not torch.allclose(model(x), plain, atol=1e-3)
        assert torch.equal(model(x), plain)
    assert [call.name for call in calls] == [f"layers.{i}.self_attn" for i in range(2)]
    assert [call.layer for call in calls] == [0, 1]
    assert not any(call.is_cross for call in calls)
    # Without a gradient, in eval, PyTorch takes its fused path, and a tap turns that off.
    if training or grad:
        assert torch.equal(watched, plain)
    torch.testing.assert_close(watched, plain)


@torch.no_grad()
def test_padding_in_the_fused_path_and_with_a_tap() -> None:
    model, x = encoder().eval(), hidden()
    padding = torch.zeros(2, 5, dtype=torch.bool)
    padding[0, 3:] = True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nested tensors are a prototype, says PyTorch
        plain = model(x, src_key_padding_mask=padding)
        with tap(model) as calls:
            watched = model(x, src_key_padding_mask=padding)
    assert len(calls) == 2
    torch.testing.assert_close(watched[~padding], plain[~padding])
    assert plain[padding].eq(0).all()  # as the docstring of `tap` says
    assert not watched[padding].eq(0).any()


@torch.no_grad()
def test_nested_tensors_are_refused() -> None:
    model = encoder().eval().layers[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nested = torch.nested.nested_tensor([torch.randn(3, 8), torch.randn(5, 8)])
    plain = model(nested)
    message = "nested tensors only on its fused inference path"
    with left_as_it_was(model), pytest.raises(ValueError, match=message), tap(model):
        model(nested)
    assert torch.equal(model(nested).to_padded_tensor(0.0), plain.to_padded_tensor(0.0))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_transformer_has_cross_attention(training: bool) -> None:
    model = nn.Transformer(8, 2, 1, 1, 16, dropout=0.0, batch_first=True).train(training)
    source, target = hidden(length=4), hidden(length=4)
    plain = model(source, target)
    with left_as_it_was(model), tap(model) as calls:
        watched = model(source, target)
    assert torch.equal(watched, plain)
    assert [(call.name, call.is_cross) for call in calls] == [
        ("encoder.layers.0.self_attn", False),
        ("decoder.layers.0.self_attn", False),
        ("decoder.layers.0.multihead_attn", True),
    ]


def test_gradients_through_multihead_attention() -> None:
    model, x = multihead(), hidden()
    other = copy.deepcopy(model)
    model(x, x, x, need_weights=False)[0].sum().backward()
    with tap(other, identity):
        other(x, x, x, need_weights=False)[0].sum().backward()
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert one.grad is not None
        assert torch.equal(one.grad, two.grad)


def test_a_default_device_and_a_tap_inside_it() -> None:
    """A mode of PyTorch's own on the same stack."""
    model, x = encoder().train(), hidden()
    with torch.device("cpu"), tap(model) as calls, torch.device("cpu"):
        model(x)
    assert len(calls) == 2


def test_a_subclass_of_tensor_that_overrides_the_outer_function_has_its_way() -> None:
    class Own(Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if func is nn.functional.multi_head_attention_forward:
                return torch.ones(5, 2, 8), None
            return super().__torch_function__(func, types, args, kwargs or {})

    model, x = multihead(), hidden()
    own = x.as_subclass(Own)
    with pytest.raises(TapError), tap(model):
        assert model(own, own, own, need_weights=False)[0].eq(1).all()
