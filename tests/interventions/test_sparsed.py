"""SparseD in real denoisers: the steps it knows, the blocks it reuses, and nothing left behind."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import attending as at
from attending.diffusion import sample_masked_text
from attending.interventions import InterventionWarning, SparseD, load_settings, save_settings
from attending.sparse.sparsed import sparsed_mask
from attending.taps import AttentionCall, Proceed
from tests.interventions.tiny_denoisers import tiny_wan

MASK = 3
PROMPT, ANSWER, STEPS = 40, 21, 7  # 61 tokens: the last block is short, and one straddles
BLOCK = 8


@pytest.fixture(scope="module")
def bert() -> torch.nn.Module:
    from transformers import EuroBertConfig, EuroBertForMaskedLM

    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = EuroBertConfig(
            vocab_size=30,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.4,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            mask_token_id=MASK,
        )
        return EuroBertForMaskedLM(config).eval()


@pytest.fixture(scope="module")
def wan() -> torch.nn.Module:
    with torch.random.fork_rng():
        model = tiny_wan()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def prompts(rows: int = 1, tokens: int = PROMPT, seed: int = 0) -> Tensor:
    return torch.randint(4, 30, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def write(model, prompt, **ways):
    ways = {"new_tokens": ANSWER, "steps": STEPS, "mask_token": MASK, **ways}
    return sample_masked_text(model, prompt, **ways)


class Recorded(torch.nn.Module):
    """Keeps what the model said in every step."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model, self.logits = model, []
        self.eval()

    def forward(self, input_ids: Tensor, **ways: Tensor) -> Tensor:
        self.logits.append(self.model(input_ids=input_ids, **ways).logits)
        return self.logits[-1]


