"""Pruning before the language model, held to short inputs that are made by hand."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attending.interventions._image_selectors import MERGING, NAMES
from attending.interventions.intervention import InterventionWarning
from attending.interventions.settings import load_settings, save_settings
from attending.interventions.visual_token_pruning import (
    VisualTokenPruning,
    cache_lengths,
    prune_visual_tokens,
)
from attending.probes.visual_tokens import visual_tokens
from attending.sparse.merged_tokens import vision_zip
from attending.sparse.visual_tokens import METHODS, select_tokens
from attending.taps import tap
from tests.decoding.models import llava, prompts
from tests.interventions.llava import IMAGE, PATCHES, batch, make_llava, pixels, prompt

BEFORE = [name for name in NAMES if name not in ("fastv", "sparsevlm")]
TEXTS = (prompt(3, 5), prompt(2, 9, seed=1), prompt(1, 2, seed=2))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return make_llava().double()


def close(found: Tensor, expected: Tensor) -> None:
    """To what rotary positions, which are float32 in any model, allow."""
    torch.testing.assert_close(found.double(), expected.double(), atol=1e-5, rtol=1e-5)


def hooks_of(model: nn.Module) -> list[list[Any]]:
    kinds = ("_forward_hooks", "_forward_pre_hooks")
    return [list(getattr(module, kind)) for module in model.modules() for kind in kinds]


def inputs_for(*prompts: Tensor, left: bool = True) -> dict[str, Tensor]:
    inputs = batch(*prompts, left=left)
    return inputs | {"pixel_values": inputs["pixel_values"].double()}


def generate(model: nn.Module, inputs: dict[str, Tensor], **settings: Any) -> Any:
    return model.generate(
        **inputs,
        **{"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True} | settings,
    )


def by_hand(model: nn.Module, inputs: dict[str, Tensor], kept: list[Tensor]) -> dict[str, Tensor]:
    """Embeddings and mask of the sequence in which some image tokens never were; one image each."""
    features = model.get_image_features(inputs["pixel_values"], return_dict=True).pooler_output
    rows, masks = [], []
    for row, (ids, mask) in enumerate(
        zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
    ):
        embeddings = model.get_input_embeddings()(ids)
        place = (ids == IMAGE).nonzero()[:, 0]
        first, end = int(place[0]), int(place[-1]) + 1
        tokens = features[row][kept[row]]
        rows.append(torch.cat([embeddings[:first], tokens, embeddings[end:]]))
        masks.append(torch.cat([mask[:first], mask.new_ones(len(tokens)), mask[end:]]))
    mask = torch.stack(masks)
    return {
        "inputs_embeds": torch.stack(rows),
        "attention_mask": mask,
        "position_ids": (mask.cumsum(-1) - 1).clamp_min(0),
    }


@pytest.mark.parametrize("method", METHODS[:-1])
@pytest.mark.parametrize("left", [True, False])
def test_forward_is_that_of_the_short_sequence(model: nn.Module, method: str, left: bool) -> None:
    inputs = inputs_for(*TEXTS, left=left)
    tokens = visual_tokens(model, inputs["pixel_values"])
    index = select_tokens(tokens.features, tokens.attention, 5, method, erank_avg=8.0)
    with prune_visual_tokens(model, method, 5, erank_avg=8.0) as run, torch.no_grad():
        pruned = model(**inputs)
    assert [one.tolist() for one in run.kept] == index.tolist()
    short = by_hand(model, inputs, list(index))
    with torch.no_grad():
        expected = model(**short)
    real = short["attention_mask"].bool()
    assert pruned.logits.shape == expected.logits.shape
    close(pruned.logits[real], expected.logits[real])
    assert cache_lengths(pruned.cache) == [inputs["input_ids"].shape[1] - 11] * 4
    assert run.stats == {"pruned_forwards": 1, "image_tokens": 48, "kept_image_tokens": 15}


@pytest.mark.parametrize("selector", BEFORE)
def test_generation(model: nn.Module, selector: str) -> None:
    inputs = inputs_for(*TEXTS)
    method = VisualTokenPruning(selector, 5, erank_avg=8.0)
    with method(model):
        together = generate(model, inputs)
    # Each text alone, without padding.
    for row, text in enumerate(TEXTS):
        alone = inputs_for(text) | {"pixel_values": inputs["pixel_values"][row : row + 1]}
        if selector == "random":
            continue
        with method(model):
            out = generate(model, alone)
        assert torch.equal(out.sequences[0, : text.shape[1]], text[0])
        assert out.sequences[0, -4:].tolist() == together.sequences[row, -4:].tolist()
        assert cache_lengths(out.cache) == [text.shape[1] - 11 + 3] * 4
    # Without a cache, every step runs on the pruned prompt anew.
    with method(model):
        slow = generate(model, inputs, use_cache=False)
    assert torch.equal(slow.sequences, together.sequences)


@pytest.mark.parametrize("positions", ["compact", "original"])
@pytest.mark.parametrize("padded", [True, False])
def test_decoding_equals_one_forward(model: nn.Module, positions: str, padded: bool) -> None:
    texts = TEXTS if padded else TEXTS[:1]
    inputs = inputs_for(*texts)
    method = VisualTokenPruning("fastervlm", 5, positions=positions)
    with method(model), torch.no_grad():
        out = generate(model, inputs, output_logits=True)
        ids = out.sequences[:, :-1]
        mask = torch.cat([inputs["attention_mask"], torch.ones(len(texts), 3).long()], 1)
        places = (mask.cumsum(-1) - 1).clamp_min(0)
        whole = inputs | {"input_ids": ids, "attention_mask": mask, "position_ids": places}
        full = model(**whole)
    steps = torch.stack(out.logits, 1)
    close(full.logits[:, -4:], steps)


def test_original_positions_leave_gaps(model: nn.Module) -> None:
    inputs = inputs_for(TEXTS[0])
    with VisualTokenPruning("fastervlm", 5, positions="original")(model) as run, torch.no_grad():
        without = model(input_ids=inputs["input_ids"], pixel_values=inputs["pixel_values"])
        pruned = model(**inputs, position_ids=torch.arange(25)[None])
    short = by_hand(model, inputs, run.kept[:1])
    places = torch.tensor([*range(4), *(4 + run.kept[0]).tolist(), *range(20, 25)])[None]
    with torch.no_grad():
        expected = model(**short | {"position_ids": places})
        compact = model(**short)
    close(pruned.logits, expected.logits)
    close(without.logits, expected.logits)
    assert not torch.allclose(expected.logits, compact.logits)


@pytest.mark.parametrize("selector", NAMES)
def test_keeping_all_is_the_identity(model: nn.Module, selector: str) -> None:
    inputs = inputs_for(*TEXTS)
    plain = generate(model, inputs, output_logits=True)
    for keep in (PATCHES, 99):
        pruning = prune_visual_tokens(model, selector, keep)
        with pytest.warns(InterventionWarning, match="no image had more tokens"), pruning:
            same = generate(model, inputs, output_logits=True)
        assert torch.equal(same.sequences, plain.sequences)
        assert torch.equal(torch.stack(same.logits), torch.stack(plain.logits))


@pytest.mark.parametrize("selector", NAMES)
def test_no_trace(model: nn.Module, selector: str) -> None:
    inputs = inputs_for(*TEXTS)
    plain = generate(model, inputs, output_logits=True)
    hooks = hooks_of(model)
    attributes = {name: set(module.__dict__) for name, module in model.named_modules()}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    pruning = prune_visual_tokens(model, selector, 5)
    runs = []
    for _ in range(2):  # it can be entered again
        with pruning as run:
            runs.append(generate(model, inputs).sequences)
        assert run.stats["pruned_forwards"] == 1
    assert torch.equal(*runs)
    with pytest.raises(RuntimeError, match="stop here"), pruning:
        raise RuntimeError("stop here")
    assert {name: set(module.__dict__) for name, module in model.named_modules()} == attributes
    assert hooks_of(model) == hooks
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    again = generate(model, inputs, output_logits=True)
    assert torch.equal(torch.stack(again.logits), torch.stack(plain.logits))


def test_labels_and_gradients(model: nn.Module) -> None:
    inputs = inputs_for(*TEXTS, left=False)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels = labels.masked_fill(labels == IMAGE, -100)
    with prune_visual_tokens(model, "divprune", 5) as run:
        loss = model(**inputs, labels=labels).loss
    short = by_hand(model, inputs, run.kept)
    rows = []
    for row, ids in zip(labels, inputs["input_ids"], strict=True):
        place = (ids == IMAGE).nonzero()[:, 0]
        rows.append(torch.cat([row[: place[0] + 5], row[place[-1] + 1 :]]))
    expected = model(**short, labels=torch.stack(rows)).loss
    close(loss, expected)
    loss.backward()
    gradient = model.model.multi_modal_projector.linear_1.weight.grad
    assert gradient is not None
    assert bool(gradient.any())
    model.zero_grad(set_to_none=True)


def test_rows_with_different_numbers_of_images(model: nn.Module) -> None:
    texts = (prompt(3, 5), prompt(2, 4, 6, seed=1), prompt(7, seed=2))
    for left in (True, False):
        inputs = inputs_for(*texts, left=left)
        assert len(inputs["pixel_values"]) == 3
        with prune_visual_tokens(model, "fastervlm", 5) as run, torch.no_grad():
            together = model(**inputs)
        assert run.stats["kept_image_tokens"] == 15
        # The text without an image, and 24 - 2 * 11 of 45 tokens.
        start = 0
        for row, text in enumerate(texts):
            count = int((text == IMAGE).sum()) // PATCHES
            alone: dict[str, Tensor] = {"input_ids": text}
            if count:
                alone["pixel_values"] = inputs["pixel_values"][start : start + count]
            start += count
            with torch.no_grad():
                if count:
                    with prune_visual_tokens(model, "fastervlm", 5):
                        expected = model(**alone).logits[0]
                else:
                    expected = model(**alone).logits[0]
            found = together.logits[row]
            found = found[-len(expected) :] if left else found[: len(expected)]
            close(found, expected)
    inputs = inputs_for(*texts)
    with prune_visual_tokens(model, "fastervlm", 5):
        together = generate(model, inputs)
        alone = generate(model, {"input_ids": texts[1], "pixel_values": inputs["pixel_values"][1:]})
    assert together.sequences[1, -4:].tolist() == alone.sequences[0, -4:].tolist()


def test_beams_and_samples(model: nn.Module) -> None:
    inputs = inputs_for(*TEXTS)
    with prune_visual_tokens(model, "agile", 5, erank_avg=8.0):
        beams = generate(model, inputs, num_beams=3, num_return_sequences=2)
        assert cache_lengths(beams.cache)[0] < inputs["input_ids"].shape[1]
        slow = generate(model, inputs, num_beams=3, num_return_sequences=2, use_cache=False)
        torch.manual_seed(0)
        samples = generate(model, inputs, do_sample=True, num_return_sequences=4)
    assert torch.equal(beams.sequences, slow.sequences)
    assert samples.sequences.shape[0] == 12


def test_second_turn_on_the_same_cache(model: nn.Module) -> None:
    first, second = prompt(3, 5), prompt(2, 4, seed=1)
    images = pixels(2).double()
    with VisualTokenPruning("fastervlm", 5)(model) as run, torch.no_grad():
        one = model(input_ids=first, pixel_values=images[:1])
        two = model(input_ids=second, pixel_values=images[1:], cache=one.cache)
        last = model(input_ids=torch.tensor([[7, 8]]), cache=two.cache)
        both = torch.cat([first, second, torch.tensor([[7, 8]])], 1)
        whole = model(input_ids=both, pixel_values=images)
    assert run.stats["image_tokens"] == 64
    joined = torch.cat([one.logits, two.logits, last.logits], 1)
    close(joined, whole.logits)
    assert cache_lengths(last.cache) == [both.shape[1] - 22] * 4
    # A text first, an image then, and a placeholder that the model itself wrote.
    with VisualTokenPruning("fastervlm", 5)(model), torch.no_grad():
        one = model(input_ids=torch.tensor([[1, 4, 5]]))
        two = model(input_ids=second, pixel_values=images[1:], cache=one.cache)
        last = model(input_ids=torch.tensor([[IMAGE]]), cache=two.cache)
        both = torch.cat([torch.tensor([[1, 4, 5]]), second], 1)
        whole = model(input_ids=both, pixel_values=images[1:])
    close(torch.cat([one.logits, two.logits], 1), whole.logits)
    assert cache_lengths(last.cache) == [both.shape[1] - 11 + 1] * 4


def test_embeddings_in_place_of_ids(model: nn.Module) -> None:
    inputs = inputs_for(*TEXTS)
    embeddings = model.get_input_embeddings()(inputs["input_ids"])
    with prune_visual_tokens(model, "divprune", 5), torch.no_grad():
        by_ids = model(**inputs).logits
        ids = inputs.pop("input_ids")
        by_embeddings = model(**inputs, inputs_embeds=embeddings).logits
        inner = model.model(ids, inputs["pixel_values"], inputs["attention_mask"]).last_hidden_state
    assert torch.equal(by_ids, by_embeddings)
    close(model.lm_head(inner), by_ids)


def test_vision_zip_merges_before_the_projector(model: nn.Module) -> None:
    inputs = inputs_for(TEXTS[0])
    with prune_visual_tokens(model, "visionzip", 5) as run, torch.no_grad():
        pruned = model(**inputs).logits
    eager = make_llava().double()
    eager.set_attn_implementation("eager")
    tower = eager.model.vision_tower
    keys: list[Tensor] = []
    hook = tower.encoder.layers[1].self_attn.k_proj.register_forward_hook(
        lambda module, args, output: keys.append(output)
    )
    with torch.no_grad():
        out = tower(inputs["pixel_values"], output_attentions=True, output_hidden_states=True)
    hook.remove()
    key = keys[0].view(1, PATCHES + 1, 4, 8).mean(2)[:, 1:]
    attention = out.attentions[-2].sum(1)[:, 0, 1:]
    merged = vision_zip(out.hidden_states[-2][:, 1:], attention, key, 5)
    assert run.kept[0].tolist() == merged.index[0].tolist()
    embeddings = model.get_input_embeddings()(TEXTS[0])
    tokens = model.model.multi_modal_projector(merged.tokens)
    short = torch.cat([embeddings[:, :4], tokens, embeddings[:, 20:]], 1)
    with torch.no_grad():
        close(model(inputs_embeds=short).logits, pruned)


def test_a_function_selects(model: nn.Module) -> None:
    inputs = inputs_for(*TEXTS)

    def first(features: Tensor, attention: Tensor, keep: int) -> Tensor:
        assert features.shape == (3, PATCHES, 48)
        assert attention.shape == (3, PATCHES)
        return torch.arange(keep).repeat(3, 1)

    with prune_visual_tokens(model, first, 4) as run, torch.no_grad():
        model(**inputs)
    assert [one.tolist() for one in run.kept] == [[0, 1, 2, 3]] * 3
    for wrong in (
        lambda features, attention, keep: torch.zeros(3, keep).long(),
        lambda features, attention, keep: torch.arange(keep),
        lambda features, attention, keep: torch.full((3, keep), 99),
    ):
        pruning = prune_visual_tokens(model, wrong, 4)
        with pytest.raises(ValueError, match="selector: expected"), pruning:
            model(**inputs)


@pytest.mark.parametrize("selector", ["agile", "prumerge+", "fastv"])
def test_a_share_is_kept(model: nn.Module, selector: str) -> None:
    inputs = inputs_for(*TEXTS)
    with VisualTokenPruning(selector, 0.25)(model), torch.no_grad():
        share = model(**inputs)
    with VisualTokenPruning(selector, 4)(model), torch.no_grad():
        count = model(**inputs)
    assert torch.equal(share.logits, count.logits)
    assert cache_lengths(share.cache) == cache_lengths(count.cache)


def test_calibrate_and_settings(model: nn.Module, tmp_path: Any) -> None:
    images = pixels(6).double()
    mean = visual_tokens(model, images).effective_rank.mean().item()
    method = VisualTokenPruning("agile", 7).calibrate(model, images)
    assert method.erank_avg == pytest.approx(mean)
    whole = {"pixel_values": images, "input_ids": TEXTS[0]}
    assert VisualTokenPruning().calibrate(model, whole).erank_avg == pytest.approx(mean)
    batches = ({"pixel_values": images[:4]}, {"pixel_values": images[4:]})
    assert VisualTokenPruning().calibrate(model, batches).erank_avg == pytest.approx(mean)
    assert load_settings(VisualTokenPruning, save_settings(method, tmp_path / "a.json")) == method
    with pytest.raises(ValueError, match="data: expected at least one"):
        method.calibrate(model, [])


def test_nested_blocks(model: nn.Module) -> None:
    inputs = inputs_for(*TEXTS)
    with prune_visual_tokens(model, "divprune", 8), prune_visual_tokens(model, "fastv", 3):
        one = generate(model, inputs)
    with prune_visual_tokens(model, "fastv", 3), prune_visual_tokens(model, "divprune", 8):
        two = generate(model, inputs)
    assert torch.equal(one.sequences, two.sequences)
    width = inputs["input_ids"].shape[1] + 3
    assert cache_lengths(one.cache) == [width - 8, width - 8, width - 13, width - 13]
    for names, message in (
        (("divprune", "agile"), "second pruning of the same"),
        (("fastv", "sparsevlm"), "cannot be nested"),
    ):
        first, second = (prune_visual_tokens(model, name, 3) for name in names)
        with pytest.raises(ValueError, match=message), first, second:
            model(**inputs)


def test_what_cannot_be_pruned_says_so(model: nn.Module) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    inputs = inputs_for(TEXTS[0])
    llama = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            vocab_size=9,
        )
    )
    with pytest.raises(ValueError, match="model: expected transformers' LlavaForConditional"):
        prune_visual_tokens(llama)
    with pytest.raises(ValueError, match="selector: expected one of agile"):
        prune_visual_tokens(model, "best")
    for keep in (0, 0.0, 1.5, True):
        with pytest.raises(ValueError, match="keep: expected a whole number"):
            prune_visual_tokens(model, keep=keep)
    with pytest.raises(ValueError, match="positions: expected"):
        prune_visual_tokens(model, positions="none")
    for selector in MERGING:
        with pytest.raises(ValueError, match='positions: expected "compact" with'):
            prune_visual_tokens(model, selector, positions="original")
    with pytest.raises(ValueError, match="layer: expected layers from 1 to 3"):
        prune_visual_tokens(model, "fastv", layer=4)
    with pytest.raises(ValueError, match="layer: expected whole numbers, at least 1"):
        prune_visual_tokens(model, "fastv", layer=0)
    pruning = prune_visual_tokens(model, "fastervlm", 5)
    with pruning:
        with pytest.raises(ValueError, match="input_ids: expected 16 image tokens"):
            model(input_ids=inputs["input_ids"][:, :-6], pixel_values=inputs["pixel_values"])
        with pytest.raises(ValueError, match="attention_mask: expected"):
            model(**inputs | {"attention_mask": torch.ones(1, 1, 25, 25)})
        with pytest.raises(ValueError, match="logits_to_keep: expected a number"):
            model(**inputs, logits_to_keep=torch.tensor([3]))
        with pytest.raises(ValueError, match="static"):
            generate(model, inputs, cache_implementation="static")
        model(**inputs)  # and goes on as if nothing had been
    with pytest.warns(InterventionWarning, match="there was no image"), pruning:
        model(input_ids=torch.tensor([[1, 5, 6]]))
    outside = model.get_image_features(inputs["pixel_values"], return_dict=True)
    with pytest.raises(ValueError, match="mm_encoder_outputs: expected image"), pruning:
        model(input_ids=inputs["input_ids"], mm_encoder_outputs={"image": outside})
    with pytest.raises(RuntimeError, match="not open in this thread"):
        pruning.__exit__(None, None, None)


def test_eager_attention_is_enough_for_diversity() -> None:
    model = make_llava()
    model.set_attn_implementation("eager")
    inputs = batch(*TEXTS)
    for selector in ("divprune", "random"):
        with prune_visual_tokens(model, selector, 5) as run, torch.no_grad():
            model(**inputs)
        assert run.stats["kept_image_tokens"] == 15
    pruning = prune_visual_tokens(model, "agile", 5)
    with pytest.raises(ValueError, match="set_attn_implementation"), pruning:
        model(**inputs)


def test_towers_without_a_class_token() -> None:
    model = llava(siglip=True)
    inputs = prompts([[3, 4, 5], [6, 7]])
    tokens = visual_tokens(model, inputs["pixel_values"])
    assert tokens.statistic == "received"
    index = select_tokens(tokens.features, tokens.attention, 2, "fastervlm")
    for selector in ("fastervlm", "visionzip", "prumerge+"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with prune_visual_tokens(model, selector, 2) as run, torch.no_grad():
                out = model(**inputs)
        assert cache_lengths(out.cache) == [inputs["input_ids"].shape[1] - 7] * 2
        if selector == "fastervlm":
            assert [one.tolist() for one in run.kept] == index.tolist()


def test_other_handlers_see_the_short_sequence() -> None:
    model = llava()
    inputs = prompts([[3, 4, 5], [6, 7]])
    with tap(model) as calls, prune_visual_tokens(model, "fastervlm", 2):
        model.generate(**inputs, max_new_tokens=3, do_sample=False)
    decoder = [call for call in calls if "language_model" in call.name]
    width = inputs["input_ids"].shape[1] - 7
    assert [call.key_length for call in decoder[::2]] == [width, width + 1, width + 2]
