"""Small random models, and methods that do one thing each."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from attending.taps import AttentionCall, Proceed, tap

VOCAB = 50


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.4,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).eval()


def bert() -> BertModel:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    return BertModel(config).eval()


def ids(batch: int = 3, tokens: int = 12, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCAB, (batch, tokens), generator=torch.Generator().manual_seed(seed))


@dataclasses.dataclass(frozen=True)
class Hotter:
    """Attention at a higher temperature."""

    temperature: float = 1.5

    def __call__(self, model: nn.Module) -> Any:
        def soften(call: AttentionCall, proceed: Proceed) -> Tensor:
            return proceed(dataclasses.replace(call, scale=call.softmax_scale / self.temperature))

        return tap(model, soften)


@contextmanager
def idle(model: nn.Module) -> Iterator[None]:
    """Changes nothing."""
    yield


@contextmanager
def untidy(model: Any) -> Iterator[None]:
    """Changes the model for good."""
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    yield


def refusing(model: nn.Module) -> Any:
    raise ValueError("model: expected one that sees,\n got one that does not.")


@contextmanager
def breaking(model: nn.Module) -> Iterator[None]:
    """Breaks in the middle of a forward pass."""

    def fault(*_: object) -> None:
        raise KeyError("a fault")

    hook = model.register_forward_hook(fault)
    try:
        yield
    finally:
        hook.remove()
