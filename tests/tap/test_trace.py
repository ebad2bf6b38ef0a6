"""What a tap leaves behind: nothing, whatever raises, and whatever else runs at the same time."""

import gc
import threading
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from attending.taps import AttentionCall, Proceed, Tap, TapError, tap
from tests.tap.probes import Toy, hidden, identity, left_as_it_was


class Broken(RuntimeError):
    """What the tests raise."""


def raises(*_: object) -> None:
    raise Broken


class Raising(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise Broken


def break_model(model: Toy) -> Callable[[], None]:
    kept, model.layers[1].qkv = model.layers[1].qkv, Raising()
    return lambda: setattr(model.layers[1], "qkv", kept)


def break_pre_hook(model: Toy) -> Callable[[], None]:
    return model.layers[1].register_forward_pre_hook(raises).remove


def break_hook(model: Toy) -> Callable[[], None]:
    return model.layers[1].register_forward_hook(raises).remove


def break_leaf_hook(model: Toy) -> Callable[[], None]:
    return model.layers[1].qkv.register_forward_hook(raises).remove


def break_and_run(
    mends: list[Callable[[], None]], break_it: Callable[[Toy], Callable[[], None]], model: Toy
) -> None:
    if not mends:
        mends.append(break_it(model))
    model(hidden())


def run_in(taps: list[Tap[Any]], model: Toy) -> None:
    with ExitStack() as stack:
        for each in taps:
            stack.enter_context(each)
        model(hidden())


BREAKS = [break_model, break_pre_hook, break_hook, break_leaf_hook]


@pytest.mark.parametrize("break_it", BREAKS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("early", [True, False], ids=["hooked before", "hooked within"])
def test_an_exception_ends_the_block_without_a_trace(
    break_it: Callable[[Toy], Callable[[], None]], early: bool
) -> None:
    model = Toy(3)
    with left_as_it_was(model):
        mends = [break_it(model)] if early else []
        with pytest.raises(Broken), tap(model) as calls:
            break_and_run(mends, break_it, model)
        mends[0]()
    assert calls[0].name == "layers.0"


@pytest.mark.parametrize("break_it", BREAKS, ids=lambda f: f.__name__)
def test_an_exception_caught_within_the_block_does_not_shift_what_follows(
    break_it: Callable[[Toy], Callable[[], None]],
) -> None:
    model, x = Toy(3), hidden()
    with left_as_it_was(model), tap(model) as calls:
        mend = break_it(model)
        with pytest.raises(Broken):
            model(x)
        mend()
        count, forward = len(calls), calls[-1].forward
        model(x)
    assert forward == 0
    after = [(call.name, call.forward, call.index) for call in calls[count:]]
    assert after == [(f"layers.{i}", 1, i) for i in range(3)]


def test_a_handler_that_raises_leaves_no_trace_on_nested_taps() -> None:
    def broken(call: AttentionCall, proceed: Proceed) -> Tensor:
        raise Broken

    model = Toy()
    with left_as_it_was(model), pytest.raises(Broken):
        run_in([tap(model), tap(model, broken), tap(model)], model)


def test_an_exception_outside_of_any_forward_is_passed_on_as_it_is() -> None:
    model = Toy()
    with left_as_it_was(model), pytest.raises(Broken), tap(model):
        raise Broken  # and no TapError that nothing ran


def test_taps_may_end_in_any_order() -> None:
    model, x = Toy(1), hidden()
    with left_as_it_was(model):
        first, second = tap(model), tap(model)
        early, late = first.__enter__(), second.__enter__()
        model(x)
        first.__exit__(None, None, None)
        model(x)
        second.__exit__(None, None, None)
    assert (len(early), len(late)) == (1, 2)


def test_other_modes_stay_on_within_and_around() -> None:
    class Counting(TorchFunctionMode):
        count = 0

        def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            self.count += func is torch.nn.functional.scaled_dot_product_attention
            return func(*args, **(kwargs or {}))

    model, x = Toy(2), hidden()
    with left_as_it_was(model), Counting() as outer, tap(model) as calls, Counting() as inner:
        model(x)
    assert (outer.count, len(calls), inner.count) == (2, 2, 2)


def test_hooks_of_others_keep_their_order_and_place() -> None:
    model, x, order = Toy(1), hidden(), []
    layer = model.layers[0]
    layer.register_forward_pre_hook(lambda *_: order.append("first"))
    layer.register_forward_pre_hook(lambda *_: order.append("second"))
    with left_as_it_was(model), tap(model):
        model(x)
    model(x)
    assert order == ["first", "second"] * 2


def test_what_a_hook_of_the_user_asks_belongs_to_the_module_it_hangs_on() -> None:
    model, x = Toy(1), hidden()
    layer = model.layers[0]

    def ask(*_: object) -> None:
        nn.functional.scaled_dot_product_attention(x, x, x)

    handles = [layer.register_forward_pre_hook(ask), layer.register_forward_hook(ask)]
    with left_as_it_was(model), tap(model) as calls:
        model(x)
    assert [call.name for call in calls] == ["layers.0"] * 3
    for handle in handles:
        handle.remove()


def test_two_threads_tap_one_model() -> None:
    """Each sees its own calls, whatever the other does in between."""
    model, rounds = Toy(3), 60
    plain_inputs = [hidden(length=3 + i) for i in range(2)]
    expected = [model(x) for x in plain_inputs]
    errors: list[BaseException] = []
    ready = threading.Barrier(3)

    def work(which: int) -> None:
        try:
            ready.wait()
            for _ in range(rounds):
                with tap(model) as calls:
                    assert torch.equal(model(plain_inputs[which]), expected[which])
                assert [call.name for call in calls] == [f"layers.{i}" for i in range(3)]
                assert {call.query_length for call in calls} == {3 + which}
                with tap(model, lambda call, proceed: -proceed(call)):
                    assert not torch.equal(model(plain_inputs[which]), expected[which])
        except BaseException as error:
            errors.append(error)

    def untapped() -> None:
        try:
            ready.wait()
            for _ in range(2 * rounds):
                assert torch.equal(model(plain_inputs[0]), expected[0])
        except BaseException as error:
            errors.append(error)

    with left_as_it_was(model):
        threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
        threads.append(threading.Thread(target=untapped))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert errors == []


def in_thread(function: Callable[[], object]) -> BaseException | None:
    caught: list[BaseException] = []

    def work() -> None:
        try:
            function()
        except BaseException as error:
            caught.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return caught[0] if caught else None


def test_another_thread_is_not_tapped_and_the_tap_says_so() -> None:
    model = Toy()
    message = "it ran in another thread, but a tap sees the calls of"
    with pytest.raises(TapError, match=message), tap(model, identity):
        assert in_thread(lambda: model(hidden())) is None


def test_a_tap_is_left_in_the_thread_that_entered_it() -> None:
    model, x = Toy(), hidden()
    opened = tap(model)
    with opened as calls:
        error = in_thread(lambda: opened.__exit__(None, None, None))
        assert isinstance(error, RuntimeError)
        assert "not open in this thread" in str(error)
        model(x)
    assert len(calls) == 2
    with pytest.raises(RuntimeError, match="not open in this thread"):
        opened.__exit__(None, None, None)


def test_a_discarded_recording_is_freed() -> None:
    import gc
    import weakref

    model = Toy()
    with tap(model) as calls:
        model(hidden())
    query = weakref.ref(calls[0].query)
    del calls
    gc.collect()
    assert query() is None


def test_an_interrupt_leaves_no_trace() -> None:
    """PyTorch calls no hook after one, but the block ends all the same."""
    model, x = Toy(), hidden()

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    handle = model.layers[1].register_forward_hook(interrupt)
    plain_hooks = len(model.layers[1]._forward_hooks)
    with left_as_it_was(model), pytest.raises(KeyboardInterrupt), tap(model):
        model(x)
    assert len(model.layers[1]._forward_hooks) == plain_hooks
    handle.remove()
    with tap(model) as calls:
        model(x)
    assert [(call.name, call.forward) for call in calls] == [("layers.0", 0), ("layers.1", 0)]


def test_inference_mode() -> None:
    model, x = Toy(), hidden()
    with torch.inference_mode():
        plain = model(x)
        with left_as_it_was(model), tap(model) as calls:
            assert torch.equal(model(x), plain)
    assert len(calls) == 2
    assert calls[0].query.is_inference()


def test_the_tensors_of_a_call_are_free_when_it_is_done() -> None:
    """No reference cycle holds them until the garbage collector comes by."""
    model, held = Toy(), []

    def watch(call: AttentionCall, proceed: Proceed) -> Tensor:
        held.extend([weakref.ref(call), weakref.ref(call.query), weakref.ref(call.key)])
        return proceed(call)

    gc.disable()
    try:
        with torch.no_grad(), tap(model, watch), tap(model, identity):
            model(hidden())
        assert len(held) >= 3
        assert all(one() is None for one in held)
    finally:
        gc.enable()
