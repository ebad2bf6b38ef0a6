"""ACT against golden vectors of the official code, dense maps, and itself with a cache or alone."""

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import attending as at
from attending.core import _key_groups as engine
from attending.core import reference
from attending.interventions.attention_calibration import (
    AttentionCalibration,
    calibrate_attention,
    usual_layers,
)
from attending.interventions.intervention import InterventionWarning
from attending.interventions.prompt_sinks import CODE_THRESHOLD, SinkRule
from attending.taps import AttentionCall, Proceed
from tests.interventions.llava import make_llava
from tests.interventions.tiny import make_causal

GOLDEN = Path(__file__).parents[1] / "golden" / "attention-calibration-act"
LOW = {"alpha": 1.5, "min_observers": 3}  # so that a small random model has sinks
EVERYWHERE = AttentionCalibration(layers=range(3), **LOW)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return make_causal()


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(3, 50, (3, 20), generator=torch.Generator().manual_seed(1))


LEFT = torch.ones(3, 20, dtype=torch.long)
LEFT[0, :7] = LEFT[1, :1] = 0


@pytest.mark.parametrize("case", ["calibrate_case1", "calibrate_case2"])
def test_golden(case: str) -> None:
    golden = {
        name: torch.from_numpy(array) for name, array in np.load(GOLDEN / f"{case}.npz").items()
    }
    attn, threshold = golden["attn"], float(golden["threshold"])
    before = attn.clone()
    found = calibrate_attention(
        attn, beta=float(golden["beta"]), threshold=threshold, min_observers=1
    )
    torch.testing.assert_close(found[0], golden["out"], rtol=0, atol=1e-10)
    assert torch.equal(attn, before)
    observers = torch.arange(attn.shape[-1], 0, -1)[None, None]
    received = attn.sum(2)
    torch.testing.assert_close((received / observers)[0], golden["avg_received"])
    sinks = SinkRule(threshold=threshold, min_observers=1).sinks(received, observers)
    assert torch.equal(sinks[0], golden["calibrated_columns"].bool())


