"""Self-attention of a video model under a mask of frames for each layer: Efficient-vDiT."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from attending.core.block_plan import BlockPlan
from attending.interventions.edit import shown_by_both
from attending.interventions.intervention import Counted
from attending.interventions.sparse_run import SparseRun, sparse_calls
from attending.sparse.frame_masks import expand_frame_mask, frame_token_mask
from attending.taps import AttentionCall, Handler, Proceed


@dataclass(frozen=True, eq=False)
class FrameReferenceAttention:
    """Let each frame of a video see itself and a few others, as a mask for each layer says.

        mask = frame_reference_mask(frames=8, k=2)
        with FrameReferenceAttention({0: mask, 1: mask}, tokens_per_frame=64)(transformer) as run:
            pipeline(prompt)
        print(run)                     # how much of the maps was computed

    The masks hold for all heads, steps and prompts. `search_layer_masks` finds, for each layer, the
    sparsest within an error budget; `distill_denoiser` trains a model under its masks. Gradients
    flow. Of models that keep the text in the same sequence, the text sees all and is seen by all.

    Source: Ding et al. 2025 (arXiv 2502.06155). No official code was found.

    Attributes:
        masks: of frames, True = seen (see `attending.sparse.frame_masks`): one for all layers, or
            by the layer's number (`call.layer`) or its name (`"blocks.3.attn1"`), the name first.
            Layers that are not there stay dense.
        tokens_per_frame: of the transformer's sequence, which is frame after frame: `(height /
            patch) * (width / patch)` of the latent frame.
        text_tokens, text_first: of text in the same sequence, and whether it precedes the video.
        block_size: tokens in a block; None for a whole frame (with text, see `default_block_size`).
            On a CPU that is best: exact, and nothing is rounded up.
        exact: hide again what blocks that are cut by a border show too much. It costs a mask of
            the size of the map, and nothing where no block is cut. False is what the paper does.
    """

    masks: Mapping[int | str, Tensor] | Tensor
    tokens_per_frame: int
    text_tokens: int = 0
    text_first: bool = True
    block_size: int | None = None
    exact: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.masks, Tensor) and not self.masks:
            raise ValueError("masks: expected a mask, or one for at least one layer, got none.")
        for mask in [self.masks] if isinstance(self.masks, Tensor) else self.masks.values():
            self.plan_of(mask)

    def plan_of(self, mask: Bool[Tensor, "frames frames"]) -> BlockPlan:
        """The blocks that are computed under a mask.

        Raises:
            ValueError: for a mask or sizes that `expand_frame_mask` refuses.
        """
        return expand_frame_mask(
            mask,
            self.tokens_per_frame,
            block_size=self.block_size,
            text_tokens=self.text_tokens,
            text_first=self.text_first,
        )

    def mask_of(self, call: AttentionCall) -> Bool[Tensor, "frames frames"] | None:
        """The mask of a call's layer; None where it stays dense."""
        if isinstance(self.masks, Tensor):
            return self.masks
        if call.name in self.masks:
            return self.masks[call.name]
        return None if call.layer is None else self.masks.get(call.layer)

    def __call__(self, model: nn.Module) -> Counted[SparseRun]:
        """The context manager within which attention is masked by frames; it yields the counts.

        Raises:
            ValueError: within the block, for a call whose length is not that of the masks.

        Warns:
            InterventionWarning: on exit, if no call was sparse.
        """

        def start(run: SparseRun) -> Handler:
            known: dict[tuple[int, torch.device], tuple[BlockPlan, Tensor | None]] = {}

            def attend(call: AttentionCall, proceed: Proceed) -> Tensor:
                mask = self.mask_of(call)
                if mask is None:
                    return run.dense(call, proceed, "no mask is given for its layer")
                self._check_length(call, mask)
                key = id(mask), call.query.device
                if key not in known:
                    known[key] = self._made(mask.to(call.query.device))
                plan, hidden = known[key]
                shown = (
                    call
                    if hidden is None
                    else replace(call, attn_mask=shown_by_both(call.attn_mask, hidden))
                )
                return run.over(shown, proceed, plan)

            return attend

        return sparse_calls(model, start, name="FrameReferenceAttention")

    def _made(self, mask: Tensor) -> tuple[BlockPlan, Tensor | None]:
        """The plan, and what hides the rest of blocks that a border cuts."""
        plan = self.plan_of(mask)
        common = math.gcd(self.tokens_per_frame, self.text_tokens)
        if not self.exact or common % plan.block_size[0] == 0:
            return plan, None
        return plan, frame_token_mask(
            mask,
            self.tokens_per_frame,
            text_tokens=self.text_tokens,
            text_first=self.text_first,
        )

    def _check_length(self, call: AttentionCall, mask: Tensor) -> None:
        wanted = len(mask) * self.tokens_per_frame + self.text_tokens
        if (call.query_length, call.key_length) != (wanted, wanted):
            raise ValueError(
                f"tokens_per_frame: expected calls of {len(mask)} frames x {self.tokens_per_frame} "
                f"tokens + {self.text_tokens} of text = {wanted} tokens, got {call!r}. Give the "
                "frames and tokens as the transformer sees them, after the patches."
            )
