"""States of groups of keys and edits of their masses, against dense float64 maps."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import attending as at
from attending.core import _key_groups as engine
from attending.core import reference
from attending.core.groups import (
    attention_with_masses,
    group_masses,
    group_states,
    member_indices,
    mix,
    move_mass,
    reweighted_pair,
)
from tests.core.problems import Problem, assert_close, problems


def dense_map(problem: Problem) -> Tensor:
    return reference.attention_map(problem.query, problem.key, **problem.call).probabilities


def dense_value(problem: Problem) -> Tensor:
    return problem.value.double().repeat_interleave(
        problem.query.shape[1] // problem.key.shape[1], 1
    )


def per_head(problem: Problem, groups: Tensor) -> Tensor:
    """Labels as [batch, heads, keys]."""
    heads = problem.query.shape[1]
    if groups.shape[1] not in (1, heads):
        groups = groups.repeat_interleave(heads // groups.shape[1], 1)
    return groups.long().expand(problem.query.shape[0], heads, -1)


@st.composite
def labelled(draw: st.DrawFn, **kinds) -> tuple[Problem, Tensor]:
    """A problem and groups of its keys; group 2 is often empty, group 1 often small."""
    problem = draw(problems(**{"max_tokens": 60, **kinds}))
    batch, heads, keys = problem.query.shape[0], problem.query.shape[1], problem.key.shape[2]
    shape = (
        draw(st.sampled_from((1, batch))),
        draw(st.sampled_from((1, problem.key.shape[1], heads))),
        keys,
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    share = draw(st.sampled_from((0.0, 0.03, 0.5, 1.0)))
    chosen = torch.rand(shape, generator=generator) < share
    if draw(st.booleans()):
        return problem, chosen
    return problem, chosen * torch.randint(1, 4, shape, generator=generator)


@contextmanager
def on_path(path: str) -> Iterator[None]:
    """Small maps are computed densely, so the other ways have to be asked for."""
    names = ("CHUNK_BYTES", "DENSE_BYTES", "GATHERED")
    before = {name: getattr(engine, name) for name in names}
    wanted = {"dense": (2**40, 2**40, 256), "fused": (0, 0, 20)}[path]
    vars(engine).update(zip(names, wanted, strict=True))
    try:
        yield
    finally:
        vars(engine).update(before)


PATHS = st.sampled_from(("dense", "fused"))


def check_states(problem: Problem, groups: Tensor, with_whole: bool) -> None:
    count = 2 if groups.dtype == torch.bool else 4
    whole = None
    if with_whole:
        whole = at.attention_state(problem.query, problem.key, problem.value, **problem.call)
    states = group_states(
        problem.query,
        problem.key,
        problem.value,
        groups,
        **problem.call,
        num_groups=count,
        whole=whole,
    )
    assert len(states) == count
    p, value, labels = dense_map(problem), dense_value(problem), per_head(problem, groups)
    masses = group_masses(states)
    for group, state in enumerate(states):
        own = p * (labels == group)[:, :, None]
        assert state.output.dtype == problem.query.dtype
        assert_close(masses[group], own.sum(-1), problem.query.dtype)
        # Weighed by its mass: the output of a group that has next to none means nothing.
        assert_close(masses[group][..., None] * state.output, own @ value, problem.query.dtype)
        unseen = own.sum(-1) == 0
        assert (state.output[unseen & (state.lse == -math.inf)] == 0).all()
    assert_close(mix(states, masses), p @ value, problem.query.dtype)


@settings(max_examples=25)
@given(labelled(), st.booleans(), PATHS)
def test_states_are_the_reference(case: tuple[Problem, Tensor], whole: bool, path: str) -> None:
    with on_path(path):
        check_states(*case, whole)


@settings(max_examples=25)
@given(labelled(dtypes=(torch.bfloat16, torch.float16), spreads=(0.01, 1.0)), st.booleans(), PATHS)
def test_states_in_half_precision(case: tuple[Problem, Tensor], whole: bool, path: str) -> None:
    with on_path(path):
        check_states(*case, whole)


@settings(max_examples=25)
@given(labelled(max_tokens=3), st.booleans(), PATHS)
def test_states_of_one_token(case: tuple[Problem, Tensor], whole: bool, path: str) -> None:
    with on_path(path):
        check_states(*case, whole)


def edited(problem: Problem, groups: Tensor, take: dict[int, float], give: tuple[int, ...]):
    """The edited map by its definition, dense."""
    p, labels = dense_map(problem), per_head(problem, groups)
    shares = [(p * (labels == g)[:, :, None]).sum(-1) for g in range(4)]
    freed = sum(share * shares[g] for g, share in take.items())
    getting = sum(shares[g] for g in give)
    able = getting > 0
    enough = torch.where(freed < -getting, getting / freed.clamp_max(-1e-300).neg(), 1.0)
    freed = enough * freed
    factor = torch.ones_like(p)
    for group in range(4):
        own = (labels == group)[:, :, None]
        new = torch.ones_like(getting)
        if group in take:
            new = torch.where(able, 1 - take[group] * enough, new)
        elif group in give:
            new = torch.where(able, 1 + freed / getting.where(able, new), new)
        factor = torch.where(own, new[..., None], factor)
    return p * factor


EDITS = st.sampled_from(
    (
        ({1: 0.6}, (0,)),
        ({1: 1.0}, (0,)),
        ({1: 0.3, 2: 0.9}, (3,)),
        ({1: 0.5}, (0, 2)),
        ({1: -0.2}, (0,)),
        ({0: 0.0}, (1,)),
    )
)


@settings(max_examples=25)
@given(labelled(spreads=(0.01, 1.0)), EDITS, st.booleans(), PATHS)
def test_edited_output_is_that_of_the_edited_map(case, edit, whole: bool, path: str) -> None:
    problem, groups = case
    groups = groups.long()
    state = at.attention_state(problem.query, problem.key, problem.value, **problem.call)
    with on_path(path):
        states = group_states(
            problem.query,
            problem.key,
            problem.value,
            groups,
            **problem.call,
            num_groups=4,
            whole=state if whole else None,
        )
    before = group_masses(states)
    after = move_mass(before, *edit)
    torch.testing.assert_close(after.sum(0), before.sum(0))  # rows sum to what they summed to
    wanted = edited(problem, groups, *edit) @ dense_value(problem)
    assert_close(mix(states, after), wanted, problem.query.dtype)
    with on_path(path):
        found = attention_with_masses(
            problem.query,
            problem.key,
            problem.value,
            groups,
            lambda masses: move_mass(masses, *edit),
            **problem.call,
            num_groups=4,
            whole=state if whole else None,
        )
    assert_close(found.output, wanted, problem.query.dtype)
    torch.testing.assert_close(found.masses, before, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found.new_masses, after, rtol=1e-3, atol=1e-4)


@settings(max_examples=25)
@given(labelled(spreads=(0.01, 1.0), masks=("none", "causal", "bool", "padded")), EDITS)
def test_plain_attention_of_the_reweighted_pair_is_the_edited_map(case, edit) -> None:
    problem, groups = case
    groups = groups.long()
    states = group_states(
        problem.query, problem.key, problem.value, groups, **problem.call, num_groups=4
    )
    before = group_masses(states)
    after = move_mass(before, *edit)
    pair = reweighted_pair(problem.query, problem.key, groups, before, after, problem.scale)
    changed = replace(
        problem,
        query=pair.query,
        key=pair.key,
        scale=pair.scale,
        enable_gqa=pair.key.shape[1] != pair.query.shape[1],
    )
    wanted = edited(problem, groups, *edit)
    # A row without mass in its group keeps its scores, and moves nothing.
    assert_close(dense_map(changed), wanted, problem.query.dtype)


@settings(max_examples=25)
@given(st.integers(0, 2**31), PATHS)
def test_gradients_are_those_of_the_reference(seed: int, path: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (
        torch.randn(1, heads, 9, 4, generator=generator, dtype=torch.float64).requires_grad_()
        for heads in (4, 2, 2)
    )
    groups = torch.rand(1, 4, 9, generator=generator) < 0.3
    problem = Problem(query, key, value, None, True, None, True)
    state = at.attention_state(query, key, value, is_causal=True, enable_gqa=True)
    with on_path(path):
        states = group_states(
            query, key, value, groups, is_causal=True, enable_gqa=True, whole=state
        )
        once = attention_with_masses(
            query,
            key,
            value,
            groups,
            lambda masses: move_mass(masses, {1: 0.6}, (0,)),
            is_causal=True,
            enable_gqa=True,
            whole=state,
        ).output
    output = mix(states, move_mass(group_masses(states), {1: 0.6}, (0,))) + once
    weight = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    found = torch.autograd.grad((output * weight).sum(), (query, key, value))
    wanted = torch.autograd.grad(
        (2 * (edited(problem, groups, {1: 0.6}, (0,)) @ dense_value(problem)) * weight).sum(),
        (query, key, value),
    )
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_little_is_left_of_rows_that_look_at_sinks_alone(dtype: torch.dtype) -> None:
    """Where subtraction would lose all digits, the rest is computed again."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, 70, 8, generator=generator) for _ in range(3))
    query[:, 0] = query[:, 0].abs() + 1
    key[:, 0, 3] = 4.0  # head 0 looks at key 3 with all but some 1e-9 of its mass
    query, key, value = (tensor.to(dtype) for tensor in (query, key, value))
    groups = torch.zeros(1, 2, 70, dtype=torch.bool)
    groups[..., 3] = True
    problem = Problem(query, key, value, None, True, None, False)
    shares = (dense_map(problem) * ~groups[:, :, None]).sum(-1)
    assert shares[0, 0, 3:].max() < 1e-3
    whole = at.attention_state(query, key, value, is_causal=True)
    with on_path("fused"):
        rest, _ = group_states(query, key, value, groups, is_causal=True, whole=whole)
    without = replace(problem, attn_mask=(~groups[:, :, None]).expand(1, 2, 70, 70).tril())
    without = replace(without, is_causal=False)
    output, lse = reference.attention_state(query, key, value, **without.call)
    assert_close(rest.output, output, dtype)
    assert_close(rest.lse, lse, dtype)


