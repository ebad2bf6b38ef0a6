"""Momentum decoding: greedy search that resists walking in circles.

The next token is, among the k most probable ones,

    argmax over v of  p(v) - alpha * f(c(v))

with p the softmax over the whole vocabulary in float32, c(v) the circular depth of v (how long a
passage of the text it would repeat, see `attending.decoding.walk`), and f a table, the resistance.
A most probable token that is new to the text always wins, so this is greedy search until it would
go back. Like greedy search it is deterministic and costs one forward a token.

    with MomentumDecoding()(model) as run:                                        # a block
        model.generate(**batch, max_new_tokens=200)
    print(run)
    model.generate(**batch, custom_generate=MomentumDecoding().custom_generate)   # or one call
    model.generate(**batch, do_sample=False, logits_processor=[MomentumLogitsProcessor()])

Source: Lan et al. 2212.02175 and its code. The default of that code's last commit is not the method
of the paper but an ablation, the resistance "ngram4". Two things differ from it: a depth beyond the
table counts as its last entry, not as infinite; and rows of a batch may have any padding.
"""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import LogitsProcessor, LogitsProcessorList

from attending.decoding.generating import (
    Generate,
    Generating,
    refuse_sampling,
    refuse_sampling_call,
    setting,
)
from attending.decoding.resistance import Resistance, penalties
from attending.decoding.walk import Walk

Mask = Int[Tensor, "batch tokens"] | Bool[Tensor, "batch tokens"]


@dataclass
class MomentumRun:
    """What momentum decoding did, in a block or as a processor. Worth printing.

    Attributes:
        tokens: how many tokens were chosen, over rows of batches and calls of `generate`.
        new: of these, where the most probable token was new to the text: greedy search.
        returned: where it was not new and was taken all the same.
        reranked: where another token was taken instead.
    """

    tokens: int = 0
    new: int = 0
    returned: int = 0
    reranked: int = 0

    @property
    def stats(self) -> dict[str, int]:
        """The counts, as a plain dictionary."""
        return dict(vars(self))

    def __str__(self) -> str:
        """In one line."""
        return (
            f"momentum decoding: {self.tokens} tokens; the most probable one was new {self.new} "
            f"times, old and kept {self.returned} times, replaced {self.reranked} times"
        )


