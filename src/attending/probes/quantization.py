"""What simulated int8 costs a model: loss and perplexity before and after.

Outliers are what makes int8 hard. One scale for a whole tensor has to reach its largest value, and
a value a thousand times the rest leaves the rest a few of the 255 steps, or none. So the gap that
absmax quantisation opens is a measure of the damage of outliers, and the one that An et al.
(2502.06415) report: GPT-2 goes to a perplexity of 93 with them, to 29 without.

    absmax:  scale = max |x| / 127,   x_int8 = round(x / scale),   x' = scale * x_int8

with one scale per tensor. The computation stays in floating point (fake quantisation): this
measures quality, and makes nothing faster or smaller.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from attending.nn.linear import linear_layers
from attending.taps.running import as_batches, evaluating

Scheme = Literal["absmax_w8", "absmax_w8a8"]
LossFunction = Callable[[nn.Module, Any], tuple[Tensor, int]]

STEPS = 127  # of int8 on each side of zero; -128 is left out, so that zero stays zero


@dataclass(frozen=True)
class QuantizationReport:
    """Loss before and after simulated quantisation, in nats per target.

    Attributes:
        scheme: what was quantised.
        layers: how many linear layers.
        targets: over how many targets the loss is the mean.
        loss, quantized_loss: mean cross-entropy; infinite or nan if the model gave that.
    """

    scheme: Scheme
    layers: int
    targets: int
    loss: float
    quantized_loss: float

    @property
    def gap(self) -> float:
        """By how much the loss rises, in nats."""
        return self.quantized_loss - self.loss

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return _exp(self.loss)

    @property
    def quantized_perplexity(self) -> float:
        """exp(quantized_loss)."""
        return _exp(self.quantized_loss)

    def __str__(self) -> str:
        return (
            f"{self.scheme}, {self.layers} layers, {self.targets} targets: loss {self.loss:.4f} -> "
            f"{self.quantized_loss:.4f} nats, perplexity {self.perplexity:.4g} -> "
            f"{self.quantized_perplexity:.4g}"
        )


def absmax_int8(tensor: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The tensor after a round trip through int8 with one scale, `max |x| / 127`.

    Computed at least in float32, returned in the dtype of the tensor. Zeros stay zeros.
    """
    wide = tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))
    if wide.numel() == 0:
        return tensor.detach().clone()
    scale = wide.abs().max() / STEPS
    steps = torch.round(wide / scale.where(scale > 0, torch.ones_like(scale)))
    return (steps * scale).to(tensor.dtype)


@contextmanager
def absmax_quantized(
    model: nn.Module, scheme: Scheme = "absmax_w8", skip: Sequence[str] = ("lm_head",)
) -> Iterator[list[str]]:
    """The model with linear layers in simulated int8, as long as the context is open.

    On entry each layer gets a new parameter; on exit it gets its own back, the very same object, so
    the model is bit for bit what it was. A weight that is tied to an embedding is quantised in the
    linear layer alone.

    Args:
        model: any module with `nn.Linear` or transformers' `Conv1D` layers.
        scheme: "absmax_w8" quantises the weights, "absmax_w8a8" the inputs of those layers, too:
            each call's whole input gets one scale, so what is batched together matters.
        skip: layers to leave as they are: full names, or any part of one between dots. By default
            the head, as int8 inference does; the output embeddings of a transformers model too.

    Yields:
        The names of the quantised layers.

    Raises:
        ValueError: for an unknown scheme, or if no layer is left.
    """
    if scheme not in get_args(Scheme):
        raise ValueError(f"scheme: expected one of {get_args(Scheme)}, got {scheme!r}.")
    if isinstance(skip, str):
        raise ValueError(f"skip: expected several names, got one string; use ({skip!r},).")
    head = _output_embeddings(model) if "lm_head" in skip else None
    layers = [
        (name, module)
        for name, module, _ in linear_layers(model)
        if module is not head and name not in skip and not set(name.split(".")) & set(skip)
    ]
    if not layers:
        raise ValueError(
            f"model: expected nn.Linear or Conv1D layers beyond those in skip={tuple(skip)}, found "
            f"none in {type(model).__name__}."
        )
    with ExitStack() as undo:
        for _, module in layers:
            if "weight" not in module._parameters:
                raise ValueError(
                    f"model: expected plain parameters, but the weight of {module} is computed "
                    "(parametrized). Fold it first, with torch.nn.utils.parametrize."
                    "remove_parametrizations."
                )
            own = module._parameters["weight"]
            assert own is not None
            undo.callback(module._parameters.__setitem__, "weight", own)
            module._parameters["weight"] = nn.Parameter(absmax_int8(own), requires_grad=False)
            if scheme == "absmax_w8a8":
                undo.callback(module.register_forward_pre_hook(_quantize_input).remove)
        yield [name for name, _ in layers]


