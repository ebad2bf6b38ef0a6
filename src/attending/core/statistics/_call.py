"""The arguments that all statistics of a map share, checked and widened once."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from attending.core.check import check_arguments
from attending.core.state import AttentionState, attend


class Call(NamedTuple):
    """Query and key of at least float32, and what makes scores of them."""

    query: Tensor
    key: Tensor
    bias: Tensor | None
    bias_is_mask: bool
    is_causal: bool
    scale: float

    def attend(self, value: Tensor) -> AttentionState:
        return attend(
            self.query,
            self.key,
            value,
            bias=self.bias,
            is_causal=self.is_causal,
            scale=self.scale,
        )

    def lse(self) -> Tensor:
        return self.attend(self.key).lse

    @property
    def groups(self) -> int:
        return self.query.shape[1] // self.key.shape[1]

    def visible_keys(self) -> Tensor:
        """How many keys each query sees: [batch or 1, heads or 1, queries], float."""
        queries, keys = self.query.shape[2], self.key.shape[2]
        if self.bias is not None:
            visible = (self.bias > -math.inf).expand(*self.bias.shape[:3], keys)
            visible = visible.tril() if self.is_causal else visible
            return visible.sum(-1).to(self.query.dtype)
        if self.is_causal:
            count = torch.arange(1, queries + 1, device=self.query.device).clamp_max(keys)
        else:
            count = torch.full((queries,), keys, device=self.query.device)
        return count.to(self.query.dtype)[None, None]


def prepare(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Call:
    """Check the arguments, and widen half precision: statistics of it would be wrong by 1e-2."""
    checked = check_arguments(query, key, None, attn_mask, is_causal, scale, enable_gqa)
    dtype = torch.promote_types(query.dtype, torch.float32)
    return Call(
        query.to(dtype),
        key.to(dtype),
        checked.bias,
        checked.bias_is_mask,
        is_causal,
        checked.scale,
    )


def check_lse(lse: Tensor | None, call: Call) -> Tensor:
    """The lse that the caller has already, checked; or a pass over the map that computes it."""
    if lse is None:
        return call.lse()
    if lse.shape != call.query.shape[:3]:
        raise ValueError(
            f"lse: expected [batch, heads, queries] = {list(call.query.shape[:3])}, that of "
            f"attention_state on the same arguments, got {list(lse.shape)}."
        )
    return lse.to(call.query.dtype)