@st.composite
def maps(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Causal maps with planted sinks, and what each query sees; padded on either side or not."""
    batch, heads, tokens = (
        draw(st.integers(1, 3)),
        draw(st.integers(1, 3)),
        draw(st.integers(1, 40)),
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scores = torch.randn(batch, heads, tokens, tokens, generator=generator, dtype=torch.float64)
    planted = torch.rand(batch, heads, 1, tokens, generator=generator) < 0.1
    scores = scores + 4.0 * planted
    visible = torch.ones(tokens, tokens, dtype=torch.bool).tril().expand(batch, 1, tokens, tokens)
    start = torch.randint(0, tokens, (batch, 1, 1, 1), generator=generator)
    place = torch.arange(tokens)
    side = draw(st.sampled_from(("none", "left", "right")))
    if side == "left":
        visible = visible & (place >= start)
    elif side == "right":
        visible = visible & (place <= start) & (place[:, None] <= start)
    attn = torch.softmax(scores.masked_fill(~visible, -torch.inf), -1).nan_to_num(0.0)
    return attn, visible


RULES = st.builds(
    dict,
    alpha=st.sampled_from((1.0, 5.0)),
    threshold=st.sampled_from((None, CODE_THRESHOLD)),
    beta=st.sampled_from((0.0, 0.4, 1.0)),
    protect=st.sampled_from(("first_sink", "bos", (), (0, 2))),
    min_observers=st.integers(1, 4),
)


def by_hand(attn: Tensor, visible: Tensor, rule: dict) -> Tensor:
    """The definition, one entry after the other."""
    result = attn.clone()
    for item, head in np.ndindex(*attn.shape[:2]):
        a, seen = attn[item, head], visible[item, 0]
        real = [t for t in range(len(a)) if seen[:, t].any()]
        limit = rule["alpha"] / len(real) if rule["threshold"] is None else rule["threshold"]
        flagged = []
        for t in real:
            observers = [k for k in range(len(a)) if seen[k, t]]
            average = sum(float(a[k, t]) for k in observers) / len(observers)
            if average > limit and len(observers) >= rule["min_observers"]:
                flagged.append(t)
        if rule["protect"] == "first_sink":
            flagged = flagged[1:]
        else:
            kept = (0,) if rule["protect"] == "bos" else rule["protect"]
            flagged = [t for t in flagged if t - real[0] not in kept]
        for k in range(len(a)):
            sink = sum(float(a[k, t]) for t in flagged)
            others = sum(float(a[k, t]) for t in real if t not in flagged)
            if others == 0:
                continue
            for t in real:
                gain = 1 + (1 - rule["beta"]) * sink / others
                result[item, head, k, t] = a[k, t] * (rule["beta"] if t in flagged else gain)
    return result


@settings(max_examples=40)
@given(maps(), RULES)
def test_a_map_by_its_definition(case: tuple[Tensor, Tensor], rule: dict) -> None:
    attn, visible = case
    found = calibrate_attention(attn, visible=visible, **rule)
    torch.testing.assert_close(found, by_hand(attn, visible, rule), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.sum(-1), attn.sum(-1))
    assert (found[attn == 0] == 0).all()
    if rule["beta"] == 1:
        torch.testing.assert_close(found, attn, rtol=1e-12, atol=0)


def test_rows_that_lie_on_sinks_alone_stay() -> None:
    """The official code divides 0 by 0 there."""
    attn = torch.eye(5, dtype=torch.float64)
    attn[2:] = torch.tensor([0.0, 1.0, 0, 0, 0])
    found = calibrate_attention(attn[None, None], protect=(), threshold=0.1, min_observers=1)
    torch.testing.assert_close(found[0, 0], attn)


def test_the_first_sink_is_not_always_the_first_token() -> None:
    """A single sink that is not the first token: kept by the code's rule, damped by "bos"."""
    attn = torch.full((1, 1, 20, 20), 0.3).tril().softmax(-1).tril()
    attn[..., 4:, 4] = 3.0
    attn = attn / attn.sum(-1, keepdim=True)
    assert torch.equal(calibrate_attention(attn, threshold=0.5), attn)
    damped = calibrate_attention(attn, threshold=0.5, protect="bos")
    torch.testing.assert_close(damped[..., 4], 0.4 * attn[..., 4])


def calls_and_outputs(
    model: nn.Module, method, *args, **inputs
) -> list[tuple[AttentionCall, Tensor]]:
    kept: list[tuple[AttentionCall, Tensor]] = []

    def keep(call: AttentionCall, proceed: Proceed) -> Tensor:
        kept.append((call, proceed(call)))
        return kept[-1][1]

    with torch.no_grad(), at.tap(model, keep), method(model, *args):
        model(**inputs)
    return kept


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("dense", [True, False])
def test_a_model_is_edited_as_its_maps(monkeypatch, model, ids, padding: str, dense: bool) -> None:
    """Every row of every item and head, GQA, against the dense operator on the model's own maps."""
    for name in ("CHUNK_BYTES", "DENSE_BYTES"):
        monkeypatch.setattr(engine, name, 2**40 if dense else 0)
    mask = {"none": torch.ones_like(LEFT), "left": LEFT, "right": LEFT.flip(-1)}[padding]
    found = calls_and_outputs(model, EVERYWHERE, input_ids=ids, attention_mask=mask)
    assert len(found) == 3
    for call, output in found:
        p = reference.attention_map(
            call.query, call.key, call.attn_mask, call.is_causal, None, call.enable_gqa
        ).probabilities
        real = mask.bool()[:, None, None] & mask.bool()[:, None, :, None]
        visible = real & torch.ones(20, 20, dtype=torch.bool).tril()
        wanted = calibrate_attention(p, visible=visible, **LOW)
        value = call.value.double().repeat_interleave(call.num_heads // call.value.shape[1], 1)
        rows = mask.bool()[:, None, :, None]
        torch.testing.assert_close(
            output.double() * rows, (wanted @ value) * rows, rtol=1e-4, atol=1e-5
        )
        assert not torch.allclose(wanted, p, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("mask", [None, LEFT], ids=["even", "padded"])
@pytest.mark.parametrize("cache", [None, "static"])
def test_decoding_with_a_cache_is_a_full_forward(model, ids, mask, cache) -> None:
    """The official code gets this wrong: there a step of one query calibrates itself."""
    new = 5
    with EVERYWHERE(model) as run:
        found = model.generate(
            ids,
            attention_mask=torch.ones_like(ids) if mask is None else mask,
            max_new_tokens=new,
            do_sample=False,
            cache_implementation=cache,
            return_dict_in_generate=True,
            output_logits=True,
            disable_compile=True,
        )
    assert run.edited_calls == 3 * new
    inputs: dict[str, Tensor] = {"input_ids": found.sequences}
    if mask is not None:
        inputs["attention_mask"] = torch.cat([mask, torch.ones(3, new, dtype=torch.long)], 1)
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp_min(0)
    with EVERYWHERE(model, prompt_length=20):
        logits = model(**inputs).logits
    plain = model(**inputs).logits
    for step, given_ in enumerate(found.logits):
        torch.testing.assert_close(given_, logits[:, 19 + step], rtol=1e-4, atol=1e-4)
        assert (given_ - plain[:, 19 + step]).abs().max() > 0.01


@torch.no_grad()
def test_every_item_of_a_batch_is_as_if_alone(model, ids) -> None:
    """The official code calibrates the first one only."""
    places = (LEFT.cumsum(-1) - 1).clamp_min(0)
    with EVERYWHERE(model):
        together = model(ids, attention_mask=LEFT, position_ids=places).logits
        for item, start in enumerate((7, 1, 0)):
            alone = model(ids[item : item + 1, start:]).logits
            torch.testing.assert_close(alone[0], together[item, start:], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_prompts_of_different_lengths_padded_on_the_right(model, ids) -> None:
    """A full forward with a prompt length per item; what comes after the prompt is never a sink."""
    lengths = torch.tensor([9, 20, 14])
    with EVERYWHERE(model, prompt_length=lengths):
        together = model(ids).logits
    for item, length in enumerate(lengths.tolist()):
        with EVERYWHERE(model, prompt_length=length):
            alone = model(ids[item : item + 1]).logits
        torch.testing.assert_close(alone[0], together[item], rtol=1e-4, atol=1e-4)
        changed = ids[item : item + 1].clone()
        changed[:, length:] = 7  # later tokens change nothing before them: no leak
        with EVERYWHERE(model, prompt_length=length):
            other = model(changed).logits
        torch.testing.assert_close(alone[:, :length], other[:, :length], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_sequences_that_take_turns(model, ids) -> None:
    """Two prompts with their own caches, as contrastive decoding has them."""
    first, second = ids[:1, :12], ids[1:2, :15]
    token = torch.tensor([[5]])
    alone = []
    for prompt in (first, second):
        with EVERYWHERE(model):
            cache = model(prompt, use_cache=True).past_key_values
            alone.append(model(token, cache=cache).logits)
    with EVERYWHERE(model):
        caches = [model(prompt, use_cache=True).past_key_values for prompt in (first, second)]
        mixed = [model(token, cache=cache).logits for cache in caches]
    for one, other in zip(alone, mixed, strict=True):
        assert torch.equal(one, other)


@torch.no_grad()
def test_several_tokens_at_once_after_a_prefix(model, ids) -> None:
    """A masked step of many queries, as in chunks or speculation, is what single steps are."""
    with EVERYWHERE(model):
        cache = model(ids[:, :14], use_cache=True).past_key_values
        together = model(ids[:, 14:], cache=cache).logits
    with EVERYWHERE(model):
        cache = model(ids[:, :14], use_cache=True).past_key_values
        single = [model(ids[:, t : t + 1], cache=cache).logits for t in range(14, 20)]
    torch.testing.assert_close(torch.cat(single, 1), together, rtol=1e-4, atol=1e-4)
    with EVERYWHERE(model, prompt_length=14):
        whole = model(ids).logits[:, 14:]
    torch.testing.assert_close(whole, together, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_sliding_windows_drop_sinks() -> None:
    """Keys of a prompt leave the cache of a sliding window, and their marks with them."""
    model = make_causal("Mistral", sliding_window=10)
    ids = torch.randint(3, 50, (2, 14), generator=torch.Generator().manual_seed(2))
    method = AttentionCalibration(layers=range(3), alpha=1.2, min_observers=2, protect=())
    with method(model):
        found = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=8,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
    with method(model, prompt_length=14):
        logits = model(found.sequences).logits
    for step, one in enumerate(found.logits):
        torch.testing.assert_close(one, logits[:, 13 + step], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_beams_share_the_sinks_of_their_prompt(model, ids) -> None:
    with EVERYWHERE(model) as run:
        model.generate(ids, num_beams=2, max_new_tokens=3, do_sample=False)
    assert run.edited_calls == run.calls == 9


@torch.no_grad()
def test_only_the_chosen_heads(model, ids) -> None:
    method = AttentionCalibration(heads={1: (2,)}, **LOW)
    with method(model) as run, at.tap(model) as edited:
        model(ids)
    assert run.heads == {(1, 2)}
    assert run.left_alone == {"its layer is not calibrated": 2}
    assert edited[0].query.shape[-1] == edited[2].query.shape[-1] == 8  # as they came
    assert edited[1].query.shape[-1] > 8  # with the columns of the edit


@torch.no_grad()
def test_the_language_model_of_a_vision_model() -> None:
    """Layers are those of the language model, not of the vision tower, which counts from 0 too."""
    model = make_llava()
    with (
        pytest.warns(InterventionWarning, match="no key was in a group"),
        AttentionCalibration(threshold=0.99)(model) as run,
    ):
        model(torch.tensor([[1, 5, 6, 7, 8, 9, 10, 11, 12, 13]]))
    assert run.calls == 4
    assert run.left_alone["its layer is not calibrated"] == 3  # of 4 layers, the third is usual


@torch.no_grad()
def test_encoders_are_left_alone() -> None:
    config = transformers.BertConfig(
        vocab_size=20,
        hidden_size=16,
        intermediate_size=16,
        num_attention_heads=2,
        num_hidden_layers=4,
    )
    model = transformers.AutoModel.from_config(config, attn_implementation="sdpa").eval()
    ids = torch.randint(3, 20, (2, 9))
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    for given_ in (torch.ones_like(ids), mask):
        with (
            pytest.warns(InterventionWarning, match="as in an encoder"),
            AttentionCalibration()(model),
        ):
            model(ids, attention_mask=given_)


@torch.no_grad()
def test_a_prompt_that_ran_before_the_block_is_refused(model, ids) -> None:
    cache = model(ids, use_cache=True).past_key_values
    with (
        pytest.raises(ValueError, match="Enter the block before the prompt runs"),
        EVERYWHERE(model),
    ):
        model(ids[:, :1], cache=cache)


def test_bad_settings_are_named(model) -> None:
    for name, wrong in {
        "alpha": 0.0,
        "threshold": 2.0,
        "beta": -0.1,
        "protect": "last",
        "min_observers": 0,
    }.items():
        with pytest.raises(ValueError, match=f"{name}: expected"):
            AttentionCalibration(**{name: wrong})
    with pytest.raises(ValueError, match="protect: expected positions"):
        AttentionCalibration(protect=(-1,))
    with pytest.raises(ValueError, match="layers: expected None"):
        AttentionCalibration(heads={1: (0,)}, layers=(1,))
    with pytest.raises(ValueError, match="layers: expected layers from 0 to 2"):
        AttentionCalibration(layers=(3,))(model)
    with pytest.raises(ValueError, match="heads: expected layers from 0 to 2"):
        AttentionCalibration(heads={5: (0,)})(model)
    with pytest.raises(ValueError, match="layers: expected at least one"):
        AttentionCalibration()(model)  # three layers: all are left out
    with pytest.raises(ValueError, match="heads: expected heads from 0 to 3"):
        calls_and_outputs(
            model, AttentionCalibration(heads={1: (4,)}), input_ids=torch.ones(1, 5).long()
        )
    with pytest.raises(ValueError, match="prompt_length: expected one integer"):
        calls_and_outputs(
            model, EVERYWHERE, torch.tensor([1, 2]), input_ids=torch.ones(3, 5).long()
        )
    with pytest.raises(ValueError, match="attn: expected the square map"):
        calibrate_attention(torch.ones(1, 1, 1, 5))
    assert list(usual_layers(32)) == list(range(2, 31))
