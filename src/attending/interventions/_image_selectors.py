"""The selectors of `VisualTokenPruning`, each as a choice among what was seen of images."""

from collections.abc import Callable
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from attending.interventions._image_features import Choose, KeptImage, Needs, Seen
from attending.sparse._tokens import check_keep
from attending.sparse.merged_tokens import MergedTokens, pru_merge, vision_zip
from attending.sparse.visual_tokens import METHODS, Method, select_tokens

Merging = Literal["visionzip", "prumerge", "prumerge+"]
InLanguageModel = Literal["fastv", "sparsevlm"]
Selector: TypeAlias = Callable[
    [Float[Tensor, "images tokens dim"], Float[Tensor, "images tokens"], int],
    Int[Tensor, "images keep"],
]

MERGING: tuple[Merging, ...] = ("visionzip", "prumerge", "prumerge+")
IN_LANGUAGE_MODEL: tuple[InLanguageModel, ...] = ("fastv", "sparsevlm")
NAMES: tuple[str, ...] = (*METHODS, *MERGING, *IN_LANGUAGE_MODEL)


def needs_of(selector: str | Selector) -> Needs:
    """What a selector that works before the language model looks at."""
    if selector in ("divprune", "random"):
        return Needs(attention=None)
    if selector == "visionzip":
        return Needs(attention="features", keys=True)
    if selector in ("prumerge", "prumerge+"):
        return Needs(attention="last", keys=True)
    return Needs(attention="features")


def kept_of(keep: int | float, tokens: int) -> int:
    """How many of so many tokens: a number is one, a share is rounded to at least one.

    Raises:
        ValueError: for a number below 1, or a share that is not above 0 and at most 1.
    """
    if isinstance(keep, float):
        if not 0 < keep <= 1:
            raise ValueError(
                "keep: expected a whole number of tokens, at least 1, or a share of them above 0 "
                f"and at most 1, got {keep!r}."
            )
        return max(1, round(keep * tokens))
    return check_keep(keep)


def chooser(
    selector: str | Selector,
    keep: int | float,
    *,
    erank_avg: float,
    tau_max: float,
    tau: float,
    attention_share: float,
    seed: int,
) -> Choose:
    """The choice among the tokens of images; the arguments are those of `VisualTokenPruning`."""
    generator = torch.Generator().manual_seed(seed)

    def choose(seen: Seen) -> list[KeptImage]:
        features, attention = seen.features.detach(), seen.attention
        before = features.shape[1]
        count = kept_of(keep, before)
        if selector == "visionzip" or selector in ("prumerge", "prumerge+"):
            return _merged(seen, str(selector), count)
        if callable(selector):
            assert attention is not None
            index = _checked(selector(features, attention, count), features, count)
        else:
            if attention is None:  # not looked at by this selector
                attention = torch.zeros(features.shape[:2], device=features.device)
            method: Method = next(name for name in METHODS if name == selector)
            index = select_tokens(
                features,
                attention.to(features.device),
                count,
                method,
                erank_avg=erank_avg,
                tau_max=tau_max,
                tau=tau,
                attention_share=attention_share,
                generator=generator,
            )
        return [
            KeptImage(tokens[place], place, before)
            for tokens, place in zip(seen.features, index, strict=True)
        ]

    return choose


def _merged(seen: Seen, selector: str, keep: int) -> list[KeptImage]:
    assert seen.attention is not None
    assert seen.hidden is not None
    assert seen.key is not None
    merged: MergedTokens
    if selector == "visionzip":
        merged = vision_zip(seen.hidden, seen.attention, seen.key, keep)
    else:
        plus = selector == "prumerge+"
        merged = pru_merge(seen.hidden, seen.attention, seen.key, keep, plus=plus)
    before = seen.features.shape[1]
    if keep >= before:  # nothing was merged, so what was projected already is the same
        return [KeptImage(one, merged.index[0], before) for one in seen.features]
    projected = seen.project(merged.tokens)
    return [
        KeptImage(one, place, before) for one, place in zip(projected, merged.index, strict=True)
    ]


def _checked(index: object, features: Tensor, keep: int) -> Tensor:
    images, tokens, _ = features.shape
    keep = min(keep, tokens)
    if (
        not isinstance(index, Tensor)
        or index.dtype != torch.long
        or index.shape != (images, keep)
        or bool(((index < 0) | (index >= tokens)).any())
    ):
        shape = list(index.shape) if isinstance(index, Tensor) else type(index).__name__
        raise ValueError(
            f"selector: expected it to return indices [images, keep] = {[images, keep]} from 0 "
            f"to {tokens - 1}, got {shape}."
        )
    index = index.to(features.device).sort(-1).values
    if bool((index.diff(dim=-1) == 0).any()):
        raise ValueError("selector: expected different tokens of an image, got one twice.")
    return index
