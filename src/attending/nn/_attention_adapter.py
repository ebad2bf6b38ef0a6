"""What stands between transformers' attention interface and an operator of `attending.nn`."""

import dataclasses
import functools
import inspect
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from attending.core.masks import MaskParts, mask_parts

# Arguments by which transformers changes what attention computes.
_UNKNOWN = {
    "softcap": "a cap on the scores",
    "position_bias": "a position bias beside the mask",
    "s_aux": "learned sinks",
}


@dataclass(frozen=True)
class Operator:
    """What an operator is and what it can do.

    The function is called as `function(query, key, value, attn_mask=, is_causal=, scale=,
    enable_gqa=, module=)`, the last of which is the layer. Of the keywords, those that its
    signature lacks are left out: without `scale` the scale of the model does not apply to it,
    without `enable_gqa` it gets repeated keys and values, and without `attn_mask` or `is_causal`
    the table has to say that it cannot use them.

    Attributes:
        function: `"module:function"`, imported when it is registered.
        causal: it has a causal form, `is_causal=True`.
        bidirectional: it has a form without a causal mask.
        masks: which `attn_mask` it takes. "any": any mask, in place of `is_causal`, as in
            `scaled_dot_product_attention`. "keys": one that hides keys, boolean, `[batch, 1, 1,
            keys]`, together with `is_causal`. "none": none; padded sequences are then cut out and
            attended one by one.
        decodes: a query is answered from the keys it sees and from nothing else, so that queries
            may come one by one with a cache of keys and values.
        cross: queries and keys may come from different sequences; not with `masks="none"`.
        required: options without which it is not registered, and why.
    """

    function: str
    causal: bool = True
    bidirectional: bool = True
    masks: Literal["any", "keys", "none"] = "any"
    decodes: bool = False
    cross: bool = False
    required: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.cross and self.masks == "none":
            raise ValueError(
                'cross: expected False with masks="none", since padding is cut out of queries and '
                f"keys alike, got {self}."
            )


@dataclass(frozen=True, eq=False)
class _Call:
    """One call of an attention layer."""

    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    scale: float | None
    causal_layer: bool

    @property
    def queries(self) -> int:
        return self.query.shape[2]

    @property
    def keys(self) -> int:
        return self.key.shape[2]

    def first_keys(self, count: int) -> "_Call":
        mask = None if self.mask is None else self.mask[..., :count]
        key, value = self.key[:, :, :count], self.value[:, :, :count]
        return dataclasses.replace(self, key=key, value=value, mask=mask)

    def refusal(self, name: str, reason: str) -> ValueError:
        index = getattr(self.module, "layer_idx", None)
        layer = type(self.module).__name__ + ("" if index is None else f" of layer {index}")
        return ValueError(f"attending:{name} in {layer}: {reason}.")


