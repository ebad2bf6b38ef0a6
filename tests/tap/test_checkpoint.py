"""Gradient checkpointing: what runs again in backward runs as it did the first time."""

import warnings
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from attending.taps import AttentionCall, Handler, Proceed, tap
from tests.tap.models import llama_model, t5_model, tokens
from tests.tap.probes import Toy, ToyAttention, hidden, hotter, left_as_it_was, shifted

KINDS = pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
WHERE = pytest.mark.parametrize("inside", [True, False], ids=["inside", "outside"])


def gradients(
    model: nn.Module,
    forward: Callable[[], Tensor],
    handlers: tuple[Handler, ...],
    inside: bool = False,
) -> list[Tensor]:
    """Of the squared output, by backward inside the block or after it."""
    model.zero_grad(set_to_none=True)
    with ExitStack() as taps:
        for handler in handlers:
            taps.enter_context(tap(model, handler))
        loss = forward().square().mean()
        if inside:
            loss.backward()
    if not inside:
        loss.backward()
    return [
        parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None
    ]


@pytest.mark.parametrize("build", [llama_model, t5_model], ids=["llama", "t5"])
@KINDS
@WHERE
def test_gradients_of_transformers_are_those_without_checkpointing(
    build: Callable[[], Any], reentrant: bool, inside: bool
) -> None:
    model = build().train().double()
    model.config.use_cache = False
    extra = {"decoder_input_ids": tokens(2, 5)} if build is t5_model else {}
    forward = lambda: model(tokens(), use_cache=False, **extra).logits  # noqa: E731
    expected = gradients(model, forward, (hotter, shifted))
    untouched = gradients(model, forward, ())
    enable = getattr(model, "activation_checkpointing_enable", None)  # since transformers 5.2x
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    with left_as_it_was(model):
        found = gradients(model, forward, (hotter, shifted), inside)
    assert len(found) == len(expected) > 10
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
    assert any(not torch.allclose(a, b) for a, b in zip(expected, untouched, strict=True))


class Checkpointed(nn.Module):
    """Layers in a region that lies in a region; `within` is called in the inner one."""

    def __init__(self, reentrant: bool | None, depth: int = 1) -> None:
        super().__init__()
        self.first, self.second, self.last = ToyAttention(), ToyAttention(), ToyAttention()
        self.reentrant, self.depth = reentrant, depth
        self.around: Callable[[nn.Module], Any] = nullcontext_of

    def region(self, x: Tensor) -> Tensor:
        x = self.first(x)
        with self.around(self):
            x = self.second(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        function: Callable[[Tensor], Tensor] = self.region
        if self.reentrant is not None:
            for _ in range(self.depth):
                function = again(function, self.reentrant)
        return self.last(function(x))


def nullcontext_of(_: nn.Module) -> ExitStack:
    return ExitStack()


def again(function: Callable[[Tensor], Tensor], reentrant: bool) -> Callable[[Tensor], Tensor]:
    return lambda x: checkpoint(function, x, use_reentrant=reentrant)  # type: ignore[no-any-return]


def toy_gradients(
    reentrant: bool | None,
    handlers: tuple[Handler, ...],
    inside: bool,
    depth: int = 1,
    around: Callable[[nn.Module], Any] = nullcontext_of,
) -> list[Tensor]:
    torch.manual_seed(0)
    model = Checkpointed(reentrant, depth).double()
    model.around = around
    x = hidden().double().requires_grad_()
    found = gradients(model, lambda: model(x), handlers, inside)
    assert x.grad is not None
    return [x.grad, *found]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected) == 7
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


@KINDS
@WHERE
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_regions_within_regions(reentrant: bool, inside: bool, depth: int) -> None:
    expected = toy_gradients(None, (hotter, shifted), inside)
    assert_same(toy_gradients(reentrant, (hotter, shifted), inside, depth), expected)


@KINDS
@WHERE
def test_a_tap_that_begins_within_a_region_begins_again(reentrant: bool, inside: bool) -> None:
    """And stays inside the one around the region, also when that one has ended."""

    def around(model: nn.Module) -> Any:
        return tap(model, shifted)

    expected = toy_gradients(None, (hotter,), inside, around=around)
    assert_same(toy_gradients(reentrant, (hotter,), inside, around=around), expected)
    assert_same(
        toy_gradients(reentrant, (), inside, around=around),
        toy_gradients(None, (), inside, around=around),
    )


@KINDS
@WHERE
def test_a_handler_that_runs_another_tapped_model(reentrant: bool, inside: bool) -> None:
    """Its calls are its own: they do not shift those of the region."""
    helper = Toy(2).double()

    def handler(call: AttentionCall, proceed: Proceed) -> Tensor:
        with tap(helper, shifted):
            factor = helper(torch.ones(1, 3, 8, dtype=torch.double)).mean().detach()
        return hotter(call, proceed) * factor

    expected = toy_gradients(None, (handler,), inside)
    assert_same(toy_gradients(reentrant, (handler,), inside), expected)


