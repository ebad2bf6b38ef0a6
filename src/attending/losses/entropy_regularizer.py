"""`entropy_regularization` for any model that a tap can see, with its learned thresholds.

    regularizer = EntropyRegularizer.for_model(model, batch, weight=1e-5)
    optimizer = torch.optim.AdamW([*model.parameters(), *regularizer.parameters()])
    for batch in batches:
        with regularizer.watch(model):
            outputs = model(**batch)
        (outputs.loss + regularizer.loss()).backward()

The model is not changed and keeps its fused attention; with the authors' code it has to return its
attention maps, which means eager attention.
"""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.utils import checkpoint

from attending.core import statistics
from attending.losses.entropy_regularization import Semantics, Thresholds, entropy_regularization
from attending.taps import AttentionCall, Handler, Proceed, tap
from attending.taps.running import evaluating


class _Rows(NamedTuple):
    """The rows of one attention call, batch and queries flattened into one axis."""

    entropy: Tensor  # [heads, rows]
    ceiling: Tensor  # [heads, rows]
    counted: Tensor  # [rows], boolean


class EntropyRegularizer(nn.Module):
    """`entropy_regularization` for any model that a tap can see, with its learned thresholds.

    Every self-attention layer gets one learned threshold per query head (GQA: per query head, too).
    Within `watch`, the entropies of all self-attention calls are computed from the query and key
    that the model passes to `scaled_dot_product_attention`, after rotary embeddings and query
    norms, with their gradient; cross-attention is left out. That costs one more pass of attention
    per layer, forward and backward, and memory that grows with the number of tokens.

    - Masks and causality are those of the call. Rows of padding do not count: in self-attention a
      token whose key no query may see is padding. Pass `query_mask` where you know better.
    - Several forwards within one `watch` count as one larger batch.
    - Dropout of attention weights is not part of the entropy.
    - Gradient checkpointing works in the kind that PyTorch recommends, `use_reentrant=False`. The
      reentrant kind runs the forward without a graph, so that the loss would silently lose its
      gradient: refused.

    Attributes:
        layers: names of the layers, as in `model.named_modules()`; a module that attends several
            times per forward (ALBERT) is listed as `name`, `name#1`, `name#2`, ...
        thresholds: the learned targets of each layer, as a share of the largest entropy. They get a
            gradient only while something is outside the band.
    """

    def __init__(
        self,
        num_heads: Mapping[str, int],
        *,
        weight: float = 1e-5,
        tolerance: float = 0.2,
        initial_threshold: float = 0.5,
        semantics: Semantics = "paper",
        row_max: Literal["log_T", "log_visible"] = "log_T",
        context_size: int | None = None,
    ) -> None:
        """Use `for_model` unless you know the names of the layers.

        Args:
            num_heads: query heads of each layer, by the name of the module that attends.
            weight: factor of the loss (lambda). The paper: 1e-5 and 5e-5. With `"official"`
                semantics it multiplies a sum over batch and queries, so in the paper's setting
                (128 x 128 rows) 1e-5 acts like 0.16; with `"paper"` semantics 1e-5 changed nothing
                that could be told from noise in our rerun. Choose the product with the rows.
            tolerance: half the width of the band, as a share of the largest entropy (gamma).
            initial_threshold: where the thresholds start. Neither the paper nor the code says;
                0.5 is our choice (the paper's end between 0.20 and 0.52).
            semantics: see `Semantics`.
            row_max: the largest entropy of a row: `"log_T"`, the log of the number of all keys (the
                paper, also for causal rows, which cannot reach it), or `"log_visible"`, the log of
                the number of keys that the row may see.
            context_size: `"log_T"` takes the log of this instead, as the official code can.
        """
        super().__init__()
        if semantics not in ("paper", "official"):
            raise ValueError(f'semantics: expected "paper" or "official", got {semantics!r}.')
        if row_max not in ("log_T", "log_visible"):
            raise ValueError(f'row_max: expected "log_T" or "log_visible", got {row_max!r}.')
        if context_size is not None and (context_size < 1 or row_max != "log_T"):
            raise ValueError(
                'context_size: expected at least 1, and row_max="log_T", got '
                f'{context_size} with row_max="{row_max}".'
            )
        if not tolerance >= 0 or not weight >= 0:
            raise ValueError(
                f"tolerance, weight: expected numbers of at least 0, got {tolerance}, {weight}."
            )
        if not num_heads or any(heads < 1 for heads in num_heads.values()):
            raise ValueError(
                f"num_heads: expected at least one layer with at least one head, got {num_heads}."
            )
        self.weight, self.tolerance, self.semantics = weight, tolerance, semantics
        self.row_max, self.context_size = row_max, context_size
        self.layers = tuple(num_heads)
        self.thresholds = nn.ParameterList(
            nn.Parameter(torch.full((heads,), float(initial_threshold)))
            for heads in num_heads.values()
        )
        self._rows: dict[str, list[_Rows]] = {}

    @classmethod
    def for_model(
        cls, model: nn.Module, inputs: Mapping[str, Any] | Tensor, **settings: Any
    ) -> "EntropyRegularizer":
        """Find the self-attention layers of a model by one forward without gradients.

        Args:
            model: any module whose attention a tap can see. Left as it was: the forward runs in
                eval mode.
            inputs: a small batch, `model(**inputs)`, or one tensor, `model(inputs)`.
            settings: the keyword arguments of the constructor.

        Returns:
            A regularizer on the device of the model.

        Raises:
            ValueError: if the model has no self-attention.
            TapError: if its attention cannot be seen; the message says what to set.
        """
        num_heads: dict[str, int] = {}
        names = _Names()

        def look(call: AttentionCall, proceed: Proceed) -> Tensor:
            if not call.is_cross:
                num_heads[names.of(call)] = call.num_heads
            return proceed(call)

        with torch.no_grad(), evaluating(model), tap(model, look):
            model(inputs) if isinstance(inputs, Tensor) else model(**inputs)
        if not num_heads:
            raise ValueError(
                f"model: expected one with self-attention, got {type(model).__name__}, which only "
                "has cross-attention."
            )
        regularizer = cls(num_heads, **settings)
        parameter = next(model.parameters(), None)
        return regularizer if parameter is None else regularizer.to(parameter.device)

    @contextmanager
    def watch(
        self, model: nn.Module, query_mask: Bool[Tensor, "batch queries"] | None = None
    ) -> Iterator[None]:
        """Collect the row entropies of every forward within the block, for `loss`.

        What an earlier `watch` collected is dropped.

        Args:
            model: the model, or the part of it, that `for_model` was given: names must be the same.
            query_mask: True for tokens that count; by default, all that are not padding.

        Raises:
            ValueError: if the model attends in a layer that has no thresholds, or runs under
                reentrant gradient checkpointing.
            TapError: if no attention was seen; the message says what to set.
        """
        self._rows = {}
        with tap(model, self._observer(query_mask)):
            yield

    def loss(self) -> Float[Tensor, ""]:
        """`weight` times the regularization of what the last `watch` saw; add it to the loss."""
        seen = self._seen()
        thresholds = dict(zip(self.layers, self.thresholds, strict=True))
        value = entropy_regularization(
            [rows.entropy[None] for rows in seen.values()],
            [thresholds[name] for name in seen],
            max_entropy=[rows.ceiling[None] for rows in seen.values()],
            tolerance=self.tolerance,
            semantics=self.semantics,
            query_mask=[rows.counted[None] for rows in seen.values()],
        )
        return self.weight * value

    def head_entropies(self) -> dict[str, Thresholds]:
        """Mean entropy of each head in nats, by layer, of what `watch` saw; no gradient."""
        return {
            name: rows.entropy.detach().where(rows.counted, 0.0).sum(-1)
            / rows.counted.sum().clamp_min(1)
            for name, rows in self._seen().items()
        }

    def extra_repr(self) -> str:
        """The settings, for `print(model)`."""
        return (
            f"layers={len(self.layers)}, weight={self.weight}, tolerance={self.tolerance}, "
            f"semantics={self.semantics!r}, row_max={self.row_max!r}"
        )

    def _seen(self) -> dict[str, _Rows]:
        if not self._rows:
            raise RuntimeError(
                "EntropyRegularizer saw no forward yet: run the model in `with "
                "regularizer.watch(model):` first, then ask for the loss"
            )
        return {
            name: _Rows(*(torch.cat(parts, -1) for parts in zip(*rows, strict=True)))
            for name, rows in self._rows.items()
        }

    def _observer(self, query_mask: Tensor | None) -> Handler:
        names = _Names()
        with_graph = torch.is_grad_enabled()

        def observe(call: AttentionCall, proceed: Proceed) -> Tensor:
            if call.is_cross:
                return proceed(call)
            if not call.recomputed:
                name = names.of(call)
                if with_graph:
                    _refuse_reentrant(call)
                self._check_known(call, name)
                self._rows.setdefault(name, []).append(self._measure(call, query_mask))
            elif torch.is_grad_enabled():
                # The second run of a checkpointed region has to save what the first one saved.
                self._measure(call, query_mask)
            return proceed(call)

        return observe

    def _check_known(self, call: AttentionCall, name: str) -> None:
        if name not in self.layers:
            raise ValueError(
                f"model: {call.name or 'it'} attends but has no thresholds ({name!r} is not among "
                f"{list(self.layers[:3])}, ...). Watch the very module that for_model was given."
            )
        heads = self.thresholds[self.layers.index(name)].shape[0]
        if heads != call.num_heads:
            raise ValueError(
                f"model: expected {heads} heads in {name}, got {call.num_heads}; build the "
                "regularizer for this model with for_model."
            )

    def _measure(self, call: AttentionCall, query_mask: Tensor | None) -> _Rows:
        batch, heads, queries, _ = call.query.shape
        hidden = _hidden(call)
        mask = call.attn_mask
        if mask is not None and mask.is_floating_point():
            # Some models hide with the lowest number of their dtype in place of -inf.
            mask = mask.masked_fill(mask <= torch.finfo(mask.dtype).min / 2, -torch.inf)
        rest = (mask, call.is_causal, call.scale, call.enable_gqa)
        entropy = statistics.entropy(call.query, call.key, *rest)
        if self.row_max == "log_visible":
            # The entropy of order 0 is the log of the number of visible keys.
            ceiling = statistics.renyi_entropy(call.query.detach(), call.key.detach(), 0.0, *rest)
        else:
            size = self.context_size or call.key_length
            ceiling = torch.full_like(entropy, size, requires_grad=False).log()
        if query_mask is None:
            counted = torch.ones(batch, queries, dtype=torch.bool, device=entropy.device)
            if hidden is not None and queries == call.key_length:
                counted = ~hidden
        else:
            counted = query_mask.to(entropy.device)
            if counted.dtype != torch.bool or tuple(counted.shape) != (batch, queries):
                raise ValueError(
                    f"query_mask: expected a boolean tensor [batch, queries] = {[batch, queries]} "
                    f"for {call!r}, got {counted.dtype} {list(counted.shape)}."
                )
        return _Rows(
            entropy.transpose(0, 1).reshape(heads, -1),
            ceiling.transpose(0, 1).reshape(heads, -1),
            counted.reshape(-1),
        )


