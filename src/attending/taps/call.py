"""One attention call as data, and the handlers that it passes through."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention


@dataclass(frozen=True, eq=False, kw_only=True)
class AttentionCall:
    """A call of `torch.nn.functional.scaled_dot_product_attention`, and where in the model it was.

    The tensors are those that the model passed, not copies: they keep their graph, and what the
    model later overwrites in place (a static KV cache) changes here too.

    One case is shown otherwise than it was made. When transformers decodes a token with a mask,
    it folds the heads that share a key into the query axis: `[batch, kv_heads, group, dim]`. A
    call shows what was meant, `[batch, heads, 1, dim]` with `enable_gqa`; a handler that passes it
    on unchanged still runs exactly what the model asked for. It is recognised by the config's
    `num_attention_heads`: where a device holds only some of the heads, the call is shown as made.

    Attributes:
        name: qualified name of the innermost module that was running, as in
            `model.named_modules()`: "model.layers.3.self_attn"; "" is the tapped model itself. A
            module registered under several names goes by the first.
        layer: which block, read from the name: the first integer that indexes an
            `nn.ModuleList`, else the first integer, else None. Encoder and decoder both count
            from 0, and so do the down and up blocks of a UNet: there, tell blocks by their name.
        query: what asks.
        key: what is asked; `kv_heads` is `heads` without `enable_gqa`.
        value: what is answered; its dim may differ.
        attn_mask: boolean (True = visible) or a float bias, broadcasting to
            `[batch, heads, queries, keys]`.
        dropout_p: probability that an attention weight is dropped.
        is_causal: query i sees keys 0..i, counted from the top left also where there are more
            keys than queries.
        scale: of the scores; None stands for `dim ** -0.5` (see `softmax_scale`).
        enable_gqa: each key head is shared by a group of neighbouring query heads.
        is_cross: whether the keys come from another sequence than the queries, and only from
            there. Joint attention over two streams (SD3, Flux) is self-attention over both. See
            `attending.taps.where` for how that is known; it is never guessed from lengths.
        index: number of this call within its forward, from 0.
        forward: number of the forward within the tap, from 0. A forward is an outermost call of
            the model or of a part of it (`generate` calls the encoder of a T5 on its own) that
            reached attention.
        recomputed: True where gradient checkpointing runs a call once more during backward; the
            other attributes are those of the first time.
        cache: the KV cache that the module was given, as models of transformers pass it down; None
            if there was none. The steps of one generation have the same object, so what was found
            in a prompt can be kept under it.
        inner: how many handlers the call will pass through after this one. 0 for the innermost,
            whose `proceed` is the function itself.
        module: the module named by `name`.
    """

    name: str
    layer: int | None
    query: Float[Tensor, "batch heads queries dim"]
    key: Float[Tensor, "batch kv_heads keys dim"]
    value: Float[Tensor, "batch kv_heads keys value_dim"]
    attn_mask: Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False
    is_cross: bool = False
    index: int = 0
    forward: int = 0
    recomputed: bool = False
    cache: Any = None
    inner: int = 0
    module: nn.Module

    @property
    def num_heads(self) -> int:
        """Heads of the query."""
        return self.query.shape[-3]

    @property
    def query_length(self) -> int:
        """Tokens that ask."""
        return self.query.shape[-2]

    @property
    def key_length(self) -> int:
        """Tokens that are asked, those in the KV cache included."""
        return self.key.shape[-2]

    @property
    def softmax_scale(self) -> float:
        """The factor of the scores, with the default written out."""
        return float(self.query.shape[-1] ** -0.5 if self.scale is None else self.scale)

    def __repr__(self) -> str:
        """In short: shapes and not numbers."""
        kind = "cross" if self.is_cross else "self"
        mask = "causal" if self.is_causal else None
        if self.attn_mask is not None:
            mask = f"mask {list(self.attn_mask.shape)}"
        parts = [
            repr(self.name),
            f"forward {self.forward}, call {self.index}",
            f"{kind}-attention",
            f"query {list(self.query.shape)}",
            f"key {list(self.key.shape)}",
            mask,
            "recomputed" if self.recomputed else None,
        ]
        return f"AttentionCall({', '.join(part for part in parts if part)})"


Proceed: TypeAlias = Callable[[AttentionCall], Tensor]
"""Runs the handlers further in, and last of all the real function, on a call."""

Handler: TypeAlias = Callable[[AttentionCall, Proceed], Tensor]
"""Stands in for the function: gets a call and `proceed`, returns the output of attention."""


@dataclass(frozen=True)
class Site:
    """Where in a tapped model a call was made; the fields of `AttentionCall` of the same names."""

    name: str
    layer: int | None
    module: nn.Module
    is_cross: bool
    index: int
    forward: int
    recomputed: bool = False
    cache: Any = None


class Link(NamedTuple):
    """One tap in the chain that a call passes through."""

    handler: Handler
    site: Site
    older: Sequence[object] = ()  # the checkpointed regions that were open when the tap began
    changes: bool = True  # False of a recording, which a second run can do without
    inner: int = 0  # how many there are further in; in a second run, how many there were


def bind(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> dict[str, Any]:
    """The arguments of `scaled_dot_product_attention` by name, however they were passed."""
    return locals()


def run(links: Sequence[Link], arguments: dict[str, Any]) -> Tensor:
    """Pass a call through the handlers, outermost first, and then to the real function.

    Args:
        links: the taps; without any, the function just runs.
        arguments: what `bind` returned.
    """
    if not links:
        return scaled_dot_product_attention(**arguments)
    group = _packed_group(links[0].site.module, arguments)
    shown = _unpack(arguments, group) if group else arguments

    def attend(call: AttentionCall) -> Tensor:
        given = {name: getattr(call, name) for name in shown}
        if any(given[name] is not shown[name] for name in shown):
            return scaled_dot_product_attention(**given)
        # Untouched: the very call that the model made, so that not one bit differs.
        output = scaled_dot_product_attention(**arguments)
        return output.reshape(output.shape[0], -1, 1, output.shape[-1]) if group else output

    output = _pass(links, 0, attend, AttentionCall(**vars(links[0].site), **shown))
    return output.reshape(output.shape[0], -1, group, output.shape[-1]) if group else output


def _pass(
    links: Sequence[Link], position: int, attend: Callable[[AttentionCall], Tensor], call: Any
) -> Tensor:
    """The call through the handlers from a position on; `attend` is behind the last.

    A function of the module, since a nested one that calls itself is a reference cycle: it would
    keep the tensors of every call until the garbage collector comes by.
    """
    if not isinstance(call, AttentionCall):
        raise TypeError(f"proceed takes an AttentionCall, got {type(call).__name__}")
    if position == len(links):
        return attend(call)
    handler, site, inner = links[position].handler, links[position].site, links[position].inner
    if call.inner != inner:
        call = replace(call, inner=inner)
    if position and site != links[position - 1].site:  # the tap of another model, or a part
        call = replace(call, **vars(site))
    output = handler(call, lambda changed: _pass(links, position + 1, attend, changed))
    _check_output(output, handler, call)
    return output


def _check_output(output: object, handler: Handler, call: AttentionCall) -> None:
    who = getattr(handler, "__qualname__", type(handler).__name__)
    if not isinstance(output, Tensor):
        raise TypeError(
            f"handler {who} must return the output of attention, a Tensor, for {call!r}; "
            f"got {type(output).__name__} (a `return proceed(call)` may be missing)"
        )
    if output.is_nested:
        return
    expected = _output_shape(call)
    if output.shape != expected:
        raise ValueError(
            f"handler {who} must return an output of shape {list(expected)} for {call!r}; "
            f"got {list(output.shape)}"
        )


def _output_shape(call: AttentionCall) -> torch.Size:
    def front(tensor: Tensor) -> tuple[int, ...]:
        shape = tuple(tensor.shape[:-2])
        return (*shape[:-1], 1) if call.enable_gqa else shape  # one key head stands for its group

    shape = torch.broadcast_shapes(call.query.shape[:-2], front(call.key), front(call.value))
    return torch.Size((*shape, call.query.shape[-2], call.value.shape[-1]))


def _packed_group(module: nn.Module, arguments: dict[str, Any]) -> int:
    """How many heads transformers' `pack_gqa` folded into the query axis; 0 if it did not."""
    group = getattr(module, "num_key_value_groups", 1)
    heads = getattr(getattr(module, "config", None), "num_attention_heads", None)
    if not isinstance(group, int) or group < 2 or arguments["enable_gqa"]:
        return 0
    query, key = arguments["query"], arguments["key"]
    packed = query.ndim == 4 and query.shape[1] == key.shape[1] and query.shape[2] == group
    # With the keys repeated, and not the queries packed, there are as many as the config says.
    return group if packed and query.shape[1] * group == heads else 0


def _unpack(arguments: dict[str, Any], group: int) -> dict[str, Any]:
    query, mask = arguments["query"], arguments["attn_mask"]
    shown = arguments | {"query": query.reshape(query.shape[0], -1, 1, query.shape[-1])}
    if mask is not None and mask.ndim == 4 and mask.shape[1] * mask.shape[2] > 1:
        shown["attn_mask"] = mask.reshape(mask.shape[0], -1, 1, mask.shape[-1])
    return shown | {"enable_gqa": True}
