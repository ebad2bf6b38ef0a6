"""Attention within circles in a pretrained image or video transformer, without training: CLEAR.

To see how much of a denoiser's attention is local, and what a radius costs, before
`attending.conversion.linearize` makes the window permanent and trains what it takes:

    with CircularWindow(radius=16)(pipe.transformer) as run:
        pipe(prompt)
    print(run)

Without training a large radius (the official code's README: 32 at 1024 x 1024) degrades gently, a
small one repeats patterns; the README advises `down_factor=4` with a small radius.

Source: CLEAR (arXiv 2412.16112); see `attending.sparse.circular_window` for what is computed.
"""

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from attending.interventions.image_run import ImageRun, image_calls
from attending.interventions.intervention import Counted
from attending.sparse._grid_window import Grid, window_shape
from attending.sparse.circular_window import (
    BASE_LENGTH,
    circular_window_attention,
    circular_window_mask,
    log_length_scale,
    pool_tokens,
    window_entries,
)
from attending.sparse.image_tokens import ImageTokens
from attending.taps import AttentionCall, Handler, Proceed

HAS_MASK = "it has a mask of its own"
DOWN_SAMPLED_LENGTH = 10.0  # factor of the length in the official code's scale; not explained there


@dataclass(eq=False, kw_only=True)
class WindowRun(ImageRun):
    """The counts of a `CircularWindow`; `density` is that of pairs that are seen, not computed."""

    by_forward: dict[int, ImageTokens] = field(default_factory=dict, repr=False)

    def windowed(self, call: AttentionCall, share: float) -> None:
        """Count a call of which a share of the map was seen."""
        if not call.recomputed:
            self.edited(call, range(call.num_heads), call.query.shape[:-1].numel())
            self._entries(call, share)

    def tokens_of(self, call: AttentionCall) -> ImageTokens:
        """Where the tokens of the call are, also where checkpointing runs it again later on."""
        if call.recomputed:
            return self.by_forward[call.forward]
        assert self.tokens is not None
        if torch.is_grad_enabled():
            self.by_forward[call.forward] = self.tokens
        return self.tokens

    @property
    def stats(self) -> dict[str, int | float]:
        """The counts, as a plain dictionary."""
        return {
            "calls": self.calls,
            "sparse_calls": self.edited_calls,
            "dense_calls": self.calls - self.edited_calls,
            "density": self.density,
        }

    def __str__(self) -> str:
        """In one line."""
        line = (
            f"{self.name}: {self.edited_calls} of {self.calls} calls of self-attention within the "
            f"window, {self.density:.1%} of all maps seen"
        )
        reasons = (f"{count} x {reason}" for reason, count in self.left_alone.most_common())
        return "; dense: ".join(filter(None, (line, ", ".join(reasons))))


