"""Image tokens dropped between the layers of a language model: what FastV and SparseVLM do.

Before a layer of the schedule, the hidden states of the dropped tokens are put aside, and from
there on every layer gets fewer states, with the mask and the rotary positions of those that are
left. So the layers' caches are of different lengths. Behind the last layer all are put back in
their places (the dropped ones as they were when dropped), and logits, labels and what `generate`
counts keep their shapes.
"""

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from attending.interventions._language_states import narrowed, put, row_of, take
from attending.interventions._pruned_inputs import cache_in, images_in, placeholders
from attending.interventions._visual_sequences import cache_of, match_batch
from attending.interventions.vision_language import hidden_argument
from attending.sparse.language_tokens import attention_from, recycle, relevant_text
from attending.taps import AttentionCall, Proceed
from attending.taps.where import arguments_of

Columns = Int[Tensor, "batch kept"]


@dataclass(eq=False)
class _Forward:
    """One forward: its new tokens, and which of them are still there.

    Attributes:
        image: which are image tokens.
        real: which are no padding.
        past: what the caches of the narrower layers hold, by the layer from which on.
        start: how many tokens the whole sequence had before.
        columns: which are left, None for all.
        present: all hidden states, as they were when dropped.
        raters: SparseVLM's text tokens, what each counts.
        scores: of what is left, once they are known.
        prunes: whether it brings an image.
        held: what the caches hold after this forward, by the layer from which on.
        left: image tokens of a row, by the layer from which on.
    """

    image: Bool[Tensor, "batch tokens"]
    real: Bool[Tensor, "batch tokens"]
    past: Mapping[int, Columns]
    start: int
    images: int
    schedule: Mapping[int, int]
    prunes: bool
    columns: Columns | None = None
    present: Float[Tensor, "batch tokens dim"] | None = None
    raters: Float[Tensor, "batch tokens"] | None = None
    scores: Float[Tensor, "batch keys"] | None = None
    held: dict[int, Columns] = field(default_factory=dict)
    left: dict[int, int] = field(default_factory=dict)
    narrowed: tuple[object, dict[str, Any]] | None = None


