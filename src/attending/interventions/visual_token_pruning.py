"""Give the language model fewer tokens of an image: visual token pruning of a LLaVA.

Most of the time of a vision-language model goes into image tokens, and most of these are not needed
for the answer. Within a block, a running model gets only some of them:

    with prune_visual_tokens(model, "agile", keep=64) as run:
        model.generate(**inputs)                    # any batch of texts and images
    run.stats                                       # image tokens before and after

The sequence is really shorter: fewer states in every layer, a shorter KV cache, no masked
placeholders. Prompts, `attention_mask` and what `generate` returns keep their lengths, so nothing
around the model has to know. Batches of different texts work, with padding on either side, and so
do beams, several images in a prompt, a second turn on the same cache, and labels.

| selector | where | how |
| --- | --- | --- |
| `agile` | before the language model | attention, with a distance that adapts to the image |
| `static` | before | the same distance for all images |
| `fastervlm` | before | attention of the tower's class token |
| `vispruner` | before | half by attention, half by difference |
| `divprune`, `fps` | before | by difference |
| `visionzip`, `prumerge`, `prumerge+` | before the projector | the rest is merged |
| `fastv` | after `layer` layers | attention of the prompt's last token |
| `sparsevlm` | at several layers | attention of relevant text; part of the rest is merged |
| `random` | before | a baseline that is harder to beat than it looks |

Those before the language model are `attending.sparse.visual_tokens` and `...merged_tokens`, and
`selector` may be a function of your own with the signature `(features, attention, keep)`. The last
two are `attending.sparse.language_tokens`.

Source: AgilePruner (Baek et al., arXiv 2603.01236), and the papers of the others; see `sparse`.
The official codes patch one model file each and take one image at a time; the released AgilePruner
also shifts the features of float32 models while it measures them. These do not.

What it does not do: other models than `LlavaModel` of transformers (a `ValueError` says so), static
caches (their masks are built for the full length), and images of different sizes in one call. With
`fastv` and `sparsevlm` the caches of the layers have different lengths; `get_seq_length()` of a
cache is then that of its first layer, which all of transformers' bookkeeping agrees with. Each row
of a batch must then have the same number of images, and interventions that mark tokens for all
layers, such as visual attention redistribution, cannot be nested with them.
"""

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from attending.interventions._image_selectors import (
    IN_LANGUAGE_MODEL,
    MERGING,
    NAMES,
    Selector,
    kept_of,
)
from attending.interventions._pruned_inputs import Positions
from attending.interventions._pruning_block import PruningBlock
from attending.interventions._pruning_run import PruningRun, llava_model
from attending.interventions.intervention import Counted
from attending.probes.visual_tokens import visual_tokens


