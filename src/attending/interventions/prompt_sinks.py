"""Attention sinks of a prompt: which keys draw more attention than a rule allows."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attending.core.state import AttentionState
from attending.core.statistics import column_mass, state_and_column_mass
from attending.interventions.edit import hiding, state_of
from attending.interventions.prompt import Seen, match_batch
from attending.taps import AttentionCall

Protect = Literal["first_sink", "bos"] | Sequence[int]

CODE_THRESHOLD = 0.1
"""The absolute threshold of the official code, whatever the length (its variable THRES)."""


@dataclass(frozen=True)
class SinkRule:
    """Which keys of a prompt are sinks to be damped.

    Attributes:
        alpha: a sink receives on average more than `alpha / N`, N being the tokens of the prompt.
        threshold: an absolute threshold in place of that one, such as `CODE_THRESHOLD`.
        protect: what is never damped: "first_sink", of each head the first key that is a sink, as
            in the code; "bos", the first token; or positions, counted from the first token.
        min_observers: keys that fewer queries can see are no sinks. 1 is the official code's.
    """

    alpha: float = 5.0
    threshold: float | None = None
    protect: Protect = "first_sink"
    min_observers: int = 8

    def __post_init__(self) -> None:
        if not self.alpha > 0:
            raise ValueError(f"alpha: expected a number above 0, got {self.alpha!r}.")
        if self.threshold is not None and not 0 < self.threshold < 1:
            raise ValueError(
                f"threshold: expected None or a share between 0 and 1, got {self.threshold!r}."
            )
        if self.min_observers < 1:
            raise ValueError(f"min_observers: expected at least 1, got {self.min_observers!r}.")
        if isinstance(self.protect, str):
            if self.protect not in ("first_sink", "bos"):
                raise ValueError(
                    'protect: expected "first_sink", "bos" or positions such as (0, 1), got '
                    f"{self.protect!r}."
                )
        elif any(not isinstance(place, int) or place < 0 for place in self.protect):
            raise ValueError(f"protect: expected positions from 0, got {self.protect!r}.")

    def sinks(
        self,
        received: Float[Tensor, "batch heads keys"],
        observers: Float[Tensor, "#batch #heads keys"] | Int[Tensor, "#batch #heads keys"],
        real_keys: Bool[Tensor, "batch keys"] | None = None,
    ) -> Bool[Tensor, "batch heads keys"]:
        """The sinks, less those that are protected.

        Args:
            received: what each key receives from all queries together, as `column_mass` has it.
            observers: how many queries can see each key.
            real_keys: which keys are tokens of the prompt; all by default.
        """
        batch, _, keys = received.shape
        if real_keys is None:
            real_keys = torch.ones(batch, keys, dtype=torch.bool, device=received.device)
        tokens = real_keys.sum(-1).clamp_min(1)[:, None, None]
        limit = self.alpha / tokens if self.threshold is None else self.threshold
        average = received / observers.clamp_min(1)
        flagged = (average > limit) & (observers >= self.min_observers) & real_keys[:, None]
        if self.protect == "first_sink":
            return flagged & (flagged.cumsum(-1) > 1)
        first = real_keys.int().argmax(-1)[:, None]
        place = torch.arange(keys, device=received.device) - first
        protected = (0,) if self.protect == "bos" else self.protect
        kept = torch.isin(
            place, torch.tensor(list(protected), device=place.device, dtype=torch.long)
        )
        return flagged & ~kept[:, None]


class FoundSinks(NamedTuple):
    """What a look at a prompt found.

    Attributes:
        marks: 1 for the sinks in the heads that were looked at; 0 for all else.
        whole: the `attention_state` of the call, which the look needs anyway.
    """

    marks: Int[Tensor, "batch heads keys"]
    whole: AttentionState


def find_sinks(
    call: AttentionCall,
    seen: Seen,
    heads: Sequence[int],
    rule: SinkRule,
    prompt_length: int | Int[Tensor, " batch"] | None = None,
) -> FoundSinks:
    """The sinks of a call that begins a sequence.

    Args:
        call: of self-attention.
        seen: `read_call(call)`.
        heads: in which heads to look.
        rule: what a sink is.
        prompt_length: as in `AttentionCalibration`.
    """
    batch, keys, device = call.query.shape[0], call.key_length, call.query.device
    places = torch.arange(keys, device=device)
    real = torch.ones(batch, keys, dtype=torch.bool, device=device)
    if seen.real_keys is not None:
        real = real & seen.real_keys
    if prompt_length is not None:
        limit = match_batch(prompt_length, batch, "prompt_length").to(device)
        real = real & (places < limit[:, None])
    marks = torch.zeros(batch, call.num_heads, keys, dtype=torch.long, device=device)
    # What comes after the last token of any prompt is not looked at.
    size = min(call.query_length, int((real * (places + 1)).max()))
    if size == 0 or not heads:
        return FoundSinks(marks, state_of(call))
    chosen = torch.tensor(list(heads), device=device)
    every = len(chosen) == call.num_heads
    observers = _observers(seen, real[:, : call.query_length])
    asking = real[:, None, : call.query_length].to(
        torch.promote_types(call.query.dtype, torch.float)
    )
    needs_graph = torch.is_grad_enabled() and call.query.requires_grad
    if every and not needs_graph:
        # What follows the prompt asks nothing, and no query of the prompt sees it.
        whole, received = state_and_column_mass(
            call.query,
            call.key,
            call.value,
            None if bool(real.all()) else asking,
            hiding(call.attn_mask),
            call.is_causal,
            call.softmax_scale,
            call.enable_gqa,
        )
    else:
        whole = state_of(call)
        received = _received(call, chosen, size, asking, whole.lse)
    with torch.no_grad():
        observers = observers if observers.shape[1] == 1 or every else observers[:, chosen]
        found = rule.sinks(received[..., :size], observers[..., :size], real[:, :size])
        marks[:, chosen, :size] = found.long()
    return FoundSinks(marks, whole)


def _observers(seen: Seen, real: Tensor) -> Int[Tensor, "#batch #heads keys"]:
    """How many queries of the prompt see each key that one of them has the place of."""
    if seen.visible is None:
        return torch.flip(real.flip(-1).cumsum(-1), (-1,))[:, None]
    size = real.shape[-1]
    return (seen.visible[:, :, :, :size] & real[:, None, :, None]).sum(2)


@torch.no_grad()
def _received(
    call: AttentionCall, chosen: Tensor, size: int, asking: Tensor, lse: Tensor
) -> Float[Tensor, "batch some_heads keys"]:
    """What the first keys receive from the prompt, in some of the heads."""
    kv = chosen // (call.num_heads // call.key.shape[1])
    mask = hiding(call.attn_mask)
    if mask is not None:
        mask = mask.expand(*mask.shape[:2], call.query_length, call.key_length)
        mask = mask[:, :, :size, :size]
        mask = mask if mask.shape[1] == 1 else mask[:, chosen]
    return column_mass(
        call.query[:, chosen, :size],
        call.key[:, kv, :size],
        asking[:, :, :size],
        attn_mask=mask,
        is_causal=call.is_causal,
        scale=call.softmax_scale,
        lse=lse[:, chosen, :size],
    )
