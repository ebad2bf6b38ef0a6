"""DAMRO on a small LLaVA: against a loop of full forwards, and as `generate` is used."""

import copy
import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from attending.decoding.contrastive import ContrastiveLogitsProcessor, contrast_first
from attending.decoding.damro import DAMRO, damro_generate
from attending.decoding.generating import DecodingWarning
from attending.decoding.image_prompts import see_images, with_image_tokens
from attending.decoding.momentum import MomentumDecoding
from attending.interventions.attention_calibration import AttentionCalibration
from attending.interventions.intervention import Intervention
from attending.interventions.settings import load_settings, save_settings
from tests.decoding.models import IMAGE, PATCHES, llama, llava, prompts

TEXTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13]]
EXACT = {"rtol": 1e-4, "atol": 5e-4}


def chosen_by_hand(model: Any, pixels: Tensor, k: int) -> Tensor:
    """The official recipe for LLaVA, from hooks on the projections of layer -2."""
    attention = model.model.vision_tower.encoder.layers[-2].self_attn
    kept = {}
    hooks = [
        getattr(attention, name).register_forward_hook(
            lambda _, __, output, name=name: kept.__setitem__(name, output)
        )
        for name in ("q_proj", "k_proj")
    ]
    with torch.no_grad():
        model.model.vision_tower(pixels)
    for hook in hooks:
        hook.remove()
    query, key = kept["q_proj"].double(), kept["k_proj"].double()
    weights = (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5).softmax(-1)
    return weights[:, 0, 1:].topk(k).indices


def next_logits(model: Any, text: list[int], written: list[int], features: Tensor) -> Tensor:
    """Of one sequence with these image tokens: a full forward on embeddings, nothing cached."""
    with torch.no_grad():
        embed = model.get_input_embeddings()
        parts = [embed(torch.tensor([2])), features, embed(torch.tensor(text + written))]
        return model(inputs_embeds=torch.cat(parts)[None], use_cache=False).logits[0, -1].double()


def expected(
    model: Any, text: list[int], pixels: Tensor, k: int, alpha: float, beta: float, steps: int
) -> tuple[list[int], list[Tensor]]:
    """Greedy DAMRO in the plainest way."""
    with torch.no_grad():
        features = model.get_image_features(pixels[None], return_dict=True).pooler_output[0]
    index = chosen_by_hand(model, pixels[None], k)[0]
    written: list[int] = []
    scores = []
    for _ in range(steps):
        positive = next_logits(model, text, written, features)
        negative = next_logits(model, text, written, features[index])
        score = (1 + alpha) * positive - alpha * negative
        score = score.masked_fill(positive < positive.max() + math.log(beta), -math.inf)
        scores.append(score)
        written.append(int(score.argmax()))
    return written, scores


def new_tokens(found: Any, inputs: dict[str, Tensor]) -> Tensor:
    sequences = found if isinstance(found, Tensor) else found.sequences
    return sequences[:, inputs["input_ids"].shape[1] :]


def greedy(model: Any, inputs: dict[str, Tensor], **settings: Any) -> Any:
    return model.generate(
        **inputs, **{"max_new_tokens": 8, "do_sample": False, "min_new_tokens": 8, **settings}
    )


@pytest.mark.parametrize("k", [1, 4])
def test_equals_a_loop_of_full_forwards(k: int) -> None:
    model, inputs = llava(), prompts(TEXTS)
    with DAMRO(k=k, alpha=1.5, beta=0.05)(model) as run:
        found = model.generate(
            **inputs,
            max_new_tokens=6,
            do_sample=False,
            eos_token_id=None,
            return_dict_in_generate=True,
            output_scores=True,
        )
    for row, text in enumerate(TEXTS):
        written, scores = expected(model, text, inputs["pixel_values"][row], k, 1.5, 0.05, 6)
        assert new_tokens(found, inputs)[row].tolist() == written
        for step, exact in enumerate(scores):
            torch.testing.assert_close(found.scores[step][row].double(), exact, **EXACT)
    assert run.stats["steps"] == 6
    assert run.changed > 0


def test_all_forms_are_the_same_and_leave_no_trace() -> None:
    model, inputs = llava(), prompts(TEXTS)
    before = copy.deepcopy(model.state_dict())
    attributes = set(vars(model))
    plain = greedy(model, inputs)
    hooks = [list(module._forward_hooks) for module in model.modules()]  # transformers' own
    block = DAMRO(k=3)(model)
    with block:
        found = greedy(model, inputs)
        assert greedy(model, inputs).equal(found)
    with block as again:  # entered again, with counts of its own
        assert greedy(model, inputs).equal(found)
    assert again.steps == 8
    assert not found.equal(plain)
    assert greedy(model, inputs, custom_generate=DAMRO(k=3).custom_generate).equal(found)
    assert damro_generate(
        model, inputs, k=3, max_new_tokens=8, min_new_tokens=8, do_sample=False
    ).equal(found)
    with pytest.raises(RuntimeError, match="mine"), DAMRO()(model):
        raise RuntimeError("mine")
    assert set(vars(model)) == attributes
    assert hooks == [list(module._forward_hooks) for module in model.modules()]
    assert all(before[name].equal(value) for name, value in model.state_dict().items())
    assert greedy(model, inputs).equal(plain)


