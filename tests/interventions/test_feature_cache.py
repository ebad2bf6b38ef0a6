"""Caches of whole blocks: golden vectors, invariants, models of diffusers, and no trace."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import attending as at
from attending.interventions.cache_schedule import (
    DecreasingSteps,
    FixedSteps,
    UniformSteps,
)
from attending.interventions.drift_schedule import DriftSteps
from attending.interventions.feature_cache import ProfilingCache, TeaCache
from attending.interventions.intervention import InterventionWarning
from attending.interventions.settings import load_settings, save_settings
from tests.interventions.denoisers import (
    Steady,
    Toy,
    TwinDenoiser,
    fingerprint,
    flux,
    flux_inputs,
    hunyuan,
    hunyuan_inputs,
    sd3,
    sd3_inputs,
    wan,
    wan_inputs,
)
from tests.interventions.reference_feature_cache import cached_generation

GOLDEN = Path(__file__).parents[1] / "golden" / "profiling-dit"


def times(count: int) -> list[float]:
    return [1000.0 * (count - step) / count for step in range(count)]


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


pytestmark = pytest.mark.filterwarnings("error::attending.interventions.InterventionWarning")


@pytest.mark.parametrize("name", ["block_cache_steplist", "block_cache_interval"])
def test_against_the_official_code(name: str) -> None:
    golden = {
        key: torch.from_numpy(value) for key, value in np.load(GOLDEN / f"{name}.npz").items()
    }
    model = Toy(golden["weight"], golden["bias"]).double()
    steps = len(golden["x"])
    warmup = int(golden["warmup_steps"])
    blocks = tuple(golden["cached_blocks"].tolist())
    schedules = [FixedSteps(tuple(golden["compute_steps"].tolist()), warmup)]
    if name.endswith("interval"):
        schedules.append(UniformSteps(4, warmup))
    for schedule in schedules:
        with ProfilingCache(blocks, schedule)(model) as run:
            outs = [model(x, torch.tensor(float(s))) for s, x in enumerate(golden["x"])]
        assert (torch.stack(outs) - golden["out"]).abs().max() <= 1e-12
        assert run.computed == golden["block_calls"]
        assert run.total == golden["block_calls_dense"]
    dense = [model(x, torch.tensor(float(step))) for step, x in enumerate(golden["x"])]
    assert (torch.stack(dense) - golden["out_dense"]).abs().max() <= 1e-12
    assert steps == len(run.history)


@settings(max_examples=40)
@given(
    st.integers(1, 7),
    st.sets(st.integers(0, 6)),
    st.one_of(
        st.builds(UniformSteps, st.integers(1, 5), st.integers(0, 4)),
        st.builds(FixedSteps, st.lists(st.integers(0, 11)).map(tuple), st.integers(0, 4)),
        st.builds(DecreasingSteps, st.just(12), st.integers(0, 4), st.just(5.0)),
    ),
    st.integers(0, 1000),
)
def test_equal_to_the_definition(
    count: int, cached: set[int], schedule: UniformSteps, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(count, 4, 4, generator=generator, dtype=torch.float64)
    bias = torch.randn(count, 4, generator=generator, dtype=torch.float64)
    inputs = list(torch.randn(12, 1, 3, 4, generator=generator, dtype=torch.float64))
    cached = {block for block in cached if block < count}
    model = Toy(weight, bias).double()

    def blocks_of_step(step: int) -> list[Callable[[Tensor], Tensor]]:
        time = torch.tensor(float(step))
        return [lambda h, block=block: block(h, time) for block in model.blocks]

    computed = set(schedule.computed(12))
    expected, calls = cached_generation(blocks_of_step, inputs, cached, computed)
    before = model.block_calls
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InterventionWarning)
        with ProfilingCache(tuple(cached), schedule)(model) as run:
            outs = [model(x, torch.tensor(float(step))) for step, x in enumerate(inputs)]
    for out, known in zip(outs, expected, strict=True):
        assert (out - known).abs().max() <= 1e-12
    assert run.computed == calls == model.block_calls - before


@settings(max_examples=15)
@given(st.sets(st.integers(0, 5), min_size=1), st.integers(1, 6))
def test_exact_where_residuals_do_not_depend_on_the_step(cached: set[int], interval: int) -> None:
    model = Steady(6, 4)
    x = torch.randn(1, 3, 4, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InterventionWarning)
        with ProfilingCache(tuple(cached), UniformSteps(interval))(model):
            outs = [model(x, torch.tensor(t)) for t in times(7)]
    for out in outs:
        torch.testing.assert_close(out, model(x, torch.tensor(0.0)), atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    "schedule", [UniformSteps(1), FixedSteps(tuple(range(5))), DriftSteps(0.0)]
)
def test_bit_for_bit_dense_if_all_is_computed(schedule: UniformSteps) -> None:
    model = wan()
    dense = [model(**wan_inputs(t)).sample for t in times(5)]
    method = ProfilingCache(None, schedule)
    with pytest.warns(InterventionWarning, match="all of them computed"), method(model) as run:
        outs = [model(**wan_inputs(t)).sample for t in times(5)]
    assert all(torch.equal(a, b) for a, b in zip(dense, outs, strict=True))
    assert run.density == 1
    with pytest.warns(InterventionWarning), ProfilingCache((), UniformSteps(3))(model):
        assert torch.equal(model(**wan_inputs(1000.0)).sample, dense[0])


MODELS: dict[str, tuple[Callable[..., nn.Module], Callable[..., dict[str, Tensor]], str | None]] = {
    "wan": (wan, wan_inputs, None),
    "sd3": (sd3, sd3_inputs, None),
    "flux double": (flux, flux_inputs, "transformer_blocks"),
    "flux single": (flux, flux_inputs, "single_transformer_blocks"),
    "hunyuan double": (hunyuan, hunyuan_inputs, "transformer_blocks"),
    "hunyuan single": (hunyuan, hunyuan_inputs, "single_transformer_blocks"),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("blocks", [(0,), (1,), (0, 1, 2)])
@pytest.mark.parametrize("inference", [False, True])
def test_models_of_diffusers(name: str, blocks: tuple[int, ...], inference: bool) -> None:
    """A second look at the same inputs is what the first was: all streams are put back."""
    make, inputs, stack = MODELS[name]
    model = make()
    blocks = tuple(b for b in blocks if stack != "transformer_blocks" or b < 2)
    before = fingerprint(model)
    with torch.inference_mode() if inference else nullcontext():
        dense = model(**inputs(1000.0)).sample
        with ProfilingCache(blocks, UniformSteps(9), stack=stack)(model) as run:
            first = model(**inputs(1000.0)).sample
            # Nothing but the timestep moves, and by so little that the states are the same.
            again = model(**inputs(1000.0 - 1e-4)).sample
        assert torch.equal(first, dense)
        torch.testing.assert_close(again, dense, atol=1e-5, rtol=1e-5)
        assert torch.equal(model(**inputs(1000.0)).sample, dense)
    assert run.total - run.computed == len(blocks)
    assert fingerprint(model) == before


def test_both_lists_of_a_model_and_two_schedules() -> None:
    model = flux()
    with pytest.raises(ValueError, match="stack: expected to be told which"):
        ProfilingCache((0,), UniformSteps(2))(model)
    outer = ProfilingCache(None, UniformSteps(2), stack="transformer_blocks")
    inner = ProfilingCache((1, 2), UniformSteps(3), stack="single_transformer_blocks")
    before = fingerprint(model)
    with outer(model) as double, inner(model) as single:
        for time in times(6):
            model(**flux_inputs(time))
    assert (double.computed, double.total) == (2 * 3, 2 * 6)
    assert (single.computed, single.total) == (6 + 2 * 2, 3 * 6)
    assert fingerprint(model) == before
    with ProfilingCache(None, UniformSteps(2))(model) as run:
        for time in times(6):
            model(**flux_inputs(time))
    assert (run.computed, run.total) == (15, 30)


def test_a_run_adds_what_its_blocks_add_one_by_one() -> None:
    model = sd3(layers=4)
    inputs = [sd3_inputs(time, seed=5) for time in times(4)]
    with ProfilingCache((0, 1, 2), UniformSteps(4))(model):
        together = [model(**given).sample for given in inputs]
    with ExitStack() as nested:
        for block in range(3):
            nested.enter_context(ProfilingCache((block,), UniformSteps(4))(model))
        apart = [model(**given).sample for given in inputs]
    for a, b in zip(together, apart, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_half_precision_stays_half() -> None:
    model = wan().to(torch.bfloat16)
    inputs = {
        name: value if name == "timestep" else value.to(torch.bfloat16)
        for name, value in wan_inputs(1000.0).items()
    }
    dense = model(**inputs).sample
    with ProfilingCache((0, 1), UniformSteps(4))(model):
        model(**inputs)
        again = model(**inputs | {"timestep": torch.tensor([1000.0 - 1e-4])}).sample
    assert again.dtype == torch.bfloat16
    torch.testing.assert_close(again, dense, atol=0.02, rtol=0.02)


def test_two_streams_of_unknown_blocks_are_told_apart_by_what_the_next_is_given() -> None:
    torch.manual_seed(0)
    model = TwinDenoiser(4, 5)
    hidden, text = torch.randn(2, 3, 5)
    dense = model(hidden, text, torch.tensor(1.0))
    for blocks in [(0, 1), (1, 2), (0, 1, 2, 3), (0, 3)]:
        with ProfilingCache(blocks, UniformSteps(2))(model):
            assert torch.equal(model(hidden, text, torch.tensor(1.0)), dense)
            again = model(hidden, text, torch.tensor(1.0 - 1e-7))
        torch.testing.assert_close(again, dense, atol=1e-5, rtol=1e-5)
    lonely = TwinDenoiser(1, 5)
    method = ProfilingCache((0,), UniformSteps(2))
    with pytest.raises(ValueError, match="which of the 2 outputs of Twin"), method(lonely):
        lonely(hidden, text, torch.tensor(1.0))


class TestGuidance:
    """Two calls a step have two caches, with a context or without one."""

    @pytest.mark.parametrize("named", [True, False])
    def test_branches_do_not_mix(self, named: bool) -> None:
        model = wan()
        method = ProfilingCache((0, 1), UniformSteps(3))

        def generation(seeds: tuple[int, ...]) -> dict[int, list[Tensor]]:
            found: dict[int, list[Tensor]] = {seed: [] for seed in seeds}
            for time in times(6):
                for seed in seeds:
                    context = model.cache_context(f"branch {seed}") if named else nullcontext()
                    with context:
                        found[seed].append(model(**wan_inputs(time, seed)).sample)
            return found

        alone = {}
        for seed in (0, 1):
            with method(model):
                alone |= generation((seed,))
        with method(model) as run:
            both = generation((0, 1))
        for seed in (0, 1):
            assert all(torch.equal(a, b) for a, b in zip(alone[seed], both[seed], strict=True))
        assert {branch for branch, _, _ in run.history} == (
            {"branch 0", "branch 1"} if named else {0, 1}
        )
        assert [step for branch, step, _ in run.history if branch in (0, "branch 0")] == list(
            range(6)
        )

    def test_a_batch_of_both_is_as_good(self) -> None:
        model = wan()
        method = ProfilingCache((0, 1), UniformSteps(3))
        with method(model):
            one = [model(**wan_inputs(time, 0)).sample for time in times(6)]
        pairs = [
            {k: torch.cat([v, wan_inputs(time, 1)[k]]) for k, v in wan_inputs(time, 0).items()}
            for time in times(6)
        ]
        with method(model):
            batch = [model(**pair).sample[:1] for pair in pairs]
        for a, b in zip(one, batch, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)

    def test_a_sampler_of_second_order_is_counted_by_calls(self) -> None:
        model = wan()
        heun = [1000.0, 800.0, 800.0, 600.0, 600.0, 400.0, 400.0]
        with ProfilingCache(None, UniformSteps(3))(model) as run:
            for time in heun:
                with model.cache_context("cond"):
                    model(**wan_inputs(time))
        assert [computed for _, _, computed in run.history] == [True, False, False] * 2 + [True]


class TestGenerations:
    """Nothing of one generation is reused in the next."""

    def run(self, between: Callable[[nn.Module], Any], **changes: Any) -> Tensor:
        model = wan()
        with ProfilingCache(None, UniformSteps(50))(model) as run:
            for time in times(4):
                model(**wan_inputs(time, 0))
            between(model)
            first = model(**wan_inputs(changes.pop("timestep", 1000.0), 1, **changes)).sample
        assert run.generations == 2
        expected: Tensor = model(**wan_inputs(1000.0, 1, **changes)).sample
        assert torch.equal(first, expected)
        return first

    def test_by_the_timestep(self) -> None:
        self.run(lambda model: None)

    def test_by_a_pipeline(self) -> None:
        model = wan()
        method = ProfilingCache(None, UniformSteps(50))

        def generation() -> None:
            model(**wan_inputs(500.0))
            model._reset_stateful_cache()

        with pytest.warns(InterventionWarning, match="3 of them began"), method(model) as run:  # noqa: PT031
            for _ in range(3):
                generation()
        # Of a single step each, at the same timestep: only the pipeline could tell.
        assert run.generations == 3

    def test_by_other_shapes(self) -> None:
        model = wan()
        with ProfilingCache(None, UniformSteps(50))(model) as run:
            model(**wan_inputs(500.0))
            model(**wan_inputs(400.0))
            model(**wan_inputs(300.0, batch=2))
        assert run.generations == 2
        assert run.history[-1] == (0, 0, True)

    def test_by_count_without_a_timestep(self) -> None:
        class Untimed(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])

            def forward(self, x: Tensor) -> Tensor:
                for layer in self.layers:
                    x = layer(x)
                return x

        model = Untimed()
        with pytest.raises(ValueError, match="steps: expected how often a generation"):
            ProfilingCache(None, UniformSteps(2))(model)
        with ProfilingCache(None, UniformSteps(9), steps=3)(model) as run:
            for _ in range(6):
                model(torch.ones(2, 4))
        assert [computed for _, _, computed in run.history] == [True, False, False] * 2

    def test_rising_timesteps_are_one_generation(self) -> None:
        model = wan()
        with ProfilingCache(None, UniformSteps(3))(model) as run:
            for time in reversed(times(6)):
                model(**wan_inputs(time))
        assert run.generations == 1
        assert run.edited_calls == 4


class TestTeaCache:
    @pytest.mark.parametrize("name", ["wan", "sd3"])
    def test_the_signal_is_what_the_first_attention_is_given(self, name: str) -> None:
        make, inputs, _ = MODELS[name]
        model = make()
        seen: list[Tensor] = []

        def look(module: nn.Module, args: Any, kwargs: Any) -> None:
            seen.append(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])

        attention = model.blocks[0].attn1 if name == "wan" else model.transformer_blocks[0].attn
        handle = attention.register_forward_pre_hook(look, with_kwargs=True)
        for time in times(8):
            model(**inputs(time))
        handle.remove()
        decide = DriftSteps(0.05, until=7).start()
        expected = [decide(step, signal) for step, signal in enumerate(seen)]
        assert 1 < sum(expected) < 8
        before = fingerprint(model)
        with TeaCache(0.05, until=7)(model) as run:
            for time in times(8):
                model(**inputs(time))
        assert [computed for _, _, computed in run.history] == expected
        assert run.computed == sum(expected) * 3
        assert fingerprint(model) == before

    def test_a_lower_threshold_computes_no_less(self) -> None:
        model = wan()
        shares = []
        for threshold in (0.3, 0.6, 1.2):
            with TeaCache(threshold)(model) as run:
                for time in times(10):
                    model(**wan_inputs(time))
            shares.append(run.density)
        assert shares == sorted(shares, reverse=True)
        assert shares[0] > shares[-1]

    def test_other_signals(self) -> None:
        model = wan()
        inputs = [wan_inputs(time, seed=3) for time in times(5)]
        with TeaCache(0.1, signal="input")(model) as run:
            for given in inputs:
                model(**given)
        assert run.edited_calls == 4  # the sample is the same in all steps
        seen: list[Tensor] = []

        def embedding_of_the_time(block: nn.Module, args: Any, kwargs: Any) -> Tensor:
            seen.append(args[2])
            return args[2]

        with torch.inference_mode(), TeaCache(0.5, signal=embedding_of_the_time)(model) as run:
            for given in inputs:
                model(**given)
        decide = DriftSteps(0.5).start()
        expected = [decide(step, signal) for step, signal in enumerate(seen)]
        assert [computed for _, _, computed in run.history] == expected

    def test_blocks_without_attention(self) -> None:
        model = Toy(torch.randn(2, 4, 4), torch.randn(2, 4))
        method = TeaCache(0.1)
        with pytest.raises(ValueError, match="expected a block with an attention"), method(model):
            model(torch.ones(1, 2, 4), torch.tensor(1.0))


def test_under_a_tap_and_inside_one() -> None:
    model = wan()
    method = TeaCache(0.8)
    with method(model):
        alone = [model(**wan_inputs(time)).sample for time in times(6)]
    with at.tap(model) as calls, method(model) as run:
        within = [model(**wan_inputs(time)).sample for time in times(6)]
    with method(model), at.tap(model):
        around = [model(**wan_inputs(time)).sample for time in times(6)]
    for a, b, c in zip(alone, within, around, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
    assert len(calls) == 2 * run.computed


def test_gradients_flow_through_the_states() -> None:
    model = Toy(torch.randn(3, 4, 4), torch.randn(3, 4)).double()
    with torch.enable_grad(), ProfilingCache((0, 1), UniformSteps(2))(model):
        x = torch.randn(1, 2, 4, dtype=torch.float64, requires_grad=True)
        model(x, torch.tensor(2.0)).sum().backward()
        x.grad = None
        out = model(x, torch.tensor(1.0))
        (gradient,) = torch.autograd.grad(out.sum(), x)
        states = x + (out - out).detach()
        added = model.blocks[1](model.blocks[0](x, torch.tensor(2.0)), torch.tensor(2.0)) - x
        last = model.blocks[2](states + added.detach(), torch.tensor(1.0))
        (expected,) = torch.autograd.grad(last.sum(), x)
    torch.testing.assert_close(gradient, expected)


def test_nothing_is_written_in_place() -> None:
    model = Steady(3, 4)
    x = torch.randn(1, 3, 4, dtype=torch.float64)
    kept = x.clone()
    with ProfilingCache((0, 1, 2), UniformSteps(2))(model):
        for time in times(4):
            model(x, torch.tensor(time))
    assert torch.equal(x, kept)


class Writer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([InPlace(), InPlace()])

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        for block in self.blocks:
            hidden_states = block(hidden_states.clone())
        return hidden_states


class InPlace(nn.Module):
    def forward(self, hidden_states: Tensor) -> Tensor:
        hidden_states += 1.0
        return hidden_states


def test_blocks_that_write_into_their_input() -> None:
    model = Writer()
    method = ProfilingCache((0,), UniformSteps(2))
    with pytest.raises(ValueError, match="writes into hidden_states"), method(model):
        model(torch.zeros(1, 2, 3), torch.tensor(1.0))
    with torch.inference_mode(), ProfilingCache((0, 1), UniformSteps(2))(model):
        for time in times(2):
            assert (model(torch.zeros(1, 2, 3), torch.tensor(time)) == 2).all()


def test_states_that_the_model_changes_between_blocks_are_not_added_twice() -> None:
    class Controlled(Steady):
        def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
            for block in self.blocks:
                hidden_states = block(hidden_states) + timestep
            return hidden_states

    model = Controlled(4, 3)
    x = torch.randn(1, 2, 3, dtype=torch.float64)
    with ProfilingCache(None, UniformSteps(9))(model) as run:
        for time in times(4):
            out = model(x, torch.tensor(time))
            expected = x + sum(block.added for block in model.blocks) + 4 * time
            torch.testing.assert_close(out, expected, atol=1e-9, rtol=1e-12)
    assert run.computed == 4


def test_what_was_there_before_stays() -> None:
    """Other hooks of diffusers, and a forward that somebody has set, survive."""
    from diffusers import FirstBlockCacheConfig

    model = wan()
    model.enable_cache(FirstBlockCacheConfig(threshold=0.05))
    model.blocks[1].note = "mine"
    before = fingerprint(model)
    method = ProfilingCache((0,), UniformSteps(2))
    with pytest.warns(InterventionWarning), method(model), model.cache_context("cond"):
        model(**wan_inputs(1000.0))
    assert fingerprint(model) == before
    with model.cache_context("cond"):
        model(**wan_inputs(900.0))

    toy = Toy(torch.randn(2, 4, 4), torch.randn(2, 4))
    mine = toy.blocks[0].forward
    toy.blocks[0].forward = mine
    with pytest.warns(InterventionWarning), ProfilingCache((0,), UniformSteps(2))(toy):
        toy(torch.ones(1, 2, 4), torch.tensor(1.0))
    assert toy.blocks[0].__dict__["forward"] is mine
    assert "forward" not in toy.blocks[1].__dict__


def test_an_error_in_the_model_leaves_no_trace() -> None:
    model = wan()
    before = fingerprint(model)
    with pytest.raises(RuntimeError), ProfilingCache(None, UniformSteps(2))(model):
        model(**wan_inputs(1000.0) | {"encoder_hidden_states": torch.ones(1, 5, 9)})
    assert fingerprint(model) == before


def test_print_settings_and_reentry(tmp_path: Path) -> None:
    method = ProfilingCache((0, 2), UniformSteps(2, warmup=1))
    model = wan()
    context = method(model)
    for _ in range(2):
        with context as run:
            for time in times(5):
                model(**wan_inputs(time))
    assert str(run) == (
        "ProfilingCache: reused in 2 of 5 calls of the model; computed 11 of 15 calls of blocks "
        "(73.3%)"
    )
    assert run.stats["computed"] == 11
    assert load_settings(ProfilingCache, save_settings(method, tmp_path / "p.json")) == method


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ProfilingCache((3,))(wan()), "blocks: expected numbers below 3"),
        (lambda: ProfilingCache((-1,)), "blocks: expected whole numbers"),
        (lambda: ProfilingCache((0,), 6), "schedule: expected a CacheSchedule"),
        (lambda: ProfilingCache((0,), stack="layers")(wan()), "stack: expected a ModuleList"),
        (lambda: ProfilingCache((0,), steps=0)(wan()), "steps: expected at least 1"),
        (lambda: ProfilingCache(None)(nn.Linear(2, 2)), "stack: expected to be told which"),
        (lambda: TeaCache(-1.0), "threshold"),
        (lambda: TeaCache(1.0, signal="time"), "signal: expected one of"),
        (lambda: TeaCache(0.1)(torch.compile(wan())), "not compiled"),
    ],
)
def test_what_cannot_be_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
