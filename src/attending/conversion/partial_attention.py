"""Partial attention for pretrained decoders: a path to the source, at first without effect.

A language model that answers over a source (a document, a sentence to translate) attends to it less
and less as the answer grows. `add_partial_attention` gives every decoder layer a second attention
whose keys are the source only; see `attending.nn.partial_attention`.

    handle = add_partial_attention(model)                # model(x) is unchanged, bit for bit
    optimizer = torch.optim.AdamW(handle.parameters(), lr=1e-4)
    with handle.source(source_mask):                     # which tokens of the prompt are source
        loss = model(**batch, labels=labels).loss
        ...
    with handle.source(prompt["attention_mask"].bool()):  # all of the prompt
        model.generate(**prompt)

The layers are added as submodules, so they are trained, moved and saved with the model. To load
them, make the model, call this, then `model.load_state_dict`. Without a `source` block the model
runs as if they were not there.

How Fu et al. (2304.04052) would be applied to a pretrained model is not in the paper; third-party
code does it [3rd]. Differences: zero-initialised outputs, so that nothing changes at first; F_p
starts as exactly the identity (that code's `silu(1.7 x)` is 1.4 at x = 1 and -0.26 at x = -1); the
source is normalised like the queries, since the cloned projections expect it; no positions in the
partial path; the causal mask and the positions of the model's own attention stay as they are, as
pretrained rotary positions have not learned others. To change those, too, pass what
`attending.nn.source_target_layout` gives as `attention_mask` and `position_ids`.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, cast

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from attending.nn.partial_attention import (
    Init,
    PartialAttention,
    SourceMap,
    SourceMemory,
    crop_source,
)

# A layer adds to the stream: x += self_attn(input_layernorm(x)); x += mlp(post_attention_...(x)).
_NEEDED = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")
_OTHERWISE = ("pre_feedforward_layernorm", "post_feedforward_layernorm", "encoder_attn")
_CLONED = ("q_proj", "k_proj", "v_proj", "o_proj")


class PartialPath(nn.Module):
    """What a decoder layer gets: a norm, and the partial attention after it.

    Attributes:
        norm: of queries and source, at first a copy of the layer's `input_layernorm`.
        attention: the `PartialAttention`.
    """

    def __init__(self, norm: nn.Module, attention: PartialAttention) -> None:
        super().__init__()
        self.norm = norm
        self.attention = attention

    def encode(self, hidden: Tensor, source_mask: Tensor) -> SourceMemory:
        """What is kept of the source, given the states of the whole prompt."""
        source, visible = crop_source(hidden, source_mask)
        return self.attention.encode(self.norm(source), visible)

    def forward(self, hidden: Tensor, memory: SourceMemory) -> Tensor:
        """What is added to the states."""
        return self.attention(self.norm(hidden), memory)  # type: ignore[no-any-return]


class PartialAttentionHandle:
    """What `add_partial_attention` returns: the paths, the source, and the way back.

    Attributes:
        paths: by the name of the decoder layer; submodules of the model, called
            `partial_attention` there.
    """

    def __init__(self, layers: dict[str, nn.Module], paths: dict[str, PartialPath]) -> None:
        self.paths = paths
        self._layers = dict(layers)
        self._source: Tensor | None = None
        self._hooks: list[RemovableHandle] = []
        self._runs: list[_Path] = []
        for name, layer in layers.items():
            layer.add_module("partial_attention", paths[name])
            run = _Path(self, name, paths[name])
            self._runs.append(run)
            self._hooks += [
                layer.register_forward_pre_hook(run.before, with_kwargs=True),
                layer.get_submodule("self_attn").register_forward_hook(run.after),
            ]

    @contextmanager
    def source(self, source_mask: Bool[Tensor, "batch tokens"]) -> Iterator[None]:
        """Say which tokens of the first forward are source, for all forwards of the block.

        A forward without a cache, or with an empty one, reads the source anew; one with a cache
        goes on with what was read. The mask may be shorter than the sequence, whose other tokens
        are then target. Beams and returned sequences of `generate` are expanded like their prompt.

        Raises:
            ValueError: for a mask that is not boolean `[batch, tokens]`. Within the block: where it
                does not fit the tokens, or a sequence began outside.
            RuntimeError: inside another such block.
        """
        if source_mask.dim() != 2 or source_mask.dtype != torch.bool:
            raise ValueError(
                "source_mask: expected a boolean [batch, tokens], got "
                f"{source_mask.dtype} {list(source_mask.shape)}."
            )
        if self._source is not None:
            raise RuntimeError("a block of source is open already; leave it before the next.")
        self._source = source_mask
        try:
            yield
        finally:
            self._source = None
            for run in self._runs:
                run.forget()

    def parameters(self) -> list[nn.Parameter]:
        """Those of the paths: what to train when the rest of the model stays as it is."""
        return [parameter for path in self.paths.values() for parameter in path.parameters()]

    def remove(self) -> None:
        """Take hooks and paths off: the model is what it was. A second call does nothing."""
        for hook in self._hooks:
            hook.remove()
        for layer in self._layers.values():
            layer._modules.pop("partial_attention", None)
        self._hooks, self._layers = [], {}

    def __enter__(self) -> "PartialAttentionHandle":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.remove()


class _Path:
    """The hooks of one decoder layer.

    The layer adds the output of its self-attention to its input. So the partial path, which reads
    that sum, is added to the output of the self-attention: it lands in the stream right after it.
    """

    def __init__(self, handle: PartialAttentionHandle, name: str, path: PartialPath) -> None:
        self.handle, self.name, self.path = handle, name, path
        self.forget()

    def forget(self) -> None:
        self.hidden: Tensor | None = None
        self.memory: SourceMemory | None = None
        self.past = 0

    def before(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.handle._source is None:
            return
        self.hidden = kwargs.get("hidden_states", args[0] if args else None)
        self.past = _past_length(layer, args, kwargs)

    def after(self, attention: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        source, hidden = self.handle._source, self.hidden
        self.hidden = None
        if source is None or hidden is None:
            return None
        attended = output[0] if isinstance(output, tuple) else output
        states = hidden + attended
        if self.past == 0:
            self.memory = self.path.encode(states, self._fitted(source, states))
        elif self.memory is None or self.memory.key.shape[0] != states.shape[0]:
            raise ValueError(
                f"{self.name}: expected a sequence whose first tokens were read in this block, got "
                f"one that goes on after {self.past} tokens read elsewhere. Open the block of "
                "source before the prompt is read."
            )
        attended = attended + self.path(states, self.memory)
        return (attended, *output[1:]) if isinstance(output, tuple) else attended

    def _fitted(self, source: Tensor, states: Tensor) -> Tensor:
        batch, tokens = states.shape[:2]
        if batch % source.shape[0] or source.shape[1] > tokens:
            raise ValueError(
                f"source_mask: expected [batch, tokens] for states {list(states.shape)}, got "
                f"{list(source.shape)}. The source has to be in the first forward, whole."
            )
        source = source.to(states.device).repeat_interleave(batch // source.shape[0], 0)
        return nn.functional.pad(source, (0, tokens - source.shape[1]))


def _past_length(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """How many tokens the layer's cache holds before this forward; transformers renamed it."""
    index = getattr(layer.get_submodule("self_attn"), "layer_idx", 0) or 0
    for candidate in (*args, *kwargs.values()):
        if hasattr(candidate, "get_seq_length"):
            return int(candidate.get_seq_length(index))
    return 0