def test_without_contrast_and_cut_it_is_the_model() -> None:
    model, inputs = llava(), prompts(TEXTS)
    plain = greedy(model, inputs)
    assert damro_generate(
        model, inputs, k=2, alpha=0.0, beta=0.0, max_new_tokens=8, min_new_tokens=8, do_sample=False
    ).equal(plain)
    settings = {"do_sample": True, "temperature": 0.8, "top_p": 0.9, "num_return_sequences": 2}
    torch.manual_seed(3)
    plain = greedy(model, inputs, **settings)
    torch.manual_seed(3)
    with DAMRO(k=2, alpha=0.0, beta=0.0)(model):
        assert greedy(model, inputs, **settings).equal(plain)


def test_a_batch_is_each_sequence_on_its_own() -> None:
    model, inputs = llava(), prompts(TEXTS)
    for settings in ({}, {"num_beams": 2, "num_return_sequences": 2}):
        with DAMRO(k=3)(model):
            found = new_tokens(greedy(model, inputs, **settings), inputs)
            for row, text in enumerate(TEXTS):
                one = prompts([text]) | {"pixel_values": inputs["pixel_values"][row : row + 1]}
                alone = new_tokens(greedy(model, one, **settings), one)
                assert found[row * len(alone) : (row + 1) * len(alone)].equal(alone)


