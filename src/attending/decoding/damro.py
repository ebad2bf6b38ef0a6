"""DAMRO: decode against the few image tokens that everything looks at.

The class token of a vision tower puts most of its attention on a handful of patches, background as
often as not, and the language model inherits that. What it says from these patches alone is said
without having seen the object. DAMRO (Gong et al., arXiv 2410.04514) lets a second branch see only
them, and subtracts its logits:

    A      = softmax(q_cls K^T / sqrt(width)), the columns of the patches, at layer -2 of the tower
    v_neg  = the k image tokens with the largest A, most attended first
    s      = (1 + alpha) l(y | v, x) - alpha l(y | v_neg, x),  cut to plausible tokens (beta)

    with DAMRO(k=10, alpha=2.0, beta=0.1)(model) as run:          # any LLaVA-type model
        model.generate(**inputs, max_new_tokens=64)
    print(run.stats)

    model.generate(**inputs, custom_generate=DAMRO().custom_generate)   # the same in one call
    damro_generate(model, inputs, k=10, max_new_tokens=64)              # and the same

Works for a model of transformers with a vision tower, `get_image_features` and placeholders in
`input_ids`, one image token for each patch (LLaVA-1.5 and its like). Towers without a class token
(SigLIP) go by the mean attention received, which is another statistic and not the paper's. Refused
by name: towers whose patches are regrouped or cropped before the language model gets them.

The paper's settings: k = 10, alpha = 2 for LLaVA-1.5 and LLaVA-NeXT on MME and in the GPT-4V-aided
evaluation; alpha = 0.5 on POPE and 1.5 on CHAIR for InstructBLIP; beta = 0.1 always. [code]

Where this differs from the official code (read at commit 03008ac):

- Temperature, top-p, top-k, repetition penalty and minimal lengths are respected, after the
  contrast. The official loop samples directly and skips them.
- Batches, left padding, `num_return_sequences` and beams; the official loop takes one image.
- The official InstructBLIP code gathers every patch one place too early. Nothing of that here.
- The negative branch keeps compact positions (k tokens where the image had all), as there.

Cost: a second forward for each token, with a shorter cache.
"""

import functools
import inspect
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

from jaxtyping import Int
from torch import Tensor, nn
from transformers import LogitsProcessor, LogitsProcessorList

from attending.decoding.contrastive import (
    ContrastCounts,
    ContrastiveLogitsProcessor,
    Decode,
    check_strength,
    contrast_first,
)
from attending.decoding.generating import Change, Generate, Generating
from attending.decoding.image_prompts import (
    SeenImages,
    check_sees_images,
    repeated_images,
    see_images,
    with_image_tokens,
)
from attending.probes.cls_attention import Reduction, Statistic, outlier_tokens


