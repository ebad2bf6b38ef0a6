"""FORA, and the caches of diffusers as interventions."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attending.interventions.cache_schedule import UniformSteps
from attending.interventions.diffusers_caches import FirstBlockCache, PyramidAttentionBroadcast
from attending.interventions.feature_cache import ProfilingCache
from attending.interventions.intervention import InterventionWarning
from attending.interventions.output_cache import FORA, parts_of
from tests.interventions.denoisers import (
    fingerprint,
    flux,
    flux_inputs,
    sd3,
    sd3_inputs,
    wan,
    wan_inputs,
)

pytestmark = pytest.mark.filterwarnings("error::attending.interventions.InterventionWarning")

Method = FORA | PyramidAttentionBroadcast | FirstBlockCache
METHODS: dict[str, Method] = {
    "fora": FORA(3),
    "pab": PyramidAttentionBroadcast(spatial=2, cross=3),
    "fbc": FirstBlockCache(0.5),
}


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def times(count: int) -> list[float]:
    return [1000.0 * (count - step) / count for step in range(count)]


def generation(
    model: nn.Module, seeds: tuple[int, ...] = (0,), named: bool = False
) -> dict[int, list[Tensor]]:
    found: dict[int, list[Tensor]] = {seed: [] for seed in seeds}
    for time in times(8):
        for seed in seeds:
            with model.cache_context(f"seed {seed}") if named else nullcontext():
                found[seed].append(model(**wan_inputs(time, seed)).sample)
    return found


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("named", [True, False])
def test_branches_and_generations_are_kept_apart(name: str, named: bool) -> None:
    model, method = wan(), METHODS[name]
    before = fingerprint(model)
    dense = generation(model)[0]
    alone: dict[int, list[Tensor]] = {}
    for seed in (0, 1):
        with method(model) as run:
            alone |= generation(model, (seed,))
        assert 0 < run.density < 1
    assert not torch.equal(alone[0][-1], dense[-1])
    assert torch.equal(alone[0][0], dense[0])
    with method(model) as run:
        both = generation(model, (0, 1), named)
        again = generation(model, (0, 1), named)
    for seed in (0, 1):
        assert all(torch.equal(a, b) for a, b in zip(alone[seed], both[seed], strict=True))
        assert all(torch.equal(a, b) for a, b in zip(alone[seed], again[seed], strict=True))
    assert run.generations == 2
    assert fingerprint(model) == before
    assert torch.equal(generation(model)[0][-1], dense[-1])


class TestFora:
    @pytest.mark.parametrize(
        ("make", "inputs", "each"),
        [(wan, wan_inputs, 3), (sd3, sd3_inputs, None), (flux, flux_inputs, None)],
    )
    def test_all_outputs_of_the_last_computed_step(
        self, make: Callable[..., nn.Module], inputs: Any, each: int | None
    ) -> None:
        model = make()
        dense = model(**inputs(1000.0)).sample
        with FORA(2)(model) as run:
            assert torch.equal(model(**inputs(1000.0)).sample, dense)
            again = model(**inputs(1000.0 - 1e-4)).sample
        torch.testing.assert_close(again, dense, atol=1e-5, rtol=1e-5)
        assert run.total == 2 * run.computed
        if each is not None:
            assert run.computed == each * len(model.blocks)

    def test_gates_are_computed_anew(self) -> None:
        """By hand: the block with the layers of the first call and the time of the second."""
        model = wan(layers=1)
        block = model.blocks[0]
        kept: dict[str, Tensor] = {}
        handles = [
            layer.register_forward_hook(lambda m, a, out, name=name: kept.update({name: out}))
            for name, layer in [("1", block.attn1), ("2", block.attn2), ("f", block.ffn)]
        ]
        model(**wan_inputs(1000.0))
        for handle in handles:
            handle.remove()
        handles = [
            layer.register_forward_hook(lambda m, a, out, name=name: kept[name])
            for name, layer in [("1", block.attn1), ("2", block.attn2), ("f", block.ffn)]
        ]
        expected = model(**wan_inputs(300.0, seed=1)).sample
        for handle in handles:
            handle.remove()
        with FORA(2)(model):
            model(**wan_inputs(1000.0))
            got = model(**wan_inputs(300.0, seed=1)).sample
        assert torch.equal(got, expected)
        with ProfilingCache(None, UniformSteps(2))(model):
            model(**wan_inputs(1000.0))
            whole = model(**wan_inputs(300.0, seed=1)).sample
        assert not torch.equal(got, whole)

    def test_parts(self) -> None:
        model = wan()
        block = model.blocks[0]
        assert parts_of(block, ("attention",)) == [block.attn1, block.attn2]
        assert parts_of(block, ("feed_forward",)) == [block.ffn]
        named = nn.ModuleDict({"ff": nn.Linear(1, 1), "offset": nn.Linear(1, 1)})
        assert parts_of(named, ("attention", "feed_forward")) == [named["ff"]]
        with FORA(2, parts=("attention",))(model) as run:
            generation(model)
        assert (run.computed, run.total) == (4 * 6, 8 * 6)
        assert str(run).endswith("computed 24 of 48 calls of layers (50.0%)")

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: FORA(0), "interval"),
            (lambda: FORA(2, parts=()), "parts: expected some of"),
            (lambda: FORA(2, parts=("gates",)), "parts: expected some of"),
            (lambda: FORA(2)(nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(1, 1)])})), "model"),
        ],
    )
    def test_what_cannot_be_is_refused(self, make: Callable[[], object], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            make()


class TestDiffusers:
    def test_the_same_as_diffusers_own(self) -> None:
        from diffusers import FirstBlockCacheConfig, PyramidAttentionBroadcastConfig

        now = [0.0]
        configs = {
            "pab": PyramidAttentionBroadcastConfig(
                spatial_attention_block_skip_range=2,
                cross_attention_block_skip_range=3,
                current_timestep_callback=lambda: now[0],
            ),
            "fbc": FirstBlockCacheConfig(threshold=0.5),
        }
        for name, config in configs.items():
            model = wan()
            with METHODS[name](model):
                ours = generation(model)[0]
            model.enable_cache(config)
            theirs = []
            for time in times(8):
                now[0] = time
                with model.cache_context("cond"):
                    theirs.append(model(**wan_inputs(time)).sample)
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))

    def test_counts(self) -> None:
        model = wan()
        with PyramidAttentionBroadcast(spatial=2)(model) as run:
            generation(model)
        # Steps at 1000, 875, 750, ..., 125; reused at odd calls within (100, 800): 625, 375, 125.
        assert (run.computed, run.total) == (3 * 5, 3 * 8)
        assert [step for _, step, computed in run.history if not computed] == [3, 5, 7]
        calls = [0]
        handle = model.blocks[1].attn1.register_forward_hook(lambda *_: calls.append(1))
        with FirstBlockCache(0.5)(model) as run:
            generation(model)
        handle.remove()
        computed = sum(computed for _, _, computed in run.history)
        assert sum(calls) == computed
        assert (run.computed, run.total) == (8 + 2 * computed, 24)

    def test_with_another_cache_around(self) -> None:
        model = flux()
        before = fingerprint(model)
        inner = PyramidAttentionBroadcast(spatial=2, timesteps=(0.1, 0.9))
        outer = ProfilingCache((0,), UniformSteps(2), stack="transformer_blocks")
        with outer(model) as one, inner(model) as two:
            for time in times(6):
                model(**flux_inputs(time))
        assert one.density < 1
        assert two.density < 1
        assert fingerprint(model) == before

    def test_a_failed_call_closes_its_context(self) -> None:
        model = wan()
        before = fingerprint(model)
        with FirstBlockCache(0.5)(model) as run:
            model(**wan_inputs(1000.0))
            with pytest.raises(RuntimeError):
                model(**wan_inputs(900.0) | {"encoder_hidden_states": torch.ones(1, 5, 9)})
            model(**wan_inputs(800.0))
            model(**wan_inputs(700.0))
        assert {branch for branch, _, _ in run.history} == {0}
        assert fingerprint(model) == before

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: PyramidAttentionBroadcast(None), "at least one number"),
            (lambda: PyramidAttentionBroadcast(0), "spatial: expected whole"),
            (lambda: PyramidAttentionBroadcast(timesteps=(8, 1)), "timesteps"),
            (lambda: FirstBlockCache(-1), "threshold"),
            (lambda: FirstBlockCache()(nn.Linear(1, 1)), "expected a model of diffusers"),
        ],
    )
    def test_what_cannot_be_is_refused(self, make: Callable[[], object], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            make()

    def test_nothing_reused_is_said(self) -> None:
        model = wan()
        method, message = FirstBlockCache(0.0), "FirstBlockCache reused nothing in 8 calls"
        with pytest.warns(InterventionWarning, match=message), method(model):
            generation(model)
