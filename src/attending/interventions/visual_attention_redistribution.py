"""Visual attention redistribution (VAR): from sinks to the rest of the image, without training.

For decoders that read image tokens and text in one sequence. Some image tokens draw attention
whatever the text says and hold little; they are known by massive activations in a few channels, as
the first token of a text is (`attending.interventions.sink_dimensions`). In heads that look at the
image, a part of the attention on sinks goes to the other image tokens:

    m = sum over image tokens of a                        mass on the image; at least 0.2
    r = sum over image tokens that are no sinks of a / m  at least `min_non_sink_ratio`
    moved = move_fraction * sum over all sinks of a
    a[sink]  becomes (1 - move_fraction) * a[sink]
    a[other image token] becomes a + moved * a / sum over other image tokens of a

for each text query and head by itself (Kang et al., "See What You Are Told: Visual Attention Sink
in Large Multimodal Models", ICLR 2025, 2503.03321, eqs. 1 to 4). Not visual autoregressive
modelling, which has the same initials.

    method = VisualAttentionRedistribution(scale_tau=True).calibrate(model, inputs)
    with method(model) as run:
        model.generate(**inputs)
    print(run)          # sinks, heads and mass moved, layer by layer

No map is built: beside one pass over the call, text queries look once more at the image tokens and
sinks alone. It nests with other interventions: where a handler of another one comes after this, it
is handed a call whose plain attention is the edited one.

Where the paper and its official code (seilk/VisAttnSink, 98e62d6) differ, this has the paper's
meaning under a name of its own:

- the code's `p` is what sinks keep, `move_fraction` what they lose: the released 0.6 moves 0.4, the
  paper's 0.6 moves 0.6. The code's `rho` bounds the share of sinks, `min_non_sink_ratio` that of
  the others. `from_official_code(p=..., rho=...)` translates.
- `phi >= tau` here, `phi > tau` in the code, which also leaves alone a text query before the last
  image token: `convention="official-code"` has both.
- the last layer is left alone, as in the paper; in the code the setting has no effect.
- both look for sinks in the prompt only; a generated token is never one.
- where no image token is a sink, the code edits nothing, not even for sinks in the text. The paper
  does not say so; `require_visual_sink` decides.

The paper's settings for `min_non_sink_ratio`: 0.8 for general tasks, 0.5 for hallucination, 0.9 for
vision-centric ones (as readers of the paper report; likewise the paper's `move_fraction`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from attending.interventions._redistribution_run import (
    ChangeSinks,
    Redistribution,
    RedistributionRun,
)
from attending.interventions._visual_groups import looks_at_image
from attending.interventions.intervention import Counted
from attending.interventions.sink_dimensions import (
    KNOWN_SINK_DIMENSIONS,
    find_sink_dimensions,
    sink_value,
)
from attending.interventions.vision_language import language_layers

__all__ = [
    "KNOWN_SINK_DIMENSIONS",
    "VisualAttentionRedistribution",
    "find_sink_dimensions",
    "redistribute_attention",
    "select_image_centric_heads",
    "sink_value",
]

Convention = Literal["paper", "official-code"]


@dataclass(frozen=True)
class VisualAttentionRedistribution:
    """Move attention from sinks to the other image tokens, while a block runs.

        inputs = processor(images=image, text=prompt, return_tensors="pt")
        method = VisualAttentionRedistribution(scale_tau=True).calibrate(model, inputs)
        with method(model) as run:
            answer = model.generate(**inputs)

    Image tokens are found in `input_ids`, in any number of spans; batches may be padded on either
    side. Decoding with a cache gives what a forward over the whole sequence gives, if that is told
    how long the prompt was: `method(model, prompt_length=n)`. Without, all of the sequence counts
    as prompt, and its later tokens may be sinks.

    Attributes:
        sink_dimensions: the channels that tell a sink; `calibrate` finds them.
        tau: what phi has to reach. 20 in the paper, whose models are 4096 wide and more.
        scale_tau: whether tau is meant at width 4096 and is multiplied by `sqrt(dim / 4096)`. phi
            cannot exceed `sqrt(dim)`, so small models need it. The scaling is ours.
        min_image_mass: what a head has to spend on the image, for each query.
        min_non_sink_ratio: which part of that has to be on image tokens that are no sinks; the
            paper's rho. Above 1, nothing is edited.
        move_fraction: which part of the attention on sinks is moved; the paper's p.
        skip_first: layers at the start that are left alone.
        skip_last: layers at the end that are left alone.
        convention: "paper" or "official-code", as the module's docstring says.
        require_visual_sink: edit only where some image token is a sink.
        image_token_id: what stands for an image token in `input_ids`; by default what the model's
            config says.
    """

    sink_dimensions: tuple[int, ...] | None = None
    tau: float = 20.0
    scale_tau: bool = False
    min_image_mass: float = 0.2
    min_non_sink_ratio: float = 0.5
    move_fraction: float = 0.6
    skip_first: int = 2
    skip_last: int = 1
    convention: Convention = "paper"
    require_visual_sink: bool = True
    image_token_id: int | None = None

    def __post_init__(self) -> None:
        if self.sink_dimensions is not None:  # a list, when it was read from JSON
            object.__setattr__(self, "sink_dimensions", tuple(self.sink_dimensions))
        if not self.tau > 0:
            raise ValueError(f"tau: expected a number above 0, got {self.tau}.")
        if self.convention not in ("paper", "official-code"):
            raise ValueError(
                f'convention: expected "paper" or "official-code", got {self.convention!r}.'
            )
        for name in ("skip_first", "skip_last"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: expected 0 or more, got {getattr(self, name)}.")
        _check_thresholds(self.min_image_mass, self.min_non_sink_ratio)
        _check_fraction(self.move_fraction)

    @classmethod
    def from_official_code(
        cls,
        sink_dimensions: Sequence[int],
        *,
        tau: float = 20.0,
        rho: float = 0.5,
        summ: float = 0.2,
        p: float = 0.6,
    ) -> "VisualAttentionRedistribution":
        """The method by the names and meanings of the official configuration.

        Args:
            sink_dimensions: its `dim_sink`.
            tau: its `tau`.
            rho: the largest share of the image's mass that sinks may have.
            summ: the least mass on the image.
            p: what is left of the attention on sinks (`beta` in its README).
        """
        return cls(
            sink_dimensions=tuple(sink_dimensions),
            tau=tau,
            min_image_mass=summ,
            min_non_sink_ratio=1.0 - rho,
            move_fraction=1.0 - p,
            convention="official-code",
        )

    def calibrate(
        self, model: nn.Module, inputs: Mapping[str, Any], k: int = 2
    ) -> "VisualAttentionRedistribution":
        """The same with the sink channels of a model, by `find_sink_dimensions`."""
        return replace(self, sink_dimensions=find_sink_dimensions(model, inputs, k).dimensions)

    def __call__(
        self,
        model: nn.Module,
        *,
        image_mask: Bool[Tensor, "batch tokens"] | None = None,
        prompt_length: int | Int[Tensor, " batch"] | None = None,
        change_sinks: ChangeSinks | None = None,
    ) -> Counted[RedistributionRun]:
        """The context manager within which the model's attention is changed.

        Args:
            model: a vision-language model that ends in `scaled_dot_product_attention`, or its
                language model, or any decoder with an `image_mask`.
            image_mask: which tokens of the prompt stand for an image. By default they are found in
                `input_ids`; needed where the model is given `inputs_embeds`.
            prompt_length: how many tokens, padding included, may be sinks; by default all that come
                before the first forward with a cache.
            change_sinks: `change_sinks(layer, sinks, image)` gets the number of a layer and which
                tokens of the prompt are its sinks and of an image, `[batch, tokens]`, and returns
                which are to be treated as sinks: to spare some that matter, or for a control.

        Returns:
            A context manager that yields the run, whose `stats` and text say what was edited.

        Raises:
            ValueError: for a method that was not calibrated, or a model without decoder layers or
                with too few of them. Within the block: for a tau that phi cannot reach, tokens
                without a mask, or a sequence that began outside.

        Warns:
            InterventionWarning: at the end of a block in which nothing was edited, and why.
        """
        if self.sink_dimensions is None:
            raise ValueError(
                "sink_dimensions: expected the channels of the model, got None. Call "
                "method.calibrate(model, inputs) first, or pass those of KNOWN_SINK_DIMENSIONS."
            )
        layers = dict(enumerate(language_layers(model).items()))
        chosen = {
            number: layer
            for number, layer in layers.items()
            if self.skip_first <= number < len(layers) - self.skip_last
        }
        if not chosen:
            raise ValueError(
                f"skip_first: expected to leave a layer to edit, as {type(model).__name__} has "
                f"{len(layers)} layers, got skip_first={self.skip_first} and "
                f"skip_last={self.skip_last}."
            )
        made = Redistribution(self, model, chosen, image_mask, prompt_length, change_sinks)
        return Counted(made.opened, name=type(self).__name__)


def select_image_centric_heads(
    attention: Float[Tensor, "batch heads queries keys"],
    image_mask: Bool[Tensor, "batch keys"],
    sink_mask: Bool[Tensor, "batch keys"],
    *,
    query_mask: Bool[Tensor, "batch queries"] | None = None,
    min_image_mass: float = 0.2,
    min_non_sink_ratio: float = 0.5,
    require_visual_sink: bool = True,
) -> Bool[Tensor, "batch heads queries"]:
    """Which heads look at the image rather than at its sinks, for each query (eq. 3).

    On a map that is there, to look into a model or to test; the method itself builds none.

    Args:
        attention: rows of a softmax.
        image_mask: which keys are image tokens.
        sink_mask: which keys are sinks, in the image or not.
        query_mask: which queries may be edited; by default all.
        min_image_mass, min_non_sink_ratio, require_visual_sink: as in
            `VisualAttentionRedistribution`.
    """
    _check_masks(attention, image_mask, sink_mask)
    _check_thresholds(min_image_mass, min_non_sink_ratio)
    inside = image_mask & ~sink_mask
    non_sink_mass = (attention * inside[:, None, None]).sum(-1)
    sink_mass = (attention * (image_mask & sink_mask)[:, None, None]).sum(-1)
    selected = looks_at_image(non_sink_mass, sink_mass, min_image_mass, min_non_sink_ratio)
    if require_visual_sink:
        selected = selected & (image_mask & sink_mask).any(-1)[:, None, None]
    return selected if query_mask is None else selected & query_mask[:, None]


def redistribute_attention(
    attention: Float[Tensor, "batch heads queries keys"],
    image_mask: Bool[Tensor, "batch keys"],
    sink_mask: Bool[Tensor, "batch keys"],
    selected: Bool[Tensor, "batch heads queries"],
    move_fraction: float = 0.6,
) -> Float[Tensor, "batch heads queries keys"]:
    """The map with attention moved from all sinks to the image tokens that are none (eq. 4).

    Rows still sum to 1. A row without mass on such image tokens stays as it is.

    Args:
        attention: rows of a softmax.
        image_mask: which keys are image tokens.
        sink_mask: which keys are sinks, in the image or not.
        selected: which rows to change, from `select_image_centric_heads`.
        move_fraction: which part of the mass on sinks is moved.
    """
    _check_masks(attention, image_mask, sink_mask)
    _check_fraction(move_fraction)
    inside, sinks = (
        mask[:, None, None].to(attention.dtype) for mask in (image_mask & ~sink_mask, sink_mask)
    )
    received = (attention * inside).sum(-1, keepdim=True)
    moved = move_fraction * (attention * sinks).sum(-1, keepdim=True)
    growth = moved / received.masked_fill(received == 0, 1.0)
    changed = attention * (1 + growth * inside - move_fraction * sinks)
    return torch.where(selected[..., None] & (received > 0), changed, attention)


def _check_masks(attention: Tensor, image_mask: Tensor, sink_mask: Tensor) -> None:
    if attention.dim() != 4:
        raise ValueError(
            f"attention: expected a map [batch, heads, queries, keys], got {list(attention.shape)}."
        )
    expected = [attention.shape[0], attention.shape[3]]
    for name, mask in (("image_mask", image_mask), ("sink_mask", sink_mask)):
        if mask.dtype != torch.bool or list(mask.shape) != expected:
            raise ValueError(
                f"{name}: expected a boolean mask [batch, keys] = {expected}, got {mask.dtype} "
                f"{list(mask.shape)}."
            )


def _check_thresholds(min_image_mass: float, min_non_sink_ratio: float) -> None:
    if not 0 <= min_image_mass <= 1:
        raise ValueError(f"min_image_mass: expected a share between 0 and 1, got {min_image_mass}.")
    if not min_non_sink_ratio >= 0:
        raise ValueError(
            f"min_non_sink_ratio: expected a number of 0 or more, got {min_non_sink_ratio}."
        )


def _check_fraction(move_fraction: float) -> None:
    if not 0 <= move_fraction <= 1:
        raise ValueError(f"move_fraction: expected a share between 0 and 1, got {move_fraction}.")
