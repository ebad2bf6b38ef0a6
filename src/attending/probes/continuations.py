"""Coherence and greedy ratio: how likely a language model finds what follows a prompt.

    scores = score_continuations(model, prompts, continuations)      # lists of token ids
    scores.coherence.nanmean(), scores.greedy_ratio.nanmean()

Coherence is the mean log-probability of the continuation's tokens. Papers on decoding measure it
with another, larger model than the one that wrote, OPT-2.7B mostly, after the BOS token and with
prompt and continuation tokenised apart. The greedy ratio asks the model that wrote: how many of
the tokens are those that greedy search would have taken. Both are high for text that repeats
itself, so read them beside `attending.probes.text.diversity`.

Sources: the scripts of MomentumDecoding (Lan et al. 2212.02175) and contrastive search, which round
the greedy ratio of each text to four decimals; nothing is rounded here.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from attending.taps.running import device_of, evaluating


class ContinuationScores(NamedTuple):
    """What `score_continuations` gives, one number a text; nan for an empty continuation.

    Attributes:
        coherence: mean log-probability of the continuation's tokens, nats, at most 0.
        greedy_ratio: share of them that the model finds the likeliest.
    """

    coherence: Float[Tensor, " texts"]
    greedy_ratio: Float[Tensor, " texts"]


def coherence(
    logits: Float[Tensor, "texts tokens vocabulary"],
    input_ids: Int[Tensor, "texts tokens"],
    continuation: Bool[Tensor, "texts tokens"],
) -> Float[Tensor, " texts"]:
    """The mean log-probability of the tokens of each continuation, in nats.

        1 / T * sum over t of  log softmax(logits[t - 1])[input_ids[t]]

    Args:
        logits: of a causal model for all of `input_ids`: those at t - 1 say what is expected at t.
        input_ids: prompts and continuations.
        continuation: which tokens are scored: not the prompt, not padding, not the first token,
            which nothing predicts.

    Returns:
        One number a text, at least in float32; nan for one without a scored token.

    Raises:
        ValueError: for shapes that do not fit, or a scored first token.
    """
    expected, actual, scored = _aligned(logits, input_ids, continuation)
    expected = expected.to(torch.promote_types(expected.dtype, torch.float32))
    chosen = expected.gather(-1, actual[..., None])[..., 0]
    return _mean(chosen - expected.logsumexp(-1), scored)


def greedy_ratio(
    logits: Float[Tensor, "texts tokens vocabulary"],
    input_ids: Int[Tensor, "texts tokens"],
    continuation: Bool[Tensor, "texts tokens"],
) -> Float[Tensor, " texts"]:
    """The share of the tokens of each continuation that the model finds the likeliest.

    Args:
        logits: see `coherence`, also for the rest. Of equally likely tokens the first counts, as in
            greedy search.
        input_ids: prompts and continuations.
        continuation: which tokens are scored.

    Returns:
        One number a text, 0 to 1; nan for one without a scored token.

    Raises:
        ValueError: for shapes that do not fit, or a scored first token.
    """
    expected, actual, scored = _aligned(logits, input_ids, continuation)
    return _mean((expected.argmax(-1) == actual).float(), scored)


def score_continuations(
    model: nn.Module,
    prompts: Sequence[Sequence[int] | Tensor],
    continuations: Sequence[Sequence[int] | Tensor],
    *,
    bos_token_id: int | None = None,
    batch_size: int = 8,
) -> ContinuationScores:
    """Coherence and greedy ratio of texts under a causal language model of transformers.

    The model runs in evaluation mode, without gradients, and is then what it was. Batches are made
    of texts of similar length; padding on the right is hidden by the attention mask.

    Args:
        model: `model(input_ids=..., attention_mask=..., use_cache=False).logits`.
        prompts: token ids [tokens], without padding.
        continuations: token ids [tokens], one for each prompt, of the same tokenizer. Cut what
            comes after the end of the text; the end token itself is a token like any other.
        bos_token_id: set before each prompt, as the papers do; None if the prompt has it already,
            or the model was not trained with one.
        batch_size: how many texts at a time.

    Raises:
        ValueError: if the numbers of prompts and continuations differ or are 0, or if nothing comes
            before a continuation.
    """
    if len(prompts) != len(continuations) or not len(prompts) or batch_size < 1:
        raise ValueError(
            "continuations: expected one for each prompt, at least one, and batch_size of at least "
            f"1, got {len(prompts)} prompts, {len(continuations)} continuations, {batch_size}."
        )
    before = [] if bos_token_id is None else [bos_token_id]
    texts: list[tuple[list[int], int]] = []
    for index, (prompt, continued) in enumerate(zip(prompts, continuations, strict=True)):
        start = before + _ids(prompt)
        if not start:
            raise ValueError(
                f"prompts: expected at least one token each, got none in prompt {index}. Pass "
                "bos_token_id to score a text from its first token on."
            )
        texts.append((start + _ids(continued), len(start)))
    device = device_of(model)
    found = torch.full((2, len(texts)), math.nan)
    with evaluating(model), torch.no_grad():
        for chosen in _batches([len(ids) for ids, _ in texts], batch_size):
            input_ids, attention_mask, scored = _padded([texts[index] for index in chosen], device)
            output = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
            found[0, chosen] = coherence(output.logits, input_ids, scored).float().cpu()
            found[1, chosen] = greedy_ratio(output.logits, input_ids, scored).cpu()
    return ContinuationScores(found[0], found[1])


def _aligned(
    logits: Tensor, input_ids: Tensor, continuation: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    if (
        logits.dim() != 3
        or input_ids.shape != logits.shape[:2]
        or continuation.shape != input_ids.shape
        or continuation.dtype != torch.bool
    ):
        raise ValueError(
            "logits, input_ids, continuation: expected [texts, tokens, vocabulary], [texts, tokens]"
            f" and booleans [texts, tokens], got {list(logits.shape)}, {list(input_ids.shape)} and "
            f"{continuation.dtype} {list(continuation.shape)}."
        )
    if bool(continuation[:, :1].any()):
        raise ValueError(
            "continuation: expected False for the first token, which nothing predicts. Set a BOS "
            "token before it."
        )
    scored = continuation[:, 1:]
    actual = input_ids[:, 1:].masked_fill(~scored, 0)  # padding may be no id at all, such as -100
    return logits[:, :-1], actual, scored


def _mean(values: Tensor, scored: Tensor) -> Tensor:
    return values.masked_fill(~scored, 0).sum(-1) / scored.sum(-1)


def _ids(tokens: Sequence[int] | Tensor) -> list[int]:
    return [int(token) for token in (tokens.tolist() if isinstance(tokens, Tensor) else tokens)]


def _batches(lengths: list[int], size: int) -> Iterator[list[int]]:
    by_length = sorted(range(len(lengths)), key=lambda index: lengths[index])
    return (by_length[start : start + size] for start in range(0, len(lengths), size))


def _padded(
    texts: list[tuple[list[int], int]], device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Ids with zeros on the right, the attention mask, and which tokens are scored."""
    longest = max(len(ids) for ids, _ in texts)
    input_ids = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in texts], device=device)
    position = torch.arange(longest, device=device)
    lengths = torch.tensor([len(ids) for ids, _ in texts], device=device)[:, None]
    starts = torch.tensor([start for _, start in texts], device=device)[:, None]
    visible = position < lengths
    return input_ids, visible.long(), visible & (position >= starts)
