"""What an attention call tells of its sequence, and a memory of what was found in the prompt.

Some edits depend on what all queries of a prompt do: a sink is a key that *they* look at. A decode
step sees one query, and a later one sees later tokens, so neither may decide again: what was found
in the prompt is kept for the steps that follow. The call itself tells which it is:

- a sequence **begins** when no key is older than the queries;
- it **goes on** when the queries are the last of more keys, those of a cache;
- a map in which every token sees every other one is that of an **encoder**.
"""

import weakref
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from attending.core.masks import visible_entries
from attending.taps import AttentionCall


class Seen(NamedTuple):
    """What a call tells of its sequence.

    Attributes:
        begins: whether no key is older than the queries.
        is_encoder: whether every token sees every other one (of at least two).
        visible: the mask, as what each query sees; None if there is none but causality.
        real_queries: which queries are no padding; None if all are.
        real_keys: which keys are no padding, nor places that a static cache has not filled yet;
            None if all are.
    """

    begins: bool
    is_encoder: bool
    visible: Bool[Tensor, "#batch #heads queries keys"] | None
    real_queries: Bool[Tensor, "batch queries"] | None
    real_keys: Bool[Tensor, "batch keys"] | None


def read_call(call: AttentionCall) -> Seen:
    """Read beginnings and padding off a call of self-attention.

    Padding is a key that no query sees, and a query at the place of such a key. Some models let
    queries of padding see everything, so that no row is empty: a row that sees its future, where
    others do not, is padding too.
    """
    queries, keys = call.query_length, call.key_length
    if call.attn_mask is None:
        begins = call.is_causal or keys <= queries
        return Seen(begins, not call.is_causal and 1 < keys <= queries, None, None, None)
    mask = call.attn_mask
    mask = mask.reshape((1,) * (4 - mask.dim()) + tuple(mask.shape))
    visible = visible_entries(mask)
    visible = visible.expand(*mask.shape[:2], queries, keys)
    seen = visible.any(1)  # by any head
    batch = call.query.shape[0]
    square = min(queries, keys)
    places = seen[:, :square, :square]
    if int(seen[:, -1].sum(-1).max()) > queries:  # the queries are the last of more keys
        real_queries = seen.any(-1)
        return Seen(
            False, False, visible, _unless_all(real_queries, batch), _unless_all(seen.any(1), batch)
        )
    own = places.diagonal(dim1=1, dim2=2)
    some = seen.any(1)
    is_encoder = keys > 1 and bool((seen[:, :square] == some[:, None])[own].all())
    if not is_encoder:
        last = torch.arange(square, device=own.device) == square - 1
        own = own & (last | ~places.all(-1))
    real_keys = torch.zeros(len(own), keys, dtype=torch.bool, device=own.device)
    real_keys[:, :square] = own
    real_queries = torch.zeros(len(own), queries, dtype=torch.bool, device=own.device)
    real_queries[:, :square] = own
    return Seen(
        True, is_encoder, visible, _unless_all(real_queries, batch), _unless_all(real_keys, batch)
    )


def _unless_all(real: Tensor, batch: int) -> Tensor | None:
    return None if bool(real.all()) else real.expand(batch, -1)


class PromptReader:
    """`read_call`, once for all layers of a forward that share a mask."""

    def __init__(self) -> None:
        self._mask: Tensor | None = None
        self._last: tuple[object, Seen] | None = None

    def __call__(self, call: AttentionCall) -> Seen:
        """What the call tells of its sequence."""
        mask = call.attn_mask
        if mask is None:
            return read_call(call)
        # Layers may get views of their own. The mask is held, so that no other takes its memory;
        # in the forward that made it a mask does not change, but its tensor may be used again.
        place = (mask.data_ptr(), mask.shape, mask.stride(), mask.dtype)
        about = (place, call.forward, call.query_length, call.key.shape, call.query.shape[0])
        if self._last is None or self._last[0] != about:
            self._last = (about, read_call(call))
            self._mask = mask
        return self._last[1]


class PromptMemory:
    """Marks on the keys of a prompt, by layer, kept for the steps that decode after it.

    Sequences are known by their cache, so several may be under way at once; what has no cache
    object, or one that was copied, goes by the last prompt.
    """

    def __init__(self) -> None:
        self._by_cache: weakref.WeakKeyDictionary[object, dict[str, Tensor]] = (
            weakref.WeakKeyDictionary()
        )
        self._latest: dict[str, Tensor] = {}

    def keep(self, call: AttentionCall, marks: Int[Tensor, "batch heads keys"]) -> None:
        """Remember the marks of a call that begins a sequence."""
        self._latest[call.name] = marks
        if _can_be_key(call.cache):
            self._by_cache.setdefault(call.cache, {})[call.name] = marks

    def recall(self, call: AttentionCall) -> Int[Tensor, "batch heads keys"]:
        """The marks of the prompt for a call that goes on with it; 0 for later keys.

        A batch that was expanded for beams or samples gets a copy for each. Keys that a sliding
        window dropped are left out.

        Raises:
            ValueError: if the prompt did not run within the block, or in another batch.
        """
        known = self._by_cache.get(call.cache) if _can_be_key(call.cache) else None
        marks = (self._latest if known is None else known).get(call.name)
        if marks is None:
            raise ValueError(
                "model: expected the prompt to run within the block, as what is edited is found in "
                f"it, got a cache of {call.key_length - call.query_length} tokens that ran before "
                f"({call!r}). Enter the block before the prompt runs."
            )
        batch, keys = call.query.shape[0], call.key_length
        if batch % marks.shape[0]:
            raise ValueError(
                f"model: expected the batch of the prompt, {marks.shape[0]}, or a multiple of it, "
                f"got {batch} in {call!r}. Run the prompt of this batch within the block."
            )
        marks = marks.repeat_interleave(batch // marks.shape[0], 0)[..., _dropped(call) :]
        return torch.nn.functional.pad(marks, (0, keys - marks.shape[-1]))


def _can_be_key(cache: object) -> bool:
    return cache is not None and hasattr(cache, "__weakref__") and type(cache).__hash__ is not None


def _dropped(call: AttentionCall) -> int:
    """How many of the first keys a sliding window has dropped from the cache."""
    length = getattr(call.cache, "get_seq_length", None)
    layer = getattr(call.module, "layer_idx", None)
    if not callable(length) or not isinstance(layer, int):
        return 0
    return max(0, int(length(layer)) - call.key_length)


def match_batch(
    per_item: int | Int[Tensor, " items"], batch: int, name: str
) -> Int[Tensor, " batch"]:
    """One number for each item of the batch, from one for all, or from one for each group of items.

    Raises:
        ValueError: if the batch is no multiple of the number of items.
    """
    numbers = torch.as_tensor(per_item).reshape(-1)
    if len(numbers) == 0 or batch % len(numbers) or numbers.is_floating_point():
        raise ValueError(
            f"{name}: expected one integer, or one for each of the {batch} items of the batch, "
            f"got {numbers.dtype} {list(numbers.shape)}."
        )
    return numbers.repeat_interleave(batch // len(numbers))
