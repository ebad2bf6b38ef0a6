"""Contrastive search: the likely token whose hidden state is unlike those of the text so far.

The next token is, among the k most probable ones,

    argmax over v of  (1 - alpha) p(v) - alpha * max over t of  cos(h_v, h_t)

with p the softmax over the whole vocabulary, h_t the last hidden state of each token of the text,
the prompt included, and h_v that of v if it were appended. To know the h_v, the model runs on all k
candidates at each step; the row of the chosen one is kept, its cache and its logits too. So a token
costs one forward k rows wide, where greedy search and momentum decoding have one row.

    model.generate(**batch, custom_generate=ContrastiveSearch().custom_generate)
    with ContrastiveSearch(alpha=0.6, top_k=4)(model) as run:
        model.generate(**batch)

Version 5 of transformers no longer has it (`penalty_alpha` asks for code from the hub). It is here
for those who used it, and to be compared with momentum decoding, whose authors made both.

Source: Su et al. 2202.06417.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import LogitsProcessorList
from transformers.generation.utils import GenerateDecoderOnlyOutput

from attending.decoding.generating import (
    Generate,
    Generating,
    refuse_sampling,
    refuse_sampling_call,
)


@dataclass
class ContrastiveRun:
    """What contrastive search did within one block. Worth printing.

    Attributes:
        tokens: how many tokens were chosen, over rows of batches and calls of `generate`.
        reranked: of these, where another than the most probable one was taken.
    """

    tokens: int = 0
    reranked: int = 0

    @property
    def stats(self) -> dict[str, int]:
        """The counts, as a plain dictionary."""
        return dict(vars(self))

    def __str__(self) -> str:
        """In one line."""
        return f"contrastive search: {self.tokens} tokens, {self.reranked} not the most probable"


def contrastive_scores(
    probabilities: Float[Tensor, "batch candidates"],
    candidate_states: Float[Tensor, "batch candidates dim"],
    context_states: Float[Tensor, "batch tokens dim"],
    alpha: float = 0.6,
    attention_mask: Bool[Tensor, "batch tokens"] | None = None,
) -> Float[Tensor, "batch candidates"]:
    """`(1 - alpha) p(v) - alpha * max_t cos(h_v, h_t)` for each candidate v.

    Args:
        probabilities: of the candidates, out of the whole vocabulary.
        candidate_states: h_v, of the candidates.
        context_states: h_t, of the text so far.
        alpha: 0 to 1; 0 is greedy search.
        attention_mask: which tokens are text; None for all.
    """
    unit = torch.nn.functional.normalize
    cosine = unit(candidate_states, dim=-1) @ unit(context_states, dim=-1).transpose(-1, -2)
    if attention_mask is not None:
        cosine = cosine.masked_fill(~attention_mask[:, None], -1.0)
    return (1 - alpha) * probabilities - alpha * cosine.amax(-1)


@dataclass(frozen=True)
class ContrastiveSearch:
    """Contrastive search for what a decoder generates, within a block or in one call.

    Args:
        alpha: the weight of dissimilarity, 0 to 1; the paper has 0.6 for GPT-2.
        top_k: how many candidates; each is a row of the forward.

    Raises:
        ValueError: for settings out of range. When generating: for sampling, beams, models with an
            encoder, and models that give no hidden states or no cache.
    """

    alpha: float = 0.6
    top_k: int = 4

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha: expected a number from 0 to 1, got {self.alpha!r}.")
        if self.top_k < 1:
            raise ValueError(f"top_k: expected at least 1, got {self.top_k!r}.")

    def __call__(self, model: nn.Module) -> AbstractContextManager[ContrastiveRun]:
        """The context manager within which `model.generate` is contrastive search.

        Raises:
            ValueError: if the model has no `generate`.
        """

        def start() -> tuple[ContrastiveRun, Any]:
            run = ContrastiveRun()

            def change(generate: Generate, arguments: dict[str, Any]) -> Any:
                refuse_sampling_call("contrastive search", arguments, model)
                if arguments.get("custom_generate") is not None:
                    raise ValueError(
                        "custom_generate: expected none within contrastive search, which is one "
                        f"itself, got {arguments['custom_generate']!r}."
                    )
                search = partial(_search, self, run)
                return generate(**{**arguments, "do_sample": False, "custom_generate": search})

            return run, change

        return Generating(model, start, "ContrastiveSearch")

    def custom_generate(
        self,
        model: Any,
        input_ids: Int[Tensor, "batch tokens"],
        logits_processor: LogitsProcessorList,
        stopping_criteria: Any,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> Any:
        """For `model.generate(..., custom_generate=method.custom_generate)`.

        Returns:
            The tokens, or with `return_dict_in_generate` an output that has them as `sequences`.
        """
        return _search(
            self,
            ContrastiveRun(),
            model,
            input_ids,
            logits_processor,
            stopping_criteria,
            generation_config,
            **model_kwargs,
        )


def _search(
    method: ContrastiveSearch,
    run: ContrastiveRun,
    model: Any,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: Any,
    generation_config: Any,
    **model_kwargs: Any,
) -> Any:
    config = generation_config
    refuse_sampling("contrastive search", config.do_sample, config.num_beams)
    if model.config.is_encoder_decoder:
        raise ValueError("model: expected a decoder without an encoder, got one with an encoder.")
    batch = len(input_ids)
    rows = torch.arange(batch, device=input_ids.device)
    unfinished = torch.ones(batch, dtype=torch.bool, device=input_ids.device)
    ends = config.eos_token_id is not None
    inputs = model.prepare_inputs_for_generation(input_ids, is_first_iteration=True, **model_kwargs)
    outputs = _forward(model, inputs)
    cache, context = outputs["cache"], outputs.hidden_states[-1]
    logits = outputs.logits[:, -1]
    while bool(unfinished.any()):
        scores = logits_processor(input_ids, logits.float())
        top, candidates = scores.softmax(-1).topk(min(method.top_k, scores.shape[-1]))
        width = candidates.shape[1]
        # What generate knows of the sequence (mask, positions) grows by one token ...
        model_kwargs = model._update_model_kwargs_for_generation(outputs, model_kwargs)
        # ... and is repeated for the candidates: the forward is `width` times as wide.
        cache.batch_repeat_interleave(width)
        inputs = model.prepare_inputs_for_generation(
            candidates.reshape(-1, 1), next_sequence_length=1, **_repeated(model_kwargs, width)
        )
        outputs = _forward(model, inputs)
        states = outputs.hidden_states[-1][:, -1].unflatten(0, (batch, width))
        mask = model_kwargs.get("attention_mask")
        visible = None if mask is None else mask[:, :-1].bool()
        choice = contrastive_scores(top, states, context, method.alpha, visible).argmax(-1)
        run.tokens += int(unfinished.sum())
        run.reranked += int(((choice > 0) & unfinished).sum())
        kept = rows * width + choice
        cache.batch_select_indices(kept)
        logits = outputs.logits[kept, -1]
        context = torch.cat([context, states[rows, choice][:, None]], 1)
        tokens = candidates[rows, choice]
        if ends:
            tokens = torch.where(unfinished, tokens, config.pad_token_id)
        input_ids = torch.cat([input_ids, tokens[:, None]], -1)
        unfinished = unfinished & ~stopping_criteria(input_ids, None)
    if config.return_dict_in_generate:
        return GenerateDecoderOnlyOutput(sequences=input_ids, cache=cache)
    return input_ids


def _forward(model: Any, inputs: dict[str, Any]) -> Any:
    outputs = model(**inputs, output_hidden_states=True, return_dict=True)
    cache = outputs.get("cache")
    if outputs.get("hidden_states") is None or not hasattr(cache, "batch_repeat_interleave"):
        raise ValueError(
            "model: expected one that gives its hidden states and a cache whose rows can be "
            f"repeated, got {type(model).__name__} and {type(cache).__name__}. Set use_cache=True."
        )
    return outputs


def _repeated(model_kwargs: dict[str, Any], times: int) -> dict[str, Any]:
    """With a row for each candidate where there was one for each text."""
    repeated = dict(model_kwargs)
    for name, dim in (("attention_mask", 0), ("token_type_ids", 0), ("position_ids", -2)):
        if isinstance(repeated.get(name), Tensor):
            repeated[name] = repeated[name].repeat_interleave(times, dim)
    return repeated
