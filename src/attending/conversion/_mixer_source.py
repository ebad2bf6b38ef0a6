"""What mixers of different layers share: the embedding of the input, and the stream of no input.

Queries and keys that do not come from the current layer come from here. The *stream* is one more
sequence, the same whatever the input is, that goes through the very same blocks with standard
attention; its queries and keys of each layer serve all inputs.
"""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class MixerSource(nn.Module):
    """Belongs to a model as `mixer_source`; its hooks run before the model and its first layer.

    Args:
        noise: what enters the stream, `[tokens, dim]`, of "random_qk".
        token_ids: of which the embedding enters the stream, of "fixed_qk".
    """

    noise: Tensor | None
    token_ids: Tensor | None

    def __init__(self, noise: Tensor | None = None, token_ids: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("noise", noise)
        self.register_buffer("token_ids", token_ids)
        self.embedding: Tensor | None = None
        self.recorded: dict[int, tuple[Tensor, Tensor]] = {}
        self.recording = False
        self.frozen = False
        self.positions: Tensor | None = None  # [batch, tokens]; None: 0, 1, ...

    def __getstate__(self) -> dict[str, Any]:
        # What a forward left behind is part of its graph, which cannot be copied.
        return {
            **self.__dict__,
            "embedding": None,
            "recorded": {},
            "positions": None,
            "frozen": False,
        }

    def attach(self, body: nn.Module, first_layer: nn.Module) -> None:
        """Register the hooks."""
        body.add_module("mixer_source", self)
        body.register_forward_pre_hook(self._before_model, with_kwargs=True)
        first_layer.register_forward_pre_hook(self._before_first_layer, with_kwargs=True)

    @property
    def length(self) -> int:
        """The most tokens that the stream has; 0 if there is none."""
        entry = self.noise if self.noise is not None else self.token_ids
        return 0 if entry is None else len(entry)

    def read(self, layer: int, batch: int) -> tuple[Tensor, Tensor]:
        """Queries and keys of a layer at the places of the current input."""
        pair = self.recorded[layer]
        if self.positions is None:
            return tuple(one.expand(batch, -1, -1, -1) for one in pair)  # type: ignore[return-value]
        places = self.positions.expand(batch, -1)
        return tuple(one[0][:, places].transpose(0, 1) for one in pair)  # type: ignore[return-value]

    @contextmanager
    def freeze(self, body: nn.Module) -> Iterator[None]:
        """Run the stream once, as long as it is, and keep its queries and keys."""
        with torch.no_grad():
            self._run(body, self.length)
        self.frozen = True
        try:
            yield
        finally:
            self.frozen = False
            self.recorded = {}

    def _before_first_layer(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        self.embedding = args[0] if args else kwargs["hidden_states"]

    def _before_model(
        self, body: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        if not self.length:
            return
        if getattr(body, "gradient_checkpointing", False) and body.training:
            raise ValueError(
                "model: expected no gradient checkpointing, since the mixers of other layers read "
                "what the stream left in each. Call model.gradient_checkpointing_disable()."
            )
        positions = _positions(inspect.signature(body.forward).bind_partial(*args, **kwargs))
        tokens = int(positions.max()) + 1 if positions.numel() else 0
        if tokens > self.length:
            raise ValueError(
                f"input_ids: expected at most {self.length} tokens, the length of the fixed "
                f"sequence of this model's mixers, got {tokens}."
            )
        plain = torch.equal(positions, torch.arange(tokens, device=positions.device)[None])
        if not self.frozen:
            self._run(body, tokens)
        self.positions = None if plain and not self.frozen else positions

    def _run(self, body: nn.Module, tokens: int) -> None:
        if self.noise is not None:
            entry = self.noise[:tokens]
        else:
            assert self.token_ids is not None
            entry = body.get_input_embeddings()(self.token_ids[:tokens])  # type: ignore[operator]
        self.recorded, self.recording = {}, True
        try:
            # Not through __call__: neither our hooks nor those of others are meant for it.
            body.forward(inputs_embeds=entry[None], use_cache=False)
        finally:
            self.recording = False


def _positions(call: inspect.BoundArguments) -> Tensor:
    """The place of each token of the input in its own sequence, `[batch or 1, tokens]`."""
    given: dict[str, Any] = {**call.arguments, **call.arguments.get("kwargs", {})}
    entry = given.get("input_ids")
    entry = given["inputs_embeds"] if entry is None else entry
    places: Tensor | None = given.get("position_ids")
    if places is not None:
        return places if places.dim() == 2 else places[None]
    tokens = entry.shape[1]
    mask: Tensor | None = given.get("attention_mask")
    if mask is not None and mask.dim() == 2 and not bool(mask.all()):
        return (mask.long().cumsum(-1) - 1).clamp_min(0)[:, -tokens:]
    caches = (given.get(name) for name in ("cache", "past_key_values", "layer_past"))
    cache = next((one for one in caches if one is not None), None)
    past = 0 if cache is None else int(cache.get_seq_length())
    return torch.arange(past, past + tokens, device=entry.device)[None]