@dataclass(frozen=True)
class CircularWindow:
    """Let each image token see the tokens in a circle around it, and all text.

    Works on every self-attention call whose sequence holds the image's tokens, with or without
    text (so on both kinds of blocks of FLUX and SD3, and on the self-attention of Wan). Calls with
    a mask of their own stay dense, and the run says so.

    Attributes:
        radius: in tokens, strict: 1 is the token alone. A token of FLUX is 16 x 16 pixels.
        grid: `(height, width)` or `(frames, height, width)` in tokens. None: read from the model's
            inputs at each forward, see `attending.sparse.image_tokens`.
        text_first: whether text tokens come before image tokens; None: known for FLUX and SD3.
        frame_radius: of a video, frames less than so many away; None for all. Ours.
        down_factor: let image tokens also see the whole image, down-sampled by this factor.
        log_length: use the official code's scale for sizes beyond those of training,
            `log_length_scale` (with a factor of 10 in the logarithm if down-sampled, as there).
        base_length: of training, for that scale, in tokens.
    """

    radius: float
    grid: Grid | None = None
    text_first: bool | None = None
    frame_radius: int | None = None
    down_factor: int | None = None
    log_length: bool = False
    base_length: int = BASE_LENGTH

    def __post_init__(self) -> None:
        if not self.radius > 0:
            raise ValueError(f"radius: expected more than 0 tokens, got {self.radius}.")
        if self.down_factor is not None and self.down_factor < 1:
            raise ValueError(f"down_factor: expected at least 1, got {self.down_factor}.")
        if self.frame_radius is not None and self.frame_radius < 1:
            raise ValueError(f"frame_radius: expected at least 1, got {self.frame_radius}.")
        if self.grid is not None:
            window_shape(self.grid, self.radius, self.frame_radius)

    def __call__(self, model: nn.Module) -> Counted[WindowRun]:
        """The context manager within which attention is local; it yields the counts.

        Raises:
            ValueError: within the block, if the grid cannot be read or does not fit.

        Warns:
            InterventionWarning: on exit, if no call was changed.
        """

        def start(run: WindowRun) -> Handler:
            def attend(call: AttentionCall, proceed: Proceed) -> Tensor:
                tokens = run.tokens_of(call)
                reason = self.why_dense(call, tokens)
                if reason is not None:
                    return run.dense(call, proceed, reason)
                run.windowed(call, self.share(call, tokens))
                return self.attend(call, proceed, tokens)

            return attend

        return image_calls(model, self, start, name="CircularWindow", new_run=WindowRun)

    def why_dense(self, call: AttentionCall, tokens: ImageTokens) -> str | None:
        """Why a call of self-attention is none over the image's tokens; None if it is one."""
        if call.query_length != call.key_length:
            return "it has other keys than queries"
        if tokens.text_length(call.key_length) < 0:
            return f"it has fewer tokens than the grid {tokens.grid}"
        if call.attn_mask is not None or call.is_causal:
            return HAS_MASK
        return None

    def share(self, call: AttentionCall, tokens: ImageTokens) -> float:
        """The share of the call's map that is seen; with down-sampling that can be more than 1."""
        shape, window = window_shape(tokens.grid, self.radius, self.frame_radius)
        image, text = math.prod(shape), tokens.text_length(call.key_length)
        seen = window_entries(shape, window) + image * text + text * (image + text)
        if self.down_factor is not None:
            seen += image * (image // self.down_factor**2)
        return seen / (image + text) ** 2

    def attend(
        self,
        call: AttentionCall,
        proceed: Proceed,
        tokens: ImageTokens,
        pool_weight: Tensor | None = None,
    ) -> Tensor:
        """The output of a call within the window.

        If another handler comes after this one, it is handed a dense call with a mask.

        Raises:
            ValueError: if the call drops attention weights, or it is not known where its text is.
        """
        if call.dropout_p:
            raise ValueError(
                f"model: expected no dropout on attention weights, got {call.dropout_p} in "
                f"{call!r}. Call model.eval() first."
            )
        text_length = tokens.text_length(call.key_length)
        if text_length and tokens.text_first is None:
            raise ValueError(
                f"text_first: expected True or False, as {call!r} has {text_length} tokens beside "
                f"the grid {tokens.grid}; got None. FLUX has text first, SD3 last."
            )
        first = bool(tokens.text_first)
        scale = self._scale(call)
        if not call.inner:
            return circular_window_attention(
                call.query,
                call.key,
                call.value,
                tokens.grid,
                self.radius,
                text_length=text_length,
                text_first=first,
                frame_radius=self.frame_radius,
                down_factor=self.down_factor,
                pool_weight=pool_weight,
                scale=scale,
            )
        mask = circular_window_mask(
            tokens.grid,
            self.radius,
            text_length=text_length,
            text_first=first,
            frame_radius=self.frame_radius,
            down_factor=self.down_factor,
        ).to(call.query.device)
        key, value = call.key, call.value
        if self.down_factor is not None:
            start = text_length if first else 0
            image = slice(start, start + call.key_length - text_length)
            key, value = (
                torch.cat(
                    [
                        one,
                        pool_tokens(one[:, :, image], tokens.grid, self.down_factor, pool_weight),
                    ],
                    2,
                )
                for one in (key, value)
            )
        return proceed(replace(call, key=key, value=value, attn_mask=mask, scale=scale))

    def _scale(self, call: AttentionCall) -> float:
        if not self.log_length:
            return call.softmax_scale
        dim = call.query.shape[-1]
        found = log_length_scale(
            dim,
            call.key_length,
            base_length=self.base_length,
            factor=1.0 if self.down_factor is None else DOWN_SAMPLED_LENGTH,
        )
        return found * call.softmax_scale * math.sqrt(dim)
