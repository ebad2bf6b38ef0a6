"""The regularizer on real models: same loss and gradients as from dense float64 maps."""

import contextlib
import math

import pytest
import torch
from transformers import (
    AlbertConfig,
    AlbertModel,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from attending.core import reference
from attending.losses.entropy_regularization import entropy_regularization
from attending.losses.entropy_regularizer import EntropyRegularizer
from attending.taps import TapError, tap


def llama(**changes) -> LlamaForCausalLM:
    sizes = {
        "vocab_size": 50,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    return LlamaForCausalLM(LlamaConfig(**(sizes | changes)))


def gpt2() -> GPT2LMHeadModel:
    sizes = {"vocab_size": 50, "n_embd": 24, "n_layer": 2, "n_head": 3, "n_positions": 64}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))


def spread(model):
    """Larger weights, so that the maps are not all even."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)
    return model.double()


def dense_loss(model, inputs, regularizer, padding=None):
    """From the dense float64 map of every call."""
    with tap(model) as calls:
        model(**inputs)
    entropies, tops = [], []
    for call in calls:
        dense = reference.attention_map(
            call.query, call.key, call.attn_mask, call.is_causal, call.scale, call.enable_gqa
        )
        entropies.append(reference.entropy(dense))
        keys = torch.full(entropies[-1].shape, float(call.key_length), dtype=torch.float64)
        if regularizer.row_max == "log_visible":
            keys = dense.visible.sum(-1).double().clamp_min(1)
        tops.append(keys.log())
    loss = entropy_regularization(
        entropies,
        list(regularizer.thresholds),
        max_entropy=tops,
        tolerance=regularizer.tolerance,
        semantics=regularizer.semantics,
        query_mask=padding,
    )
    return regularizer.weight * loss


def gradients(loss, *modules):
    parameters = [p for module in modules for p in module.parameters()]
    return torch.autograd.grad(loss, parameters, allow_unused=True)


def assert_same(got, expected):
    for one, other in zip(got, expected, strict=True):
        if one is None or other is None:
            # The map of the last layer never meets the head of the model.
            assert one is None or not one.any()
            assert other is None or not other.any()
        else:
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("build", [llama, gpt2])
@pytest.mark.parametrize("semantics", ["paper", "official"])
@pytest.mark.parametrize("row_max", ["log_T", "log_visible"])
@pytest.mark.parametrize("padded", [None, "left", "right"])
def test_loss_and_gradients_are_those_of_the_dense_maps(build, semantics, row_max, padded):
    model = spread(build()).eval()  # eval: GPT-2 would drop other weights the second time
    inputs = {"input_ids": torch.randint(0, 50, (2, 11))}
    padding = None
    if padded is not None:
        hidden = slice(0, 4) if padded == "left" else slice(7, 11)
        mask = torch.ones(2, 11, dtype=torch.long)
        mask[1, hidden] = 0
        inputs["attention_mask"] = mask
        padding = mask.bool()
    regularizer = EntropyRegularizer.for_model(
        model, inputs, weight=0.3, tolerance=0.02, semantics=semantics, row_max=row_max
    ).double()
    expected = dense_loss(model, inputs, regularizer, padding)
    with regularizer.watch(model):
        model(**inputs)
    loss = regularizer.loss()
    assert loss > 0
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0.0)
    assert_same(gradients(loss, model, regularizer), gradients(expected, model, regularizer))


@pytest.mark.parametrize("build", [llama, gpt2])
def test_gradients_of_query_and_key(build):
    """Held to the map of each call, with nothing of the model in between."""
    model = spread(build()).eval()
    inputs = {"input_ids": torch.randint(0, 50, (2, 9))}
    regularizer = EntropyRegularizer.for_model(model, inputs, weight=1.0, tolerance=0.0).double()
    with tap(model) as calls, regularizer.watch(model):
        model(**inputs)
    leaves = [tensor for call in calls for tensor in (call.query, call.key)]
    got = torch.autograd.grad(regularizer.loss(), leaves, retain_graph=True)
    fresh = [leaf.detach().requires_grad_() for leaf in leaves]
    entropies = []
    for call, query, key in zip(calls, fresh[::2], fresh[1::2], strict=True):
        key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
        scores = query @ key.transpose(-1, -2) * call.softmax_scale
        scores = scores.masked_fill(~torch.ones(9, 9, dtype=torch.bool).tril(), -math.inf)
        logs = scores.log_softmax(-1)
        entropies.append(-(logs.exp() * logs.clamp_min(-1e300)).sum(-1))
    expected = entropy_regularization(
        entropies, list(regularizer.thresholds), max_entropy=math.log(9), tolerance=0.0
    )
    # The second layer's query depends on the first layer's through the values: only the last
    # layer's gradients are those of its own entropies alone.
    want = torch.autograd.grad(expected, fresh)
    for one, other in list(zip(got, want, strict=True))[2:]:
        assert one.abs().max() > 1e-6
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_training_moves_the_entropy_into_the_band():
    model = spread(llama()).float().train()
    batch = {"input_ids": torch.randint(0, 50, (4, 16))}
    regularizer = EntropyRegularizer.for_model(
        model, batch, weight=1.0, tolerance=0.05, initial_threshold=0.3
    )
    assert model.training
    regularizer.thresholds.requires_grad_(False)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        with regularizer.watch(model):
            model(**batch)
        loss = regularizer.loss()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.1 * losses[0]


def test_no_map_is_kept_and_the_model_is_left_as_it_was():
    tokens = 192
    model = llama()
    inputs = {"input_ids": torch.randint(0, 50, (1, tokens))}
    regularizer = EntropyRegularizer.for_model(model, inputs, weight=1.0)
    sizes = []

    def note(tensor):
        sizes.append(tensor.numel())
        return tensor

    before = model(**inputs).logits
    with regularizer.watch(model), torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        watched = model(**inputs).logits
    assert torch.equal(before, watched)
    assert torch.equal(before, model(**inputs).logits)
    assert not any(module._forward_hooks for module in model.modules())
    heads = 4
    assert max(sizes) < heads * tokens * tokens
    regularizer.loss().backward()
    assert model.model.layers[0].self_attn.q_proj.weight.grad.abs().max() > 0


def test_gradient_checkpointing_gives_the_same_gradients_or_is_refused():
    model = spread(llama()).train()
    inputs = {"input_ids": torch.randint(0, 50, (2, 10)), "labels": torch.randint(0, 50, (2, 10))}
    regularizer = EntropyRegularizer.for_model(model, inputs, weight=10.0, tolerance=0.01).double()

    def run():
        with regularizer.watch(model):
            outputs = model(**inputs, use_cache=False)
        return gradients(outputs.loss + regularizer.loss(), model, regularizer)

    plain = run()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert_same(run(), plain)
    # Backward within the block: the handlers are still there and must not count anything twice.
    with regularizer.watch(model):
        outputs = model(**inputs, use_cache=False)
        inside = gradients(outputs.loss + regularizer.loss(), model, regularizer)
    assert_same(inside, plain)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(ValueError, match="use_reentrant"), regularizer.watch(model):
        model(**inputs, use_cache=False)
    with torch.no_grad(), regularizer.watch(model):  # only a number is asked for
        model(**inputs, use_cache=False)
    assert regularizer.loss() > 0


def test_several_forwards_are_one_larger_batch():
    model = spread(gpt2()).eval()
    ids = torch.randint(0, 50, (4, 8))
    for semantics in ("paper", "official"):
        regularizer = EntropyRegularizer.for_model(
            model, ids, weight=1.0, tolerance=0.0, semantics=semantics
        )
        with regularizer.watch(model):
            model(ids)
        whole = regularizer.loss()
        with regularizer.watch(model):
            model(ids[:1])
            model(ids[1:])
        torch.testing.assert_close(regularizer.loss(), whole)


def test_encoder_decoder_counts_self_attention_only():
    config = T5Config(
        vocab_size=50, d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2,
        decoder_start_token_id=0,
    )  # fmt: skip
    model = T5ForConditionalGeneration(config).eval()
    inputs = {
        "input_ids": torch.randint(0, 50, (2, 9)),
        "decoder_input_ids": torch.randint(0, 50, (2, 5)),
        "attention_mask": torch.tensor([[1] * 9, [1] * 6 + [0] * 3]),
    }
    regularizer = EntropyRegularizer.for_model(model, inputs, weight=1.0, tolerance=0.0)
    assert len(regularizer.layers) == 4
    assert not any("EncDec" in name for name in regularizer.layers)
    with regularizer.watch(model):
        model(**inputs)
    model.set_attn_implementation("eager")
    maps = model(**inputs, output_attentions=True)
    entropies = regularizer.head_entropies()
    for name, got in entropies.items():
        side = maps.encoder_attentions if "encoder" in name.split(".")[0] else None
        dense = (side if side is not None else maps.decoder_attentions)[
            int(name.split("block.")[1][0])
        ]
        rows = -(dense * dense.clamp_min(1e-30).log()).sum(-1)
        if side is not None:
            rows = rows.transpose(0, 1)[:, inputs["attention_mask"].bool()]
            torch.testing.assert_close(got, rows.mean(-1), rtol=1e-4, atol=1e-5)
        else:
            torch.testing.assert_close(got, rows.mean((0, 2)), rtol=1e-4, atol=1e-5)


def test_a_layer_that_runs_several_times_has_thresholds_for_each():
    config = AlbertConfig(
        vocab_size=50, hidden_size=16, embedding_size=8, intermediate_size=16,
        num_attention_heads=2, num_hidden_layers=3,
    )  # fmt: skip
    model = AlbertModel(config).eval()
    ids = torch.randint(0, 50, (1, 6))
    regularizer = EntropyRegularizer.for_model(model, ids, weight=1.0, tolerance=0.0)
    assert [name.rpartition("#")[2] for name in regularizer.layers[1:]] == ["1", "2"]
    with regularizer.watch(model):
        model(ids)
    assert len(regularizer.head_entropies()) == 3


def test_bfloat16_and_autocast():
    model = BertModel(
        BertConfig(
            vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
            num_attention_heads=4,
        )
    ).eval()  # fmt: skip
    ids = torch.randint(0, 50, (2, 12))
    regularizer = EntropyRegularizer.for_model(model, ids, weight=1.0, tolerance=0.0)
    with regularizer.watch(model):
        model(ids)
    expected = regularizer.loss()
    for half in (torch.autocast("cpu", torch.bfloat16), contextlib.nullcontext(model.bfloat16())):
        with half, regularizer.watch(model):
            model(ids)
        assert regularizer.loss().dtype == torch.float32
        torch.testing.assert_close(regularizer.loss(), expected, rtol=0.02, atol=0.0)
        regularizer.loss().backward()


def test_explicit_query_mask_and_context_size():
    model = spread(gpt2()).eval()
    ids = torch.randint(0, 50, (2, 7))
    settings = {"weight": 1.0, "tolerance": 0.0}
    regularizer = EntropyRegularizer.for_model(model, ids, **settings).double()
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[:, :3] = False
    with regularizer.watch(model, query_mask=mask):
        model(ids)
    expected = dense_loss(model, {"input_ids": ids}, regularizer, mask)
    torch.testing.assert_close(regularizer.loss(), expected, rtol=1e-9, atol=0.0)
    with pytest.raises(ValueError, match="query_mask"), regularizer.watch(model, mask[:, 1:]):
        model(ids)
    wide = EntropyRegularizer.for_model(model, ids, context_size=64, **settings).double()
    with wide.watch(model):
        model(ids)
    entropies = torch.stack(list(wide.head_entropies().values()))
    by_hand = (entropies - 0.5 * math.log(64)).square().mean()
    torch.testing.assert_close(wide.loss(), by_hand.to(wide.loss()))


def test_state_survives_saving():
    first = EntropyRegularizer({"a": 2, "b": 3})
    with torch.no_grad():
        first.thresholds[1].fill_(0.25)
    second = EntropyRegularizer({"a": 2, "b": 3})
    second.load_state_dict(first.state_dict())
    assert second.thresholds[1].tolist() == [0.25] * 3


def test_what_cannot_work_is_refused():
    model, ids = gpt2(), torch.randint(0, 50, (1, 5))
    regularizer = EntropyRegularizer.for_model(model, ids)
    with pytest.raises(RuntimeError, match="saw no forward"):
        regularizer.loss()
    with pytest.raises(ValueError, match="has no thresholds"), regularizer.watch(model.transformer):
        model(ids)
    with pytest.raises(TapError, match="no attention call"), regularizer.watch(model):
        pass
    other = GPT2LMHeadModel(GPT2Config(n_embd=24, n_layer=2, n_head=4, vocab_size=50))
    with pytest.raises(ValueError, match="expected 3 heads"), regularizer.watch(other):
        other(ids)
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="set_attn_implementation"):
        EntropyRegularizer.for_model(model, ids)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"semantics": "sum"}, "semantics"),
        ({"row_max": "T"}, "row_max"),
        ({"context_size": 0}, "context_size"),
        ({"context_size": 8, "row_max": "log_visible"}, "context_size"),
        ({"tolerance": -1}, "tolerance"),
        ({"weight": math.nan}, "weight"),
        ({"num_heads": {}}, "num_heads"),
        ({"num_heads": {"a": 0}}, "num_heads"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        EntropyRegularizer(**({"num_heads": {"a": 2}} | settings))
