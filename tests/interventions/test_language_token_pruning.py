"""FastV and SparseVLM, held to a full run in which dropped tokens are hidden by masks."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attending.interventions.visual_token_pruning import (
    VisualTokenPruning,
    cache_lengths,
    prune_visual_tokens,
)
from attending.sparse.language_tokens import recycle, relevant_text
from tests.interventions.llava import IMAGE, batch, make_llava, pixels, prompt
from tests.interventions.test_visual_token_pruning import close, generate, inputs_for

TEXTS = (prompt(3, 5), prompt(2, 9, seed=1), prompt(1, 2, seed=2))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return make_llava(num_hidden_layers=6).double()


def probabilities(
    layer: nn.Module, hidden: Tensor, positions: Any, visible: Tensor
) -> tuple[Tensor, Tensor]:
    """The map `[batch, heads, queries, keys]` of a layer of Llama, and what it returns."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    attention = layer.self_attn
    normed = layer.input_layernorm(hidden)
    shape = (*hidden.shape[:2], -1, attention.head_dim)
    query = attention.q_proj(normed).view(shape).transpose(1, 2)
    key = attention.k_proj(normed).view(shape).transpose(1, 2)
    query, key = apply_rotary_pos_emb(query, key, *positions)
    key = key.repeat_interleave(attention.num_key_value_groups, 1)
    scores = query @ key.transpose(-1, -2) * attention.scaling
    found = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    output = layer(hidden, attention_mask=visible, position_embeddings=positions)
    return found, output


def reference(
    model: nn.Module, inputs: dict[str, Tensor], schedule: dict[int, int], by_text: bool
) -> Tensor:
    """Logits of a run on all tokens, in which those that were dropped are hidden from then on."""
    inner = model.model
    ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
    features = inner.get_image_features(inputs["pixel_values"], return_dict=True).pooler_output
    image = ids == IMAGE
    hidden = inner.get_input_embeddings()(ids)
    hidden = hidden.masked_scatter(image[..., None], torch.cat(features))
    places = (mask.long().cumsum(-1) - 1).clamp_min(0)
    positions = inner.language_model.rotary_emb(hidden, places)
    causal = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
    own = torch.eye(ids.shape[1], dtype=torch.bool)
    alive = torch.ones_like(mask)
    raters = []
    for row in range(len(ids)):
        last = int(image[row].nonzero()[-1])
        text = mask[row] & (torch.arange(ids.shape[1]) > last)
        rates = relevant_text(hidden[row, image[row]][None], hidden[row, text][None])[0]
        raters.append(text.nonzero()[:, 0][rates])
    found = hidden
    for number, layer in enumerate(inner.language_model.layers):
        if number in schedule:
            for row in range(len(ids)):
                rows = raters[row] if by_text else mask[row].nonzero()[-1]
                scores = found[row].mean(0)[rows].mean(0)
                left = (image[row] & alive[row]).nonzero()[:, 0]
                if by_text:
                    kept = recycle(hidden[row, left][None], scores[left][None], schedule[number])
                    stay = left[kept.index[0]]
                    hidden = hidden.clone()
                    hidden[row, stay] = kept.tokens[0]
                else:
                    stay = left[scores[left].topk(schedule[number]).indices]
                alive[row, left] = False
                alive[row, stay] = True
        visible = (causal & (mask & alive)[:, None] | own)[:, None]
        found, hidden = probabilities(layer, hidden, positions, visible)
    return model.lm_head(inner.language_model.norm(hidden))


