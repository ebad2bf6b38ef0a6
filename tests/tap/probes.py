"""What the tests of the tap share: small models, handlers, and whether a model is untouched."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import _get_current_function_mode_stack

from attending.taps import AttentionCall, Proceed

ARGUMENTS = (
    "query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa",
)  # fmt: skip


class ToyAttention(nn.Module):
    """A layer of attention, in the fewest lines."""

    def __init__(self, dim: int = 8, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)

    def forward(self, hidden: Tensor) -> Tensor:
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(hidden).chunk(3, dim=-1)
        )
        output = scaled_dot_product_attention(query, key, value)
        return hidden + output.transpose(1, 2).flatten(2)


class Toy(nn.Module):
    """Layers of it."""

    def __init__(self, num_layers: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(ToyAttention() for _ in range(num_layers))

    def forward(self, hidden: Tensor) -> Tensor:
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


def hidden(batch: int = 2, length: int = 5) -> Tensor:
    return torch.randn(batch, length, 8)


def identity(call: AttentionCall, proceed: Proceed) -> Tensor:
    return proceed(call)


def hotter(call: AttentionCall, proceed: Proceed) -> Tensor:
    """Changes the call, and what comes back, in ways that do not commute with `shifted`."""
    return 2 * proceed(replace(call, scale=3 * call.softmax_scale))


def shifted(call: AttentionCall, proceed: Proceed) -> Tensor:
    return proceed(replace(call, value=call.value + 1)).square()


def again(call: AttentionCall) -> Tensor:
    """Attention from the fields of a call."""
    return scaled_dot_product_attention(**{name: getattr(call, name) for name in ARGUMENTS})


def state_of(model: nn.Module) -> list[dict[str, object]]:
    """All that hangs on the modules of a model; containers as copies."""
    return [
        {
            name: dict(value) if isinstance(value, dict) else value
            for name, value in vars(module).items()
        }
        for module in model.modules()
    ]


@contextmanager
def left_as_it_was(model: nn.Module) -> Iterator[None]:
    """Fails if the block leaves a hook or anything else on the model, or a mode on the stack."""
    before, modes = state_of(model), _get_current_function_mode_stack()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    hooks = [sum(len(v) for k, v in s.items() if k.endswith("_hooks")) for s in before]
    try:
        yield
    finally:
        after = state_of(model)
        assert _get_current_function_mode_stack() == modes
        assert [list(state) for state in after] == [list(state) for state in before]
        for new, old in zip(after, before, strict=True):
            for name, value in old.items():
                same = new[name] is value or new[name] == value
                assert same, name
        assert hooks == [sum(len(v) for k, v in s.items() if k.endswith("_hooks")) for s in after]
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, weights[name]), name