def test_several_images_in_a_prompt_and_prompts_without() -> None:
    model = llava()
    two = prompts([[5, 6], [7]], images=2)
    with DAMRO(k=3)(model):
        found = new_tokens(greedy(model, two, num_return_sequences=2, num_beams=2), two)
        for row in range(2):
            one = {name: two[name][row : row + 1] for name in ("input_ids", "attention_mask")}
            one["pixel_values"] = two["pixel_values"][2 * row : 2 * row + 2]
            alone = new_tokens(greedy(model, one, num_return_sequences=2, num_beams=2), one)
            assert found[2 * row : 2 * row + 2].equal(alone)
    # A row without an image has two equal branches: it is decoded as the model would.
    mixed = prompts([[5, 6, 7]])
    text = torch.tensor([[0] * PATCHES + [2, 5, 6, 7]])
    mixed["input_ids"] = torch.cat([mixed["input_ids"], text])
    mixed["attention_mask"] = torch.cat([mixed["attention_mask"], (text != 0).long()])
    found = damro_generate(model, mixed, k=3, max_new_tokens=6, do_sample=False, eos_token_id=None)
    plain = model.generate(text[:, PATCHES:], max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert found[1, -6:].equal(plain[0, -6:])
    kept = with_image_tokens(
        model,
        see_images(model, mixed["pixel_values"]),
        torch.tensor([[4, 1]]),
        mixed["input_ids"],
        mixed["attention_mask"],
    )
    assert kept["input_ids"].tolist() == [[2, IMAGE, IMAGE, 5, 6, 7], [0, 0, 2, 5, 6, 7]]
    assert kept["attention_mask"].tolist() == [[1] * 6, [0, 0, 1, 1, 1, 1]]


def test_towers_without_class_token_and_models_that_keep_it() -> None:
    inputs = prompts(TEXTS)
    for model, statistic, offset in (
        (llava(siglip=True), "received", 0),
        (llava(vision_feature_select_strategy="full"), "cls", 1),
    ):
        seen = see_images(model, inputs["pixel_values"])
        assert seen.offset == offset
        assert seen.statistic == statistic
        assert seen.attention.shape == (3, PATCHES)
        tokens = len(seen.outputs.pooler_output[0])
        given = prompts(TEXTS, size=tokens)
        negative = DAMRO(k=2).negative_inputs(
            model, seen, given["input_ids"], given["attention_mask"]
        )
        top = seen.attention.topk(2).indices + offset
        for row, features in enumerate(negative["mm_encoder_outputs"]["image"].pooler_output):
            assert features.equal(seen.outputs.pooler_output[row][top[row]])
        with DAMRO(k=2)(model) as run:
            greedy(model, given)
        assert run.steps == 8
    model = llava(siglip=True)
    with pytest.raises(ValueError, match="needs a class token"), DAMRO(statistic="cls")(model):
        greedy(model, inputs)


class Streamer:
    """What transformers' streamers are, for a test."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.seen.append(value)

    def end(self) -> None:
        self.ended = True


def test_streams_and_works_without_the_cache_of_generate() -> None:
    model, inputs = llava(), prompts(TEXTS[:1])
    streamer = Streamer()
    with DAMRO(k=3)(model):
        found = greedy(model, inputs, streamer=streamer)
        assert greedy(model, inputs, use_cache=False).equal(found)
    assert streamer.ended
    assert torch.cat([one.flatten() for one in streamer.seen]).equal(found[0])


def test_blocks_nest() -> None:
    model, inputs = llava(), prompts(TEXTS)
    outer, inner = DAMRO(k=2, alpha=1.0), DAMRO(k=5, alpha=0.5)
    with outer(model) as first, inner(model) as second:
        found = greedy(model, inputs)
    assert first.steps == second.steps == 8
    # By hand: the inner contrast first, the outer one on what it gives.
    images = see_images(model, inputs["pixel_values"])
    contrasts = [
        ContrastiveLogitsProcessor(
            model,
            method.negative_inputs(model, images, inputs["input_ids"], inputs["attention_mask"]),
            method.alpha,
            method.beta,
        )
        for method in (inner, outer)
    ]
    by_hand = greedy(model, inputs, logits_processor=contrasts, custom_generate=contrast_first)
    assert found.equal(by_hand)
    assert "generate" not in vars(model)


def test_is_a_method_like_others(tmp_path: Any) -> None:
    method = DAMRO(k=7, alpha=0.5)
    assert isinstance(method, Intervention)
    assert load_settings(DAMRO, save_settings(method, tmp_path / "damro.json")) == method


def test_refusals() -> None:
    model, inputs = llava(), prompts(TEXTS)
    for wrong in ({"k": 0}, {"k": 2.0}, {"alpha": -1.0}, {"beta": 2.0}, {"reduce": "none"}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}: expected"):
            DAMRO(**wrong)
    with pytest.raises(ValueError, match="model: expected a vision-language model"):
        DAMRO()(llama())
    with DAMRO(k=3)(model):
        with pytest.raises(ValueError, match="pixel_values: expected images"):
            model.generate(torch.tensor([[2, 5]]), max_new_tokens=1)
        with pytest.raises(ValueError, match="assistant_model: expected None"):
            greedy(model, inputs, assistant_model=model)
        with pytest.raises(ValueError, match="greedy decoding, sampling or beams"):
            greedy(model, inputs, prompt_lookup_num_tokens=2)
        with pytest.raises(ValueError, match="input_ids: expected 9 placeholders"):
            greedy(model, prompts(TEXTS, size=PATCHES - 1))
        with pytest.raises(ValueError, match="layer: expected -3 to 2"):
            greedy(model, inputs, custom_generate=DAMRO(k=1, layer=7).custom_generate)
        greedy(model, inputs)
    with pytest.raises(ValueError, match="k: expected a whole number from 1 to 9"):
        damro_generate(model, inputs, k=10, max_new_tokens=2)
    with pytest.raises(ValueError, match="one image token for each patch"):
        see_images(model, inputs["pixel_values"], torch.tensor([[24, 24]]))
    with pytest.warns(DecodingWarning, match="no token was generated"), DAMRO()(model):
        pass
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        damro_generate(model, inputs, k=9, max_new_tokens=2)


def test_both_branches_run_the_edited_model() -> None:
    """With sinks damped around it: each branch has its own prompt, with sinks of its own."""
    model, inputs = llava(), prompts(TEXTS[2:])
    edit = AttentionCalibration(layers=(0, 1), alpha=1.2, beta=0.1, min_observers=2)
    settings = {"return_dict_in_generate": True, "output_scores": True, "eos_token_id": None}
    method = DAMRO(k=4, alpha=1.5, beta=0.05)
    with edit(model) as run, method(model):
        found = model.generate(**inputs, max_new_tokens=5, do_sample=False, **settings)
    assert run.edited_calls
    with torch.no_grad():
        images = model.get_image_features(inputs["pixel_values"], return_dict=True)
    features = images.pooler_output[0]
    index = chosen_by_hand(model, inputs["pixel_values"], 4)[0]
    written: list[int] = []
    for scores in found.scores:
        logits = []
        for tokens in (features, features[index]):
            length = 1 + len(tokens) + len(TEXTS[2])
            with edit(model, prompt_length=length):
                logits.append(next_logits(model, TEXTS[2], written, tokens))
        exact = 2.5 * logits[0] - 1.5 * logits[1]
        exact = exact.masked_fill(logits[0] < logits[0].max() + math.log(0.05), -math.inf)
        torch.testing.assert_close(scores[0].double(), exact, **EXACT)
        written.append(int(exact.argmax()))
    plain = model.generate(
        **inputs, max_new_tokens=5, do_sample=False, custom_generate=method.custom_generate
    )
    assert not plain[:, -5:].equal(found.sequences[:, -5:])


def test_momentum_comes_after_the_contrast() -> None:
    model, inputs = llava(), prompts(TEXTS)
    with MomentumDecoding(alpha=0.5)(model) as second, DAMRO(k=3)(model) as first:
        found = greedy(model, inputs, max_new_tokens=12)
    with DAMRO(k=3)(model), MomentumDecoding(alpha=0.5)(model):
        assert greedy(model, inputs, max_new_tokens=12).equal(found)
    assert first.tokens
    assert second.reranked