@pytest.mark.parametrize("isolated", [False, True])
@pytest.mark.parametrize(("skip", "plan_step"), [(0.2, None), (0.5, None), (0.5, 0)])
def test_every_step_as_by_hand(bert, skip, plan_step, isolated) -> None:
    last = int(STEPS * skip) + 1
    planning = last if plan_step is None else plan_step
    masks, step, densities = {}, [-1], []

    def by_hand(call: AttentionCall, proceed: Proceed) -> Tensor:
        step[0] += call.layer == 0
        if step[0] == planning:
            masks[call.name] = sparsed_mask(
                call.query, call.key, ANSWER, block_size=BLOCK, isolated=isolated
            )
        if step[0] <= last:
            return proceed(call)
        densities.append(masks[call.name].float().mean())
        shown = masks[call.name].repeat_interleave(BLOCK, 2).repeat_interleave(BLOCK, 3)
        length = call.query_length
        return proceed(replace(call, attn_mask=shown[:, :, :length, :length]))

    expected, found = Recorded(bert), Recorded(bert)
    with at.tap(bert, by_hand):
        tokens = write(expected, prompts(2))
    method = SparseD(skip=skip, block_size=BLOCK, isolated=isolated, plan_step=plan_step)
    with method(bert) as run:
        assert torch.equal(write(found, prompts(2), on_step=run.on_step), tokens)
    for ours, theirs in zip(found.logits, expected.logits, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    sparse = 2 * (STEPS - last - 1)
    assert run.stats["sparse_calls"] == sparse == len(densities)
    assert run.stats["dense_calls"] == 2 * (last + 1)
    share = run.stats["blocks_computed"] / run.stats["blocks_of_dense"]
    assert share == pytest.approx(float(torch.stack(densities).mean()))
    assert run.left_alone == {"the first steps are dense": 2 * (last + 1)}


def test_the_clock_counts_where_the_sampler_does_not_tell(bert) -> None:
    with SparseD(block_size=BLOCK)(bert) as told:
        expected = write(bert, prompts(), on_step=told.on_step)
    method = SparseD(block_size=BLOCK, steps=STEPS, new_tokens=ANSWER)
    with method(bert) as counted:
        assert torch.equal(write(bert, prompts(), order="confidence"), expected)
        first = counted.stats
        write(bert, prompts(2, seed=5))  # another generation, another batch
    assert first == told.stats
    assert counted.stats["sparse_calls"] == 2 * first["sparse_calls"]


@pytest.mark.parametrize("told", [True, False])
def test_generations_do_not_see_each_other(bert, told) -> None:
    method = SparseD(block_size=BLOCK, **({} if told else {"steps": STEPS, "new_tokens": ANSWER}))

    def one(run, **ways):
        return write(bert, on_step=run.on_step if told else None, **ways)

    alone = []
    for seed, tokens in ((0, PROMPT), (1, 25), (2, PROMPT)):
        with method(bert) as run:
            alone.append(one(run, prompt=prompts(1, tokens, seed)))
    with method(bert) as run:
        for expected, (seed, tokens) in zip(alone, ((0, 40), (1, 25), (2, 40)), strict=True):
            assert torch.equal(one(run, prompt=prompts(1, tokens, seed)), expected)


def test_gaps_and_an_answer_that_is_given(bert) -> None:
    gaps = prompts(1, 61)
    gaps[:, 3::7] = MASK
    ways = {"new_tokens": 0, "steps": STEPS}
    with SparseD(block_size=BLOCK)(bert) as run:
        joint = write(bert, gaps, on_step=run.on_step, **ways)
        assert run.new_tokens is None
    with SparseD(block_size=BLOCK, steps=STEPS)(bert):
        assert torch.equal(write(bert, gaps, **ways), joint)
    with SparseD(block_size=BLOCK, new_tokens=21, count_real=True)(bert) as run:
        write(bert, gaps, on_step=run.on_step, **ways)
        assert run.new_tokens == 21
        plan = next(iter(run.plans.values()))
    assert (plan.block_mask[..., 5:].sum(-1) == 1).all()  # of 3 blocks, int(3 * 0.3) + 1


def test_blocks_one_after_another(bert) -> None:
    with SparseD(block_size=BLOCK)(bert) as run:
        write(bert, prompts(), block_length=7, steps=9, on_step=run.on_step)
    assert run.stats["dense_calls"] == 2 * 3
    assert run.stats["sparse_calls"] == 2 * 6


def test_padding_of_whole_blocks_changes_nothing(bert) -> None:
    short, long = prompts(1, 24, seed=3), prompts(1, PROMPT, seed=4)
    padded = torch.cat([torch.cat([torch.zeros(1, 16, dtype=torch.long), short], 1), long])
    real = torch.ones_like(padded)
    real[0, :16] = 0
    method = SparseD(block_size=BLOCK, select=0.25)
    together, alone = Recorded(bert), Recorded(bert)
    with method(bert) as run:
        found = write(together, padded, attention_mask=real, on_step=run.on_step)
    with method(bert) as run:
        expected = write(alone, short, on_step=run.on_step)
    with method(bert) as run:
        other = write(bert, long, on_step=run.on_step)
    for ours, theirs in zip(together.logits, alone.logits, strict=True):
        torch.testing.assert_close(ours[:1, 16:], theirs, rtol=1e-3, atol=1e-3)
    assert torch.equal(found[:1, 16:], expected)
    assert torch.equal(found[1:], other)


@settings(max_examples=8, deadline=None)
@given(st.sampled_from([{"select": 1.0}, {"skip": 1.0}, {"skip": 3.0}]), st.integers(1, 70))
def test_all_blocks_or_all_steps_are_dense(bert, ways, block_size) -> None:
    dense, sparse = Recorded(bert), Recorded(bert)
    expected = write(dense, prompts(2))
    block = SparseD(block_size=block_size, **ways)(bert)
    if "skip" in ways:
        with pytest.warns(InterventionWarning, match="the first steps are dense"), block as run:
            found = write(sparse, prompts(2), on_step=run.on_step)
        assert all(torch.equal(*pair) for pair in zip(sparse.logits, dense.logits, strict=True))
    else:
        with block as run:
            found = write(sparse, prompts(2), on_step=run.on_step)
        for pair in zip(sparse.logits, dense.logits, strict=True):
            torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-4)
        assert run.density == 1
    assert torch.equal(found, expected)


