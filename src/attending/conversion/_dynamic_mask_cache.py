"""A cache of transformers that keeps scores, and forgets what no later token can attend to.

Imported by the function that makes one, since it needs transformers.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from attending.nn.dynamic_mask import chosen_keys


class ScoredLayer(DynamicLayer):  # type: ignore[misc]
    """Keys, values and scores of at most `window` tokens for each head of key and value."""

    is_croppable = False
    keys: Tensor | None
    values: Tensor | None

    def __init__(self, window: int) -> None:
        super().__init__()
        self.window = window
        self.scores: Tensor | None = None
        self.cumulative_length = 0

    def update(
        self, key_states: Tensor, value_states: Tensor, delta: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Append the new tokens, forget the worst; returns those before and the new ones."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.cumulative_length += key_states.shape[2]
        keys, values, scores = key_states, value_states, delta
        if self.keys is not None and self.values is not None and self.scores is not None:
            keys = torch.cat([self.keys, keys], 2)
            values = torch.cat([self.values, values], 2)
            scores = torch.cat([self.scores, scores], 2)
        self.keys, self.values, self.scores = chosen_keys(keys, values, scores, self.window)
        return keys, values, scores

    def get_seq_length(self) -> int:
        """All tokens so far, also those that were forgotten."""
        return self.cumulative_length

    def reset(self) -> None:
        """Forget everything."""
        self.scores = None
        super().reset()

    def reorder_cache(self, beam_idx: Any) -> None:
        """For beams."""
        super().reorder_cache(beam_idx)
        if self.scores is not None:
            self.scores = self.scores.index_select(0, beam_idx.to(self.scores.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """For several continuations of one prompt."""
        super().batch_repeat_interleave(repeats)
        if self.scores is not None:
            self.scores = self.scores.repeat_interleave(repeats, dim=0)

    def batch_select_indices(self, indices: Tensor) -> None:
        """For some sequences of the batch."""
        super().batch_select_indices(indices)
        if self.scores is not None:
            self.scores = self.scores[indices]

    def crop(self, tokens_to_remove: int) -> None:
        """Not possible: what was forgotten for a later token cannot come back.

        Raises:
            ValueError: unless there is nothing to remove.
        """
        if tokens_to_remove:
            raise ValueError(
                "tokens_to_remove: expected 0, since this cache has forgotten tokens for those "
                f"that came later, got {tokens_to_remove}. Use a DynamicCache, for example for "
                "assisted decoding."
            )


class DynamicMaskModelCache(Cache):  # type: ignore[misc]
    """`ScoredLayer` for the layers of dynamic mask attention, a plain one for the others.

    Args:
        windows: of the layers that have one, by index.
        num_layers: of the model.
    """

    keeps_scores = True

    def __init__(self, windows: Mapping[int, int], num_layers: int) -> None:
        super().__init__(
            layers=[
                ScoredLayer(windows[index]) if index in windows else DynamicLayer()
                for index in range(num_layers)
            ]
        )

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        layer_idx: int,
        *others: Any,
        delta: Tensor | None = None,
        **named: Any,
    ) -> tuple[Tensor, ...]:
        """As in `Cache`; with `delta` the scores go in and come out, too."""
        if delta is None:
            pair: tuple[Tensor, Tensor] = super().update(
                key_states, value_states, layer_idx, *others, **named
            )
            return pair
        layer = self.layers[layer_idx]
        assert isinstance(layer, ScoredLayer)
        return layer.update(key_states, value_states, delta)
