"""Within `generate`, with every cache; and under autocast."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attending.taps import AttentionCall, Proceed, tap
from tests.tap.models import llama_model, padding, t5_model, tokens, whisper_model
from tests.tap.probes import again, hotter, identity, left_as_it_was

NEW = 5
GREEDY = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}


@pytest.fixture(scope="module")
def llama() -> Any:
    torch.manual_seed(0)
    model = llama_model()
    for parameter in model.parameters():  # livelier than the initialisation: tokens differ
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.3)
    return model


def generate(model: Any, **options: Any) -> Tensor:
    options = {"attention_mask": torch.ones_like(tokens()), **GREEDY, **options}
    return model.generate(tokens(), **options)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
def test_the_identity_gives_the_same_tokens(llama: Any, cache: str, padded: bool) -> None:
    options: dict[str, Any] = {"cache_implementation": cache}
    if padded:
        options["attention_mask"] = padding().flip(1)
    plain = generate(llama, **options)
    with left_as_it_was(llama), tap(llama, identity):
        assert torch.equal(generate(llama, **options), plain)
    with tap(llama, lambda call, proceed: again(call)):
        assert torch.equal(generate(llama, **options), plain)
    with tap(llama, hotter):
        assert not torch.equal(generate(llama, **options), plain)
    assert torch.equal(generate(llama, **options), plain)


@torch.no_grad()
def test_the_keys_grow_with_the_cache(llama: Any) -> None:
    with tap(llama) as calls:
        generate(llama)
    assert len(calls) == 2 * NEW
    assert [call.forward for call in calls] == [i // 2 for i in range(2 * NEW)]
    assert [call.layer for call in calls] == [0, 1] * NEW
    assert [call.key_length for call in calls[::2]] == [7 + i for i in range(NEW)]
    assert [call.query_length for call in calls[::2]] == [7] + [1] * (NEW - 1)
    assert not any(call.is_cross for call in calls)  # more keys than queries, and still self


@torch.no_grad()
def test_a_static_cache_is_as_long_as_it_will_get(llama: Any) -> None:
    with tap(llama) as calls:
        generate(llama, cache_implementation="static")
    assert [call.key_length for call in calls[::2]][1:] == [7 + NEW - 1] * (NEW - 1)
    for step, call in enumerate(calls[2::2], start=1):
        assert call.attn_mask is not None
        assert call.attn_mask.sum(dim=-1).flatten().tolist() == [7 + step] * 2


@pytest.mark.parametrize("padded", [False, True], ids=["unmasked", "masked"])
@torch.no_grad()
def test_grouped_queries_are_shown_as_meant_when_they_are_packed(llama: Any, padded: bool) -> None:
    """With a mask, transformers folds the group into the query axis; a call shows what it means."""
    asked: list[tuple[int, ...]] = []
    function = torch.nn.functional.scaled_dot_product_attention

    class Listening(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if func is function:
                asked.append(tuple((args[0] if args else kwargs["query"]).shape))
            return func(*args, **(kwargs or {}))

    mask = padding().flip(1) if padded else torch.ones_like(tokens())
    with Listening():
        generate(llama, attention_mask=mask)
    # What this version really calls: [batch, kv_heads, group, dim] where there is a mask.
    assert set(asked[2:]) == ({(2, 2, 2, 8)} if padded else {(2, 4, 1, 8)})

    outputs: list[Tensor] = []

    def check(call: AttentionCall, proceed: Proceed) -> Tensor:
        output = proceed(call)
        if call.query_length == 1:
            outputs.append(output)
            assert call.query.shape == output.shape == (2, 4, 1, 8)
            assert call.key.shape[1] == 2
            assert call.enable_gqa
            assert call.attn_mask is None or call.attn_mask.shape[2] == 1
            torch.testing.assert_close(again(call), output)
        return output

    with tap(llama, check):
        generate(llama, attention_mask=mask)
    assert len(outputs) == 2 * (NEW - 1)

    # Passed on unchanged, the function gets the very shapes that the model asked with.
    plain = asked.copy()
    asked.clear()
    with Listening(), tap(llama, identity):
        generate(llama, attention_mask=mask)
    assert asked == plain


@torch.no_grad()
def test_a_mask_for_each_head_is_unpacked_with_the_queries() -> None:
    from types import SimpleNamespace

    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    class GroupedAttention(nn.Module):
        num_key_value_groups, is_causal = 2, True
        config = SimpleNamespace(num_attention_heads=4)

        def forward(self, query: Tensor, key: Tensor, mask: Tensor) -> Tensor:
            return sdpa_attention_forward(self, query, key, key, mask)[0]

    model = GroupedAttention()
    query, key, mask = torch.randn(2, 4, 1, 8), torch.randn(2, 2, 6, 8), torch.randn(2, 4, 1, 6)
    plain = model(query, key, mask)
    with tap(model) as calls:
        assert torch.equal(model(query, key, mask), plain)
    assert torch.equal(calls[0].query, query)
    assert calls[0].attn_mask is not None
    assert torch.equal(calls[0].attn_mask, mask)
    torch.testing.assert_close(again(calls[0]).transpose(1, 2), plain)


@torch.no_grad()
def test_a_change_to_a_packed_call_is_the_change_to_the_unpacked_one(llama: Any) -> None:
    """Heads keep their order: the same handler by way of repeated keys gives the same."""
    options = {"attention_mask": padding().flip(1)}

    def scaled_by_head(call: AttentionCall, proceed: Proceed) -> Tensor:
        factor = torch.arange(1.0, 5.0).view(1, 4, 1, 1)
        return factor * proceed(call)

    def without_groups(call: AttentionCall, proceed: Proceed) -> Tensor:
        repeat = call.num_heads // call.key.shape[1]
        return proceed(
            replace(
                call,
                key=call.key.repeat_interleave(repeat, dim=1),
                value=call.value.repeat_interleave(repeat, dim=1),
                enable_gqa=False,
            )
        )

    logits = []
    for extra in (identity, without_groups):
        with tap(llama, scaled_by_head), tap(llama, extra):
            result = generate(llama, **options, output_logits=True, return_dict_in_generate=True)
        logits.append(torch.stack(result.logits))
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("build", [t5_model, whisper_model])
@torch.no_grad()
def test_encoder_decoders_call_the_encoder_on_its_own(build: Any) -> None:
    model = build()
    source = tokens() if build is t5_model else torch.randn(2, 8, 20)
    length = 7 if build is t5_model else 10
    plain = model.generate(source, **GREEDY)
    with left_as_it_was(model), tap(model) as calls:
        watched = model.generate(source, **GREEDY)
    assert torch.equal(watched, plain)
    encoder = [call for call in calls if call.forward == 0]
    assert all("encoder." in call.name and not call.is_cross for call in encoder)
    assert len(encoder) == 2
    for call in calls[2:]:
        assert "decoder." in call.name
        assert call.is_cross == ("ncDecAttention" in call.name or "encoder_attn" in call.name)
        if call.is_cross:
            assert call.key_length == length
    own = [call.key_length for call in calls[2:] if not call.is_cross and call.layer == 0]
    assert own == list(range(own[0], own[0] + len(own)))
    assert len(calls) == 2 + 4 * len(own)


@torch.no_grad()
def test_beams_and_samples() -> None:
    torch.manual_seed(0)
    model = llama_model()
    for options in ({"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}):
        torch.manual_seed(1)
        plain = generate(model, **options)
        torch.manual_seed(1)
        with tap(model, identity):
            assert torch.equal(generate(model, **options), plain)


@pytest.mark.parametrize("build", ["llama", "t5", "unet"])
@torch.no_grad()
def test_autocast(build: str) -> None:
    from tests.tap import diffusion_models, models

    torch.manual_seed(0)
    example = (diffusion_models if build == "unet" else models).__dict__[build]()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = example.forward()
        with left_as_it_was(example.model), tap(example.model) as calls:
            watched = example.forward()
        assert torch.equal(watched, plain)
        assert len(calls) == len(example.expected)
        assert any(call.value.dtype == torch.bfloat16 for call in calls)
        with tap(example.model, lambda call, proceed: again(call)):
            assert torch.equal(example.forward(), plain)
    outside = example.forward()
    assert outside.dtype == torch.float32
    assert not torch.equal(outside, plain.float())


@pytest.mark.slow
def test_what_generate_compiles_itself_is_seen(llama: Any) -> None:
    """As it does on a GPU with a static cache; here by an inner switch, and without code."""
    from transformers import CompileConfig

    config = CompileConfig(backend="eager")
    config._compile_all_devices = True
    options = {"cache_implementation": "static", "compile_config": config}
    plain = generate(llama, **options)
    seen: list[str] = []

    def handler(call: AttentionCall, proceed: Proceed) -> Tensor:
        seen.append(call.name)
        return proceed(call)

    with tap(llama, handler):
        assert torch.equal(generate(llama, **options), plain)
    assert seen == [f"model.layers.{i}.self_attn" for i in range(2)] * NEW
    assert torch.equal(generate(llama, **options), plain)
