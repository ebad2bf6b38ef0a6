"""Planned blocks in real denoisers and language models."""

import pytest
import torch
from torch import Tensor

import attending as at
from attending.interventions import BlockSparse, InterventionWarning
from attending.sparse.window import window_plan
from attending.taps import AttentionCall, Proceed
from attending.taps.denoising import Moment
from tests.interventions.tiny_denoisers import tiny_wan, wan_inputs


def inputs(time: float = 500.0) -> dict[str, Tensor]:
    return wan_inputs(frames=3, height=8, width=8) | {"timestep": torch.tensor([time])}


@torch.no_grad()
def test_a_plan_in_wan_equals_its_mask_and_leaves_no_trace() -> None:
    model = tiny_wan()
    before = model(**inputs()).sample
    plan = window_plan(48, 48, block_size=16, width=2)

    def masked(call: AttentionCall, proceed: Proceed) -> Tensor:
        from dataclasses import replace

        return proceed(call if call.is_cross else replace(call, attn_mask=plan.visible()))

    with at.tap(model, masked):
        expected = model(**inputs()).sample
    with BlockSparse(lambda call, moment: plan)(model) as run:
        found = model(**inputs()).sample
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, before)
    assert torch.equal(model(**inputs()).sample, before)
    assert run.stats == {
        "calls": 2,
        "sparse_calls": 2,
        "dense_calls": 0,
        "blocks_computed": 2 * 2 * 6,
        "blocks_of_dense": 2 * 2 * 9,
        "density": pytest.approx(2 / 3),
    }
    assert "66.7% of all maps" in str(run)


@torch.no_grad()
def test_the_planner_knows_the_step() -> None:
    model, plan = tiny_wan(), window_plan(48, 48, block_size=16, width=1)
    seen: list[tuple[int, str]] = []

    def late(call: AttentionCall, moment: Moment) -> object:
        seen.append((moment.step, call.name))
        return plan if moment.step else None

    with BlockSparse(late)(model) as run:  # type: ignore[arg-type]
        for time in (900.0, 500.0, 100.0):
            model(**inputs(time=time))
    assert [step for step, _ in seen] == [0, 0, 1, 1, 2, 2]
    assert {name for _, name in seen} == {"blocks.0.attn1", "blocks.1.attn1"}
    assert run.stats["dense_calls"] == 2
    assert run.density == pytest.approx((1 + 1 / 3 + 1 / 3) / 3)
    with (
        pytest.warns(InterventionWarning, match="the planner gave no plan"),
        BlockSparse(lambda call, moment: None)(model),
    ):
        model(**inputs())


@torch.no_grad()
def test_nested_blocks_show_the_inner_one_the_mask() -> None:
    model = tiny_wan()
    near = window_plan(48, 48, block_size=16, width=2)
    own = window_plan(48, 48, block_size=16, width=1)
    with BlockSparse(lambda call, moment: own)(model):
        expected = model(**inputs()).sample
    with (
        BlockSparse(lambda call, moment: near)(model),
        BlockSparse(lambda call, moment: own)(model),
    ):
        found = model(**inputs()).sample
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_causal_and_padded_calls_stay_so() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=20,
            hidden_size=24,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
        )
    ).eval()
    ids = torch.randint(0, 20, (2, 21), generator=torch.Generator().manual_seed(2))
    dense = model(ids).logits
    everything = at.BlockPlan.from_block_mask(
        torch.ones(3, 3, dtype=torch.bool), block_size=8, query_length=21, key_length=21
    )
    with BlockSparse(lambda call, moment: everything)(model):
        torch.testing.assert_close(model(ids).logits, dense, rtol=1e-4, atol=1e-5)
    padding = torch.ones_like(ids)
    padding[0, :5] = 0
    dense = model(ids, attention_mask=padding).logits
    with BlockSparse(lambda call, moment: everything)(model):
        found = model(ids, attention_mask=padding).logits
    torch.testing.assert_close(found[0, 5:], dense[0, 5:], rtol=1e-4, atol=1e-5)
    wrong = window_plan(20, 20, block_size=8, width=1)
    with (
        BlockSparse(lambda call, moment: wrong)(model),
        pytest.raises(ValueError, match="plan: expected one for 21 queries"),
    ):
        model(ids)
