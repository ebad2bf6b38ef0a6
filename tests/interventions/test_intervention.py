"""The common shape: counts, warnings, nesting, no trace; and edits handed from one to the next."""

import threading
import warnings
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn

import attending as at
from attending.core import reference
from attending.interventions.attention_calibration import AttentionCalibration
from attending.interventions.edit import edit_masses
from attending.interventions.hierarchical_attention import HierarchicalAttention
from attending.interventions.intervention import (
    Counted,
    Intervention,
    InterventionWarning,
    Run,
    with_counters,
)
from attending.taps import AttentionCall, Handler, Proceed
from tests.interventions.tiny import make_causal


@dataclass(frozen=True)
class FirstKey:
    """Takes a share of the first key's mass: the smallest edit there is."""

    share: float = 0.5
    head: int | None = None

    def __call__(self, model: nn.Module) -> Counted:
        def start(run: Run) -> Handler:
            def edit(call: AttentionCall, proceed: Proceed) -> Tensor:
                groups = torch.zeros(1, call.num_heads, call.key_length, dtype=torch.long)
                groups[:, slice(None) if self.head is None else self.head, 0] = 1
                return edit_masses(call, proceed, groups, self.take, run=run, num_groups=2)

            return edit

        return with_counters(model, start, name="FirstKey")

    def take(self, masses: Tensor) -> Tensor:
        return at.core.groups.move_mass(masses, {1: self.share}, (0,))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return make_causal()


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(3, 50, (2, 9), generator=torch.Generator().manual_seed(0))


def first_key_taken(p: Tensor, share: float) -> Tensor:
    """The same on a map."""
    rest = 1 - p[..., :1]
    able = rest > 0
    freed = share * p[..., :1] * able
    new = p * (1 + freed / torch.where(able, rest, 1.0))
    new[..., :1] = p[..., :1] - freed
    return new


def dense_map(call: AttentionCall) -> Tensor:
    return reference.attention_map(
        call.query,
        call.key,
        call.attn_mask,
        call.is_causal,
        call.softmax_scale,
        call.enable_gqa,
    ).probabilities


