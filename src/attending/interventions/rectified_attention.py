"""Rectified SpaAttn in a running image or video transformer, without training."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from attending.core.block_plan import BlockPlan
from attending.core.masks import mask_parts
from attending.interventions.image_run import ImageRun, image_calls
from attending.interventions.intervention import Counted
from attending.interventions.sparse_run import plan_of_call
from attending.sparse.curve_order import block_neighbors, gilbert_order, row_order
from attending.sparse.image_tokens import ImageTokens
from attending.sparse.rectified import (
    RECTIFY,
    Rectify,
    apply_rectification,
    rectification,
)
from attending.taps import AttentionCall, Handler, Proceed


@dataclass(frozen=True)
class RectifiedAttention:
    """Compute a few blocks of self-attention and estimate the rest from pooled blocks.

        with RectifiedAttention(drop=0.75)(pipeline.transformer) as run:
            pipeline(prompt)
        print(run)                     # how much of the maps was computed

    For each call, layer and head anew: tokens are put along a space-filling curve, cut into blocks
    and averaged; from the small map of averages follow which blocks are computed and what stands
    for the others (`attending.sparse.rectified`). The output is put back in the model's order.
    Rotary embeddings are in the queries and keys by then, so the order changes nothing.

    Defaults are those of the official script for Wan 2.1 text to video, with 50 steps. For others
    it has: HunyuanVideo `drop=0.8, dense_layers=0, dense_steps=0`, Wan image to video
    `dense_steps=0`, CogVideoX `drop=0.85`.

    Text in the same sequence (SD3, Flux, HunyuanVideo) is never pooled: all see it, and it sees
    all. Padding of text is read from the call's mask; calls with any other mask, causal ones and
    those to another sequence stay dense. Gradients flow. Handlers further in do not see the call.

    Source: Liu et al., arXiv 2511.19835 and its official code. That one reorders hidden states and
    rotary tables once for the whole model; here it is done in each call, so that no model has to
    be rewritten, at the cost of four copies.

    Attributes:
        grid: tokens along time, height and width (height and width for a picture); None to read it
            from what the model is called on, see `attending.sparse.image_tokens`.
        block_size: tokens in a block.
        drop: share of the blocks of a row that may be dropped: `int((1 - drop) * blocks)` are kept
            at least.
        top_p: more are kept until they have this share in the map of averages; None for no more.
        dense_layers: so many of the first layers stay dense.
        dense_steps: so many of the first steps stay dense.
        rectify: what stands for dropped blocks: "ipar+gapr" (the paper's), "ipar", "all", "row",
            or "none" for plain block-sparse attention.
        reorder: put tokens along the curve first.
        neighbors: keep blocks that touch, too.
        first_frame: keep blocks of the first frame for each other, too, as the official code does
            for Wan: the first `blocks // frames` ones.
        zero_padded: pool a last block that is shorter as the official code does.
        text_first: of models with text in the same sequence, whether it precedes the picture; None
            for those that `image_tokens` knows.

    Raises:
        ValueError: for settings out of range; within the block, where the grid or the place of
            text cannot be known.
    """

    grid: tuple[int, int] | tuple[int, int, int] | None = None
    block_size: int = 128
    drop: float = 0.75
    top_p: float | None = 0.3
    dense_layers: int = 2
    dense_steps: int = 5
    rectify: Rectify = "ipar+gapr"
    reorder: bool = True
    neighbors: bool = True
    first_frame: bool = False
    zero_padded: bool = False
    text_first: bool | None = None

    def __post_init__(self) -> None:
        grid = (1, 1) if self.grid is None else self.grid
        if len(grid) not in (2, 3) or any(int(n) != n or n < 1 for n in grid):
            raise ValueError(
                "grid: expected tokens as (frames, height, width) or (height, width), each at "
                f"least 1, got {self.grid!r}. Count tokens, not pixels."
            )
        for name, least in {"block_size": 1, "dense_layers": 0, "dense_steps": 0}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected at least {least}, got {getattr(self, name)}.")
        if not 0 <= self.drop <= 1:
            raise ValueError(f"drop: expected a share of blocks, 0 to 1, got {self.drop}.")
        if self.top_p is not None and not 0 <= self.top_p <= 1:
            raise ValueError(f"top_p: expected a share, 0 to 1, got {self.top_p}.")
        if self.rectify not in RECTIFY:
            raise ValueError(
                f"rectify: expected one of {', '.join(RECTIFY)}, got {self.rectify!r}."
            )

    def __call__(self, model: nn.Module) -> "Counted[RectifiedRun]":
        """The context manager within which attention is sparse; it yields the counts.

        Args:
            model: the transformer, as the sampler calls it.

        Warns:
            InterventionWarning: on exit, if no call was sparse.
        """

        def start(run: RectifiedRun) -> Handler:
            def attend(call: AttentionCall, proceed: Proceed) -> Tensor:
                return self._attend(run, call, proceed)

            return attend

        return image_calls(model, self, start, name="RectifiedAttention", new_run=RectifiedRun)

    def _attend(self, run: "RectifiedRun", call: AttentionCall, proceed: Proceed) -> Tensor:
        if call.query_length != call.key_length:
            return run.dense(call, proceed, "its keys are not those of its queries")
        if call.is_causal:
            return run.dense(call, proceed, "it is causal")
        tokens = run.tokens
        if tokens is None:
            raise RuntimeError(f"the model that RectifiedAttention was given did not run {call!r}")
        text_length = tokens.text_length(call.key_length)
        if text_length < 0:
            return run.dense(call, proceed, "it has fewer tokens than the grid")
        if call.layer is not None and call.layer < self.dense_layers:
            return run.dense(call, proceed, "the first layers are dense")
        if run.clock.now().step < self.dense_steps:
            return run.dense(call, proceed, "the first steps are dense")
        if text_length and tokens.text_first is None:
            raise ValueError(
                f"text_first: expected True or False, as {call!r} has {text_length} tokens beside "
                f"the grid {tokens.grid}; got None. If there is no text, the grid is wrong."
            )
        layout = run.layout(self, tokens, text_length, call.query.device)
        visible = None
        if call.attn_mask is not None:
            mask = call.attn_mask.reshape((1,) * (4 - call.attn_mask.dim()) + call.attn_mask.shape)
            parts = mask_parts(mask, len(call.query), call.query_length, call.key_length)
            visible = None if parts.key_visible is None else parts.key_visible[:, layout.forward]
            hides_picture = visible is not None and not bool(
                visible[:, : -text_length or None].all()
            )
            if not parts.is_full or hides_picture:
                return run.dense(call, proceed, "its mask hides more than text")
            visible = None if visible is None else visible[:, -text_length:]
        query, key, value = (
            one.index_select(2, layout.forward) for one in (call.query, call.key, call.value)
        )
        found = rectification(
            query,
            key,
            value,
            text_length=text_length,
            text_mask=visible,
            block_size=self.block_size,
            top_k=max(1, int((1 - self.drop) * layout.blocks)),
            top_p=self.top_p,
            neighbors=layout.neighbors,
            rectify=self.rectify,
            zero_padded=self.zero_padded,
            scale=call.scale,
        )
        run.sparse(call, plan_of_call(call, _with_text(found.plan, text_length)))
        output = apply_rectification(query, key, value, found, text_mask=visible, scale=call.scale)
        return output.index_select(2, layout.backward)


class _Layout(NamedTuple):
    """Where tokens go: the picture along the curve, then text."""

    forward: Tensor
    backward: Tensor
    blocks: int
    neighbors: Tensor


@dataclass(eq=False, kw_only=True)
class RectifiedRun(ImageRun):
    """What `RectifiedAttention` left out within one `with` block.

    Attributes:
        layouts: the orders of tokens that were used.
    """

    layouts: dict[tuple[Any, ...], _Layout] = field(default_factory=dict, repr=False)

    def layout(
        self,
        method: RectifiedAttention,
        tokens: ImageTokens,
        text_length: int,
        device: torch.device,
    ) -> _Layout:
        """Made once for each grid and length of text."""
        key = (tokens, text_length, device)
        if key not in self.layouts:
            frames, height, width = (1,) * (3 - len(tokens.grid)) + tuple(tokens.grid)
            order = (gilbert_order if method.reorder else row_order)(frames, height, width)
            image = len(order.forward)
            text = torch.arange(text_length)
            if tokens.text_first:
                forward = torch.cat([order.forward + text_length, text])
            else:
                forward = torch.cat([order.forward, text + image])
            blocks = -(-image // method.block_size)
            near = torch.zeros(blocks, blocks, dtype=torch.bool)
            if method.neighbors:
                near = block_neighbors(order, method.block_size)
            if method.first_frame:
                corner = blocks // frames
                near[:corner, :corner] = True
            self.layouts[key] = _Layout(
                forward.to(device), forward.argsort().to(device), blocks, near.to(device)
            )
        return self.layouts[key]


def _with_text(plan: BlockPlan, text_length: int) -> BlockPlan:
    """The plan with blocks of text, all of which are computed: to count them."""
    size = plan.block_size[0]
    more = -(-text_length // size)
    length = (plan.block_mask.shape[2] + more) * size
    mask = pad(plan.block_mask, (0, more, 0, more), value=True)
    return BlockPlan.from_block_mask(mask, block_size=size, query_length=length, key_length=length)