class LanguagePruning:
    """Prunes the running language model of a LLaVA: hooks and a handler of attention calls."""

    def __init__(
        self,
        schedule: Callable[[int], Mapping[int, int]],
        num_layers: int,
        *,
        by_text: bool,
        image_token_id: int,
        embedding: Callable[[], Tensor],
        done: Callable[[int, float], None],
        no_image: Callable[[], None],
    ) -> None:
        """Prepare.

        Args:
            schedule: for the tokens of an image, before which layer how many are kept.
            num_layers: of the language model.
            by_text: SparseVLM's ranking and merging; else FastV's.
            image_token_id: the placeholder.
            embedding: the placeholder's embedding, to find it among embeddings.
            done: told, of each forward with images, how many image tokens it had and how many of
                them the layers kept on average.
            no_image: told of a forward without, of a sequence that has none.
        """
        self.schedule = schedule
        self.num_layers = num_layers
        self.by_text = by_text
        self.image_token_id = image_token_id
        self.embedding = embedding
        self.done = done
        self.no_image = no_image
        self.forward: _Forward | None = None
        self._held: weakref.WeakKeyDictionary[Any, tuple[int, dict[int, Columns]]]
        self._held = weakref.WeakKeyDictionary()

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A pre-hook of the LlavaModel, behind those that change its inputs."""
        given = arguments_of(module, args, kwargs)
        image = placeholders(given, self.image_token_id, self.embedding)
        cache = cache_of(given)
        length = getattr(cache, "get_seq_length", lambda: 0)
        start = int(length())
        real = torch.ones_like(image)
        mask = given.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 2:
            real = mask[:, -image.shape[1] :].bool()
        past = self._past(cache, start, len(image))
        self.forward = None
        counts = image.sum(-1)
        if not past and not bool(counts.any()):
            if not start:
                self.no_image()
            return
        if bool((counts != counts[0]).any()):
            raise ValueError(
                "input_ids: expected the same number of image tokens in each row, as the layers "
                f"are pruned to one width, got {counts.tolist()}. Group the batch by that, or use "
                "a selector that prunes before the language model."
            )
        images = images_in(given) // len(image)
        schedule = dict(self.schedule(int(counts[0]) // images)) if images else {}
        prunes = bool(counts.any())
        self.forward = _Forward(image, real, past, start, images, schedule, prunes)

    def _past(self, cache: object, start: int, batch: int) -> dict[int, Columns]:
        if cache is None or start == 0 or cache not in self._held:
            return {}
        length, held = self._held[cache]
        gone = max(0, length - start)  # taken back, all of them from the end
        return {
            layer: match_batch(columns, batch, "cache")[:, : columns.shape[1] - gone]
            for layer, columns in held.items()
        }

    def before_layer(
        self, layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """A pre-hook of each layer: gives it what is left."""
        forward = self.forward
        if forward is None:
            return None
        hidden = hidden_argument(args, kwargs)
        if layer == 0 and self.by_text and forward.prunes:
            forward.raters = _raters(hidden, forward)
        _check_width(hidden.shape[1], forward)
        if layer in forward.schedule and forward.prunes:
            hidden = self._drop(layer, hidden, forward)
        if layer in forward.schedule or layer in forward.past:
            _hold(layer, forward)
        held = [number for number in forward.held if number <= layer]
        if not held:
            return None
        mask = kwargs.get("attention_mask")
        if layer in forward.held or forward.narrowed is None or forward.narrowed[0] is not mask:
            forward.narrowed = mask, narrowed(kwargs, _left(forward), forward.held[max(held)])
        kwargs = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        return (hidden, *args[1:]), kwargs | forward.narrowed[1]

    def _drop(self, layer: int, hidden: Tensor, forward: _Forward) -> Tensor:
        """What is left of the hidden states; the forward learns which tokens that is."""
        batch, columns = len(hidden), _left(forward)
        scores, forward.scores = forward.scores, None
        image = forward.image.gather(1, columns)
        here = int(image[0].sum())
        keep = min(forward.schedule[layer] * forward.images, here)
        forward.left[layer] = here
        if keep == here:
            return hidden
        if scores is None:
            raise ValueError(
                "model: expected an attention call in the layer before the one that prunes, saw "
                'none. Call model.set_attn_implementation("sdpa") first.'
            )
        if forward.present is None:
            forward.present = hidden
        else:
            forward.present = put(forward.present, columns, hidden)
        places = image.nonzero()[:, 1].view(batch, here)
        scores = scores[:, -columns.shape[1] :].gather(1, places)
        if self.by_text:
            kept = recycle(take(hidden, places), scores, keep)
            stay = places.gather(1, kept.index)
            hidden = put(hidden, stay, kept.tokens)
        else:
            order = scores.sort(dim=-1, descending=True, stable=True).indices
            stay = places.gather(1, order[:, :keep])
        left = (~image).scatter(1, stay, True)
        chosen = left.nonzero()[:, 1].view(batch, -1)
        forward.columns = columns.gather(1, chosen)
        forward.left[layer] = stay.shape[1]
        return take(hidden, chosen)

    def look(self, call: AttentionCall, proceed: Proceed) -> Tensor:
        """A handler: ranks tokens by the attention of the layer before they are dropped."""
        forward = self.forward
        if forward is None or call.layer is None or call.is_cross:
            return proceed(call)
        if call.layer + 1 in forward.schedule:
            forward.scores = self._scores(call, forward)
        return proceed(call)

    def _scores(self, call: AttentionCall, forward: _Forward) -> Tensor:
        columns = _left(forward)
        _check_width(call.query_length, forward)
        if self.by_text:
            assert forward.raters is not None
            weights = forward.raters.gather(1, columns)
            query, mask, causal = call.query, call.attn_mask, call.is_causal
        else:
            real = forward.real.gather(1, columns)
            last = torch.where(real, torch.arange(real.shape[1], device=real.device), -1).argmax(-1)
            query, mask = row_of(call, last)
            weights, causal = query.new_ones(len(query), 1), False
        return attention_from(
            query.detach(),
            call.key.detach(),
            weights,
            attn_mask=mask,
            is_causal=causal,
            scale=call.scale,
            enable_gqa=call.enable_gqa,
        )

    def after_last(self, module: nn.Module, args: Any, output: Any) -> Any:
        """A forward hook of the last layer: all tokens in their places again."""
        forward = self.forward
        if forward is None or forward.present is None or forward.columns is None:
            return None
        hidden = output[0] if isinstance(output, tuple) else output
        whole = put(forward.present, forward.columns, hidden)
        return (whole, *output[1:]) if isinstance(output, tuple) else whole

    def end(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        """A forward hook of the LlavaModel: remembers what its cache holds."""
        forward, self.forward = self.forward, None
        if forward is None or output is None:
            return
        cache = cache_in(arguments_of(module, args, kwargs), output)
        if cache is not None:
            self._held[cache] = (forward.start + forward.image.shape[1], forward.held)
        if forward.prunes:
            rows, before = len(forward.image), int(forward.image[0].sum())
            widths = [before] * self.num_layers
            for layer, left in sorted(forward.left.items()):
                widths[layer:] = [left] * (self.num_layers - layer)
            self.done(rows * before, rows * sum(widths) / self.num_layers)


def _hold(layer: int, forward: _Forward) -> None:
    """What the cache of a layer will hold: what it held, and what is left of the new tokens."""
    columns = _left(forward)
    past = forward.past.get(layer)
    if past is None:
        past = torch.arange(forward.start, device=columns.device).expand(len(columns), -1)
    forward.held[layer] = torch.cat([past, forward.start + columns], 1)


def _check_width(found: int, forward: _Forward) -> None:
    expected = _left(forward).shape[1]
    if found != expected:
        raise ValueError(
            f"model: expected {expected} tokens in a layer of the language model, got {found}. Two "
            "prunings within the language model cannot be nested."
        )


def _left(forward: _Forward) -> Columns:
    if forward.columns is not None:
        return forward.columns
    batch, tokens = forward.image.shape
    return torch.arange(tokens, device=forward.image.device).expand(batch, tokens)


def _raters(hidden: Tensor, forward: _Forward) -> Float[Tensor, "batch tokens"]:
    """The text tokens after the image that rate, 1 / count each; before it, if none is after."""
    batch = len(forward.image)
    visual = take(hidden, forward.image.nonzero()[:, 1].view(batch, -1)).detach()
    seen = forward.image.long().cumsum(-1)
    text = forward.real & ~forward.image
    after = text & (seen == seen[:, -1:])
    text = torch.where(after.any(-1, keepdim=True), after, text)
    rating = relevant_text(visual, hidden.detach(), text).to(torch.float32)
    return rating / rating.sum(-1, keepdim=True)