def _hidden(call: AttentionCall) -> Bool[Tensor, "batch keys"] | None:
    """Keys that no query of the call may see."""
    mask = call.attn_mask
    if mask is None:
        return None
    visible = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    visible = visible.reshape((1,) * (4 - visible.dim()) + tuple(visible.shape))
    return ~visible.any(1).any(1).expand(call.query.shape[0], call.key_length)


def _refuse_reentrant(call: AttentionCall) -> None:
    frame = None if torch.is_grad_enabled() else sys._getframe()
    while frame is not None:
        if frame.f_code is checkpoint.CheckpointFunction.forward.__code__:
            raise ValueError(
                f"model: {call.name or 'it'} runs under reentrant gradient checkpointing, which "
                "keeps no graph of the entropies, so the loss would have no gradient. Use the "
                "other kind: model.gradient_checkpointing_enable("
                'gradient_checkpointing_kwargs={"use_reentrant": False}).'
            )
        frame = frame.f_back


class _Names:
    """Gives a module that attends several times per forward a name for each of them."""

    def __init__(self) -> None:
        self._forward = -1
        self._times: dict[str, int] = {}

    def of(self, call: AttentionCall) -> str:
        if call.forward != self._forward:
            self._forward, self._times = call.forward, {}
        times = self._times.get(call.name, 0)
        self._times[call.name] = times + 1
        return f"{call.name}#{times}" if times else call.name
