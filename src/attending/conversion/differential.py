"""Differential attention in a Llama: replace the attention modules of a model, save it, load it.

    model = AutoModelForCausalLM.from_config(config)             # Llama, Mistral, Qwen2
    convert_differential(model, num_signal_heads=8, num_noise_heads=2)
    ...train it: its attention is new...
    model.save_pretrained("folder")
    model = load_differential("folder")

    model = convert_diffllama(DiffLlamaForCausalLM.from_pretrained(...))       # computes the same

A differential layer has parameters of its own and other shapes than the attention that it replaces,
so it is a module in its place and no attention implementation (those of `register_attention` are
functions of query, key and value). Masks, caches and `generate` work as before; the cache holds as
much as that of `2 * num_kv_pairs` heads of keys and values.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from attending.conversion._decoder_sites import body_of, put_layers, sites_of
from attending.conversion._differential_layer import DifferentialDecoderAttention
from attending.conversion._saved_model import load_weights, model_of_record
from attending.nn.grouped_differential_attention import (
    GroupedDifferentialAttention,
    LambdaIndex,
    LambdaMode,
)

Model = TypeVar("Model", bound=nn.Module)
REPLACED = ("LlamaAttention", "MistralAttention", "Qwen2Attention")
_RECORD = "attending_differential"  # the entry in the model's config


def convert_differential(
    model: Model,
    num_signal_heads: int,
    num_noise_heads: int,
    *,
    num_kv_pairs: int | None = None,
    head_dim: int | None = None,
    layers: Sequence[int] | None = None,
    lambda_index: LambdaIndex = "zero_based",
    lambda_mode: LambdaMode = "scalar",
    seed: int = 0,
) -> Model:
    """Put new layers of grouped differential attention in the place of attention, in place.

    The new layers are for training: they take over nothing from the old ones, whose heads mean
    something else. (Whoever wants to keep a pretrained model's function cannot have it exactly, for
    the norm after the subtraction.)

    Args:
        model: a causal language model of transformers, Llama, Mistral or Qwen2, or its body.
        num_signal_heads, num_noise_heads: of each layer; the one a multiple of the other.
        num_kv_pairs: pairs of keys, a divisor of `num_noise_heads`, which is the default. A pair
            caches as much as two kv heads.
        head_dim: width of queries and keys; that of the model by default, and no other with a
            rotary embedding of another width.
        layers: which layers to replace, counted from 0; all by default.
        lambda_index, lambda_mode: as in `GroupedDifferentialAttention`.
        seed: of the new weights, normal with the config's `initializer_range`.

    Returns:
        The same model.

    Raises:
        ValueError: for a model of another architecture, with dropout on its maps, or numbers that
            do not fit. The model is then as it was.
    """
    body = body_of(model)
    found = sites_of(body, REPLACED)
    if not found:
        raise ValueError(
            f"model: expected attention of one of the classes {list(REPLACED)}, found none in "
            f"{type(model).__name__}. A model is converted once; for DiffLlama there is "
            "convert_diffllama."
        )
    chosen = range(len(found)) if layers is None else layers
    wrong = [index for index in chosen if not 0 <= index < len(found)]
    if wrong or not len(chosen):
        raise ValueError(
            f"layers: expected some of the layers 0 to {len(found) - 1}, got {list(chosen)}."
        )
    config: Any = body.config
    if getattr(config, "attention_dropout", 0.0):
        raise ValueError(
            "model: expected attention_dropout 0, since no paper says what dropout on the two maps "
            f"would mean, got {config.attention_dropout}. Set it to 0 in the config first."
        )
    made = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for index in chosen:
            name, old = found[index]
            if head_dim not in (None, old.head_dim):
                raise ValueError(
                    f"head_dim: expected {old.head_dim}, that of the model's rotary embedding, got "
                    f"{head_dim}. Set head_dim in the config before the model is made."
                )
            layer = GroupedDifferentialAttention(
                config.hidden_size,
                num_signal_heads,
                num_noise_heads,
                old.o_proj.bias is not None,
                num_kv_pairs,
                old.head_dim,
                old.layer_idx,
                lambda_index,
                lambda_mode,
                eps=getattr(config, "rms_norm_eps", 1e-5),
            )
            for module in layer.modules():
                if isinstance(module, nn.Linear):
                    nn.init.normal_(module.weight, std=config.initializer_range)
                    if module.bias is not None:
                        nn.init.zeros_(module.bias)
            made.append((name, layer.to(old.q_proj.weight)))
    _replace(body, made)
    return model


def convert_diffllama(model: Model) -> Model:
    """Put layers of this library in the place of DiffLlama's attention, in place.

    The model computes the same as before, and can then be grown (`grow_heads`). The heads are
    permuted: DiffLlama's noise head of signal head h is h + heads / 2, and the halves of a value
    are half the kv heads apart. Its norm has no weight; the new one's starts as 1.

    Args:
        model: a `DiffLlamaForCausalLM` of transformers, or its body.

    Returns:
        The same model.

    Raises:
        ValueError: if it has no such attention.
    """
    body = body_of(model)
    found = sites_of(body, ("DiffLlamaAttention",))
    if not found:
        raise ValueError(
            f"model: expected attention of DiffLlama, found none in {type(model).__name__}."
        )
    _replace(body, [(name, from_diffllama(old)) for name, old in found])
    return model


def from_diffllama(attention: Any) -> GroupedDifferentialAttention:
    """The layer that computes what a `DiffLlamaAttention` computes, with its weights copied."""
    config, weight = attention.config, attention.q_proj.weight
    signal, pairs = config.num_attention_heads // 2, config.num_key_value_heads // 2
    if config.num_attention_heads % 2:
        raise ValueError(
            "attention: expected an even number of heads, signal and noise, got "
            f"{config.num_attention_heads}."
        )
    layer = GroupedDifferentialAttention(
        config.hidden_size,
        signal,
        signal,
        attention.q_proj.bias is not None,
        pairs,
        attention.head_dim,
        attention.layer_idx,
        lambda_init=attention.lambda_init,
        eps=attention.groupnorm.eps,
        device=weight.device,
        dtype=weight.dtype,
    ).train(attention.training)
    old = attention.state_dict()
    state = {name.replace("o_proj", "out_proj"): one for name, one in old.items()}
    for projection, half in (("q_proj", signal), ("k_proj", pairs), ("v_proj", pairs)):
        order = [head for first in range(half) for head in (first, first + half)]
        for name in (f"{projection}.weight", f"{projection}.bias"):
            if name in state:
                state[name] = state[name].unflatten(0, (2 * half, -1))[order].flatten(0, 1)
    state["subln.weight"] = torch.ones_like(layer.subln.weight)
    layer.load_state_dict(state)
    return layer


def load_differential(folder: str | Path, model_class: Any = None) -> Any:
    """Load a model with differential layers that `save_pretrained` wrote, grown or not.

    (`from_pretrained` would make a model of the standard class, and not know the weights.)

    Args:
        folder: with its config and safetensors.
        model_class: a class of transformers with `from_config` or `_from_config`;
            `AutoModelForCausalLM` by default.

    Returns:
        The model, in evaluation mode.

    Raises:
        ValueError: if the folder holds no such model, or lacks weights.
    """
    model = model_of_record(
        folder, _RECORD, "convert_differential or convert_diffllama", model_class
    )
    record = getattr(model.config, _RECORD)
    body = body_of(model)
    places = dict(body.named_modules())
    made = []
    for name, options in record.items():
        weight = places[name].q_proj.weight
        layer = GroupedDifferentialAttention(**options, device=weight.device, dtype=weight.dtype)
        made.append((name, layer))
    _replace(body, made)
    load_weights(model, folder)
    return model.eval()


def differential_layers(model: nn.Module) -> list[DifferentialDecoderAttention]:
    """The differential layers of a model, in order.

    Raises:
        ValueError: if it has none.
    """
    found = [one for one in model.modules() if isinstance(one, DifferentialDecoderAttention)]
    if not found:
        raise ValueError(
            "model: expected one with differential layers, of convert_differential or "
            f"convert_diffllama, got {type(model).__name__} without."
        )
    return found


def record_layers(model: nn.Module) -> None:
    """Write into the config of the model which layers it has, for `load_differential`."""
    body = body_of(model)
    record = {
        name: module.attention.options()
        for name, module in body.named_modules()
        if isinstance(module, DifferentialDecoderAttention)
    }
    setattr(body.config, _RECORD, record)


def _replace(body: Any, made: Sequence[tuple[str, GroupedDifferentialAttention]]) -> None:
    put_layers(body, made, DifferentialDecoderAttention)
    record_layers(body)
