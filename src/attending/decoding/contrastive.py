"""Contrastive decoding: what a model says, less what a worse informed one would say anyway.

The positive branch is the model on the prompt. The negative branch sees the same text with less
evidence: a noised image (VCD), only the image tokens of no interest (DAMRO), a misleading
instruction (ICD), no context or no image at all (context-aware decoding, M3ID); or it is a weaker
model (contrastive decoding of Li et al.). What both say comes from the text alone, and is played
down:

    s = l_pos + alpha (l_pos - l_neg) = (1 + alpha) l_pos - alpha l_neg
    p = softmax(s)

Where both are sure of the same token, s is noise for all others. So only what is plausible to the
positive branch is let through (adaptive plausibility, Li et al. 2210.15097):

    s[y] = -inf   unless p_pos(y) >= beta max_w p_pos(w), that is l_pos[y] >= max l_pos + ln beta

    negative = {**inputs, "pixel_values": add_noise(inputs["pixel_values"])}     # VCD
    contrast = ContrastiveLogitsProcessor(model, negative, alpha=1.0, beta=0.1)
    model.generate(**inputs, logits_processor=[contrast], custom_generate=contrast_first)

Temperature, top-k, top-p and repetition penalty apply to s, after the contrast. The released loops
of VCD and DAMRO drop them silently. On its own, without `custom_generate`, transformers runs the
warpers of sampling (temperature, top-k, top-p) after the processor too, but repetition penalty and
its like before it, where they act on the positive branch and are amplified by `1 + alpha`.

Each token costs two forwards: see `docs/reference/damro.md` for what was measured.

Sources: DAMRO (2410.04514), official loop run for the golden vectors; VCD (2311.16922); Li et al.
(2210.15097); the others by the same formula. [recall]
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation.configuration_utils import GenerationMode

from attending.decoding._second_branch import SecondBranch

Alpha: TypeAlias = float | Callable[[int], float]
Decode: TypeAlias = Callable[..., Any]
"""What `generate(custom_generate=...)` takes; `contrast_first` is one."""


@dataclass(eq=False)
class ContrastCounts:
    """What a contrast did, over all generations of a run. Worth printing.

    Attributes:
        steps: tokens generated for a whole batch; each is a forward of the negative branch.
        tokens: the same for each sequence, those that had ended included.
        changed: of these tokens, those whose most likely choice is another than without contrast.
        candidates: plausible tokens, summed over `tokens`.
    """

    steps: int = 0
    tokens: int = 0
    changed: int = 0
    candidates: int = 0

    @property
    def stats(self) -> dict[str, float]:
        """The counts, with `candidates` as the mean for one token."""
        return {
            "steps": self.steps,
            "tokens": self.tokens,
            "changed": self.changed,
            "candidates": self.candidates / self.tokens if self.tokens else math.nan,
        }

    def count(
        self, before: Float[Tensor, "rows vocab"], after: Float[Tensor, "rows vocab"]
    ) -> None:
        """Count one step: the scores without and with the contrast."""
        self.steps += 1
        self.tokens += len(before)
        self.changed += int((before.argmax(-1) != after.argmax(-1)).sum())
        self.candidates += int((after > -math.inf).sum())


def check_strength(alpha: Alpha, beta: float) -> None:
    """Raise ValueError for an alpha (at step 0) below 0 or infinite, a beta outside [0, 1]."""
    first = alpha(0) if callable(alpha) else alpha
    if not (math.isfinite(first) and first >= 0):
        raise ValueError(f"alpha: expected a finite number that is not negative, got {first!r}.")
    if not 0 <= beta <= 1:
        raise ValueError(f"beta: expected a number in [0, 1], got {beta!r}.")


def plausible_tokens(
    logits: Float[Tensor, "*batch vocab"], beta: float
) -> Bool[Tensor, "*batch vocab"]:
    """Which tokens are at least `beta` times as likely as the most likely one.

    With `beta=0` all, with `beta=1` the most likely alone (and what ties with it). What was already
    hidden with -inf is never plausible.

    Raises:
        ValueError: if beta is not in [0, 1].
    """
    check_strength(0.0, beta)
    hidden = logits.isneginf()
    if beta == 0:
        return ~hidden
    return (logits >= logits.amax(-1, keepdim=True) + math.log(beta)) & ~hidden


def contrastive_logits(
    positive: Float[Tensor, "*batch vocab"],
    negative: Float[Tensor, "*batch vocab"],
    alpha: float = 1.0,
    beta: float = 0.1,
) -> Float[Tensor, "*batch vocab"]:
    """`(1 + alpha) positive - alpha negative` where plausible to the positive branch, else -inf.

    A constant added to either branch does not change the softmax of the result, so logits and
    log-probabilities are equally good. Equal branches give the positive one, cut.

    Args:
        positive: logits of the next token, with the evidence. They may hold -inf.
        negative: logits without it; finite.
        alpha: strength of the contrast, not negative; 0 only cuts. In terms of classifier-free
            guidance, `guidance_scale = 1 + alpha`.
        beta: of adaptive plausibility, in [0, 1]: 0 cuts nothing, 1 leaves the most likely token.

    Returns:
        float32, or float64 if one of the branches is: half precision would lose the difference.

    Raises:
        ValueError: for shapes that differ, a negative or infinite alpha, beta outside [0, 1].
    """
    if positive.shape != negative.shape:
        raise ValueError(
            f"negative: expected the shape of positive {list(positive.shape)}, got "
            f"{list(negative.shape)}."
        )
    check_strength(alpha, beta)
    dtype = torch.promote_types(positive.dtype, negative.dtype)
    dtype = torch.promote_types(dtype, torch.float32)
    positive, negative = positive.to(dtype), negative.to(dtype)
    kept = plausible_tokens(positive, beta)
    return (positive + alpha * (positive - negative)).masked_fill(~kept, -math.inf)


class ContrastiveLogitsProcessor(LogitsProcessor):  # type: ignore[misc]
    """Contrast each step of `generate` with a second forward, whose cache the processor owns.

        contrast = ContrastiveLogitsProcessor(model, negative_inputs)
        model.generate(**inputs, logits_processor=[contrast], custom_generate=contrast_first)

    For greedy decoding, sampling, beam search, `num_return_sequences`, left-padded batches. A new
    `generate` on the same prompt starts afresh. It belongs to its prompt: another one is refused,
    so make a new processor for each.

    Args:
        model: of the negative branch: the same model, or a weaker one with the same vocabulary.
            It runs as it is at that moment: interventions around `generate` apply to both branches.
        negative_inputs: what the model is called with once, `input_ids` or `inputs_embeds`, one row
            for each row of the prompt, and with left padding an `attention_mask`; and what else it
            takes (`pixel_values`, ...). The length is free. Generated tokens are appended.
        alpha: as in `contrastive_logits`, or a function of the step, from 0. M3ID's growing weight
            is `lambda step: math.expm1(gamma * step)`. [recall]
        beta: as in `contrastive_logits`.
        log_probabilities: return `log_softmax(s)`. Beam search adds scores up over steps, and needs
            that. Repetition penalty acts differently on log-probabilities, so it is off by default.
        counts: where to count; several processors may share it.

    Raises:
        ValueError: for arguments that do not fit; when called, for a prompt with another number of
            rows, another prompt than before, and rows that changed places (beam search) without
            `log_probabilities`.
    """

    def __init__(
        self,
        model: nn.Module,
        negative_inputs: Mapping[str, Any],
        alpha: Alpha = 1.0,
        beta: float = 0.1,
        *,
        log_probabilities: bool = False,
        counts: ContrastCounts | None = None,
    ) -> None:
        check_strength(alpha, beta)
        self.alpha, self.beta = alpha, beta
        self.log_probabilities = log_probabilities
        self.counts = ContrastCounts() if counts is None else counts
        self._branch = SecondBranch(model, negative_inputs)

    def __call__(
        self, input_ids: Int[Tensor, "rows tokens"], scores: Float[Tensor, "rows vocab"]
    ) -> Float[Tensor, "rows vocab"]:
        """The contrasted scores of the next token; called by `generate`."""
        negative = self._branch.next_logits(input_ids)
        if self._branch.moved and not self.log_probabilities:
            raise ValueError(
                "log_probabilities: rows changed places, as in beam search, which adds scores of "
                "several steps up and needs log_probabilities=True, got False."
            )
        alpha = self.alpha(self._branch.step) if callable(self.alpha) else self.alpha
        result = contrastive_logits(scores, negative.to(scores.device), alpha, self.beta)
        self.counts.count(scores, result)
        return result.log_softmax(-1) if self.log_probabilities else result


def contrast_first(
    model: Any,
    input_ids: Int[Tensor, "rows tokens"],
    logits_processor: Sequence[LogitsProcessor],
    stopping_criteria: Any,
    generation_config: Any,
    **model_kwargs: Any,
) -> Any:
    """For `generate(custom_generate=contrast_first)`: the contrast, then all other processors.

    Generates as `generate` would, with the `ContrastiveLogitsProcessor`s moved to the front of the
    list. Transformers gives a `custom_generate` callable no streamer; to stream, use the `with`
    form of a method such as `DAMRO`.

    Raises:
        ValueError: for modes of generation other than greedy decoding, sampling and beams, and for
            beams without `log_probabilities`.
    """
    contrasts = [one for one in logits_processor if isinstance(one, ContrastiveLogitsProcessor)]
    others = [one for one in logits_processor if one not in contrasts]
    mode = generation_config.get_generation_mode()
    with_beams = mode in (GenerationMode.BEAM_SEARCH, GenerationMode.BEAM_SAMPLE)
    if not with_beams and mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise ValueError(
            "generation_config: expected greedy decoding, sampling or beams, as contrastive "
            f"decoding runs its second branch token by token, got {mode.value}."
        )
    if with_beams and not all(contrast.log_probabilities for contrast in contrasts):
        raise ValueError(
            "log_probabilities: beam search adds scores of several steps up, and needs "
            "ContrastiveLogitsProcessor(log_probabilities=True), got False."
        )
    decode = type(model)._beam_search if with_beams else type(model)._sample
    return decode(
        model,
        input_ids,
        logits_processor=LogitsProcessorList([*contrasts, *others]),
        stopping_criteria=stopping_criteria,
        generation_config=generation_config,
        **model_kwargs,
    )
