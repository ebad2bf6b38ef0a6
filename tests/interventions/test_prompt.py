"""What a call tells of its sequence, and what is kept of a prompt."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import attending as at
from attending.interventions.prompt import PromptMemory, PromptReader, match_batch, read_call
from attending.taps import AttentionCall


def call_of(
    queries: int,
    keys: int,
    mask: Tensor | None = None,
    is_causal: bool = False,
    batch: int = 2,
    cache: object = None,
) -> AttentionCall:
    query, key = torch.zeros(batch, 4, queries, 2), torch.zeros(batch, 2, keys, 2)
    return AttentionCall(
        name="layers.0",
        layer=0,
        query=query,
        key=key,
        value=key,
        attn_mask=mask,
        is_causal=is_causal,
        enable_gqa=True,
        module=nn.Module(),
        cache=cache,
    )


def causal(queries: int, keys: int) -> Tensor:
    return torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)


LEFT = torch.tensor([[False, False, True, True, True], [True, True, True, True, True]])
RIGHT = LEFT.flip(-1)


def test_without_a_mask() -> None:
    assert read_call(call_of(5, 5, is_causal=True)) == (True, False, None, None, None)
    assert read_call(call_of(1, 1)) == (True, False, None, None, None)
    assert read_call(call_of(5, 5)) == (True, True, None, None, None)  # an encoder
    assert read_call(call_of(1, 6)) == (False, False, None, None, None)
    assert read_call(call_of(3, 6)) == (False, False, None, None, None)


@pytest.mark.parametrize("real", [LEFT, RIGHT])
@pytest.mark.parametrize("kind", ["boolean", "lowest", "inf", "padding sees all", "one more head"])
def test_padding(real: Tensor, kind: str) -> None:
    mask: Tensor = causal(5, 5) & real[:, None, None]
    if kind == "padding sees all":
        mask = mask | ~mask.any(-1, keepdim=True)
    elif kind == "one more head":
        mask = mask.repeat(1, 4, 1, 1)
        mask[:, 1] = False  # a head that sees nothing does not make padding
    elif kind != "boolean":
        low = torch.finfo(torch.float32).min if kind == "lowest" else -torch.inf
        mask = torch.zeros(mask.shape).masked_fill(~mask, low)
    seen = read_call(call_of(5, 5, mask))
    assert seen.begins
    assert not seen.is_encoder
    assert torch.equal(seen.real_keys, real)
    assert torch.equal(seen.real_queries, real)


def test_masks_without_padding() -> None:
    for mask in (causal(5, 5), causal(5, 5)[None], causal(5, 5)[None, None]):
        seen = read_call(call_of(5, 5, mask))
        assert (seen.begins, seen.is_encoder) == (True, False)
        assert seen.real_keys is None
        assert seen.real_queries is None


def test_encoders_with_padding() -> None:
    for real in (LEFT, RIGHT):
        assert read_call(call_of(5, 5, real[:, None, None])).is_encoder
    prefix = causal(5, 5)
    prefix[:3, :3] = True  # the prefix sees all of itself, the rest is causal
    assert not read_call(call_of(5, 5, prefix)).is_encoder


def test_steps_with_a_cache() -> None:
    real = torch.cat([LEFT, torch.ones(2, 2, dtype=torch.bool)], 1)
    for queries in (1, 2):
        mask = causal(queries, 7) & real[:, None, None]
        seen = read_call(call_of(queries, 7, mask))
        assert (seen.begins, seen.is_encoder) == (False, False)
        assert torch.equal(seen.real_keys, real)
        assert seen.real_queries is None


def test_static_caches_have_places_that_nobody_has_filled() -> None:
    filled = torch.cat([LEFT, torch.zeros(2, 4, dtype=torch.bool)], 1)
    nothing = torch.zeros(5, 9, dtype=torch.bool)
    assert read_call(call_of(5, 9, nothing)).begins  # a mask that hides everything is no step
    mask = torch.zeros(2, 1, 5, 9, dtype=torch.bool)
    mask[..., :5] = causal(5, 5) & LEFT[:, None, None]
    prompt = read_call(call_of(5, 9, mask))
    assert (prompt.begins, prompt.is_encoder) == (True, False)
    assert torch.equal(prompt.real_keys, filled)
    filled[:, 5] = True
    step = read_call(call_of(1, 9, filled[:, None, None]))
    assert not step.begins
    assert torch.equal(step.real_keys, filled)


def test_reading_once_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    from attending.interventions import prompt

    reads = []

    def count(call: AttentionCall) -> object:
        reads.append(call)
        return read_call(call)

    monkeypatch.setattr(prompt, "read_call", count)
    reader, mask = PromptReader(), causal(5, 5)[None, None]
    call = call_of(5, 5, mask)
    for one in (call, replace(call, attn_mask=mask[..., :5])):  # a view of its own
        assert reader(one).begins
    assert len(reads) == 1
    reader(replace(call, forward=1))  # its memory may have been used again
    assert len(reads) == 2
    reader(replace(call, attn_mask=mask.clone()))
    assert len(reads) == 3


class Cache:
    """Anything that can be told from others."""


def test_memory_by_cache() -> None:
    first, second = Cache(), Cache()
    memory = PromptMemory()
    marks = torch.tensor([[[0, 1, 0]], [[1, 0, 0]]]).expand(2, 4, 3)
    memory.keep(call_of(3, 3, cache=first), marks)
    memory.keep(call_of(3, 3, cache=second), 1 - marks)
    assert torch.equal(memory.recall(call_of(1, 3, cache=first)), marks)
    assert memory.recall(call_of(1, 4, cache=second))[0, 0].tolist() == [1, 0, 1, 0]
    # A cache that was copied, or none: the last prompt.
    for cache in (Cache(), None, ((),)):
        assert memory.recall(call_of(1, 4, cache=cache))[0, 0].tolist() == [1, 0, 1, 0]
    beams = memory.recall(call_of(1, 4, batch=4, cache=first))
    assert beams[:, 0].tolist() == [[0, 1, 0, 0]] * 2 + [[1, 0, 0, 0]] * 2
    with pytest.raises(ValueError, match="expected the batch of the prompt, 2, or a multiple"):
        memory.recall(call_of(1, 4, batch=3, cache=first))
    with pytest.raises(ValueError, match="Enter the block before the prompt runs"):
        PromptMemory().recall(call_of(1, 4))


def test_one_number_for_each_item() -> None:
    assert match_batch(3, 2, "n").tolist() == [3, 3]
    assert match_batch(torch.tensor([1, 2]), 4, "n").tolist() == [1, 1, 2, 2]
    for wrong in (torch.tensor([1, 2, 3]), torch.tensor([1.5])):
        with pytest.raises(ValueError, match="n: expected one integer"):
            match_batch(wrong, 4, "n")


def test_a_tap_tells_the_cache_and_what_comes_after() -> None:
    from tests.interventions.tiny import make_causal

    model, ids = make_causal(layers=1), torch.tensor([[1, 2, 3]])
    with torch.no_grad(), at.tap(model) as outer, at.tap(model) as inner:
        cache = model(ids, use_cache=True).past_key_values
        model(ids[:, :1], cache=cache)
        model(ids, use_cache=False)
    assert [call.cache is cache for call in inner] == [True, True, False]
    assert inner[2].cache is None
    assert [call.inner for call in (*outer, *inner)] == [1, 1, 1, 0, 0, 0]