def test_lowest_floats_as_masks_leave_nothing_wrong() -> None:
    """Masks that hide with the lowest float rather than -inf, fully hidden rows too."""
    query, key, value = (torch.randn(1, 2, 6, 4) for _ in range(3))
    mask = torch.zeros(1, 1, 6, 6).masked_fill(
        ~torch.ones(6, 6).bool().tril(), torch.finfo(torch.float32).min
    )
    groups = torch.tensor([0, 1, 0, 0, 1, 0]).bool()[None, None]
    states = group_states(query, key, value, groups, mask)
    causal = group_states(query, key, value, groups, is_causal=True)
    for one, other in zip(states, causal, strict=True):
        seen = other.lse > -math.inf
        torch.testing.assert_close(one.output[seen], other.output[seen])
        torch.testing.assert_close(one.lse[seen], other.lse[seen])


def test_all_mass_to_what_little_is_left() -> None:
    generator = torch.Generator().manual_seed(0)
    exact = [torch.randn(1, 2, 3000, 16, dtype=torch.float64, generator=generator) for _ in "qkv"]
    exact[1][:, :, 5] *= 4  # for many queries the rest is just above what is computed again
    groups = torch.zeros(1, 1, 3000, dtype=torch.long)
    groups[..., 5] = 1
    outputs = []
    for tensors in (exact, [tensor.float() for tensor in exact]):
        whole = at.attention_state(*tensors, is_causal=True)
        states = group_states(*tensors, groups, is_causal=True, whole=whole)
        outputs.append(mix(states, move_mass(group_masses(states), {1: 1.0}, (0,))))
    torch.testing.assert_close(outputs[1].double(), outputs[0], atol=1e-4, rtol=0.0)