@torch.no_grad()
@pytest.mark.parametrize("head", [None, 2])
def test_an_edit_inside_a_model_is_that_of_the_map(model, ids, head: int | None) -> None:
    """What a tap records inside is the edited map, and what leaves is its output."""
    seen: list[tuple[AttentionCall, Tensor]] = []

    def keep(call: AttentionCall, proceed: Proceed) -> Tensor:
        output = proceed(call)
        seen.append((call, output))
        return output

    with at.tap(model, keep), FirstKey(0.5, head)(model) as run, at.tap(model) as inside:
        model(ids)
    assert run.edited_calls == run.calls == 3
    assert run.heads == {(layer, h) for layer in range(3) for h in ([head] if head else range(4))}
    for (call, output), edited in zip(seen, inside, strict=True):
        wanted = dense_map(call)
        some = slice(None) if head is None else slice(head, head + 1)
        wanted[:, some] = first_key_taken(wanted[:, some], 0.5)
        torch.testing.assert_close(dense_map(edited), wanted, rtol=1e-5, atol=1e-6)
        value = call.value.double().repeat_interleave(2, 1)
        torch.testing.assert_close(output.double(), wanted @ value, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_blocks_compose_like_functions(model, ids) -> None:
    """Two edits, one inside the other, are one after the other on the map."""
    outputs: list[tuple[AttentionCall, Tensor]] = []

    def keep(call: AttentionCall, proceed: Proceed) -> Tensor:
        outputs.append((call, proceed(call)))
        return outputs[-1][1]

    with at.tap(model, keep), FirstKey(0.5)(model) as outer, FirstKey(0.2)(model) as inner:
        model(ids)
    assert outer.edited_calls == inner.edited_calls == 3
    for call, output in outputs:
        wanted = first_key_taken(first_key_taken(dense_map(call), 0.5), 0.2)
        value = call.value.double().repeat_interleave(2, 1)
        torch.testing.assert_close(output.double(), wanted @ value, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_no_trace_is_left(model, ids) -> None:
    before = model(ids).logits
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    block = FirstKey()(model)
    with block:
        edited = model(ids).logits
    assert not torch.equal(edited, before)
    assert torch.equal(model(ids).logits, before)
    with block as run:  # again, and inside itself
        torch.testing.assert_close(model(ids).logits, edited, rtol=0, atol=0)
        with block as second:
            model(ids)
        assert second.edited_calls == 3
    assert run.edited_calls == 6
    assert model.state_dict().keys() == weights.keys()
    assert all(torch.equal(model.state_dict()[name], weights[name]) for name in weights)
    hooks = [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert hooks == []


@torch.no_grad()
def test_a_block_that_raises_is_left_too(model, ids) -> None:
    before = model(ids).logits
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(KeyError), FirstKey()(model):
            raise KeyError
    assert torch.equal(model(ids).logits, before)


@torch.no_grad()
def test_a_block_in_which_nothing_changed_says_why(model, ids) -> None:
    with (
        pytest.warns(InterventionWarning, match=r"FirstKey changed nothing.*no row had mass"),
        FirstKey(0.0)(model),
    ):
        model(ids)
    with pytest.raises(at.TapError, match="no forward"), FirstKey()(model):
        pass


def test_what_a_run_says() -> None:
    run = Run("Method")
    run.left(None, "it was busy")
    assert "1 x it was busy" in str(run)
    run.edited(heads=[0, 1], rows=5)
    assert run.stats == {"calls": 2, "edited_calls": 1, "edited_rows": 5, "edited_heads": 2}
    assert str(run).startswith("Method: edited 1 of 2 calls, 5 rows in 2 heads")


def test_leaving_what_was_not_entered(model) -> None:
    with pytest.raises(RuntimeError, match="not open in this thread"):
        FirstKey()(model).__exit__(None, None, None)


@torch.no_grad()
def test_other_threads_use_the_model_undisturbed(model, ids) -> None:
    before, found = model(ids).logits, []

    def elsewhere() -> None:
        with torch.no_grad():
            found.append(model(ids).logits)

    with FirstKey()(model):
        edited = model(ids).logits
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
    assert torch.equal(found[0], before)
    assert not torch.equal(edited, before)


def test_gradients_through_an_edit_with_checkpointing(ids) -> None:
    """The second run of a checkpointed region is edited as the first, and not counted."""
    gradients, runs = [], []
    for checkpointing in (False, True):
        model = make_causal()
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with FirstKey()(model) as run, at.tap(model):
            model(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
        runs.append(run.stats)
    assert runs[0] == runs[1]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_dropped_weights_are_refused(ids) -> None:
    model = make_causal(attention_dropout=0.5)
    model.train()
    with pytest.raises(ValueError, match="no dropout on attention weights"), FirstKey()(model):
        model(ids)


def test_methods_are_interventions() -> None:
    methods = (FirstKey(), AttentionCalibration(), HierarchicalAttention((2,), (0,)))
    assert all(isinstance(method, Intervention) for method in methods)


@torch.no_grad()
def test_half_precision(ids) -> None:
    """Rounding aside, the edit in bfloat16 is that in float32."""
    outputs = []

    def keep(call: AttentionCall, proceed: Proceed) -> Tensor:
        outputs.append((call, proceed(call)))
        return outputs[-1][1]

    model = make_causal().to(torch.bfloat16)
    with at.tap(model, keep), FirstKey()(model):
        model(ids)
    for call, output in outputs:
        assert output.dtype == torch.bfloat16
        value = call.value.double().repeat_interleave(2, 1)
        wanted = first_key_taken(dense_map(call), 0.5) @ value
        torch.testing.assert_close(output.double(), wanted, rtol=3e-2, atol=3e-2)


@torch.no_grad()
def test_masks_of_other_shapes() -> None:
    """A mask of two dimensions, and one that hides with the lowest float."""
    query, key, value = (torch.randn(1, 2, 5, 4) for _ in range(3))
    visible = torch.ones(5, 5, dtype=torch.bool).tril()
    lowest = torch.zeros(5, 5).masked_fill(~visible, torch.finfo(torch.float32).min)

    class Attends(nn.Module):
        def forward(self, **call: object) -> Tensor:
            return nn.functional.scaled_dot_product_attention(query, key, value, **call)

    found = []
    for call in ({"is_causal": True}, {"attn_mask": visible}, {"attn_mask": lowest}):
        module = Attends()
        with FirstKey()(module):
            found.append(module(**call))
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(found[0], found[2])


def test_a_call_handed_on_is_replaced(model) -> None:
    """`replace` keeps where a call is, and what comes after it."""
    with at.tap(model) as calls, torch.no_grad():
        model(torch.tensor([[1, 2, 3]]))
    assert calls[0].inner == 0
    assert replace(calls[0], scale=1.0).name == calls[0].name


def test_all_names_of_the_room_are_there() -> None:
    assert set(at.interventions.__all__) <= set(dir(at.interventions))
    for name in at.interventions.__all__:
        assert getattr(at.interventions, name) is not None
    assert not hasattr(at.interventions, "AttentionCalibratoin")
