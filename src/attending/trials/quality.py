"""How good the outputs of a forward pass are, and how far they are from those of the plain model.

All is per sequence, and only over tokens that are no padding. Where a sequence holds an image, only
the tokens after it count: the places of image tokens have no next token to predict, and a method
that prunes them leaves fewer places, with the text still at the end.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from attending.taps.running import first_tensor
from attending.trials.samples import Measure

MEASURES = (
    Measure(
        "perplexity",
        "Perplexity",
        "",
        "exp of the mean negative log likelihood of the next token, over all predicted tokens.",
        "lower",
        "geometric mean",
        "sequence",
    ),
    Measure(
        "drift_kl",
        "Drift, KL",
        "nats/token",
        "KL divergence from the plain model's prediction to this one's, averaged over the tokens.",
        None,
        "mean",
        "sequence",
        True,
    ),
    Measure(
        "drift_l2",
        "Drift, L2",
        "",
        "Norm of the change of the outputs over the norm of the plain model's outputs.",
        None,
        "mean",
        "sequence",
        True,
    ),
    Measure(
        "agreement",
        "Same top token",
        "share",
        "The share of tokens after which the most likely next one is that of the plain model.",
        None,
        "mean",
        "sequence",
        True,
    ),
)
IGNORED = -100  # transformers' mark of labels that do not count
_CHUNK = 2**24  # numbers of the logits of which softmax is taken at once

Scores = dict[str, tuple[list[float], list[float]]]  # name: values and weights, per sequence


@dataclass(frozen=True)
class Outputs:
    """What a model gave for a batch.

    Attributes:
        values: a row of numbers per token; one row per sequence where the output has no tokens.
        are_logits: whether softmax makes probabilities of a row.
    """

    values: Float[Tensor, "batch tokens features"]
    are_logits: bool


def outputs_of(found: Any) -> Outputs | None:
    """The outputs in what a forward pass returned; None if there is no floating-point tensor."""
    for name, are_logits in (("logits", True), ("last_hidden_state", False), ("sample", False)):
        value = found.get(name) if isinstance(found, Mapping) else getattr(found, name, None)
        if isinstance(value, Tensor):
            return Outputs(_in_rows(value), are_logits)
    tensor = first_tensor(found) if isinstance(found, Tensor | Mapping | tuple | list) else None
    if tensor is None or not tensor.is_floating_point() or tensor.dim() == 0:
        return None
    return Outputs(_in_rows(tensor), False)


def _in_rows(tensor: Tensor) -> Float[Tensor, "batch tokens features"]:
    if tensor.dim() == 3:
        return tensor
    return tensor.reshape(tensor.shape[0], 1, -1)


@dataclass(frozen=True)
class Scored:
    """Which outputs of a batch are scored, and the tokens that they should predict.

    Attributes:
        last: so many of the last rows of the outputs are looked at.
        visible: which of them are neither padding nor before the end of an image.
        targets: the token that each should predict, `IGNORED` for none; None where the outputs
            predict no tokens.
    """

    last: int
    visible: Bool[Tensor, "batch last"]
    targets: Int[Tensor, "batch last"] | None


def scored(
    model: nn.Module, batch: Any, outputs: Outputs, prompt_length: int | None = None
) -> Scored:
    """What of the plain model's outputs is scored, and so of all contenders'.

    Next tokens are known for models of transformers that can generate, and where the batch holds
    `labels` that fit the outputs.

    Args:
        model: the plain model.
        batch: what it was given.
        outputs: what it returned.
        prompt_length: the tokens before are not predicted: the first prediction that counts is
            that of the token behind them.

    Raises:
        ValueError: if a prompt of that length leaves nothing.
    """
    config: Any = getattr(model, "config", None)
    given = batch if isinstance(batch, Mapping) else {"input_ids": first_tensor(batch)}
    twin = bool(getattr(config, "is_encoder_decoder", False)) and "decoder_input_ids" in given
    ids = given.get("decoder_input_ids" if twin else "input_ids")
    mask = given.get("decoder_attention_mask" if twin else "attention_mask")
    labels = given.get("labels")
    rows = outputs.values.shape[:2]
    if not _fits(ids, rows):  # not one row per token
        targets = labels if outputs.are_logits and _fits(labels, rows) else None
        return Scored(rows[1], torch.ones(rows, dtype=torch.bool), targets)
    ids = ids.to(outputs.values.device)
    visible = torch.ones_like(ids, dtype=torch.bool)
    if _fits(mask, rows):
        visible = mask.to(ids.device).bool()
    place = visible.long().cumsum(1)
    image = _image_tokens(config, ids)
    if image is not None:
        visible &= ~image.flip(1).cummax(1).values.flip(1)  # no image token here or later
    if prompt_length is not None:
        visible &= place >= prompt_length  # the last token of the prompt predicts the first
        if not bool(visible[:, :-1].any()):
            raise ValueError(
                f"prompt_length: expected less than the {ids.shape[1]} tokens of the inputs, got "
                f"{prompt_length}; nothing would be left to score."
            )
    targets = _targets(model, ids, labels, visible) if outputs.are_logits else None
    first = int(visible.any(0).long().argmax())
    return Scored(
        rows[1] - first, visible[:, first:], None if targets is None else targets[:, first:]
    )


def _fits(tensor: object, rows: torch.Size) -> TypeGuard[Tensor]:
    return isinstance(tensor, Tensor) and not tensor.is_floating_point() and tensor.shape == rows


def _image_tokens(config: Any, ids: Tensor) -> Tensor | None:
    for name in ("image_token_id", "image_token_index"):
        wanted = getattr(config, name, None)
        if isinstance(wanted, int) and bool((ids == wanted).any()):
            return ids == wanted
    return None


def _targets(
    model: Any, ids: Tensor, labels: Tensor | None, visible: Tensor
) -> Int[Tensor, "batch tokens"] | None:
    generates = callable(getattr(model, "can_generate", None)) and bool(model.can_generate())
    if _fits(labels, ids.shape):
        labels = labels.to(ids.device)
        two_parts = bool(getattr(model.config, "is_encoder_decoder", False))
        if not generates or two_parts:  # these are not shifted by the model
            return labels
        return _next(labels)
    if not generates:
        return None
    # Padding and image tokens are no targets; the first token that counts is one of none.
    return _next(ids.masked_fill(~visible, IGNORED))


def _next(tokens: Tensor) -> Tensor:
    return torch.cat([tokens[:, 1:], torch.full_like(tokens[:, :1], IGNORED)], 1)


def score(outputs: Outputs, plain: Outputs, what: Scored) -> Scores:
    """The measures of a batch, per sequence, as far as there are any."""
    ours, theirs = outputs.values[:, -what.last :], plain.values[:, -what.last :]
    if ours.shape != theirs.shape:
        raise ValueError(
            f"the outputs have shape {list(outputs.values.shape)}, and those of the plain model "
            f"{list(plain.values.shape)}; there is nothing to compare."
        )
    visible = what.visible.to(ours.device)
    found: dict[str, list[tuple[float, float]]] = {}
    for index in range(len(ours)):
        kept = visible[index]
        if not bool(kept.any()):
            continue
        own, other = ours[index][kept], theirs[index][kept]
        targets = None if what.targets is None else what.targets[index].to(ours.device)[kept]
        one = _score_sequence(own, other, targets, outputs.are_logits)
        for name, pair in one.items():
            found.setdefault(name, []).append(pair)
    return {name: ([v for v, _ in pairs], [w for _, w in pairs]) for name, pairs in found.items()}


def _score_sequence(
    own: Float[Tensor, "tokens features"],
    other: Float[Tensor, "tokens features"],
    targets: Int[Tensor, " tokens"] | None,
    are_logits: bool,
) -> dict[str, tuple[float, float]]:
    tokens, norm = len(own), float(other.double().norm())
    gap = float((own.double() - other.double()).norm())
    found = {"drift_l2": (gap / norm if norm else (0.0 if gap == 0 else float("inf")), 1.0)}
    if not are_logits:
        return found
    kl = agree = loss = 0.0
    predicted = 0
    step = max(1, _CHUNK // own.shape[1])
    for start in range(0, tokens, step):
        piece = slice(start, start + step)
        log_own, log_other = (x[piece].float().log_softmax(-1) for x in (own, other))
        gaps = torch.where(log_other.isneginf(), 0.0, log_other.exp() * (log_other - log_own))
        kl += float(gaps.double().sum())
        agree += float((log_own.argmax(-1) == log_other.argmax(-1)).sum())
        if targets is not None:
            wanted = targets[piece]
            known = wanted != IGNORED
            chosen = log_own[known].gather(1, wanted[known][:, None])
            loss -= float(chosen.double().sum())
            predicted += int(known.sum())
    found["drift_kl"] = (max(kl / tokens, 0.0), float(tokens))  # rounding may leave -1e-9
    found["agreement"] = (agree / tokens, float(tokens))
    if predicted:
        mean = torch.tensor(loss / predicted, dtype=torch.float64)
        found["perplexity"] = (float(mean.exp()), float(predicted))
    return found