class MomentumLogitsProcessor(LogitsProcessor):  # type: ignore[misc]
    """Momentum decoding as a processor of scores, for `generate(do_sample=False)`.

    It gives the k candidates `p(v) - alpha * f(c(v))` and all others -inf. These are no logits any
    more, so it goes last, and sampling or beam search on top has no meaning. What other processors
    have set to -inf is no candidate. If all candidates are resisted infinitely, the most probable
    is taken. Of equal scores greedy search takes the lowest id.

    Rows of a batch are independent. State is kept from step to step: O(k S) a token and row, beside
    a comparison of the tokens with those of the step before. Any sequence that does not go on from
    there by one token starts afresh; with `ignore_prompt` or `attention_mask`, say so by `reset`,
    as a prompt may happen to go on where the last text ended.

    Args:
        alpha: the weight of the resistance; 0 is greedy search.
        top_k: k; 1 is greedy search.
        resistance: f, a name in `attending.decoding.resistance.RESISTANCES`, or a table f(0),
            f(1), ...; `math.inf` forbids. A depth beyond the table counts as its last entry.
        max_depth: S; the last depth of the table if None.
        ignore_prompt: only generated tokens are part of the walk. Not in the paper; for prompts
            with boilerplate, which make ordinary words old.
        attention_mask: of the prompt; padding, where it is 0, is not part of the walk.
        pad_token_id: where there is no mask: tokens of this id that a row starts with are padding.
        eos_token_id: rows that have generated such a token are finished and left alone.
        run: where to count.

    Raises:
        ValueError: for settings out of range.
    """

    def __init__(
        self,
        alpha: float = 0.2,
        top_k: int = 5,
        resistance: Resistance = "dec2022",
        max_depth: int | None = None,
        *,
        ignore_prompt: bool = False,
        attention_mask: Mask | None = None,
        pad_token_id: int | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        run: MomentumRun | None = None,
    ) -> None:
        self.penalties = penalties(alpha, top_k, resistance, max_depth)
        self.top_k = top_k
        self.ignore_prompt = ignore_prompt
        self.attention_mask = attention_mask
        self.pad_token_id = pad_token_id
        self.eos_token_ids = _as_set(eos_token_id)
        self.run = MomentumRun() if run is None else run
        self._walks: list[Walk] = []
        self._finished: list[bool] = []
        self._seen: Tensor | None = None

    def __call__(
        self, input_ids: Int[Tensor, "batch tokens"], scores: Float[Tensor, "batch vocabulary"]
    ) -> Float[Tensor, "batch vocabulary"]:
        """The scores of the next token; called by `generate`, once a step.

        Raises:
            ValueError: if the attention mask does not fit `input_ids`.
        """
        # Few operations on tensors: after a forward each of them finds its code out of the cache.
        self._follow(input_ids)
        if scores.dtype not in (torch.float32, torch.float64):
            scores = scores.float()
        probabilities = scores.softmax(-1)
        if self.top_k == 1:  # of several maxima the first, as in greedy search
            top, candidates = probabilities.max(-1, keepdim=True)
        else:
            top, candidates = probabilities.topk(min(self.top_k, scores.shape[-1]))
        probable, ids = top.tolist(), candidates.tolist()
        if not all(row[-1] > 0 for row in probable):  # excluded, or only very improbable?
            excluded = scores.gather(-1, candidates) == -math.inf
            probable = top.masked_fill(excluded, -math.inf).tolist()
        ranked = [
            self._rank(self._walks[row], ids[row], numbers) if not self._finished[row] else numbers
            for row, numbers in enumerate(probable)
        ]
        result = torch.full_like(scores, -math.inf)
        return result.scatter_(
            -1, candidates, torch.tensor(ranked, dtype=result.dtype, device=result.device)
        )

    def reset(self) -> None:
        """Forget all sequences: the next call starts with a prompt."""
        self._seen = None

    def _rank(self, walk: Walk, candidates: list[int], probable: list[float]) -> list[float]:
        depths = walk.depths(candidates)
        scores = [one - self.penalties[depth] for one, depth in zip(probable, depths, strict=True)]
        best = max(scores)
        if best == -math.inf:
            scores[0] = best = probable[0] if probable[0] > -math.inf else 0.0
        run = self.run
        run.tokens += 1
        if scores[0] < best:
            run.reranked += 1
        elif depths[0]:
            run.returned += 1
        else:
            run.new += 1
        return scores

    def _follow(self, input_ids: Tensor) -> None:
        """Bring the walks to these tokens: by one step, or from the start."""
        seen, self._seen = self._seen, input_ids
        rows, length = input_ids.shape
        if (
            seen is None
            or seen.shape != (rows, length - 1)
            or not torch.equal(input_ids.narrow(1, 0, length - 1), seen)
        ):
            self._finished = [False] * rows
            prompts = [[]] * rows if self.ignore_prompt else self._prompts(input_ids)
            self._walks = [Walk(len(self.penalties) - 1, prompt) for prompt in prompts]
            return
        for row, (token,) in enumerate(input_ids.narrow(1, length - 1, 1).tolist()):
            if not self._finished[row]:
                self._walks[row].extend((token,))
                self._finished[row] = token in self.eos_token_ids

    def _prompts(self, input_ids: Tensor) -> list[list[int]]:
        """The tokens of each row, with numbers that come only once in place of padding."""
        padding = torch.zeros_like(input_ids, dtype=torch.bool)
        mask = self.attention_mask
        if mask is not None:
            rows, length = mask.shape
            if len(input_ids) % rows or length > input_ids.shape[1]:
                raise ValueError(
                    "attention_mask: expected one for the prompt, as many rows as input_ids and "
                    f"not longer, got {list(mask.shape)} for {list(input_ids.shape)}."
                )
            mask = mask.repeat_interleave(len(input_ids) // rows, 0).to(padding.device)
            padding[:, :length] = mask == 0
        elif self.pad_token_id is not None:
            padding = (input_ids == self.pad_token_id).cumprod(-1).bool()
        unique = -1 - torch.arange(input_ids.shape[1], device=input_ids.device)
        prompts: list[list[int]] = torch.where(padding, unique, input_ids).tolist()
        return prompts


@dataclass(frozen=True)
class MomentumDecoding:
    """Momentum decoding of whatever a model generates, within a block or in one call.

        with MomentumDecoding(alpha=0.3)(model) as run:
            model.generate(**batch, max_new_tokens=200)
        print(run)                                                # or run.stats

    Within the block `generate` is deterministic: sampling that the model's own config asks for is
    off, sampling or beams that the call asks for are refused. Processors given to `generate`, by
    the call or by blocks inside this one, come before.

    Args:
        alpha: as in `MomentumLogitsProcessor`, and so are the others.
        top_k: how many candidates.
        resistance: name or table.
        max_depth: the largest depth that is told apart.
        ignore_prompt: whether only generated tokens count.

    Raises:
        ValueError: for settings out of range. Within the block: for a `generate` that samples or
            has beams.
    """

    alpha: float = 0.2
    top_k: int = 5
    resistance: Resistance = "dec2022"
    max_depth: int | None = None
    ignore_prompt: bool = False

    def __post_init__(self) -> None:
        penalties(self.alpha, self.top_k, self.resistance, self.max_depth)

    def __call__(self, model: nn.Module) -> AbstractContextManager[MomentumRun]:
        """The context manager within which `model.generate` decodes with momentum.

        Raises:
            ValueError: if the model has no `generate`.
        """

        def start() -> tuple[MomentumRun, Any]:
            run = MomentumRun()

            def change(generate: Generate, arguments: dict[str, Any]) -> Any:
                refuse_sampling_call("momentum decoding", arguments, model)
                ids, name = arguments.get("inputs", arguments.get("input_ids")), "attention_mask"
                if _has_encoder(model):
                    ids, name = arguments.get("decoder_input_ids"), "decoder_attention_mask"
                processor = self._processor(
                    _fitting(arguments.get(name), ids),
                    setting(arguments, model, "pad_token_id"),
                    setting(arguments, model, "eos_token_id"),
                    run,
                )
                given = arguments.get("logits_processor") or ()
                last = LogitsProcessorList([*given, processor])
                return generate(**{**arguments, "do_sample": False, "logits_processor": last})

            return run, change

        return Generating(model, start, "MomentumDecoding")

    def custom_generate(
        self,
        model: Any,
        input_ids: Int[Tensor, "batch tokens"],
        logits_processor: Sequence[LogitsProcessor],
        stopping_criteria: Any,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> Any:
        """For `model.generate(..., custom_generate=method.custom_generate)`.

        Raises:
            ValueError: for a `generate` that samples or has beams.
        """
        config = generation_config
        refuse_sampling("momentum decoding", config.do_sample, config.num_beams)
        name = "decoder_attention_mask" if _has_encoder(model) else "attention_mask"
        processor = self._processor(
            _fitting(model_kwargs.get(name), input_ids),
            config.pad_token_id,
            config.eos_token_id,
            MomentumRun(),
        )
        return type(model)._sample(
            model,
            input_ids,
            logits_processor=LogitsProcessorList([*logits_processor, processor]),
            stopping_criteria=stopping_criteria,
            generation_config=config,
            **model_kwargs,
        )

    def _processor(
        self, mask: Tensor | None, pad: int | None, eos: Any, run: MomentumRun
    ) -> MomentumLogitsProcessor:
        ends = _as_set(eos)
        return MomentumLogitsProcessor(
            self.alpha,
            self.top_k,
            self.resistance,
            self.max_depth,
            ignore_prompt=self.ignore_prompt,
            attention_mask=mask,
            pad_token_id=None if pad in ends else pad,  # as generate does: it may be a real end
            eos_token_id=sorted(ends),
            run=run,
        )


def _has_encoder(model: Any) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def _fitting(mask: Tensor | None, input_ids: Tensor | None) -> Tensor | None:
    """The mask, if the prompt came as tokens: of embeddings or a cache, no tokens are known."""
    if mask is None or input_ids is None or mask.shape[1] > input_ids.shape[1]:
        return None
    return mask


def _as_set(ids: int | Sequence[int] | Tensor | None) -> frozenset[int]:
    if ids is None:
        return frozenset()
    if isinstance(ids, Tensor):
        ids = ids.flatten().tolist()
    return frozenset([ids] if isinstance(ids, int) else ids)
