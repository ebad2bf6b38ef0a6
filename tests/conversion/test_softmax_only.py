"""GPT-2 without its nonlinearities: what is left of it, generation, folding, saving."""

import copy

import pytest
import torch
from safetensors.torch import load_model
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, GPT2Model

from attending.conversion.softmax_only import fold_for_inference, reduce_nonlinearities
from attending.losses.entropy_regularizer import EntropyRegularizer
from attending.taps import tap

VARIANTS = {
    "SM+LN+R": {"layer_norm": True, "feed_forward": "relu"},
    "SM+LN": {"layer_norm": True, "feed_forward": "linear"},
    "SM+LN fused": {"layer_norm": True, "feed_forward": "fused"},
    "SM+G": {"feed_forward": "keep"},
    "SM+R": {"feed_forward": "relu"},
    "SM": {"feed_forward": "linear"},
    "SM weight": {"feed_forward": "linear", "norm": "weight"},
    "SM spectral": {"feed_forward": "fused", "norm": "spectral"},
    "SM+ScFFN": {"feed_forward": "scaled"},
    "SM+ScFuFFN": {},
    "SM(t)+ScFuFFN": {"initial_temperature": 0.7},
    "SM(t)+LN+G": {"layer_norm": True, "feed_forward": "keep", "initial_temperature": 2.0},
}


def gpt2(dropout: float = 0.0, **changes) -> GPT2LMHeadModel:
    torch.manual_seed(1)
    sizes = {"vocab_size": 40, "n_embd": 24, "n_layer": 2, "n_head": 3, "n_positions": 16}
    drops = {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout}
    config = GPT2Config(**(sizes | drops | changes), bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config).double()


def stirred(model):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(noise * 0.1)
    return model


def by_hand(model, settings, ids):
    """The forward of the paper, from the weights of the untouched model; float64."""
    body, keep = model.transformer, settings.get("layer_norm", False)
    kind = settings.get("feed_forward", "scaled_fused")
    act = {"keep": body.h[0].mlp.act, "relu": torch.relu}.get(kind, lambda x: x)
    heads = body.config.n_head
    x = body.wte(ids) + body.wpe.weight[: ids.shape[1]]
    causal = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
    for block in body.h:
        y = block.ln_1(x) if keep else x
        query, key, value = (
            part.unflatten(-1, (heads, -1)).transpose(1, 2)
            for part in block.attn.c_attn(y).chunk(3, -1)
        )
        scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
        scores = scores / settings.get("initial_temperature", 1.0)
        p = scores.masked_fill(~causal, -torch.inf).softmax(-1)
        x = x + block.attn.c_proj((p @ value).transpose(1, 2).flatten(2))
        y = block.ln_2(x) if keep else x
        x = x + block.mlp.c_proj(act(block.mlp.c_fc(y)))
    return model.lm_head(body.ln_f(x) if keep else x)


@pytest.mark.parametrize("name", [name for name in VARIANTS if "spectral" not in name])
def test_a_variant_is_its_definition(name: str) -> None:
    original = stirred(gpt2())
    ids = torch.randint(0, 40, (2, 9))
    expected = by_hand(original, VARIANTS[name], ids)
    model = reduce_nonlinearities(copy.deepcopy(original), **VARIANTS[name])
    assert type(model) is GPT2LMHeadModel
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-9, atol=1e-9)
    modules = [type(module).__name__ for module in model.modules()]
    assert ("LayerNorm" in modules) == VARIANTS[name].get("layer_norm", False)
    assert ("NewGELUActivation" in modules) == (VARIANTS[name].get("feed_forward") == "keep")


