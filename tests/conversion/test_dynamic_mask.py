"""Dynamic mask attention in real decoders: Doge as an independent check, caches, saving."""

import copy
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn

from attending.conversion.dynamic_mask import (
    convert_doge,
    convert_dynamic_mask,
    dynamic_mask_cache,
    dynamic_mask_layers,
    load_dynamic_mask,
)

GENERATOR = torch.Generator().manual_seed(3)
SIZES = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
    "attention_dropout": 0.0,
}


def build(kind: str = "Llama", attention: str = "sdpa", **changes: object) -> nn.Module:
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **changes})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    return awake(model)


def awake(model: nn.Module) -> nn.Module:
    """Weights so large that maps are not even, and gates that rank the tokens."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.mul_(20.0 if "embed" in name else 6.0)
            if name.endswith((".A", ".gate")):
                parameter.copy_(torch.tensor([0.7, -0.9]))
    return model.eval()


def converted(kind: str = "Llama", keep_window: int = 5, **options: object) -> nn.Module:
    model = convert_dynamic_mask(build(kind), keep_window, **options)
    with torch.no_grad():
        for layer in dynamic_mask_layers(model):
            layer.attention.gate.copy_(torch.tensor([0.7, -0.9]))
            layer.attention.score_proj.weight.mul_(30.0)
    return model


def tokens(batch: int, length: int, seed: int = 1) -> Tensor:
    return torch.randint(2, 32, (batch, length), generator=torch.Generator().manual_seed(seed))


def padded(batch: int, length: int) -> tuple[Tensor, Tensor]:
    words, mask = tokens(batch, length), torch.ones(batch, length, dtype=torch.long)
    mask[1, :4] = 0
    return words, mask


def close(ours: Tensor, theirs: Tensor, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_this_doge_is_the_one_that_sees_no_future(attention: str) -> None:
    """Before their fix, sdpa showed it: the check of our numbers would then be none."""
    model = build("Doge", attention, keep_window_size=5)
    words = tokens(1, 14)
    changed = words.clone()
    changed[:, -1] = (words[:, -1] + 7) % 30 + 2
    with torch.no_grad():
        close(model(changed).logits[:, :-1], model(words).logits[:, :-1])


@pytest.mark.parametrize("window", [5, 64])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_doge_computes_the_same(attention: str, window: int) -> None:
    model = build("Doge", attention, keep_window_size=window, attention_bias=True)
    # No word twice: its values in the first layer would be the same, and Doge's ties fall anyhow.
    words = torch.stack([torch.randperm(30, generator=GENERATOR)[:17] + 2 for _ in range(2)])
    mask = padded(2, 17)[1]
    ours = convert_doge(copy.deepcopy(model))
    with torch.no_grad():
        before = model(input_ids=words, attention_mask=mask).logits
        after = ours(input_ids=words, attention_mask=mask).logits
    close(after[0], before[0])
    close(after[1, 4:], before[1, 4:])
    model.double()
    ours.double()
    for one in (model, ours):
        one.zero_grad()
        one(input_ids=words, labels=words).loss.backward()
    # Doge's eager softmax is in float32 whatever the model is in.
    tolerance = 1e-8 if attention == "sdpa" else 1e-4
    for old, new in zip(model.model.layers, dynamic_mask_layers(ours), strict=True):
        layer = new.attention
        close(layer.gate.grad, old.self_attn.A.grad, tolerance)
        close(layer.score_proj.weight.grad, old.self_attn.dt_proj.weight.grad, tolerance)
        close(layer.v_proj.weight.grad, old.self_attn.v_proj.weight.grad, tolerance)
        close(layer.q_proj.weight.grad, old.self_attn.q_proj.weight.grad, tolerance)


def test_doge_generates_the_same_with_the_cache_that_forgets() -> None:
    model = build("Doge", keep_window_size=5)
    words, mask = padded(2, 9)
    call = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
    theirs = model.generate(words, **call)
    ours = convert_doge(model)
    assert torch.equal(ours.generate(words, **call), theirs)
    cache = dynamic_mask_cache(ours)
    assert torch.equal(ours.generate(words, cache=cache, **call), theirs)
    assert cache.get_seq_length() == 20
    assert cache.layers[0].keys.shape[2] == 5


@pytest.mark.parametrize("cache", ["dynamic", "static", "forgets"])
def test_generating_with_a_cache_is_generating_without(cache: str) -> None:
    model = converted()
    words, mask = padded(2, 7)
    call = {"attention_mask": mask, "max_new_tokens": 10, "do_sample": False}
    whole = model.generate(words, use_cache=False, **call)
    if cache == "forgets":
        kept = dynamic_mask_cache(model)
        found = model.generate(words, cache=kept, **call)
        beams = {**call, "num_beams": 3}
        assert torch.equal(
            model.generate(words, cache=dynamic_mask_cache(model), **beams),
            model.generate(words, **beams),
        )
    else:
        found = model.generate(words, cache_implementation=cache, disable_compile=True, **call)
    assert torch.equal(whole, found)


def test_prefill_in_pieces_is_prefill_at_once() -> None:
    model = converted(layers=[1])
    words = tokens(2, 23)
    with torch.no_grad():
        whole = model(words).logits
        for cache in (transformers.DynamicCache(), dynamic_mask_cache(model)):
            parts = [model(part, cache=cache).logits for part in words.split([9, 1, 6, 7], 1)]
            close(torch.cat(parts, 1), whole)
    kept = dynamic_mask_cache(model)
    with torch.no_grad():
        model(words, cache=kept)
    assert [layer.keys.shape[2] for layer in kept.layers] == [23, 5]
    assert kept.get_seq_length() == 23
    with pytest.raises(ValueError, match="tokens_to_remove: expected 0"):
        kept.crop(-2)
    kept.batch_repeat_interleave(2)
    kept.batch_select_indices(torch.tensor([0, 2]))
    with torch.no_grad():
        model(words[:, :1], cache=kept)
    kept.reset()
    assert kept.get_seq_length() == 0


@pytest.mark.parametrize("kind", ["Llama", "Mistral", "Qwen2", "Qwen3"])
def test_training_saving_and_loading(kind: str, tmp_path: Path) -> None:
    model = converted(kind)
    words = tokens(4, 12)
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=3e-3)
    losses = []
    for _ in range(8):
        loss = model(input_ids=words, labels=words).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.any()), name
    model.eval().save_pretrained(tmp_path)
    again = load_dynamic_mask(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(words).logits, model(words).logits)


def test_a_pretrained_model_starts_as_it_was() -> None:
    model = build()
    words, mask = padded(2, 12)
    with torch.no_grad():
        before = model(words, attention_mask=mask).logits
        convert_dynamic_mask(model, 12)
        after = model(words, attention_mask=mask).logits
    difference = (after - before)[mask.bool()].abs().max()
    assert 0 < float(difference) < 0.2 * float(before.std())


def test_padding_does_not_matter_and_documents_packed_together_are_apart() -> None:
    model = converted()
    words, mask = padded(2, 15)
    with torch.no_grad():
        found = model(words, attention_mask=mask).logits
        close(found[1:, 4:], model(words[1:, 4:]).logits)
        place = torch.cat([torch.arange(8), torch.arange(7)])[None]
        packed = model(words[:1], position_ids=place, use_cache=False).logits
        close(packed[:, :8], model(words[:1, :8]).logits)
        close(packed[:, 8:], model(words[:1, 8:]).logits)


def test_models_that_cannot_be_converted(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="model: expected attention of one of the classes"):
        convert_dynamic_mask(nn.Linear(2, 2), 5)
    with pytest.raises(ValueError, match="found none"):
        convert_dynamic_mask(converted(), 5)
    with pytest.raises(ValueError, match="layers: expected some of the layers 0 to 1"):
        convert_dynamic_mask(build(), 5, layers=[2])
    with pytest.raises(ValueError, match="attention_dropout 0"):
        convert_dynamic_mask(build(attention_dropout=0.1), 5)
    with pytest.raises(ValueError, match="keep_window: expected"):
        convert_dynamic_mask(build(), 0)
    with pytest.raises(ValueError, match="expected attention of Doge"):
        convert_doge(build())
    with pytest.raises(ValueError, match="model: expected one with dynamic mask attention"):
        dynamic_mask_cache(build())
    build().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="folder: expected a model of convert_dynamic_mask"):
        load_dynamic_mask(tmp_path)
