"""VAR in a real class of vision-language model: against maps, padded, decoding, and no traces."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import attending as at
from attending.interventions.attention_calibration import AttentionCalibration, calibrate_attention
from attending.interventions.intervention import Intervention, InterventionWarning
from attending.interventions.settings import load_settings, save_settings
from attending.interventions.sink_dimensions import find_sink_dimensions, sink_value
from attending.interventions.vision_language import image_token_mask, language_layers
from attending.interventions.visual_attention_redistribution import (
    VisualAttentionRedistribution,
    redistribute_attention,
    select_image_centric_heads,
)
from attending.probes.outliers import find_outliers
from tests.interventions.vision_language_models import (
    BOS,
    IMAGE,
    PATCHES,
    batch_of,
    prompt,
    tiny_intern_vl,
    tiny_llava,
    tiny_qwen2_vl,
)
from tests.tap.probes import left_as_it_was

METHOD = VisualAttentionRedistribution((25, 26), scale_tau=True, skip_first=1, tau=18.0)
NEW = 4


@pytest.fixture(scope="module")
def llava() -> Any:
    return tiny_llava()


def mapped(call: at.taps.AttentionCall) -> tuple[Tensor, Tensor]:
    """The map of a call of the model, and the values of its heads."""
    key, value = (
        tensor.repeat_interleave(call.num_heads // tensor.shape[1], 1).double()
        for tensor in (call.key, call.value)
    )
    scores = call.softmax_scale * call.query.double() @ key.mT
    if call.attn_mask is not None:
        scores = scores.masked_fill(~call.attn_mask, -torch.inf)
    elif call.is_causal:
        scores = scores.masked_fill(~torch.ones(scores.shape[2:]).bool().tril(), -torch.inf)
    return scores.softmax(-1), value


@torch.no_grad()
@pytest.mark.parametrize("convention", ["paper", "official-code"])
def test_every_layer_is_what_its_own_map_says(llava: Any, convention: Any) -> None:
    inputs = batch_of(prompt(3, 4, spans=2), prompt(1, 6))
    ids = inputs["input_ids"]
    image, real = ids == IMAGE, inputs["attention_mask"].bool()
    last = torch.arange(ids.shape[1]) > (torch.arange(ids.shape[1]) * image).amax(1, keepdim=True)
    asking = real & (~image if convention == "paper" else last)
    hidden: dict[int, Tensor] = {}
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, i=i: hidden.update({i: args[0]}))
        for i, layer in enumerate(language_layers(llava).values())
    ]
    selected_rows = []

    def compare(call: at.taps.AttentionCall, proceed: at.taps.Proceed) -> Tensor:
        output = proceed(call)
        if "language_model" not in call.name:
            return output
        attention, value = mapped(call)
        phi = sink_value(hidden[call.layer], METHOD.sink_dimensions)
        threshold = METHOD.tau * 32**0.5 / 64
        sinks = phi > threshold if convention == "official-code" else phi >= threshold
        selected = select_image_centric_heads(attention, image, sinks, query_mask=asking)
        if call.layer in (0, 4):
            selected &= False
        selected_rows.append(int(selected.sum()))
        edited = redistribute_attention(attention, image, sinks, selected) @ value
        rows = real[:, None, :, None].expand_as(output)
        torch.testing.assert_close(output.double()[rows], edited[rows], atol=1e-4, rtol=1e-4)
        return output

    method = replace(METHOD, convention=convention)
    with at.tap(llava, compare), method(llava) as run:
        llava(**inputs)
    for hook in hooks:
        hook.remove()
    assert run.stats["edited_rows"] == sum(selected_rows) > 0
    assert [bool(rows) for rows in selected_rows] == [False, True, True, True, False]
    assert [run.layers[i].edited_rows for i in (1, 2, 3)] == selected_rows[1:4]
    assert run.stats["calls"] == 3
    assert {layer for layer, _ in run.heads} == {1, 2, 3}
    assert "image tokens" in str(run)


@torch.no_grad()
def test_a_padded_batch_is_what_its_sequences_are(llava: Any) -> None:
    prompts = [prompt(3, 4), prompt(1, 2), prompt(0, 6)]
    together = batch_of(*prompts)
    with METHOD(llava) as run:
        logits = llava(**together).logits
        for index, tokens in enumerate(prompts):
            inputs = {**batch_of(tokens), "pixel_values": together["pixel_values"][index, None]}
            alone = llava(**inputs).logits[0]
            torch.testing.assert_close(logits[index, -len(tokens) :], alone, atol=1e-3, rtol=1e-3)
            plain = batch_of(tokens)["input_ids"]
            assert torch.equal(image_token_mask(llava, plain), plain == IMAGE)
    assert run.edited_rows > 0


@torch.no_grad()
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_decoding_is_a_forward_over_the_whole(llava: Any, cache: str) -> None:
    inputs = batch_of(prompt(3, 4), prompt(1, 2))
    length = inputs["input_ids"].shape[1]
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
    with METHOD(llava) as run:
        found = llava.generate(
            **inputs,
            **options,
            cache_implementation=cache,
            suppress_tokens=[IMAGE],
            output_logits=True,
            return_dict_in_generate=True,
        )
    assert run.edited_calls > 3
    sequences = found.sequences
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, NEW, dtype=torch.long)], 1)
    whole = {**inputs, "input_ids": sequences, "attention_mask": mask}
    with METHOD(llava, prompt_length=length):
        logits = llava(**whole).logits[:, length - 1 : -1]
    stepwise = torch.stack(found.logits, 1)
    torch.testing.assert_close(stepwise, logits, atol=1e-3, rtol=1e-3)
    plain = llava(**whole).logits[:, length - 1 : -1]
    assert not torch.allclose(stepwise, plain, atol=1e-2)


@torch.no_grad()
@pytest.mark.parametrize("make", [tiny_qwen2_vl, tiny_intern_vl])
def test_other_vision_language_models(make: Any) -> None:
    model, inputs = make()
    model(**inputs)  # transformers leaves something of its own the first time
    length = inputs["input_ids"].shape[1]
    method = replace(METHOD, tau=14.0).calibrate(model, inputs)
    with left_as_it_was(model), method(model) as run:
        found = model.generate(
            **inputs,
            max_new_tokens=NEW,
            min_new_tokens=NEW,
            do_sample=False,
            suppress_tokens=[IMAGE, 2, 3, 4],
            output_logits=True,
            return_dict_in_generate=True,
        )
    assert run.edited_rows
    assert run.layers[1].image_tokens == PATCHES
    ids = found.sequences
    whole = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "mm_token_type_ids" in whole:
        whole["mm_token_type_ids"] = (ids == IMAGE).int()
    with method(model, prompt_length=length):
        logits = model(**whole).logits[:, length - 1 : -1]
    torch.testing.assert_close(torch.stack(found.logits, 1), logits, atol=1e-3, rtol=1e-3)


@torch.no_grad()
def test_beams_samples_and_several_sequences_at_once(llava: Any) -> None:
    inputs = batch_of(prompt(3, 4), prompt(1, 2))
    options = {"max_new_tokens": NEW, "do_sample": False}
    with METHOD(llava):
        first = llava.generate(**inputs, **options)
        beams = llava.generate(**inputs, **options, num_beams=3, num_return_sequences=2)
        assert torch.equal(llava.generate(**inputs, **options), first)
    assert beams.shape[0] == 4
    one, other = (
        {**batch_of(tokens), "pixel_values": inputs["pixel_values"][i, None]}
        for i, tokens in enumerate([prompt(3, 4), prompt(1, 2)])
    )
    following = torch.tensor([[9]])
    with METHOD(llava):
        caches = [llava(**each, use_cache=True).past_key_values for each in (one, other)]
        mixed = [llava(following, cache=cache).logits for cache in caches]
    with METHOD(llava):
        for each, logits in zip((one, other), mixed, strict=True):
            cache = llava(**each, use_cache=True).past_key_values
            assert torch.equal(llava(following, cache=cache).logits, logits)


@torch.no_grad()
def test_embeddings_need_a_mask(llava: Any) -> None:
    inputs = batch_of(prompt(3, 4))
    image = inputs["input_ids"] == IMAGE
    embeddings = llava.get_input_embeddings()(inputs["input_ids"])
    features = llava.get_image_features(inputs["pixel_values"]).pooler_output[0]
    embeddings = embeddings.masked_scatter(image[..., None], features)
    with METHOD(llava):
        expected = llava(**inputs).logits
    with METHOD(llava, image_mask=image) as run:
        found = llava(inputs_embeds=embeddings).logits
    torch.testing.assert_close(found, expected)
    assert run.edited_rows
    with (
        pytest.raises(ValueError, match="image_mask: expected a mask of the image tokens"),
        METHOD(llava),
    ):
        llava(inputs_embeds=embeddings)
    with (
        pytest.raises(ValueError, match=r"image_mask: .*17 tokens.*20"),
        METHOD(llava, image_mask=torch.ones(1, 20, dtype=torch.bool)),
    ):
        llava(inputs_embeds=embeddings)
    with (
        pytest.raises(ValueError, match="image_mask: expected one row"),
        METHOD(llava, image_mask=torch.ones(3, 17, dtype=torch.bool)),
    ):
        llava(inputs_embeds=embeddings)


@torch.no_grad()
def test_it_leaves_no_trace_and_can_be_entered_again(llava: Any) -> None:
    inputs = batch_of(prompt(3, 4), prompt(1, 2))
    before = llava(**inputs).logits
    block = METHOD(llava)
    assert isinstance(METHOD, Intervention)
    results = []
    with left_as_it_was(llava):
        for _ in range(2):
            with block as run:
                results.append(llava(**inputs).logits)
            assert run.stats["calls"] == 3
        with pytest.raises(AttributeError), block:
            llava(**inputs).nothing()
    assert torch.equal(*results)
    assert not torch.allclose(results[0], before, atol=1e-2)
    assert torch.equal(llava(**inputs).logits, before)


@torch.no_grad()
def test_sinks_can_be_spared(llava: Any) -> None:
    inputs = batch_of(prompt(3, 4), prompt(1, 2))
    layers = []

    def spare(layer: int, sinks: Tensor, image: Tensor) -> Tensor:
        layers.append(layer)
        assert torch.equal(image, inputs["input_ids"] == IMAGE)
        assert bool((sinks & image).any())
        return sinks & ~image

    with pytest.warns(InterventionWarning), METHOD(llava, change_sinks=spare) as run:
        expected = llava(**inputs).logits
    nothing = METHOD(llava, change_sinks=lambda _, sinks, image: torch.zeros_like(sinks))
    with pytest.warns(InterventionWarning), nothing as none:
        llava.generate(**inputs, max_new_tokens=2)
    assert layers == [1, 2, 3]
    assert run.edited_rows == none.edited_rows == 0
    assert torch.equal(llava(**inputs).logits, expected)


@torch.no_grad()
def test_it_nests(llava: Any) -> None:
    inputs = batch_of(prompt(3, 4))
    image = inputs["input_ids"] == IMAGE
    inner = replace(METHOD, move_fraction=0.3, skip_last=0)
    outer = replace(METHOD, move_fraction=0.5, min_non_sink_ratio=0.6, skip_last=0)
    hidden: dict[int, Tensor] = {}
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, i=i: hidden.update({i: args[0]}))
        for i, layer in enumerate(language_layers(llava).values())
    ]
    changed = []

    def compare(call: at.taps.AttentionCall, proceed: at.taps.Proceed) -> Tensor:
        output = proceed(call)
        if "language_model" in call.name and call.layer:
            attention, value = mapped(call)
            sinks = sink_value(hidden[call.layer], METHOD.sink_dimensions) >= 18 * 32**0.5 / 64
            for method in (outer, inner):
                selected = select_image_centric_heads(
                    attention,
                    image,
                    sinks,
                    query_mask=~image,
                    min_non_sink_ratio=method.min_non_sink_ratio,
                )
                attention = redistribute_attention(
                    attention, image, sinks, selected, method.move_fraction
                )
                changed.append(int(selected.sum()))
            torch.testing.assert_close(output.double(), attention @ value, atol=1e-4, rtol=1e-4)
        return output

    with at.tap(llava, compare), outer(llava) as last, inner(llava) as first:
        llava(**inputs)
    for hook in hooks:
        hook.remove()
    assert sum(changed) == first.edited_rows + last.edited_rows
    assert min(first.edited_rows, last.edited_rows) > 0


@torch.no_grad()
@pytest.mark.parametrize("calibrated_first", [True, False])
def test_it_nests_with_the_calibration_of_sinks(llava: Any, calibrated_first: bool) -> None:
    inputs = batch_of(prompt(3, 4))
    image = inputs["input_ids"] == IMAGE
    calibration = AttentionCalibration(beta=0.4, alpha=1.5, min_observers=4, layers=(1, 2, 3))
    hidden: dict[int, Tensor] = {}
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, i=i: hidden.update({i: args[0]}))
        for i, layer in enumerate(language_layers(llava).values())
    ]

    def redistribute(attention: Tensor, layer: int) -> Tensor:
        sinks = sink_value(hidden[layer], METHOD.sink_dimensions) >= 18 * 32**0.5 / 64
        selected = select_image_centric_heads(attention, image, sinks, query_mask=~image)
        return redistribute_attention(attention, image, sinks, selected)

    def calibrate(attention: Tensor, layer: int) -> Tensor:
        return calibrate_attention(attention, beta=0.4, alpha=1.5, min_observers=4)

    def compare(call: at.taps.AttentionCall, proceed: at.taps.Proceed) -> Tensor:
        output = proceed(call)
        if "language_model" in call.name and call.layer in (1, 2, 3):
            attention, value = mapped(call)
            edits = (calibrate, redistribute) if calibrated_first else (redistribute, calibrate)
            for edit in edits:
                attention = edit(attention, call.layer)
            torch.testing.assert_close(output.double(), attention @ value, atol=1e-4, rtol=1e-4)
        return output

    outer, inner = (calibration, METHOD) if calibrated_first else (METHOD, calibration)
    with at.tap(llava, compare), outer(llava) as first, inner(llava) as second:
        llava(**inputs)
    for hook in hooks:
        hook.remove()
    assert min(first.edited_rows, second.edited_rows) > 0


@torch.no_grad()
def test_a_block_in_which_nothing_is_edited_says_why(llava: Any) -> None:
    inputs = batch_of(prompt(3, 4))
    with (
        pytest.warns(InterventionWarning, match=r"no image token .* is a sink .*phi is \d.*tau"),
        replace(METHOD, tau=60.0)(llava),
    ):
        llava(**inputs)
    with (
        pytest.warns(InterventionWarning, match=r"no head looks.*largest mass on the image is"),
        replace(METHOD, min_non_sink_ratio=2.0)(llava),
    ):
        plain = llava(**inputs).logits
    torch.testing.assert_close(plain, llava(**inputs).logits, atol=1e-5, rtol=1e-5)
    with pytest.warns(InterventionWarning, match="hold no image token"), METHOD(llava):
        llava(torch.tensor([[BOS, 7, 8]]))
    free = replace(METHOD, require_visual_sink=False)(llava, prompt_length=0)
    with pytest.warns(InterventionWarning, match="hold no image token"), free:
        llava(**inputs)
    with pytest.warns(InterventionWarning, match="no text query"), METHOD(llava):
        llava(**batch_of([IMAGE] * PATCHES))


def test_refusals(llava: Any) -> None:
    inputs = batch_of(prompt(3, 4))
    with pytest.raises(ValueError, match=r"sink_dimensions: .*calibrate\(model, inputs\)"):
        VisualAttentionRedistribution()(llava)
    with pytest.raises(ValueError, match=r"skip_first: .*has 5 layers, got skip_first=4"):
        replace(METHOD, skip_first=4)(llava)
    with (
        pytest.raises(ValueError, match=r"tau: expected less than 5.657.*scale_tau=True"),
        VisualAttentionRedistribution((25, 26))(llava),
    ):
        llava(**inputs)
    with (
        pytest.raises(ValueError, match=r"sink_dimensions: .*between 0 and 31"),
        replace(METHOD, sink_dimensions=(1415, 2533))(llava),
    ):
        llava(**inputs)
    with pytest.raises(ValueError, match="model: expected the forward of the model"), METHOD(llava):
        llava.model(**inputs)
    cache = llava(**inputs, use_cache=True).past_key_values
    with (
        pytest.raises(ValueError, match=r"model: expected the whole sequence .*cache of 17"),
        METHOD(llava),
    ):
        llava(torch.tensor([[9]]), cache=cache)
    with (
        pytest.raises(ValueError, match="image_token_id: expected an id"),
        METHOD(llava.model.language_model),
    ):
        llava.model.language_model(inputs["input_ids"])
    training = tiny_llava(attention_dropout=0.1).train()
    with pytest.raises(ValueError, match=r"model: expected no dropout.*eval"), METHOD(training):
        training(**inputs)
    with pytest.raises(ValueError, match="model: expected one stack of decoder layers"):
        language_layers(torch.nn.Linear(2, 2))


@torch.no_grad()
def test_sink_dimensions_are_found_where_they_were_planted(llava: Any) -> None:
    model = tiny_llava()
    model.get_input_embeddings().weight[BOS, [4, 20]] = torch.tensor([600.0, -900.0])
    inputs = batch_of(prompt(3, 4), prompt(1, 2))
    model(**inputs)  # transformers leaves something of its own the first time
    for module in model.modules():
        module.training = True
    with left_as_it_was(model):
        found = find_sink_dimensions(model, inputs)
    assert found.dimensions == (20, 4)
    assert found.values[0] > found.values[1] > 2
    assert all(0 < share <= 1 for share in found.shares)
    assert all(module.training for module in model.modules())
    for module in model.modules():
        module.training = False
    alone = find_sink_dimensions(model, {**batch_of(prompt(1, 2))}, k=3, layers=(1, -1))
    assert alone.dimensions[:2] == (20, 4)
    assert METHOD.calibrate(model, inputs).sink_dimensions == (20, 4)
    with pytest.raises(ValueError, match="layers: expected numbers from -5 to 4"):
        find_sink_dimensions(model, inputs, layers=(5,))
    with pytest.raises(ValueError, match="k: expected 1 to 32"):
        find_sink_dimensions(model, inputs, k=33)


def test_the_channel_found_is_the_one_with_the_outliers() -> None:
    llama = at.zoo.load("llama-stdlib")
    inputs = {
        "input_ids": torch.tensor([llama.tokenizer.encode("import os\n\nclass A:\n    pass")])
    }
    found = find_sink_dimensions(llama.model, inputs)
    report = find_outliers(llama.model, inputs, criterion="median")
    blocks = [one for one in report.activations if one.where == "block"]
    assert {max(range(192), key=one.by_channel.__getitem__) for one in blocks} == {
        found.dimensions[0]
    }
    assert found.shares[0] > 0.7
    assert found.shares[1] < 0.3125  # the paper's threshold


def test_it_is_stored_as_json(tmp_path) -> None:
    path = save_settings(METHOD, tmp_path / "method.json")
    assert load_settings(VisualAttentionRedistribution, path) == METHOD


@torch.no_grad()
def test_any_decoder_with_a_mask() -> None:
    llama = at.zoo.load("llama-stdlib")
    ids = torch.tensor([llama.tokenizer.encode("def area(width, height):\n    return width * ")])
    image = torch.zeros_like(ids, dtype=torch.bool)
    image[:, 2:8] = True
    method = VisualAttentionRedistribution(scale_tau=True, require_visual_sink=False)
    method = method.calibrate(llama.model, {"input_ids": ids})
    plain = llama.model(ids).logits
    loose = replace(method, min_image_mass=0.0, min_non_sink_ratio=0.0)
    with loose(llama.model, image_mask=image) as run:
        assert not torch.equal(llama.model(ids).logits, plain)
    assert run.edited_rows


def test_gradients_flow_through_a_model(llava: Any) -> None:
    inputs = batch_of(prompt(3, 4))
    with METHOD(llava):
        llava(**inputs).logits.square().mean().backward()
    weight = llava.model.language_model.layers[1].self_attn.q_proj.weight.grad
    assert bool(weight.isfinite().all())
    assert bool(weight.any())
    llava.zero_grad(set_to_none=True)