@pytest.mark.parametrize("name", VARIANTS)
def test_training_generation_and_folding(name: str) -> None:
    model = reduce_nonlinearities(gpt2(dropout=0.1), **VARIANTS[name])
    ids = torch.randint(1, 40, (2, 8))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(3):
        model(ids, labels=ids).loss.backward()
        missing = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
        missing = [n for n in missing if "wpe" not in n and "log_temperature" not in n]
        assert missing == []
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    stirred(model)
    padded = {
        "input_ids": torch.cat([torch.zeros(2, 3, dtype=torch.long), ids[:, :5]], 1),
        "attention_mask": torch.tensor([[0] * 3 + [1] * 5] * 2),
    }
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    generated = model.generate(ids[:, :5], **settings)
    assert torch.equal(generated, model.generate(ids[:, :5], use_cache=False, **settings))
    left = model.generate(**padded, **settings)  # positions are those of the text, not the batch
    assert torch.equal(left[:, 3:], generated)
    before = model(ids).logits
    if VARIANTS[name].get("feed_forward") in ("keep", "relu") and "(t)" not in name:
        with pytest.raises(ValueError, match="model: expected"):
            fold_for_inference(model)
        return
    fold_for_inference(model)
    torch.testing.assert_close(model(ids).logits, before, rtol=1e-10, atol=1e-10)
    assert torch.equal(model.generate(ids[:, :5], **settings), generated)
    assert not any("log_temperature" in n for n, _ in model.named_parameters())


def test_longer_than_trained_is_refused() -> None:
    model = reduce_nonlinearities(gpt2(), initial_temperature=1.0)
    attention = model.transformer.h[0].attn
    hidden = torch.randn(1, 3, 24, dtype=torch.float64)
    with pytest.raises(ValueError, match="learned for 16"):
        attention(hidden, position_ids=torch.tensor([[14, 15, 16]]))
    cache = model(torch.randint(0, 40, (1, 14))).cache
    with pytest.raises(ValueError, match="learned for 16"):  # positions from the cache alone
        attention(hidden, cache=cache)
    attention(hidden[:, :2], cache=cache)


def test_tap_checkpointing_and_regularizer_see_a_changed_model() -> None:
    model = reduce_nonlinearities(stirred(gpt2()), initial_temperature=0.5).train()
    ids = torch.randint(0, 40, (2, 8))
    with tap(model) as calls:
        model(ids)
    assert [call.layer for call in calls] == [0, 1]
    regularizer = EntropyRegularizer.for_model(model, ids, weight=1.0, tolerance=0.0).double()

    def gradients():
        with regularizer.watch(model):
            loss = model(ids, labels=ids, use_cache=False).loss
        return torch.autograd.grad(loss + regularizer.loss(), list(model.parameters()))

    plain = gradients()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for one, other in zip(gradients(), plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    temperatures = [n for n, _ in model.named_parameters() if "log_temperature" in n]
    assert len(temperatures) == 2


def test_saved_and_loaded(tmp_path) -> None:
    settings = {"initial_temperature": 0.5}
    model = stirred(reduce_nonlinearities(gpt2(), **settings))
    model.save_pretrained(tmp_path)
    again = reduce_nonlinearities(gpt2(), **settings)
    load_model(again, tmp_path / "model.safetensors")
    ids = torch.randint(0, 40, (1, 6))
    assert torch.equal(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layer_norm": True}, "feed_forward: expected"),
        ({"feed_forward": "gelu"}, "feed_forward: expected one of"),
        ({"feed_forward": "relu", "norm": "weight"}, "norm: expected None"),
        ({"norm": "batch"}, "norm: expected"),
        ({"initial_temperature": -1.0}, "initial: expected"),
    ],
)
def test_bad_settings_are_named_and_change_nothing(settings: dict, message: str) -> None:
    model = gpt2()
    before = str(model)
    with pytest.raises(ValueError, match=message):
        reduce_nonlinearities(model, **settings)
    assert str(model) == before


def test_other_models_and_changed_ones_are_refused() -> None:
    bert = BertModel(BertConfig(hidden_size=8, num_attention_heads=2, intermediate_size=8))
    with pytest.raises(ValueError, match="model: expected a GPT-2"):
        reduce_nonlinearities(bert)
    with pytest.raises(ValueError, match="add_cross_attention"):
        reduce_nonlinearities(gpt2(add_cross_attention=True))
    with pytest.raises(ValueError, match="changed before"):
        reduce_nonlinearities(reduce_nonlinearities(gpt2()))
    body = GPT2Model(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=10))
    assert reduce_nonlinearities(body) is body
