"""Sink tokens, known by massive activations in a few channels of the residual stream.

A language model marks the tokens on which it parks attention: their hidden states are huge in one
to three fixed channels, the same for every text. A vision-language model inherits the channels of
its language model, and marks image tokens with them too (Kang et al., "See What You Are Told",
ICLR 2025, 2503.03321). So a sink is found from one hidden state, before any attention is computed:

    phi(x) = max over the channels d of |x[d]| / sqrt(mean(x**2) + 1e-6)            (eq. 1)

    found = find_sink_dimensions(model, tokenizer(text, return_tensors="pt"))
    print(found.dimensions, found.values)   # e.g. (1415, 2533) and how far they stand out

Where models have outliers at all, in activations, weights and attention, is told by
`attending.probes.outliers`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from attending.interventions.vision_language import hidden_argument, language_layers
from attending.taps.running import evaluating

EPSILON = 1e-6  # under the root of the RMS, as in the official code
PAPER_DIM = 4096  # width of the models for which the paper gives tau = 20


@dataclass(frozen=True)
class KnownSinkDimensions:
    """Channels that the paper or its readers report for a language model.

    Attributes:
        dimensions: the channels.
        models: vision-language models that were built on it.
        evidence: how well it is known.
    """

    dimensions: tuple[int, ...]
    models: tuple[str, ...]
    evidence: str


_CODE = "read in the official code"
_READ = "reported by readers of the paper"

KNOWN_SINK_DIMENSIONS: Mapping[str, KnownSinkDimensions] = MappingProxyType(
    {
        "LLaMA-2-7B": KnownSinkDimensions((1415, 2533), ("LLaVA-1.5-7B",), _CODE),
        "LLaMA-2-13B": KnownSinkDimensions(
            (2100, 4743), ("LLaVA-1.5-13B", "LLaVA-1.6-13B", "VILA-13B"), _CODE
        ),
        "Qwen2-7B": KnownSinkDimensions((458, 2570), ("Qwen2-VL-7B",), f"{_READ}, two agree"),
        "InternLM2-8B": KnownSinkDimensions(
            (3584,), ("InternVL2-8B",), f"{_READ}, only one: compare with find_sink_dimensions"
        ),
    }
)
"""The channels that are known, by language model, with evidence. Vicuna has those of LLaMA-2.

Data to compare with or to pass on: `KNOWN_SINK_DIMENSIONS["Qwen2-7B"].dimensions`. Nothing here is
looked up by the name of a running model. None of them was verified by us: the weights are out of
reach of the machine on which this was written.
"""


@dataclass(frozen=True)
class SinkDimensions:
    """What `find_sink_dimensions` found.

    Attributes:
        dimensions: the channels, the largest first.
        values: their `|x| / RMS(x)` at the first token, mean over layers and sequences. A channel
            that is no outlier has about 1, and none can exceed `sqrt(D)`.
        dim: the width D of the residual stream.
    """

    dimensions: tuple[int, ...]
    values: tuple[float, ...]
    dim: int

    @property
    def shares(self) -> tuple[float, ...]:
        """`values / sqrt(D)`: 1 where one channel holds everything; tau is 0.3125 of this."""
        return tuple(value / math.sqrt(self.dim) for value in self.values)


def sink_value(
    hidden: Float[Tensor, "*batch tokens dim"], sink_dimensions: Sequence[int]
) -> Float[Tensor, "*batch tokens"]:
    """phi of each token (eq. 1): the largest sink channel in units of the RMS of all channels.

    Does not depend on the scale of a hidden state, and is at most `sqrt(dim)`. Half precision is
    widened to float32 first, since 1e3 squared is too much for float16.

    Args:
        hidden: the residual stream at the input of a layer, before its norm; the gain of the norm
            is not applied.
        sink_dimensions: the channels.

    Raises:
        ValueError: for channels that the hidden states do not have, or none.
    """
    if hidden.dim() < 2 or not hidden.is_floating_point():
        raise ValueError(
            "hidden: expected a float tensor [..., tokens, dim], got "
            f"{hidden.dtype} {list(hidden.shape)}."
        )
    check_dimensions(sink_dimensions, hidden.shape[-1])
    states = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    rms = (states.square().mean(-1) + EPSILON).sqrt()
    return states[..., list(sink_dimensions)].abs().amax(-1) / rms


def check_dimensions(sink_dimensions: Sequence[int], dim: int) -> None:
    """Raise unless there is at least one channel and all are channels of `dim`."""
    whole = all(isinstance(one, int) and not isinstance(one, bool) for one in sink_dimensions)
    if not sink_dimensions or not whole or not all(0 <= one < dim for one in sink_dimensions):
        raise ValueError(
            f"sink_dimensions: expected at least one channel between 0 and {dim - 1}, as the "
            f"hidden states have {dim}, got {tuple(sink_dimensions)!r}. find_sink_dimensions finds "
            "those of a model."
        )


def find_sink_dimensions(
    model: nn.Module, inputs: Mapping[str, Any], k: int = 2, layers: Sequence[int] | None = None
) -> SinkDimensions:
    """The channels in which the first token of a sequence is largest, over the middle layers.

    The paper publishes channels and no rule for other models. This is the rule that others use: the
    first token (BOS, where there is one) is a sink in nearly every decoder, so run a prompt and
    take the k channels with the largest `|x[d]| / RMS(x)` there, averaged over sequences and
    layers. It always finds k channels, outliers or not: see `SinkDimensions.values` for whether
    they stand out.

    Args:
        model: a model of transformers, of text or of text and images; run in evaluation mode
            without gradients, and left as it was.
        inputs: keyword arguments of the model, such as a tokenizer or processor returns. With an
            `attention_mask`, the first token is the first one that is no padding.
        k: how many channels; the paper's models have one or two.
        layers: numbers of the layers at whose inputs to look; by default the middle half.

    Raises:
        ValueError: for an argument out of range, or a model whose layers are not found.
    """
    blocks = list(language_layers(model).values())
    count = len(blocks)
    if layers is None:
        layers = range(count // 4, max(count // 4 + 1, count - count // 4))
    if not layers or not all(-count <= layer < count for layer in layers):
        raise ValueError(
            f"layers: expected numbers from {-count} to {count - 1}, as the model has {count} "
            f"layers, got {tuple(layers)!r}."
        )
    seen: list[Tensor] = []

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = hidden_argument(args, kwargs)
        first = _first_tokens(hidden, inputs.get("attention_mask")).float()
        seen.append(first.abs() / (first.square().mean(-1, keepdim=True) + EPSILON).sqrt())

    chosen = {layer % count for layer in layers}
    hooks = [
        blocks[layer].register_forward_pre_hook(look, with_kwargs=True) for layer in sorted(chosen)
    ]
    try:
        with evaluating(model), torch.no_grad():
            model(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    mean = torch.cat(seen).mean(0)
    if not 1 <= k <= mean.numel():
        raise ValueError(f"k: expected 1 to {mean.numel()}, the width of the model, got {k}.")
    found = mean.topk(k)
    return SinkDimensions(tuple(found.indices.tolist()), tuple(found.values.tolist()), mean.numel())


def _first_tokens(hidden: Tensor, attention_mask: object) -> Float[Tensor, "batch dim"]:
    """The hidden state of the first token of each sequence that is no padding."""
    places = torch.zeros(len(hidden), dtype=torch.long, device=hidden.device)
    if isinstance(attention_mask, Tensor) and attention_mask.shape == hidden.shape[:2]:
        places = attention_mask.to(hidden.device).ne(0).int().argmax(1)
    return hidden[torch.arange(len(hidden), device=hidden.device), places]
