"""Which blocks of a denoiser look at the foreground, and how far its output moves at each step.

ProfilingDiT caches the blocks of a video transformer that attend to the background, and computes
the others. This finds out which are which, from one sampling:

    profile = profile_blocks(model, lambda: pipeline(prompt), foreground)
    profile.background(0.5)                     # for ProfilingCache(blocks=...)
    profile.l1                                  # how far the output moves: where to compute often

For each block and step, from the mean map over heads,

    received[i] = (1 / queries) sum_j A[j, i]       attention that token i receives (eq. 5)
    high        = received > threshold / keys       more than if all received the same
    R           = |high and foreground| / |foreground|      (eq. 6; per frame, then the mean)

R is a recall: a block whose attention is spread evenly over everything can have a high one. Blocks
with R below tau are those of the background (eq. 7). The map is never built: `received` comes from
`attending.core.statistics.column_mass`.

Source: ProfilingDiT (Ma et al., arXiv 2504.03140). No code for this part was released, and the
paper gives neither `threshold` nor `tau`; that high means "above uniform" is inferred. The paper's
`received` is a mean over queries, a column of the map; read as a row it would be the same for all
tokens. Its masks come from SAM2 on the principal components of the predicted noise; here they are
given, from whatever knows them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from attending.core.statistics import column_mass
from attending.probes.foreground import Moves, foreground_ratio, mean_of
from attending.taps import AttentionCall, Proceed, tap
from attending.taps.denoising import DenoisingClock


@dataclass(frozen=True, eq=False)
class BlockProfile:
    """What `profile_blocks` found.

    Attributes:
        names: of the self-attention modules, in the order in which they ran.
        blocks: the number of each one's block; None where its name holds none.
        ratio_per_step: R of each step and module, the mean over calls of the step and generations.
        received: the attention that each token receives, the mean over steps and samples.
        l1: mean |eps[s] - eps[s-1]| of consecutive outputs of the model.
        relative_l1: the same by mean |eps[s-1]|.
    """

    names: tuple[str, ...]
    blocks: tuple[int | None, ...]
    ratio_per_step: Float[Tensor, "steps modules"]
    received: Float[Tensor, "modules tokens"]
    l1: Float[Tensor, "moves"]
    relative_l1: Float[Tensor, "moves"]

    @property
    def ratio(self) -> Float[Tensor, "modules"]:
        """R of each module, the mean over steps."""
        return self.ratio_per_step.mean(0)

    def foreground(self, tau: float) -> tuple[int, ...]:
        """The blocks with R of at least tau, in ascending order."""
        return self._where(self.ratio >= tau)

    def background(self, tau: float) -> tuple[int, ...]:
        """The blocks with R below tau, in ascending order."""
        return self._where(self.ratio < tau)

    def least(self, count: int) -> tuple[int, ...]:
        """The blocks with the smallest R, in ascending order: the first to cache."""
        return self._ranked(count, descending=False)

    def most(self, count: int) -> tuple[int, ...]:
        """The blocks with the largest R, in ascending order."""
        return self._ranked(count, descending=True)

    def _ranked(self, count: int, *, descending: bool) -> tuple[int, ...]:
        if not 0 <= count <= len(self.names):
            raise ValueError(
                f"count: expected between 0 and the {len(self.names)} blocks, got {count}."
            )
        order = self.ratio.argsort(descending=descending, stable=True)
        chosen = torch.zeros(len(self.names), dtype=torch.bool)
        chosen[order[:count]] = True
        return self._where(chosen)

    def _where(self, chosen: Bool[Tensor, "modules"]) -> tuple[int, ...]:
        numbers = [b for b, c in zip(self.blocks, chosen.tolist(), strict=True) if c]
        known = [number for number in numbers if number is not None]
        if len(known) < len(numbers) or len(set(self.blocks)) < len(self.blocks):
            raise ValueError(
                "blocks: expected one self-attention in each block of one list, got "
                f"{', '.join(self.names)}. Take the names and ratios apart by yourself, or profile "
                "one of the lists with `only`."
            )
        return tuple(sorted(known))

    def __repr__(self) -> str:
        """The ratios in one line."""
        ratios = ", ".join(f"{ratio:.2f}" for ratio in self.ratio.tolist())
        return f"BlockProfile({len(self.ratio_per_step)} steps, R = [{ratios}])"


def profile_blocks(
    model: nn.Module,
    run: Callable[[], object],
    foreground: Bool[Tensor, "*batch tokens"],
    *,
    threshold: float = 1.0,
    frames: int = 1,
    tokens: slice | None = None,
    only: str = "",
) -> BlockProfile:
    """Profile the self-attention of a denoiser while it samples.

        scene = make_moving_scene(seed=1, frames=8)
        mask = foreground_tokens(scene.foreground(), patch=(1, 4, 4))
        profile = profile_blocks(wan.model, lambda: make_videos(wan, [scene.caption]), mask,
                                 frames=8)

    Args:
        model: the denoiser, `pipeline.transformer`.
        run: samples with it, once or several times. Its steps are told by the timestep.
        foreground: which tokens of the video show the foreground, for all samples or for each. If
            the model is called with more samples at once (guidance in one batch), it is repeated.
        threshold: in units of the uniform level `1 / keys`.
        frames: R is taken in each frame that has foreground, and averaged; the tokens of a frame
            have to lie together.
        tokens: which of the keys are the video's, for models that attend to text in the same call
            (SD3: the first; Flux: the last). Only queries of the video count, too.
        only: profile only modules whose name begins so, such as `"transformer_blocks."`.

    Returns:
        A `BlockProfile` on the CPU.

    Raises:
        ValueError: if the mask is empty, does not fit the tokens or the frames, or nothing was run.
        TapError: if the model makes no attention call.
    """
    if not bool(foreground.any()):
        raise ValueError("foreground: expected at least one token of the foreground, got none.")
    if frames < 1 or foreground.shape[-1] % frames:
        raise ValueError(
            f"frames: expected a number that divides the {foreground.shape[-1]} tokens of "
            f"foreground, got {frames}."
        )
    sums: dict[str, dict[int, list[float]]] = {}
    layers: dict[str, int | None] = {}
    received_sums: dict[str, Tensor] = {}
    mask = foreground.reshape(-1, foreground.shape[-1])

    def look(call: AttentionCall, proceed: Proceed) -> Tensor:
        if not call.is_cross and call.name.startswith(only):
            received, keys = _received(call, tokens)
            fitting = _fitting(mask.to(received.device), received, call.name)
            ratio = foreground_ratio(received, fitting, threshold / keys, frames=frames)
            steps = sums.setdefault(call.name, {})
            steps.setdefault(clock.now().step, []).append(float(ratio.mean()))
            layers[call.name] = call.layer
            mean = received.mean(0).cpu()
            received_sums[call.name] = received_sums.get(call.name, torch.zeros_like(mean)) + mean
        return proceed(call)

    outputs = Moves()

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        outputs.add(clock.now().step, clock.now().branch, _prediction(output))

    with torch.no_grad(), DenoisingClock(model) as clock, tap(model, look):
        handle = model.register_forward_hook(keep)
        try:
            run()
        finally:
            handle.remove()
    if not sums:
        raise ValueError(
            f"only: expected the beginning of a name of a self-attention module, got {only!r}, "
            "which fits none that ran."
        )
    names = tuple(sums)
    count = max(max(steps) for steps in sums.values()) + 1
    ratios = torch.tensor(
        [[mean_of(sums[name].get(step, ())) for name in names] for step in range(count)]
    )
    calls = [sum(len(values) for values in sums[name].values()) for name in names]
    received = torch.stack(
        [received_sums[name] / number for name, number in zip(names, calls, strict=True)]
    )
    l1, relative = outputs.means()
    return BlockProfile(names, tuple(layers[n] for n in names), ratios, received, l1, relative)


def _received(call: AttentionCall, tokens: slice | None) -> tuple[Tensor, int]:
    """What the video's tokens receive from each other, `[batch, tokens]`; how many keys."""
    keys = call.key_length
    weights = None
    asking = call.query_length
    if tokens is not None:
        weights = torch.zeros(call.query_length, device=call.query.device)
        weights[tokens] = 1.0
        asking = int(weights.sum())
    mass = column_mass(
        call.query,
        call.key,
        weights,
        attn_mask=call.attn_mask,
        is_causal=call.is_causal,
        scale=call.scale,
        enable_gqa=call.enable_gqa,
    )
    received = mass.mean(1) / asking
    return (received if tokens is None else received[:, tokens]), keys


def _fitting(mask: Tensor, received: Tensor, name: str) -> Tensor:
    if received.shape[1] != mask.shape[1]:
        raise ValueError(
            f"foreground: expected one entry for each of the {received.shape[1]} tokens of {name}, "
            f"got {mask.shape[1]}. If some of those are text, say which are the video's with "
            "`tokens`."
        )
    if received.shape[0] % mask.shape[0]:
        raise ValueError(
            f"foreground: expected a mask for all samples or one for each of the "
            f"{received.shape[0]} that {name} is given, got {mask.shape[0]}."
        )
    return mask.repeat(received.shape[0] // mask.shape[0], 1)


def _prediction(output: Any) -> Tensor:
    """What a denoiser predicts, of an output of diffusers, a tuple or a tensor."""
    found = getattr(output, "sample", output)
    found = found[0] if isinstance(found, tuple | list) else found
    if not isinstance(found, Tensor):
        raise ValueError(
            f"model: expected an output with `sample`, a tuple or a tensor, got "
            f"{type(output).__name__}."
        )
    return found
