"""Every architecture: which calls, from where, and that watching changes nothing."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from attending.taps import AttentionCall, Proceed, tap
from tests.tap.diffusion_models import DIFFUSION
from tests.tap.models import LANGUAGE, Example, Seen
from tests.tap.probes import again, left_as_it_was


@pytest.fixture(scope="module", params=[*LANGUAGE, *DIFFUSION], ids=lambda build: build.__name__)
def example(request: pytest.FixtureRequest) -> Example:
    build: Callable[[], Example] = request.param
    torch.manual_seed(0)
    return build()


@torch.no_grad()
def test_sees_every_call_and_changes_nothing(example: Example) -> None:
    before = example.forward()
    with left_as_it_was(example.model), tap(example.model) as calls:
        watched = example.forward()
    assert torch.equal(watched, before)
    assert torch.equal(example.forward(), before)

    seen = [
        Seen(call.name, call.layer, call.is_cross, tuple(call.query.shape), tuple(call.key.shape))
        for call in calls
    ]
    assert seen == example.expected
    modules = dict(example.model.named_modules())
    for index, call in enumerate(calls):
        assert call.module is modules[call.name]
        assert (call.forward, call.index, call.recomputed) == (0, index, False)
        assert call.value.shape == call.key.shape
        assert call.num_heads == call.query.shape[1]
        assert (call.query_length, call.key_length) == (call.query.shape[2], call.key.shape[2])
        assert call.softmax_scale == pytest.approx(call.scale or call.query.shape[-1] ** -0.5)


@torch.no_grad()
def test_a_call_holds_all_that_its_output_depends_on(example: Example) -> None:
    before = example.forward()
    count = 0

    def recompute(call: AttentionCall, proceed: Proceed) -> Tensor:
        nonlocal count
        count += 1
        output = again(call)
        assert torch.equal(output, proceed(call))
        return output

    with tap(example.model, recompute):
        assert torch.equal(example.forward(), before)
    assert count == len(example.expected)


@torch.no_grad()
def test_a_handler_reaches_the_output(example: Example) -> None:
    before = example.forward()

    def rolled(call: AttentionCall, proceed: Proceed) -> Tensor:
        return proceed(call).roll(1, dims=-1) + 1

    with left_as_it_was(example.model), tap(example.model, rolled):
        changed = example.forward()
    assert changed.shape == before.shape
    assert not torch.allclose(changed, before, atol=1e-6)
    assert torch.equal(example.forward(), before)


@torch.no_grad()
def test_forwards_are_counted(example: Example) -> None:
    with tap(example.model) as calls:
        example.forward()
        example.forward()
    count = len(example.expected)
    assert [call.forward for call in calls] == [0] * count + [1] * count
    assert [call.index for call in calls] == [*range(count), *range(count)]