def quantization_probe(
    model: nn.Module,
    batches: Any,
    scheme: Scheme = "absmax_w8",
    *,
    loss_function: LossFunction | None = None,
    skip: Sequence[str] = ("lm_head",),
) -> QuantizationReport:
    """The loss of a model before and after simulated int8, on the same inputs.

        print(quantization_probe(model, tokenizer(texts, return_tensors="pt", padding=True)))

    The model runs in eval mode without gradients, and is afterwards what it was, bit for bit.

    Args:
        model: a causal language model of transformers; or any model, with `loss_function`.
        batches: a mapping with `input_ids` (and `attention_mask`; `labels` if they differ), or
            several. With a `loss_function`, whatever that takes.
        scheme, skip: as in `absmax_quantized`.
        loss_function: `loss_function(model, batch)` returns the sum of the loss over the targets of
            a batch, and their number; by default the cross-entropy of the next token.

    Raises:
        ValueError: for bad arguments, or if there is no target.
    """
    given = list(as_batches(batches))
    function = next_token_loss if loss_function is None else loss_function
    with evaluating(model), torch.no_grad():
        loss, targets = _mean_loss(model, given, function)
        with absmax_quantized(model, scheme, skip) as layers:
            quantized, _ = _mean_loss(model, given, function)
    return QuantizationReport(scheme, len(layers), targets, loss, quantized)


def next_token_loss(model: nn.Module, batch: Any) -> tuple[Tensor, int]:
    """The summed cross-entropy of each next token, and how many there are.

    Padding and labels of -100 are left out.
    """
    if isinstance(batch, Tensor):
        batch = {"input_ids": batch}
    if not isinstance(batch, Mapping) or "input_ids" not in batch:
        found = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
        raise ValueError(
            f"batches: expected input_ids in every batch, got {found}. For another task pass a "
            "loss_function."
        )
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    logits = model(**inputs).logits[:, :-1].float()
    labels = batch.get("labels", batch["input_ids"])[:, 1:].to(logits.device)
    mask = batch.get("attention_mask")
    if mask is not None:
        real = (mask[:, 1:] * mask[:, :-1]).bool().to(labels.device)
        labels = labels.masked_fill(~real, -100)
    total = cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    return total, int((labels != -100).sum())


def _mean_loss(
    model: nn.Module, batches: Sequence[Any], function: LossFunction
) -> tuple[float, int]:
    total, targets = 0.0, 0
    for batch in batches:
        loss, count = function(model, batch)
        total, targets = total + float(loss), targets + count
    if targets == 0:
        raise ValueError("batches: expected at least one target for the loss, got none.")
    return total / targets, targets


def _quantize_input(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (absmax_int8(args[0]), *args[1:])


def _output_embeddings(model: nn.Module) -> nn.Module | None:
    getter = getattr(model, "get_output_embeddings", None)
    found = getter() if callable(getter) else None
    return found if isinstance(found, nn.Module) else None


def _exp(loss: float) -> float:
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