@KINDS
def test_a_recording_leaves_out_what_runs_again_and_a_handler_is_told(reentrant: bool) -> None:
    model, x = Checkpointed(reentrant), hidden().requires_grad_()
    told: list[tuple[str, int, bool]] = []

    def handler(call: AttentionCall, proceed: Proceed) -> Tensor:
        told.append((call.name, call.index, call.recomputed))
        return proceed(call)

    with tap(model) as calls, tap(model, handler):
        model(x).sum().backward()
    assert [call.name for call in calls] == ["first", "second", "last"]
    assert told[:3] == [("first", 0, False), ("second", 1, False), ("last", 2, False)]
    assert told[3:] == [("first", 0, True), ("second", 1, True)]


@KINDS
def test_a_model_that_was_tapped_is_not_any_more(reentrant: bool) -> None:
    """The next forward, without a tap, has the gradients of the model itself."""
    torch.manual_seed(0)
    model, x = Checkpointed(reentrant), hidden().requires_grad_()
    plain = gradients(model, lambda: model(x), ())
    gradients(model, lambda: model(x), (hotter,))
    assert all(
        torch.equal(a, b)
        for a, b in zip(gradients(model, lambda: model(x), ()), plain, strict=True)
    )


def test_backward_twice_through_one_graph() -> None:
    model, x = Checkpointed(False).double(), hidden().double().requires_grad_()
    with tap(model, hotter):
        loss = model(x).square().mean()
    loss.backward(retain_graph=True)
    first = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    loss.backward()
    for parameter, grad in zip(model.parameters(), first, strict=True):
        torch.testing.assert_close(parameter.grad, grad)


def test_what_a_handler_learns_gets_its_gradient() -> None:
    factor = torch.tensor(1.5, dtype=torch.double, requires_grad=True)

    def handler(call: AttentionCall, proceed: Proceed) -> Tensor:
        return factor * proceed(call)

    found = []
    for reentrant in (None, True, False):
        factor.grad = None
        toy_gradients(reentrant, (handler,), inside=False)
        found.append(factor.grad)
    torch.testing.assert_close(found[1], found[0])
    torch.testing.assert_close(found[2], found[0])


@KINDS
def test_a_discarded_recording_is_freed_without_backward(reentrant: bool) -> None:
    """What is left with a region must not hold the recording that holds the region."""
    import gc
    import weakref

    model = Checkpointed(reentrant)
    with tap(model) as calls:
        output = model(hidden().requires_grad_())
    query = weakref.ref(calls[0].query)
    del calls, output
    gc.collect()
    assert query() is None


@KINDS
def test_backward_with_the_tap_still_on(reentrant: bool) -> None:
    """PyTorch turns modes off in `backward`; a direct call of its engine does not."""
    torch.manual_seed(0)
    model, x = Checkpointed(reentrant, depth=2).double(), hidden().double().requires_grad_()
    expected = gradients(model, lambda: model(x), (hotter, shifted))
    model.zero_grad(set_to_none=True)
    quiet = warnings.catch_warnings(action="error")  # not "ran without a call" when run again
    with quiet, tap(model, hotter), tap(model, shifted), tap(model) as calls:
        loss = model(x).square().mean()
        torch.autograd.Variable._execution_engine.run_backward(
            (loss,), (torch.ones_like(loss),), False, False, (),
            allow_unreachable=True, accumulate_grad=True,
        )  # fmt: skip
    assert len(calls) == 3
    for parameter, want in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, want, rtol=1e-9, atol=1e-12)


class Force(Checkpointed):
    """Takes a gradient within the region, through a region of its own."""

    def region(self, x: Tensor) -> Tensor:
        inner = self.first if self.reentrant is None else again(self.first, False)
        with torch.enable_grad():
            y = x.detach().requires_grad_()
            (force,) = torch.autograd.grad(inner(y).square().sum(), y)
        return self.second(x + force)


@KINDS
def test_a_gradient_within_a_region(reentrant: bool) -> None:
    """What runs again within the region is no call of the region itself."""

    def by_name(call: AttentionCall, proceed: Proceed) -> Tensor:
        return (hotter if call.name == "first" else shifted)(call, proceed)

    found = []
    for kind in (None, reentrant):
        torch.manual_seed(0)
        model, x = Force(kind).double(), hidden().double().requires_grad_()
        found.append(gradients(model, lambda m=model, x=x: m(x), (by_name,)))
    assert len(found[0]) == len(found[1]) == 4
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