def add_partial_attention(
    model: nn.Module, init: Init = "zero", source_map: SourceMap = "residual", clone: bool = True
) -> PartialAttentionHandle:
    """Give every decoder layer of a pretrained model a partial attention, without effect at first.

    For pre-norm decoders of transformers with the four parts `input_layernorm`, `self_attn`,
    `post_attention_layernorm` and `mlp`, whose attention is added to the stream as it is: Llama,
    Mistral, Qwen2 and Qwen3, and others of their make.

    Args:
        model: such a model.
        init: "zero" or "gate" (`tanh(gate)` at 0) change nothing at first; "random" does.
        source_map: F_p; "residual" starts as the identity.
        clone: start the projections of query, key and value, and with "gate" that of the output,
            as copies of those of the layer's self-attention.

    Returns:
        The handle: `.source(mask)`, `.parameters()`, `.remove()`.

    Raises:
        ValueError: if the model has no such layers, or the paths already.
    """
    layers = {
        name: module
        for name, module in model.named_modules()
        if all(isinstance(getattr(module, part, None), nn.Module) for part in _NEEDED)
    }
    if not layers:
        raise ValueError(
            f"model: expected decoder layers with {', '.join(_NEEDED)}, as Llama, Mistral and Qwen "
            f"have them, found none in {type(model).__name__}."
        )
    for name, layer in layers.items():
        if hasattr(layer, "partial_attention"):
            raise ValueError(
                f"model: expected layers without partial attention, got one in {name!r} already. "
                "Take it off first, with remove() of its handle."
            )
        other = [part for part in _OTHERWISE if hasattr(layer, part)]
        if other or getattr(layer, "residual_multiplier", 1.0) != 1.0:
            what = other[0] if other else "a residual_multiplier"
            raise ValueError(
                f"model: expected layers that add their attention to the stream as it is, got "
                f"{type(layer).__name__} with {what} in {name!r}."
            )
    paths = {name: _path(layer, init, source_map, clone) for name, layer in layers.items()}
    return PartialAttentionHandle(layers, paths)


def _path(layer: nn.Module, init: Init, source_map: SourceMap, clone: bool) -> PartialPath:
    attention = layer.get_submodule("self_attn")
    projections = [attention.get_submodule(name) for name in _CLONED]
    weights = [cast(Tensor, projection.weight) for projection in projections]
    head_dim: Any = getattr(attention, "head_dim", None)
    if not isinstance(head_dim, int):
        raise ValueError(
            f"model: expected {type(attention).__name__} to know its head_dim, got {head_dim!r}."
        )
    made = PartialAttention(
        weights[3].shape[0],
        weights[0].shape[0] // head_dim,
        weights[1].shape[0] // head_dim,
        head_dim=head_dim,
        source_map=source_map,
        init=init,
        bias=any(getattr(projection, "bias", None) is not None for projection in projections),
        device=weights[0].device,
        dtype=weights[0].dtype,
    )
    if clone:
        kept = (made.q_proj, made.k_proj, made.v_proj, made.out_proj)
        chosen = 4 if init == "gate" else 3
        with torch.no_grad():
            for ours, theirs in list(zip(kept, projections, strict=True))[:chosen]:
                ours.weight.copy_(theirs.weight)  # type: ignore[arg-type]
                if ours.bias is not None:
                    bias = getattr(theirs, "bias", None)
                    nn.init.zeros_(ours.bias) if bias is None else ours.bias.copy_(bias)
    norm = copy.deepcopy(layer.get_submodule("input_layernorm"))
    return PartialPath(norm, made).train(layer.training)
