"""ACT: damp attention sinks that are not the first one, without training.

For a frozen language model that answers classification or multiple-choice prompts. Some keys in
the middle of a prompt draw much attention and mean little (separators, line ends). In heads chosen
beforehand, each such key keeps a share `beta` of what it gets, and the rest of the row gets what
is freed, in proportion (Yu et al. 2406.15765, "Attention Calibration Technique").

With A the causal map of a head over a prompt of N tokens:

    a[t]    = mean of A[k, t] over the queries k that can see t
    S       = { t : a[t] > alpha / N },  less the protected one (the first sink)
    sink[k] = sum_{t in S} A[k, t]
    B[k, t] = beta A[k, t]                                            for t in S
    B[k, t] = A[k, t] (1 + (1 - beta) sink[k] / (1 - sink[k]))        for the others

Rows sum to 1 as before, and what is not seen stays unseen. The map is never built: the mass of S is
that of a few gathered keys, so an edit costs one attention, one look at the columns, and a little.

Where this differs from the official code (GATECH-EIC/ACT): there a decode step with a KV cache is
wrong (it sees one row, and sets the attention on the first token to 1), only the first item of a
batch is calibrated, rows and columns of padding count, and a row whose mass lies all on sinks
becomes NaN. Here the sinks of the prompt are kept for the steps that follow, so that decoding with
a cache gives what a full forward gives. The threshold alpha / N is the paper's [recall: its text
was not at hand]; the code has an absolute one, 0.1, which is `threshold=0.1`. `min_observers` is
ours: a key that two queries can see is no sink because both look at it.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from attending.core.groups import Masses, move_mass
from attending.interventions.edit import edit_masses
from attending.interventions.head_selection import select_heads
from attending.interventions.intervention import Run, with_counters
from attending.interventions.prompt import PromptMemory, PromptReader
from attending.interventions.prompt_sinks import Protect, SinkRule, find_sinks
from attending.interventions.vision_language import language_layers, layer_number
from attending.taps import AttentionCall, Handler, Proceed

Data = TypeVar("Data")


@dataclass(frozen=True)
class AttentionCalibration:
    """Damp the attention sinks of a language model, while a block runs.

        method = AttentionCalibration(heads={2: (0, 3), 5: (1,)})
        with method(model) as run:
            model.generate(**inputs)
        print(run)

    Sinks are found in the prompt, in every head and item of the batch for itself, and are the same
    for the tokens that are generated after it. Under padding on either side only real tokens count.

    **Perplexity.** In a forward of a whole text, sinks would be found from tokens that come after
    those whose probability is asked: a leak. Say how long the prompt is, and score the rest:

        with method(model, prompt_length=64):
            logits = model(input_ids).logits[:, 64:]

    Attributes:
        heads: which heads of which layers, both from 0, as `select_heads` finds them; all of
            `layers` by default. All heads at once is what the paper found harmful in its models:
            choose them on data.
        alpha, threshold, protect, min_observers: which keys are sinks; see `SinkRule`.
        beta: the share that a sink keeps. 1 changes nothing, 0 takes all; above 1 a sink gets more.
        layers: in place of `heads`: all heads of these layers. By default, as in the official
            code, all layers but the first two and the last.
    """

    heads: Mapping[int, Sequence[int]] | None = None
    alpha: float = 5.0
    threshold: float | None = None
    beta: float = 0.4
    protect: Protect = "first_sink"
    min_observers: int = 8
    layers: Sequence[int] | None = None

    def __post_init__(self) -> None:
        _ = self.rule  # which looks at its part
        if not 0 <= self.beta < float("inf"):
            raise ValueError(f"beta: expected a share of at least 0, got {self.beta!r}.")
        if self.heads is not None and self.layers is not None:
            raise ValueError(
                "layers: expected None where heads are given, as these name their layers, got "
                f"{self.layers!r}."
            )
        if self.heads is not None:
            chosen = {int(layer): tuple(heads) for layer, heads in self.heads.items()}
            object.__setattr__(self, "heads", chosen)

    @property
    def rule(self) -> SinkRule:
        """What a sink is."""
        return SinkRule(self.alpha, self.threshold, self.protect, self.min_observers)

    def __call__(
        self, model: nn.Module, prompt_length: int | Int[Tensor, " batch"] | None = None
    ) -> AbstractContextManager[Run]:
        """The context manager within which sinks are damped; it yields a `Run` with the counts.

        Args:
            model: a causal language model, or one with a language model in it, such as LLaVA; only
                that is calibrated.
            prompt_length: how many places of each sequence, from the first one and with padding,
                are its prompt: a number, or one for each item of the batch. By default all tokens
                of the first forward of a sequence.

        Raises:
            ValueError: if the model has no such layers or heads. Within the block: if a sequence
                goes on whose prompt ran before it, or attention weights are dropped.

        Warns:
            InterventionWarning: on exit, if nothing was changed; it says why.
        """
        names = list(language_layers(model))
        chosen = self.chosen_layers(len(names))

        def start(run: Run) -> Handler:
            memory, read = PromptMemory(), PromptReader()

            def calibrate(call: AttentionCall, proceed: Proceed) -> Tensor:
                layer = layer_number(call.name, names)
                if layer is None or call.is_cross or layer not in chosen:
                    run.left(call, "its layer is not calibrated")
                    return proceed(call)
                seen = read(call)
                if seen.is_encoder:
                    run.left(call, "every token sees every other, as in an encoder")
                    return proceed(call)
                whole = None
                if seen.begins:
                    heads = _heads(chosen[layer], call)
                    marks, whole = find_sinks(call, seen, heads, self.rule, prompt_length)
                    memory.keep(call, marks)
                else:
                    marks = memory.recall(call)
                return edit_masses(
                    call, proceed, marks, self.damp, run=run, num_groups=2, whole=whole
                )

            return calibrate

        return with_counters(model, start, name="AttentionCalibration")

    def calibrate(
        self,
        model: nn.Module,
        data: Data,
        metric: Callable[[nn.Module, Data], float],
        *,
        margin: float = 0.0,
        progress: bool = True,
    ) -> "AttentionCalibration":
        """The same with the heads that do better than none on calibration data.

        Args:
            model, data, metric, progress: as in `select_heads`, which also keeps the scores.
            margin: by how much a head has to improve the metric.

        Raises:
            ValueError: if no head does.
        """
        heads = select_heads(model, data, metric, self, progress=progress).selected(margin)
        if not heads:
            raise ValueError(
                f"data: expected some head to improve the metric by more than {margin}, none did. "
                "This model does better as it is."
            )
        return replace(self, heads=heads, layers=None)

    def damp(self, masses: Masses) -> Masses:
        """New masses of two groups of keys: 0 the rest, 1 the sinks."""
        return move_mass(masses, {1: 1.0 - self.beta}, (0,))

    def chosen_layers(self, count: int) -> dict[int, tuple[int, ...] | None]:
        """The heads to calibrate in each layer of a model with so many; None stands for all.

        Raises:
            ValueError: if the model has no such layer, or none is left.
        """
        chosen: dict[int, tuple[int, ...] | None]
        if self.heads is not None:
            chosen = {layer: tuple(heads) for layer, heads in self.heads.items()}
        else:
            chosen = dict.fromkeys(usual_layers(count) if self.layers is None else self.layers)
        for layer in chosen:
            if not 0 <= layer < count:
                raise ValueError(
                    f"{'layers' if self.heads is None else 'heads'}: expected layers from 0 to "
                    f"{count - 1}, as the model has {count}, got {layer}."
                )
        if not chosen:
            raise ValueError(
                "layers: expected at least one layer to calibrate, got none. By default the first "
                f"two and the last are left out, and the model has {count}: name them."
            )
        return chosen


def calibrate_attention(
    attn: Float[Tensor, "batch heads queries keys"],
    *,
    beta: float = 0.4,
    alpha: float = 5.0,
    threshold: float | None = None,
    protect: Protect = "first_sink",
    min_observers: int = 8,
    visible: Bool[Tensor, "#batch #heads queries keys"] | None = None,
) -> Float[Tensor, "batch heads queries keys"]:
    """A map that you have, with its sinks damped; the map that you gave stays as it is.

    For maps of a prompt, `queries == keys`. `AttentionCalibration` does the same in a running
    model, without a map.

    Args:
        attn: probabilities, after the softmax.
        beta, alpha, threshold, protect, min_observers: as in `AttentionCalibration`.
        visible: what each query sees; by default the causal mask. Rows of padding see nothing.

    Raises:
        ValueError: for a map that is not square, or settings that are none.
    """
    rule = SinkRule(alpha, threshold, protect, min_observers)
    method = AttentionCalibration(beta=beta)
    if attn.shape[-1] != attn.shape[-2]:
        raise ValueError(
            "attn: expected the square map of a prompt [batch, heads, tokens, tokens], got "
            f"{list(attn.shape)}."
        )
    if visible is None:
        tokens = attn.shape[-1]
        visible = attn.new_ones(tokens, tokens, dtype=torch.bool).tril()[None, None]
    real = visible.any(2).any(1).expand(attn.shape[0], -1)
    hidden = attn.masked_fill(~visible, 0.0)
    sinks = rule.sinks(hidden.sum(2), visible.sum(2), real)[:, :, None]
    masses = torch.stack([attn.masked_fill(sinks, 0.0).sum(-1), (attn * sinks).sum(-1)])
    new_masses = method.damp(masses)
    factors = new_masses / masses.where(masses > 0, torch.ones_like(masses))
    return attn * torch.where(sinks, factors[1][..., None], factors[0][..., None])


def usual_layers(count: int) -> range:
    """The layers that the official code calibrates: all but the first two and the last."""
    return range(2, count - 1)


def _heads(heads: tuple[int, ...] | None, call: AttentionCall) -> tuple[int, ...]:
    if heads is None:
        return tuple(range(call.num_heads))
    for head in heads:
        if not 0 <= head < call.num_heads:
            raise ValueError(
                f"heads: expected heads from 0 to {call.num_heads - 1} in {call!r}, got {head}."
            )
    return heads
