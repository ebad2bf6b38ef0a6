"""Dynamic mask attention in pretrained decoders: Llama, Mistral, Qwen2, Qwen3, and Doge.

    model = AutoModelForCausalLM.from_pretrained(...)            # Llama, Mistral, Qwen2, Qwen3
    convert_dynamic_mask(model, keep_window=1024)                # its weights stay
    ...train it on: scores and choice are learned from here...
    model.save_pretrained("folder")
    model = load_dynamic_mask("folder")
    model.generate(**prompt, cache=dynamic_mask_cache(model))   # 1024 tokens of cache

    model = convert_doge(DogeForCausalLM.from_pretrained(...))   # computes the same, without a map

Equal scores add nothing to a softmax, and a window that is not exceeded drops nothing: with scores
that start almost alike, the converted model starts as almost the model that it was, up to
`keep_window` tokens. The paper trains from scratch; conversion of a pretrained model is ours.

A layer has parameters of its own and looks at values, so it is a module in the place of attention
and no attention implementation (those of `register_attention` are functions without parameters).
Masks, caches and `generate` work as before, with any cache; `dynamic_mask_cache` makes the one that
forgets what cannot be attended to any more.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from attending.conversion._decoder_sites import body_of, put_layers, sites_of
from attending.conversion._dynamic_mask_layer import DynamicMaskDecoderAttention
from attending.conversion._saved_model import load_weights, model_of_record
from attending.nn.dynamic_mask import Score
from attending.nn.dynamic_mask_attention import DynamicMaskAttention

Model = TypeVar("Model", bound=nn.Module)
REPLACED = ("LlamaAttention", "MistralAttention", "Qwen2Attention", "Qwen3Attention")
_RECORD = "attending_dynamic_mask"  # the entry in the model's config


def convert_dynamic_mask(
    model: Model,
    keep_window: int,
    *,
    score: Score = "exp",
    gate_init: float | None = None,
    layers: Sequence[int] | None = None,
    seed: int = 0,
) -> Model:
    """Put dynamic mask attention in the place of attention, in place; projections stay.

    Args:
        model: a causal language model of transformers, Llama, Mistral, Qwen2 or Qwen3, or its body.
        keep_window: how many tokens a query attends to.
        score, gate_init: as in `DynamicMaskAttention`.
        layers: which layers to replace, counted from 0; all by default.
        seed: of the new weights: those of the scores, normal with the config's
            `initializer_range`, and the gates.

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
            f"{type(model).__name__}. A model is converted once; for Doge there is convert_doge."
        )
    chosen = list(range(len(found)) if layers is None else layers)
    wrong = [index for index in chosen if not 0 <= index < len(found)]
    if wrong or not chosen:
        raise ValueError(
            f"layers: expected some of the layers 0 to {len(found) - 1}, got {chosen}."
        )
    _refuse_dropout(body)
    made = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for index in chosen:
            name, old = found[index]
            layer = _like(old, keep_window, score, gate_init)
            nn.init.normal_(layer.score_proj.weight, std=body.config.initializer_range)
            made.append((name, layer.to(old.q_proj.weight)))
    put_layers(body, made, DynamicMaskDecoderAttention)
    record = {"keep_window": keep_window, "score": score, "layers": chosen}
    setattr(body.config, _RECORD, record)
    return model


def convert_doge(model: Model) -> Model:
    """Put layers of this library in the place of Doge's attention, in place.

    Doge is the model of the paper's authors, in transformers. The model computes the same as
    before where scores have no ties at the edge of the window, in time and memory of the window and
    not of all tokens. (Doge breaks ties as `topk` happens to; at its initial A of 0 all are ties.)

    Args:
        model: a `DogeForCausalLM`, or its body. transformers before 5.23 shows `sdpa` the future
            [ran]; the layers here are causal by themselves.

    Returns:
        The same model.

    Raises:
        ValueError: if it has no such attention, or dropout on its maps.
    """
    body = body_of(model)
    found = sites_of(body, ("DogeAttention",))
    if not found:
        raise ValueError(
            f"model: expected attention of Doge, found none in {type(model).__name__}."
        )
    _refuse_dropout(body)
    made = []
    for name, old in found:
        layer = _like(old, old.keep_window_size, "exp", None)
        layer.score_proj, layer.gate = old.dt_proj, old.A
        made.append((name, layer))
    put_layers(body, made, DynamicMaskDecoderAttention)
    setattr(body.config, _RECORD, {"doge": True})
    return model


def load_dynamic_mask(folder: str | Path, model_class: Any = None) -> Any:
    """Load a model with dynamic mask attention that `save_pretrained` wrote.

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
    model = model_of_record(folder, _RECORD, "convert_dynamic_mask or convert_doge", model_class)
    record = getattr(model.config, _RECORD)
    if "doge" in record:
        convert_doge(model)
    else:
        convert_dynamic_mask(model, **record)
    load_weights(model, folder)
    return model.eval()


def dynamic_mask_cache(model: nn.Module) -> Any:
    """A cache of transformers for a converted model, to pass as `cache`.

    It holds at most `keep_window` tokens for each head of key and value, and their scores, so that
    a step of decoding takes the same time after any number of tokens. What the model computes is
    the same as with a `DynamicCache`. It cannot be cropped, which assisted decoding needs.

    Raises:
        ValueError: if the model has no dynamic mask attention.
    """
    from attending.conversion._dynamic_mask_cache import DynamicMaskModelCache

    windows = {one.layer_idx: one.attention.keep_window for one in dynamic_mask_layers(model)}
    return DynamicMaskModelCache(windows, body_of(model).config.num_hidden_layers)


def dynamic_mask_layers(model: nn.Module) -> list[DynamicMaskDecoderAttention]:
    """The layers of dynamic mask attention of a model, in order.

    Raises:
        ValueError: if it has none.
    """
    found = [one for one in model.modules() if isinstance(one, DynamicMaskDecoderAttention)]
    if not found:
        raise ValueError(
            "model: expected one with dynamic mask attention, of convert_dynamic_mask or "
            f"convert_doge, got {type(model).__name__} without."
        )
    return found


def _like(
    old: Any, keep_window: int, score: Score, gate_init: float | None
) -> DynamicMaskAttention:
    """A layer with the projections of an attention of transformers, which it shares."""
    layer = DynamicMaskAttention(
        old.q_proj.in_features,
        old.q_proj.out_features // old.head_dim,
        old.k_proj.out_features // old.head_dim,
        keep_window,
        score,
        head_dim=old.head_dim,
        gate_init=gate_init,
        layer_idx=old.layer_idx,
    )
    layer.q_proj, layer.k_proj, layer.v_proj = old.q_proj, old.k_proj, old.v_proj
    layer.out_proj = old.o_proj
    if hasattr(old, "q_norm"):
        layer.q_norm, layer.k_norm = old.q_norm, old.k_norm
    return layer


def _refuse_dropout(body: Any) -> None:
    if getattr(body.config, "attention_dropout", 0.0):
        raise ValueError(
            "model: expected attention_dropout 0, as dynamic mask attention has no dropout on its "
            f"map, got {body.config.attention_dropout}. Set it to 0 in the config first."
        )