class Adapter:
    """An operator, called as transformers calls an attention implementation.

    Args:
        name: the operator's name, for messages.
        operator: what it can do.
        function: what it computes.
        options: keyword arguments of the function to fix.
    """

    def __init__(
        self,
        name: str,
        operator: Operator,
        function: Callable[..., Tensor],
        options: Mapping[str, object],
    ) -> None:
        parameters = inspect.signature(function).parameters
        given = {"query", "key", "value", "attn_mask", "is_causal", "scale", "enable_gqa", "module"}
        allowed = sorted(set(parameters) - given)
        for option in options:
            if option not in allowed:
                raise ValueError(
                    f"options: {name!r} has the options {allowed or 'none'}, got {option!r}."
                )
        for option, reason in operator.required.items():
            if option not in options:
                raise ValueError(f"options: {name!r} needs {option!r}, {reason}.")
        self.name, self.operator, self.options = name, operator, dict(options)
        self._function = functools.partial(function, **options)
        self._knows = frozenset(parameters)
        self._last_mask: tuple[weakref.ref[Tensor], tuple[object, ...], MaskParts] | None = None

    def __repr__(self) -> str:
        return f"{self.name!r} with the options {self.options}"

    def same(self, other: "Adapter") -> bool:
        """Whether the two compute the same."""
        return (self.name, self.options) == (other.name, other.options)

    def __call__(
        self,
        module: nn.Module,
        query: Float[Tensor, "batch heads queries dim"],
        key: Float[Tensor, "batch kv_heads keys dim"],
        value: Float[Tensor, "batch kv_heads keys value_dim"],
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        is_causal: bool | None = None,
        **others: object,
    ) -> tuple[Float[Tensor, "batch queries heads output_dim"], None]:
        """One call of an attention layer; the signature is that of transformers."""
        if torch.is_autocast_enabled(query.device.type):
            dtype = torch.get_autocast_dtype(query.device.type)
            query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        if is_causal is None:
            is_causal = getattr(module, "is_causal", True)
        mask = attention_mask
        call = _Call(module, query, key, value, mask, scaling, bool(is_causal))
        self._refuse_arguments(call, dropout, others)
        return self._attend(call, attention_mask).transpose(1, 2).contiguous(), None

    def _attend(self, call: _Call, source: Tensor | None) -> Tensor:
        if call.mask is None and call.causal_layer and 1 < call.queries < call.keys:
            # A static cache in its first step: keys beyond the queries are not written yet.
            call = call.first_keys(call.queries)
        parts = self._parts(call, source)
        seen = parts.key_visible
        if seen is not None and call.queries < call.keys:
            # A static cache in later steps: no sequence sees its end.
            used = int(seen.any(0).nonzero().max()) + 1 if bool(seen.any()) else call.keys
            if call.queries <= used < call.keys:
                return self._attend(call.first_keys(used), None)
        causal = parts.is_causal and (call.causal_layer or not parts.is_full)
        other = not parts.is_causal and not parts.is_full
        if causal and call.queries == call.keys == 1 and not self.operator.causal:
            causal = False  # of one token, both are the same
        self._refuse_kind(call, causal, other)
        if self.operator.masks == "any":
            hidden = seen is not None or other or (causal and 1 < call.queries < call.keys)
            flag = causal and not hidden and call.queries == call.keys
            return self._run(call, call.mask if hidden else None, flag)
        causal = causal and call.queries == call.keys
        if seen is None:
            return self._run(call, None, causal)
        if self.operator.masks == "keys":
            return self._run(call, seen[:, None, None, :], causal)
        return self._one_by_one(call, seen, causal)

    def _parts(self, call: _Call, source: Tensor | None) -> MaskParts:
        """`mask_parts`, once for all layers that are handed the same mask."""
        if call.mask is None:
            return MaskParts(None, call.causal_layer, not call.causal_layer)
        batch = call.query.shape[0]
        if source is None or source.is_inference():  # these do not tell whether they were changed
            return mask_parts(call.mask, batch, call.queries, call.keys)
        state = (source._version, batch, call.queries, call.keys)
        last = self._last_mask
        if last is not None and last[0]() is source and last[1] == state:
            return last[2]
        parts = mask_parts(call.mask, batch, call.queries, call.keys)
        self._last_mask = (weakref.ref(source), state, parts)
        return parts

    def _one_by_one(self, call: _Call, seen: Tensor, is_causal: bool) -> Tensor:
        """Each sequence without its padding; 0 at the queries that are padding."""
        rows = []
        square = call.queries == call.keys
        for index, visible in enumerate(seen):
            place = visible.nonzero().squeeze(1)
            query, key, value = (
                tensor[index : index + 1] for tensor in (call.query, call.key, call.value)
            )
            key, value = key[:, :, place], value[:, :, place]
            asked = query[:, :, place] if square else query
            found = self._run(
                dataclasses.replace(call, query=asked, key=key, value=value), None, is_causal
            )
            if square:
                empty = found.new_zeros(*found.shape[:2], call.queries, found.shape[3])
                found = empty.index_copy(2, place, found)
            rows.append(found)
        return torch.cat(rows)

    def _run(self, call: _Call, mask: Tensor | None, is_causal: bool) -> Tensor:
        query, key, value = call.query, call.key, call.value
        grouped = query.shape[1] != key.shape[1]
        if grouped and "enable_gqa" not in self._knows:
            groups = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        keywords: dict[str, object] = {
            "attn_mask": mask,
            "is_causal": is_causal,
            "scale": call.scale,
            "enable_gqa": grouped,
            "module": call.module,
        }
        known = {name: value for name, value in keywords.items() if name in self._knows}
        return self._function(query, key, value, **known)

    def _refuse_arguments(self, call: _Call, dropout: float, others: Mapping[str, object]) -> None:
        if call.mask is not None and call.mask.dim() != 4:
            reason = (
                "it takes a mask of [batch, heads, queries, keys], as for sdpa, and got "
                f"{list(call.mask.shape)}"
            )
            raise call.refusal(self.name, reason)
        if dropout:
            reason = (
                f"it has no dropout on the map, and the model asks for {dropout}. Set "
                "attention_dropout=0.0 in the config (BERT: attention_probs_dropout_prob=0.0)"
            )
            raise call.refusal(self.name, reason)
        if others.get("output_attentions"):
            reason = 'it returns no map; output_attentions needs attn_implementation="eager"'
            raise call.refusal(self.name, reason)
        for argument, meaning in _UNKNOWN.items():
            if others.get(argument) is not None:
                raise call.refusal(self.name, f"it does not know {argument}, {meaning}")

    def _refuse_kind(self, call: _Call, causal: bool, other: bool) -> None:
        sizes = f"{call.queries} queries for {call.keys} keys"
        operator, reason = self.operator, None
        if other and operator.masks != "any":
            reason = "it takes no mask but padding and causality, and the layer's mask is another"
        elif causal and not operator.causal:
            reason = "it has no causal form, and the layer is causal"
        elif not causal and not other and not operator.bidirectional:
            reason = "it has only a causal form, and the layer is not causal"
        elif call.queries == call.keys:
            return
        elif (causal or call.causal_layer) and not operator.decodes:
            reason = (
                f"it cannot go on from a cache of keys and values, and got {sizes}. Pass "
                "use_cache=False, to generate() as well"
            )
        elif causal and call.queries > 1 and operator.masks != "any":
            reason = f"it goes on from a cache one token at a time, and got {sizes}"
        elif not causal and not call.causal_layer and not operator.cross:
            reason = f"it has no form for cross-attention, and got {sizes}"
        if reason is not None:
            raise call.refusal(self.name, reason)