@pytest.mark.parametrize(("batch", "queries", "keys"), [(1, 0, 3), (1, 2, 0), (0, 2, 3)])
def test_states_of_nothing(batch: int, queries: int, keys: int) -> None:
    query, key = torch.randn(batch, 2, queries, 4), torch.randn(batch, 2, keys, 4)
    groups = torch.zeros(1, 1, keys, dtype=torch.long)
    states = group_states(query, key, key, groups, num_groups=2)
    for state in states:
        assert state.output.shape == (batch, 2, queries, 4)
        assert not bool(state.output.any())
        assert bool((state.lse == -math.inf).all()) or keys
    assert group_masses(states).shape == (2, batch, 2, queries)


def test_member_indices_by_hand() -> None:
    chosen = torch.tensor([[[False, True, False, True]], [[True, False, False, False]]])
    index, real = member_indices(chosen, 2)
    assert index.tolist() == [[[1, 3]], [[0, 0]]]
    assert real.tolist() == [[[True, True]], [[True, False]]]


def test_move_mass_by_hand() -> None:
    masses = torch.tensor([[0.5, 0.0], [0.3, 0.7], [0.2, 0.3]])[:, None, None]
    moved = move_mass(masses, {1: 0.5}, (0,))[:, 0, 0]
    torch.testing.assert_close(moved[:, 0], torch.tensor([0.65, 0.15, 0.2]))
    torch.testing.assert_close(moved[:, 1], torch.tensor([0.0, 0.7, 0.3]))  # nobody to give to
    towards = move_mass(masses, {1: -1.0}, (0,))[:, 0, 0]
    torch.testing.assert_close(towards[:, 0], torch.tensor([0.2, 0.6, 0.2]))
    torch.testing.assert_close(towards[:, 1], torch.tensor([0.0, 0.7, 0.3]))
    torch.testing.assert_close(  # no more than there is
        move_mass(masses, {1: -9.0}, (0,))[:, 0, 0][:, 0], torch.tensor([0.0, 0.8, 0.2])
    )
    both = move_mass(masses, {1: 1.0}, (0, 2))[:, 0, 0]
    torch.testing.assert_close(both[:, 0], torch.tensor([5 / 7, 0.0, 2 / 7]))
    torch.testing.assert_close(both[:, 1], torch.tensor([0.0, 0.0, 1.0]))