@dataclass(frozen=True)
class DAMRO:
    """Contrast with the image tokens that the vision tower's class token attends to most.

    Attributes:
        k: image tokens that the negative branch sees.
        alpha: strength of the contrast.
        beta: of adaptive plausibility: tokens less likely than beta times the most likely one are
            never generated.
        layer: of the vision tower, from 0 or from the end, whose attention is read.
        reduce: of its heads. `"merged"` is what the official code does for LLaVA, `"mean"` what it
            does for InstructBLIP; they rank patches differently.
        statistic: `"cls"`, `"received"`, or `"auto"` by what the tower has.
    """

    k: int = 10
    alpha: float = 2.0
    beta: float = 0.1
    layer: int = -2
    reduce: Reduction = "merged"
    statistic: Statistic | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        if isinstance(self.k, bool) or not isinstance(self.k, int) or self.k < 1:
            raise ValueError(f"k: expected a whole number of image tokens from 1, got {self.k!r}.")
        check_strength(self.alpha, self.beta)
        if self.reduce == "none":
            raise ValueError('reduce: expected one number for each patch, got "none".')

    def __call__(self, model: nn.Module) -> AbstractContextManager[ContrastCounts]:
        """A block in which `model.generate` decodes by DAMRO; it yields the counts.

        Blocks nest; the contrast of the innermost is the first.

        Raises:
            ValueError: if the model does not generate from images. Within the block, from
                `generate`: without `pixel_values`, for images that are not one token for each
                patch, for modes of generation other than greedy decoding, sampling and beams.

        Warns:
            DecodingWarning: if nothing was generated within the block.
        """
        check_sees_images(model)

        def start() -> tuple[ContrastCounts, Change]:
            counts = ContrastCounts()

            def change(generate: Generate, arguments: dict[str, Any]) -> Any:
                then = arguments.pop("custom_generate", None) or contrast_first
                _check_arguments(then, arguments.get("assistant_model"))
                # A callable is not handed the streamer by transformers.
                streamer = arguments.get("streamer")
                decode = functools.partial(self._decode, counts, then, streamer)
                return generate(**arguments, custom_generate=decode)

            return counts, change

        return Generating(model, start, "DAMRO")

    def custom_generate(
        self,
        model: Any,
        input_ids: Int[Tensor, "rows tokens"],
        logits_processor: Sequence[LogitsProcessor],
        stopping_criteria: Any,
        generation_config: Any,
        pixel_values: Tensor | None = None,
        vision_feature_layer: Any = None,
        vision_feature_select_strategy: str | None = None,
        image_sizes: Tensor | None = None,
        **model_kwargs: Any,
    ) -> Any:
        """For `model.generate(**inputs, custom_generate=DAMRO().custom_generate)`.

        Transformers hands a `custom_generate` callable no streamer; the `with` block does. What is
        named here, it takes out of the arguments before it would encode the image.

        Raises:
            ValueError: as within the block.
        """
        return self._decode(
            ContrastCounts(),
            contrast_first,
            None,
            model,
            input_ids,
            logits_processor,
            stopping_criteria,
            generation_config,
            pixel_values,
            vision_feature_layer,
            vision_feature_select_strategy,
            image_sizes,
            **model_kwargs,
        )

    def negative_inputs(
        self, model: nn.Module, images: SeenImages, input_ids: Tensor, attention_mask: Tensor | None
    ) -> dict[str, Any]:
        """What the negative branch is called with: the prompt with the k outliers of each image."""
        index = outlier_tokens(images.attention, self.k) + images.offset
        return with_image_tokens(model, images, index, input_ids, attention_mask)

    def _decode(
        self,
        counts: ContrastCounts,
        then: Decode,
        streamer: Any,
        model: Any,
        input_ids: Tensor,
        logits_processor: Sequence[LogitsProcessor],
        stopping_criteria: Any,
        generation_config: Any,
        pixel_values: Tensor | None = None,
        vision_feature_layer: Any = None,
        vision_feature_select_strategy: str | None = None,
        image_sizes: Tensor | None = None,
        **model_kwargs: Any,
    ) -> Any:
        check_sees_images(model)
        chosen = {
            "vision_feature_layer": vision_feature_layer,
            "vision_feature_select_strategy": vision_feature_select_strategy,
        }
        chosen = {name: value for name, value in chosen.items() if value is not None}
        images = see_images(
            model, pixel_values, image_sizes, self.layer, self.reduce, self.statistic, **chosen
        )
        beams = generation_config.num_beams or 1
        times = max(beams, generation_config.num_return_sequences or 1)
        prompt, mask = input_ids[::times], model_kwargs.get("attention_mask")
        mask = None if mask is None else mask[::times]
        contrast = ContrastiveLogitsProcessor(
            model,
            self.negative_inputs(model, images, prompt, mask),
            self.alpha,
            self.beta,
            log_probabilities=beams > 1,
            counts=counts,
        )
        if "pixel_values" in inspect.signature(then).parameters:  # it looks at the image too
            model_kwargs |= {"pixel_values": pixel_values, **chosen}
        else:
            encoded = dict(model_kwargs.get("mm_encoder_outputs") or {})
            encoded["image"] = repeated_images(model, images.outputs, prompt, times)
            model_kwargs["mm_encoder_outputs"] = encoded
        if streamer is not None:
            model_kwargs["streamer"] = streamer
        return then(
            model,
            input_ids,
            LogitsProcessorList([contrast, *logits_processor]),
            stopping_criteria,
            generation_config,
            **model_kwargs,
        )


def damro_generate(
    model: nn.Module,
    inputs: Mapping[str, Any],
    *,
    k: int = 10,
    alpha: float = 2.0,
    beta: float = 0.1,
    layer: int = -2,
    reduce: Reduction = "merged",
    **generate_kwargs: Any,
) -> Any:
    """`model.generate(**inputs, **generate_kwargs)`, decoded by DAMRO.

    Args:
        model: as for `DAMRO`.
        inputs: what its processor made: `input_ids`, `attention_mask`, `pixel_values`.
        k: as in `DAMRO`.
        alpha: as in `DAMRO`.
        beta: as in `DAMRO`.
        layer: as in `DAMRO`.
        reduce: as in `DAMRO`.
        generate_kwargs: for `generate`: `max_new_tokens`, `do_sample`, `temperature`, ...

    Returns:
        What `generate` returns.

    Raises:
        ValueError: as `DAMRO`.
    """
    method = DAMRO(k=k, alpha=alpha, beta=beta, layer=layer, reduce=reduce)
    with method(model):
        generator: Any = model
        return generator.generate(**inputs, **generate_kwargs)


def _check_arguments(then: object, assistant_model: object) -> None:
    if assistant_model is not None:
        raise ValueError(
            "assistant_model: expected None, as the second branch of DAMRO runs token by token, "
            f"got {type(assistant_model).__name__}."
        )
    if not callable(then):
        raise ValueError(
            f"custom_generate: expected a callable within a block of DAMRO, got {then!r}."
        )