def test_leaves_no_trace(bert) -> None:
    before = write(bert, prompts())
    hooks = [len(module._forward_pre_hooks) for module in bert.modules()]
    with SparseD(block_size=BLOCK, select=0.0)(bert) as run:
        assert not torch.equal(write(bert, prompts(), on_step=run.on_step), before)
    assert torch.equal(write(bert, prompts()), before)
    assert [len(module._forward_pre_hooks) for module in bert.modules()] == hooks


def film(wan, times, branches=1, **ways) -> list[Tensor]:
    """A few steps of the model on inputs that do not depend on what it said."""
    said = []
    for number, time in enumerate(times):
        for branch in range(branches):
            generator = torch.Generator().manual_seed(10 * number)
            captions = torch.Generator().manual_seed(ways.get("caption", branch))
            output = wan(
                hidden_states=torch.randn(1, 3, 3, 8, 8, generator=generator),
                timestep=torch.tensor([time]),
                encoder_hidden_states=torch.randn(1, 5, 8, generator=captions),
            )
            said.append(output.sample)
    return said


TIMES = (900.0, 700.0, 500.0, 300.0, 100.0)


@torch.no_grad()
def test_a_video_denoiser_with_guidance(wan) -> None:
    method = SparseD(skip=0.2, block_size=8, steps=len(TIMES))  # dense: steps 0, 1, 2
    with method(wan) as run:
        both = film(wan, TIMES, branches=2)
        assert len(run.plans) == 4  # two layers, two branches
        again = film(wan, TIMES, branches=2)
    assert run.stats["sparse_calls"] == 2 * 2 * 2 * 2
    assert run.stats["dense_calls"] == 2 * 2 * 2 * 3
    assert {name for name, _ in run.plans} == {"blocks.0.attn1", "blocks.1.attn1"}
    for branch in range(2):
        with method(wan):
            alone = film(wan, TIMES, caption=branch)
        assert all(torch.equal(*pair) for pair in zip(both[branch::2], alone, strict=True))
    assert all(torch.equal(*pair) for pair in zip(both, again, strict=True))
    dense = film(wan, TIMES, branches=2)
    assert all(torch.equal(*pair) for pair in zip(both[:6], dense[:6], strict=True))
    assert not any(torch.allclose(*pair) for pair in zip(both[6:], dense[6:], strict=True))


def test_causal_attention_stays_dense() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=20, hidden_size=24, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip
    model, ids = LlamaForCausalLM(config).eval(), torch.arange(12)[None]
    with (
        pytest.warns(InterventionWarning, match="it is causal"),
        SparseD(block_size=4, steps=2)(model),
    ):
        model(ids)


def test_says_what_is_missing(bert) -> None:
    with (
        pytest.raises(ValueError, match=r"steps: expected .*on_step=run.on_step"),
        SparseD(block_size=BLOCK)(bert),
    ):
        write(bert, prompts())


def test_a_generation_that_stops_early(bert) -> None:
    method = SparseD(skip=0.0, block_size=BLOCK, steps=6, new_tokens=8)
    with method(bert) as run:
        for _ in range(3):
            bert(prompts())
        with pytest.raises(ValueError, match=r"\[batch, heads, tokens\] = \[1, 4, 40\]"):
            bert(prompts(1, 30))
        run.clock.reset()
        bert(prompts(1, 30))
    assert run.stats["sparse_calls"] == 2
    assert run.stats["dense_calls"] == 2 * 3


@pytest.mark.parametrize(
    ("ways", "named"),
    [
        ({"skip": -0.1}, "skip: expected"),
        ({"select": 1.1}, "select: expected a share"),
        ({"block_size": 0}, "block_size: expected at least 1"),
        ({"steps": 0}, "steps: expected at least 1"),
        ({"new_tokens": -1}, "new_tokens: expected at least 0"),
        ({"plan_step": -1}, "plan_step: expected at least 0"),
    ],
)
def test_bad_settings(ways, named) -> None:
    with pytest.raises(ValueError, match=named):
        SparseD(**ways)


def test_on_disk(tmp_path) -> None:
    method = SparseD(skip=0.1, steps=12, isolated=True)
    assert load_settings(SparseD, save_settings(method, tmp_path / "sparsed.json")) == method