CASES = {
    "fastv": (VisualTokenPruning("fastv", 5), {2: 5}),
    "fastv late": (VisualTokenPruning("fastv", 5, layer=5), {5: 5}),
    "sparsevlm": (
        VisualTokenPruning("sparsevlm", 5, schedule={1: 8, 3: 4, 5: 2}),
        {1: 8, 3: 4, 5: 2},
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("left", [True, False])
def test_forward(model: nn.Module, case: str, left: bool) -> None:
    method, schedule = CASES[case]
    inputs = inputs_for(*TEXTS, left=left)
    places = (inputs["attention_mask"].cumsum(-1) - 1).clamp_min(0)
    with torch.no_grad():
        expected = reference(model, inputs, schedule, method.selector == "sparsevlm")
        with method(model) as run:
            out = model(**inputs, position_ids=places)
    text = inputs["attention_mask"].bool() & (inputs["input_ids"] != IMAGE)
    assert out.logits.shape == expected.shape
    close(out.logits[text], expected[text])
    lengths = cache_lengths(out.cache)
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] == inputs["input_ids"].shape[1]
    if case == "fastv":
        assert lengths == [lengths[0]] * 2 + [lengths[0] - 11] * 4
        assert run.stats["kept_image_tokens"] == round(3 * (2 * 16 + 4 * 5) / 6)
    mean = sum(lengths) / 6 - lengths[0] + 16
    assert run.kept_image_tokens == pytest.approx(3 * mean)
    # Without padding there is no mask; the attention is causal by a flag.
    alone = inputs_for(TEXTS[0]) | {"pixel_values": inputs["pixel_values"][:1]}
    with method(model), torch.no_grad():
        single = model(input_ids=alone["input_ids"], pixel_values=alone["pixel_values"])
    real = inputs["attention_mask"][0].bool()
    close(single.logits[0], out.logits[0, real])


@pytest.mark.parametrize("case", CASES)
def test_generation(model: nn.Module, case: str) -> None:
    method, _ = CASES[case]
    inputs = inputs_for(*TEXTS)
    with method(model), torch.no_grad():
        out = generate(model, inputs, output_logits=True)
        for row, text in enumerate(TEXTS):
            one = inputs_for(text) | {"pixel_values": inputs["pixel_values"][row : row + 1]}
            alone = generate(model, one)
            assert alone.sequences[0, -4:].tolist() == out.sequences[row, -4:].tolist()
            lengths = cache_lengths(alone.cache)
            assert lengths[0] == text.shape[1] + 3
            assert lengths[-1] < lengths[0] - 8
        beams = generate(model, inputs, num_beams=3)
    assert beams.sequences.shape == out.sequences.shape
    # Several tokens at once on the cache are the same as one at a time.
    with torch.no_grad(), method(model):
        places = (inputs["attention_mask"].cumsum(-1) - 1).clamp_min(0)
        first = model(**inputs, position_ids=places)
        ids = out.sequences[:, inputs["input_ids"].shape[1] :]
        mask = torch.cat([inputs["attention_mask"], torch.ones_like(ids)], 1)
        place = inputs["attention_mask"].sum(-1, keepdim=True)
        several = model(
            input_ids=ids[:, :3],
            attention_mask=mask[:, :-1],
            position_ids=place + torch.arange(3),
            cache=first.cache,
        )
    close(several.logits, torch.stack(out.logits[1:], 1))


def test_labels(model: nn.Module) -> None:
    inputs = inputs_for(*TEXTS, left=False)
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE, -100)
    labels = labels.masked_fill(inputs["attention_mask"] == 0, -100)
    with VisualTokenPruning("fastv", 5)(model):
        out = model(**inputs, labels=labels)
    expected = nn.functional.cross_entropy(
        out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    )
    close(out.loss, expected)
    out.loss.backward()
    model.zero_grad(set_to_none=True)


def test_several_images_share_what_is_kept(model: nn.Module) -> None:
    both = prompt(2, 0, 4)  # one image right after the other
    with VisualTokenPruning("fastv", 3)(model) as run, torch.no_grad():
        out = model(input_ids=both, pixel_values=pixels(2).double())
    width = both.shape[1]
    assert cache_lengths(out.cache) == [width] * 2 + [width - 26] * 4
    assert run.image_tokens == 32
    different = inputs_for(prompt(3, 5), both)
    with VisualTokenPruning("fastv", 3)(model):
        with pytest.raises(ValueError, match="same number of image tokens in each row"):
            model(**different)
        model(input_ids=both, pixel_values=pixels(2).double())


def test_second_turn(model: nn.Module) -> None:
    with VisualTokenPruning("fastv", 5)(model), torch.no_grad():
        one = model(input_ids=prompt(3, 5), pixel_values=pixels(1).double())
        two = model(input_ids=prompt(2, 4), pixel_values=pixels(1, 1).double(), cache=one.cache)
        three = model(input_ids=torch.tensor([[5, 6]]), cache=two.cache)
    assert cache_lengths(three.cache) == [50, 50, 28, 28, 28, 28]
    # A text before the image, and an image after it.
    with VisualTokenPruning("fastv", 5)(model), torch.no_grad():
        one = model(input_ids=torch.tensor([[1, 4, 5]]))
        two = model(input_ids=prompt(2, 4), pixel_values=pixels(1, 1).double(), cache=one.cache)
    assert cache_lengths(two.cache) == [26, 26, 15, 15, 15, 15]


def test_half_precision_and_a_short_model() -> None:
    model = make_llava(num_hidden_layers=2).bfloat16()
    inputs = batch(*TEXTS)
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    for selector in ("fastv", "sparsevlm", "agile", "visionzip", "prumerge+"):
        with prune_visual_tokens(model, selector, 5, layer=1) as run, torch.no_grad():
            out = model(**inputs)
        assert out.logits.dtype == torch.bfloat16
        assert torch.isfinite(out.logits[:, -1]).all()
        assert run.stats["kept_image_tokens"] < 48


def test_eager_attention_is_refused() -> None:
    model = make_llava()
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="set_attn_implementation"):
        prune_visual_tokens(model, "fastv", 5).__enter__()
