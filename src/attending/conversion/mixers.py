"""Attention taken apart: replace it, in chosen layers of a language model, by something simpler.

    model = AutoModelForCausalLM.from_config(config)           # Llama, Mistral, Qwen2/3, GPT-2,
    convert_mixers(model, "static_qk", layout="even")          # Pythia (GPT-NeoX)
    ...train it as before...

Xue, Moosavi and Aletras ("Deconstructing Attention", 2510.11602) relax one property of attention
at a time, in all layers or in some, at equal numbers of parameters, and train each model anew:

| variant | in the paper | relaxed | what it is |
| --- | --- | --- | --- |
| `standard` | Standard | nothing | the attention of the model, a check of this module |
| `mlp` | MLP | mixing of tokens | `attending.nn.gated_mlp` |
| `taylor` | Approximate | form | `attending.nn.taylor_attention`, normalised jointly |
| `taylor_per_order` | Approximate, as printed | form | the same, each order for itself |
| `nonapprox` | Non-approximate | form | `attending.nn.nonapprox_attention`, before rotation |
| `random_qk` | RndEmbQK | dependency on the sequence | queries and keys of fixed noise |
| `fixed_qk` | FixedSeqQK | dependency on the sequence | queries and keys of a fixed text |
| `static_qk` | StaticEmbQK | queries and keys of the layer | those of the input's embedding |

For `random_qk` and `fixed_qk` a stream goes through the model beside the input, with standard
attention to itself, and each layer takes queries and keys from it; so maps do not depend on the
input. It costs one more sequence per forward; `frozen_stream` saves that when weights stay.

transformers lists the maps of its own classes only, so `output_attentions=True` leaves out those of
mixers; `attending.tap` sees all that end in PyTorch's attention (not `mlp`, `taylor` and
`nonapprox`), those of the stream too.

The paper's code is not public. Inferred: the width of the MLP; that the stream attends to itself
with values of its own and goes through standard layers too; that embedding and stream pass the norm
of the layer, as its hidden states do; which Taylor form was trained.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import torch
from jaxtyping import Int
from torch import Tensor, nn

from attending.conversion._mixer_layers import FAMILIES, AttentionMixer, MLPMixer, Variant
from attending.conversion._mixer_source import MixerSource
from attending.conversion._saved_model import load_weights, model_of_record
from attending.nn.gated_mlp import GatedMLP, matched_width

Layout = Literal[
    "uniform", "even", "odd", "top", "middle", "bottom", "quarter", "first", "last", "bilateral"
]
Model = TypeVar("Model", bound=nn.Module)


def standard_layers(layout: Layout, num_layers: int) -> tuple[int, ...]:
    """The layers that keep standard attention, counted from 0.

    Table 11 of the paper, which has 24 layers and counts from 1, for any number of layers n:

    | layout | standard layers, counted from 1 |
    | --- | --- |
    | `uniform` | none |
    | `even` (the paper's default) | 2, 4, ... |
    | `odd` | 1, 3, ... |
    | `top` | the first half |
    | `bottom` | the second half |
    | `middle` | the first and the last quarter: the middle is replaced |
    | `quarter` | 4, 8, ... |
    | `first`, `last`, `bilateral` | 1; n; both |

    (The prose of the paper says of `bottom` that layers 1-6 are replaced; the table, 1-12.)

    Raises:
        ValueError: for an unknown layout or less than one layer.
    """
    if layout not in get_args(Layout):
        raise ValueError(f"layout: expected one of {get_args(Layout)}, got {layout!r}.")
    if num_layers < 1:
        raise ValueError(f"num_layers: expected at least 1, got {num_layers}.")
    n = num_layers
    kept = {
        "uniform": [],
        "even": range(2, n + 1, 2),
        "odd": range(1, n + 1, 2),
        "top": range(1, n // 2 + 1),
        "middle": [*range(1, n // 4 + 1), *range(n - n // 4 + 1, n + 1)],
        "bottom": range(n // 2 + 1, n + 1),
        "quarter": range(4, n + 1, 4),
        "first": [1],
        "last": [n],
        "bilateral": sorted({1, n}),
    }[layout]
    return tuple(layer - 1 for layer in kept)


def convert_mixers(
    model: Model,
    variant: Variant,
    *,
    layout: Layout | Sequence[int] = "even",
    token_ids: Int[Tensor, " tokens"] | None = None,
    max_length: int | None = None,
    noise_std: float | None = None,
    seed: int = 0,
) -> Model:
    """Replace the attention of some layers, in place.

    Projections are kept under their names, and training, `generate` with a cache, padding and
    `save_pretrained` go on working. What the model computes changes, so train it. `load_mixers`
    loads a saved one; `from_pretrained` would quietly make a standard model of it.

    Args:
        model: a causal language model of transformers, or its body.
        variant: see the table of this module.
        layout: which layers keep standard attention, a name of `standard_layers` or layers counted
            from 0. All others are replaced.
        token_ids: of "fixed_qk", the fixed text (in the paper the first 2048 tokens of
            FineWeb-10BT). No input may be longer.
        max_length: of "random_qk", the length of the noise, and no input may be longer; the
            model's own limit or 2048 by default, what is less.
        noise_std: of "random_qk", the standard deviation of the noise, which the paper does not
            tell; that of the model's initial weights by default.
        seed: of the noise, and of the weights of "mlp".

    Returns:
        The same model.

    Raises:
        ValueError: for a model of another architecture or converted before, an unknown variant or
            layout, or options that do not belong to the variant. The model is then as it was.
    """
    if variant not in get_args(Variant):
        raise ValueError(f"variant: expected one of {get_args(Variant)}, got {variant!r}.")
    body, layers, name = _parts(model)
    replaced = _replaced(layout, len(layers))
    for index in replaced:
        attention = getattr(layers[index], name)
        if type(attention).__name__ not in FAMILIES:
            raise ValueError(
                f"model: expected attention of one of the classes {sorted(FAMILIES)}, got "
                f"{type(attention).__name__} in layer {index}. A model is converted once."
            )
    if getattr(body, "mixer_source", None) is not None:
        raise ValueError("model: expected one that was not converted before.")
    source = _source(body, variant, token_ids, max_length, noise_std, seed)
    generator = torch.Generator().manual_seed(seed)
    for index in replaced:
        attention = getattr(layers[index], name)
        norm = getattr(layers[index], "ln_1" if name == "attn" else "input_layernorm")
        mixer: nn.Module
        if variant == "mlp":
            mixer = MLPMixer(attention, _mlp(attention, body.config, generator))
        else:
            mixer = AttentionMixer(attention, variant, norm, source)
        setattr(layers[index], name, mixer)
    source.attach(body, layers[0])
    body.config.attending_mixers = {
        "variant": variant,
        "layout": sorted(set(range(len(layers))) - set(replaced)),
        "max_length": source.length or None,
        "seed": seed,
    }
    return model


def load_mixers(folder: str | Path, model_class: Any = None) -> Any:
    """Load a converted model that `save_pretrained` wrote.

    Args:
        folder: with its config and safetensors.
        model_class: a class of transformers with `from_config` or `_from_config`;
            `AutoModelForCausalLM` by default.

    Returns:
        The model, converted as it was, in evaluation mode.

    Raises:
        ValueError: if the folder holds no converted model, or lacks weights.
    """
    model = model_of_record(folder, "attending_mixers", "convert_mixers", model_class)
    options = dict(model.config.attending_mixers)
    if options["variant"] == "fixed_qk":
        options["token_ids"] = torch.zeros(options["max_length"], dtype=torch.long)
    if options["variant"] != "random_qk":
        options.pop("max_length")
    convert_mixers(model, **options)
    load_weights(model, folder)
    return model.eval()


@contextmanager
def frozen_stream(model: nn.Module) -> Iterator[None]:
    """Run the stream of "random_qk" or "fixed_qk" once instead of with every forward.

        with torch.no_grad(), frozen_stream(model):
            model.generate(...)

    For evaluation: queries and keys of the stream are computed on entry, without gradients, from
    the weights as they are then.

    Raises:
        ValueError: if the model has no stream.
    """
    body, _, _ = _parts(model)
    source = getattr(body, "mixer_source", None)
    if source is None or not source.length:
        raise ValueError("model: expected one with random_qk or fixed_qk mixers.")
    with source.freeze(body):
        yield


@contextmanager
def skipped_mixers(model: nn.Module, what: Literal["layer", "mixer"] = "layer") -> Iterator[None]:
    """Leave out the replaced layers, to see how much a trained hybrid makes of them.

    Args:
        model: of `convert_mixers`.
        what: "layer" leaves out whole blocks, as the paper says; "mixer" keeps their feed-forward
            parts.

    Raises:
        ValueError: if nothing was replaced, or for another `what`.
    """
    if what not in ("layer", "mixer"):
        raise ValueError(f'what: expected "layer" or "mixer", got {what!r}.')
    _, layers, name = _parts(model)
    mixed = [one for one in layers if isinstance(getattr(one, name), AttentionMixer | MLPMixer)]
    if not mixed:
        raise ValueError("model: expected one with mixers, of convert_mixers.")
    with ExitStack() as stack:
        for layer in mixed:
            if what == "layer":
                hook = layer.register_forward_hook(_pass_on, with_kwargs=True)
            else:
                hook = getattr(layer, name).register_forward_hook(_nothing)
            stack.callback(hook.remove)
        yield


def _pass_on(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    hidden = args[0] if args else kwargs["hidden_states"]
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def _nothing(mixer: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    return (torch.zeros_like(output[0]), *output[1:])


def _parts(model: nn.Module) -> tuple[Any, nn.ModuleList, str]:
    """The body of a model, its layers, and the name of their attention."""
    body: Any = getattr(model, "base_model", model)
    for layers, name in (("layers", "self_attn"), ("layers", "attention"), ("h", "attn")):
        found = getattr(body, layers, None)
        if isinstance(found, nn.ModuleList) and len(found) and hasattr(found[0], name):
            return body, found, name
    raise ValueError(
        "model: expected a causal language model of transformers of one of the families Llama, "
        f"Mistral, Qwen2, Qwen3, GPT-2 and GPT-NeoX (Pythia), got {type(model).__name__}."
    )


def _replaced(layout: Layout | Sequence[int], num_layers: int) -> list[int]:
    kept = standard_layers(layout, num_layers) if isinstance(layout, str) else tuple(layout)
    wrong = [layer for layer in kept if not 0 <= layer < num_layers]
    if wrong:
        raise ValueError(f"layout: expected layers from 0 to {num_layers - 1}, got {wrong}.")
    replaced = [layer for layer in range(num_layers) if layer not in kept]
    if not replaced:
        raise ValueError(f"layout: expected one that replaces some layer, got {layout!r}.")
    return replaced


def _source(
    body: Any,
    variant: Variant,
    token_ids: Tensor | None,
    max_length: int | None,
    noise_std: float | None,
    seed: int,
) -> MixerSource:
    if (token_ids is not None) != (variant == "fixed_qk"):
        raise ValueError(
            'token_ids: expected with "fixed_qk", and only there; got variant '
            f"{variant!r} and {'none' if token_ids is None else list(token_ids.shape)}."
        )
    if variant != "random_qk" and (max_length is not None or noise_std is not None):
        raise ValueError(
            'max_length, noise_std: expected only with "random_qk", got variant '
            f"{variant!r}, {max_length} and {noise_std}."
        )
    weight = body.get_input_embeddings().weight
    if token_ids is not None:
        if token_ids.dim() != 1 or not len(token_ids) or token_ids.is_floating_point():
            raise ValueError(
                f"token_ids: expected a row of token ids, got {list(token_ids.shape)} of "
                f"{token_ids.dtype}."
            )
        return MixerSource(token_ids=token_ids.to(weight.device, torch.long))
    if variant != "random_qk":
        return MixerSource()
    limit = getattr(body.config, "max_position_embeddings", None) or 2048
    length = min(2048, limit) if max_length is None else max_length
    std = getattr(body.config, "initializer_range", 0.02) if noise_std is None else noise_std
    if not 1 <= length <= limit or not std > 0:
        raise ValueError(
            f"max_length, noise_std: expected from 1 to {limit}, and more than 0; got {length} and "
            f"{std}."
        )
    noise = torch.randn(length, weight.shape[1], generator=torch.Generator().manual_seed(seed))
    return MixerSource(noise=(noise * std).to(weight))


def _mlp(attention: nn.Module, config: Any, generator: torch.Generator) -> GatedMLP:
    first = next(attention.parameters())
    dim = config.hidden_size
    matrices = sum(one.numel() for one in attention.parameters() if one.dim() == 2)
    mlp = GatedMLP(dim, matched_width(matrices, dim), device=first.device, dtype=first.dtype)
    std = getattr(config, "initializer_range", 0.02)
    with torch.no_grad():
        for parameter in mlp.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return mlp
