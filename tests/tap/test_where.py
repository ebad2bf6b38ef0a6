"""What the place of a call tells: its layer, and self- or cross-attention."""

from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from attending.taps import tap
from attending.taps.where import layer_of
from tests.tap.probes import Toy, ToyAttention, hidden


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("", None),
        ("head", None),
        ("0", 0),
        ("0.layers.3", 3),  # a step of a sequence, then a list of layers
        ("blocks.2", 2),
        ("layers.1.qkv", 1),
    ],
)
def test_layer(name: str, layer: int | None) -> None:
    model = nn.Module()
    model.head = nn.Linear(2, 2)
    model.blocks = nn.Sequential(*(nn.Identity() for _ in range(3)))
    model.layers = Toy(2).layers
    sequence = nn.Sequential(Toy(4))
    holder = sequence if name.startswith("0") else model
    assert layer_of(holder, name) == layer


def test_a_module_under_two_names_goes_by_the_first() -> None:
    model, x = Toy(1), hidden()
    model.layers.append(model.layers[0])
    with tap(model) as calls:
        model(x)
    assert [call.name for call in calls] == ["layers.0", "layers.0"]


class Attend(nn.Module):
    """Attention to a source, if there is one, by way of the inner module."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = ToyAttention()

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None) -> Tensor:
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        return scaled_dot_product_attention(
            hidden_states[:, None], source[:, None], source[:, None]
        )


class AttendJointly(Attend):
    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None) -> Tensor:
        assert encoder_hidden_states is not None
        both = torch.cat([hidden_states, encoder_hidden_states], dim=1)
        return super().forward(both, None)


class FlaggedAttention(Attend):
    is_cross_attention = True


class CrossAttention(Attend):
    pass


@pytest.mark.parametrize(
    ("kind", "arguments", "expected"),
    [
        (Attend, "self", False),
        (Attend, "source", True),
        (Attend, "source by position", True),
        (Attend, "itself as source", False),
        (AttendJointly, "source", False),
        (FlaggedAttention, "self", True),
        (CrossAttention, "self", True),
        (CrossAttention, "itself as source", True),
    ],
    ids=str,
)
def test_cross_or_self(kind: type[Attend], arguments: str, expected: bool) -> None:
    model: Any = kind()
    own, source = hidden(length=5), hidden(length=5)  # equal lengths: they do not tell
    with tap(model) as calls:
        if arguments == "self":
            model(own)
        elif arguments == "source":
            model(own, encoder_hidden_states=source)
        elif arguments == "source by position":
            model(own, source)
        else:
            model(own, own)
    assert [call.is_cross for call in calls] == [expected]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("encoder_attn", True),
        ("crossattention", True),
        ("EncDecAttention", True),
        ("attn2", True),
        ("attn1", False),
        ("self_attn", False),
        ("attention", False),
    ],
)
def test_the_name_decides_where_nothing_else_does(name: str, expected: bool) -> None:
    model = nn.Sequential(OrderedDict([(name, ToyAttention())]))
    with tap(model) as calls:
        model(hidden())
    assert [(call.name, call.is_cross) for call in calls] == [(name, expected)]


class Block(Attend):
    """No attention itself: what it was given says nothing of the attention inside."""

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None) -> Tensor:
        return self.inner(hidden_states)  # type: ignore[no-any-return]


def test_a_source_of_the_block_is_none_of_its_attention() -> None:
    model = Block()
    with tap(model) as calls:
        model(hidden(), hidden())
    assert [(call.name, call.is_cross) for call in calls] == [("inner", False)]