@dataclass(frozen=True)
class VisualTokenPruning:
    """Prune the image tokens of a LLaVA, while a block runs.

        method = VisualTokenPruning("agile", keep=64).calibrate(model, images)
        with method(model) as run:
            model.generate(**inputs)

    Attributes:
        selector: a name from the table of the module, or a function
            `(features, attention, keep) -> indices` of tensors `[images, tokens, dim]`,
            `[images, tokens]` to `[images, keep]`.
        keep: tokens of each image: a whole number, or as a float a share of them; 1/9 is 64 of the
            576 of LLaVA-1.5. If an image has no more, all are kept and nothing is changed. For
            `sparsevlm` a budget, see `sparse.language_tokens.sparse_vlm_schedule`.
        erank_avg: for `agile`, the mean effective rank of images. 90 is LLaVA-1.5-7B's; it belongs
            to the model, and `calibrate` measures it.
        tau_max: for `agile`, the largest distance below which tokens are too alike.
        tau: for `static`, that distance.
        attention_share: for `vispruner`, how much of `keep` is chosen by attention.
        layer: for `fastv`, after how many layers; at least 1.
        schedule: for `sparsevlm`, `{layer: count}` in place of the one that follows from `keep`.
        positions: `"compact"` numbers the tokens that are left, as the official codes do before the
            language model; `"original"` leaves their positions as they were. `fastv` and
            `sparsevlm` always do the latter, and merged tokens have no position of their own, so
            they are always numbered anew.
        seed: for `random`.
    """

    selector: str | Selector = "agile"
    keep: int | float = 1 / 9
    erank_avg: float = 90.0
    tau_max: float = 0.25
    tau: float = 0.1
    attention_share: float = 0.5
    layer: int = 2
    schedule: Mapping[int, int] | None = None
    positions: Positions = "compact"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.selector not in NAMES and not callable(self.selector):
            raise ValueError(
                f"selector: expected one of {', '.join(NAMES)}, or a function; got "
                f"{self.selector!r}."
            )
        kept_of(self.keep, 1)
        if self.positions not in ("compact", "original"):
            raise ValueError(
                f'positions: expected "compact" or "original", got {self.positions!r}.'
            )
        if self.positions == "original" and self.selector in MERGING:
            raise ValueError(
                f'positions: expected "compact" with {self.selector}, whose merged tokens come '
                'from everywhere, got "original".'
            )
        numbers = {"layer": self.layer} | {
            f"schedule[{layer}]": min(layer, count)
            for layer, count in (self.schedule or {}).items()
        }
        for name, number in numbers.items():
            if isinstance(number, bool) or not isinstance(number, int) or number < 1:
                raise ValueError(
                    f"{name}: expected whole numbers, at least 1, as the first layer has no "
                    f"attention to go by, got {number!r}."
                )

    def __call__(self, model: nn.Module) -> Counted[PruningRun]:
        """The context manager within which the model's image tokens are pruned.

        Args:
            model: `LlavaForConditionalGeneration` or `LlavaModel` of transformers, or a module
                around one, such as of PEFT.

        Raises:
            ValueError: for another model, or a layer that it does not have. Within the block: for
                inputs that cannot be pruned, before the language model runs.

        Warns:
            InterventionWarning: on exit, if no image was pruned.
        """
        inner = llava_model(model)
        if self.selector in IN_LANGUAGE_MODEL:
            layers = inner.config.text_config.num_hidden_layers
            wanted = (self.layer,) if self.selector == "fastv" else tuple(self.schedule or ())
            if wrong := [layer for layer in wanted if layer >= layers]:
                name = "layer" if self.selector == "fastv" else "schedule"
                raise ValueError(
                    f"{name}: expected layers from 1 to {layers - 1}, as the language model has "
                    f"{layers}, got {wrong[0]}."
                )

        def opened(block: ExitStack) -> PruningRun:
            return PruningBlock(self, model).open(block)

        return Counted(opened, name="VisualTokenPruning")

    def calibrate(
        self,
        model: nn.Module,
        data: Tensor | Mapping[str, Any] | Iterable[Tensor | Mapping[str, Any]],
    ) -> "VisualTokenPruning":
        """The same method with `erank_avg` as it is on these images.

        Args:
            model: the model that will be pruned.
            data: images such as will be seen: `pixel_values`, or batches of them, or batches that
                have them under that name. About 100 images give the mean to a few percent.

        Raises:
            ValueError: without images, or for a model that `probes.visual_tokens` cannot look at.
        """
        inner = llava_model(model)
        batches = [data] if isinstance(data, Tensor | Mapping) else data
        ranks: list[Tensor] = []
        for batch in batches:
            pixels = batch if isinstance(batch, Tensor) else batch["pixel_values"]
            ranks.append(visual_tokens(inner, pixels).effective_rank)
        if not ranks:
            raise ValueError("data: expected at least one batch of images, got none.")
        return replace(self, erank_avg=float(torch.cat(ranks).mean()))


def prune_visual_tokens(
    model: nn.Module,
    selector: str | Selector = "agile",
    keep: int | float = 1 / 9,
    *,
    erank_avg: float = 90.0,
    layer: int = 2,
    positions: Positions = "compact",
) -> Counted[PruningRun]:
    """Prune the image tokens of a model within a block; `VisualTokenPruning` has more to set.

        with prune_visual_tokens(model, "divprune", keep=32):
            model.generate(**inputs)

    Args:
        model: as in `VisualTokenPruning.__call__`.
        selector: as in `VisualTokenPruning`, and so are the others.
        keep: tokens of each image, or a share of them.
        erank_avg: for `agile`.
        layer: for `fastv`.
        positions: `"compact"` or `"original"`.

    Returns:
        A context manager that yields a `PruningRun`.
    """
    return VisualTokenPruning(
        selector, keep, erank_avg=erank_avg, layer=layer, positions=positions
    )(model)


def cache_lengths(cache: Any) -> list[int]:
    """How many tokens each layer of a cache of transformers holds.

    After pruning before the language model all are equal, and short; after `fastv` and `sparsevlm`
    they fall from layer to layer.
    """
    return [int(layer.get_seq_length()) for layer in cache.layers]