def test_bad_input_is_named() -> None:
    query = key = torch.randn(2, 4, 5, 8)
    with pytest.raises(ValueError, match=r"groups: expected .* got torch.float32"):
        group_states(query, key, key, torch.zeros(2, 4, 5))
    with pytest.raises(ValueError, match=r"groups: .*\[2 or 1, 4 or 4 or 1, 5\]"):
        group_states(query, key, key, torch.zeros(2, 3, 5, dtype=torch.long))
    with pytest.raises(ValueError, match="groups: expected labels from 0 to 1, got 0 to 2"):
        group_states(query, key, key, torch.arange(5)[None, None] % 3, num_groups=2)
    labels = torch.zeros(1, 1, 5, dtype=torch.long)
    other = at.attention_state(query[:, :2], key[:, :2], key[:, :2])
    with pytest.raises(ValueError, match="whole: expected the attention_state"):
        group_states(query, key, key, labels, whole=other)
    states = group_states(query, key, key, labels, num_groups=2)
    with pytest.raises(ValueError, match=r"masses: expected .* 2 groups"):
        mix(states, torch.ones(3, 2, 4, 5))
    masses = group_masses(states)
    with pytest.raises(ValueError, match="take: expected groups from 0 to 1"):
        move_mass(masses, {2: 0.5}, (0,))
    with pytest.raises(ValueError, match="give: expected groups that are not in take"):
        move_mass(masses, {1: 0.5}, (1,))
    with pytest.raises(ValueError, match="take: expected shares of at most 1"):
        move_mass(masses, {1: 1.5}, (0,))
