"""How attention to the source fades as a decoder generates, and the source's influence with it.

A decoder-only model that translates, sums up or answers sees S source tokens and, at step i, i
tokens of its own, in one softmax. The source mass `m_i = sum over source of a_ij` of even attention
is `S / (S + i)`, and if all logits of the row are at most M in size,

    S e^-2M / (S e^-2M + i)  <=  m_i  <=  S e^2M / (S e^2M + i)

so it goes to 0 as O(S / (S + i)). So does the influence of the source on the output of a head, for

    d o_i / d s_j = a_ij [ W_V + (v_j - o_i) q_i^T W_K / sqrt(dim) ]

is bounded by m_i times the size of the weights. `source_attention_curve` measures the mass,
`source_sensitivity` the influence on the model's output. The mass of even attention falls as well,
so look at the ratio to it, too: where it falls below 1, a head turns away from the source; where it
stays at 1, it only spreads.

    curve = source_attention_curve(model, {"input_ids": ids}, source_mask)
    print(curve)

The attention degeneration problem of Fu et al. (2304.04052), sections 4.2 and 4.3 as third-party
code has them [3rd]; the paper's body was not at hand, and the bound and the derivative were derived
for the project's card and checked numerically [inferred].
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from attending.core.statistics import expected_features
from attending.taps import AttentionCall, Proceed, tap
from attending.taps.running import evaluating, run_model


@dataclass(frozen=True, eq=False)
class SourceAttention:
    """The mass on the source, step by step; prints as a table.

    Attributes:
        steps: i, from 1: how many target tokens a row sees, its own included.
        count: samples that have a token at that step.
        layers: names of the attention modules.
        mass: on the source, mean over samples and heads.
        uniform: `S / (S + i)`, what even attention would have; mean over the samples.
        ratio: mass over that of even attention, likewise.
    """

    steps: Int[Tensor, " steps"]
    count: Int[Tensor, " steps"]
    layers: tuple[str, ...]
    mass: Float[Tensor, "layers steps"]
    uniform: Float[Tensor, " steps"]
    ratio: Float[Tensor, "layers steps"]

    def late_over_early(self) -> Float[Tensor, " layers"]:
        """The mass in the last quarter of the steps over that in the first quarter."""
        quarter = max(1, len(self.steps) // 4)
        return self.mass[:, -quarter:].mean(1) / self.mass[:, :quarter].mean(1)

    def __str__(self) -> str:
        """Some steps; means over the layers."""
        last = len(self.steps) - 1
        shown = sorted({round(last * part / 7) for part in range(8)})
        lines = [f"{'step':>6} {'mass':>7} {'uniform':>8} {'ratio':>7}"]
        for place in shown:
            mass, ratio = self.mass[:, place].mean(), self.ratio[:, place].mean()
            lines.append(
                f"{int(self.steps[place]):6d} {float(mass):7.3f} "
                f"{float(self.uniform[place]):8.3f} {float(ratio):7.3f}"
            )
        return "\n".join(lines)


def source_attention_curve(
    model: nn.Module,
    inputs: Any,
    source_mask: Bool[Tensor, "batch tokens"],
    target_mask: Bool[Tensor, "batch tokens"] | None = None,
) -> SourceAttention:
    """The mass that target tokens put on the source, in every self-attention of a model.

    One forward over sources and targets together, which is what decoding with a cache computes step
    by step. Exact and without a map; in evaluation mode, without gradients. Cross-attention is left
    out: its mass on the source is 1.

    Args:
        model: a decoder that a tap can see.
        inputs: one batch: a mapping of the model's arguments, a tuple of positional ones, or a
            tensor.
        source_mask: which tokens are source.
        target_mask: which are target; by default all others, without the padding of an
            `attention_mask` in the inputs.

    Returns:
        The curve, over as many steps as the longest target has.

    Raises:
        ValueError: for masks that do not fit, no source or target tokens, or a model without
            self-attention over these tokens.
        attending.taps.TapError: if no attention call was seen; the message says what to set.
    """
    if target_mask is None:
        target_mask = ~source_mask
        given = inputs.get("attention_mask") if isinstance(inputs, dict) else None
        if isinstance(given, Tensor) and given.shape == source_mask.shape:
            target_mask = target_mask & given.bool().to(target_mask.device)
    step, sizes = _steps(source_mask, target_mask)
    found: dict[str, list[Tensor]] = {}

    def measure(call: AttentionCall, proceed: Proceed) -> Tensor:
        shape = (call.query.shape[0], call.query_length, call.key_length)
        tokens = source_mask.shape[1]
        if not call.is_cross and call.query.dim() == 4 and shape == (len(step), tokens, tokens):
            features = source_mask.to(call.query.device)[:, None, :, None].float()
            mass = expected_features(
                call.query,
                call.key,
                features,
                attn_mask=call.attn_mask,
                is_causal=call.is_causal,
                scale=call.scale,
                enable_gqa=call.enable_gqa,
            )
            mean = mass.squeeze(-1).mean(1).double().cpu()
            found.setdefault(call.name, []).append(mean)
        return proceed(call)

    with evaluating(model), torch.no_grad(), tap(model, measure):
        run_model(model, inputs)
    if not found:
        raise ValueError(
            "source_mask: expected self-attention of the model over sources and targets together, "
            f"{list(source_mask.shape)}, got calls of other sizes only."
        )
    masses = torch.stack([torch.stack(parts).mean(0) for parts in found.values()])
    even = sizes[:, None] / (sizes[:, None] + step.clamp_min(1))
    steps = torch.arange(1, int(step.max()) + 1)
    chosen = [step == number for number in steps]
    return SourceAttention(
        steps=steps,
        count=torch.stack([one.sum() for one in chosen]),
        layers=tuple(found),
        mass=torch.stack([masses[:, one].mean(1) for one in chosen], 1).float(),
        uniform=torch.stack([even[one].mean() for one in chosen]).float(),
        ratio=torch.stack([(masses / even)[:, one].mean(1) for one in chosen], 1).float(),
    )


def source_sensitivity(
    run: Callable[[Float[Tensor, "batch tokens dim"]], Float[Tensor, "batch tokens out"]],
    embeddings: Float[Tensor, "batch tokens dim"],
    source_mask: Bool[Tensor, "batch tokens"],
    target_mask: Bool[Tensor, "batch tokens"] | None = None,
    *,
    size: float = 1e-3,
    generator: torch.Generator | None = None,
) -> Float[Tensor, " steps"]:
    """How far the output at each step moves when one source token is moved a little.

        S_i = mean over source positions j of ||z_i(x + d_j) - z_i(x)|| / ||d_j||

    One forward for each source position, with noise at that position of each sample. (The
    third-party code perturbs the row of the embedding table, so every occurrence of a token.)

    Args:
        run: from embeddings to the output z: `lambda x: model(inputs_embeds=x).logits`, or
            `lambda x: model.run(x, layout)`. In evaluation mode. The difference of two float32
            outputs has few digits: where the influence is small, run in float64.
        embeddings: x.
        source_mask: which tokens are source.
        target_mask: which are target; all others by default.
        size: standard deviation of the noise, against embeddings of about 1.
        generator: of the noise.

    Returns:
        S_i for i from 1, mean over samples and source positions.

    Raises:
        ValueError: for masks that do not fit, or no source or target tokens.
    """
    target_mask = ~source_mask if target_mask is None else target_mask
    step, _ = _steps(source_mask, target_mask)
    if embeddings.shape[:2] != source_mask.shape:
        raise ValueError(
            f"embeddings: expected [batch, tokens, dim] for {list(source_mask.shape)}, got "
            f"{list(embeddings.shape)}."
        )
    with torch.no_grad():
        before = run(embeddings)
        total = torch.zeros(step.shape, dtype=torch.float64)
        for column in source_mask.any(0).nonzero().flatten().tolist():
            noise = torch.randn(
                embeddings.shape[0], embeddings.shape[2], generator=generator, dtype=torch.float64
            )
            noise = (size * noise).to(embeddings)
            moved = embeddings.clone()
            moved[:, column] += noise
            change = (run(moved) - before).double().norm(dim=-1)
            rate = change / noise.double().norm(dim=-1, keepdim=True)
            total += (rate * source_mask[:, column, None]).cpu()
    mean = total / source_mask.sum(1, keepdim=True).clamp_min(1).cpu()
    return torch.stack([mean[step == number].mean() for number in range(1, int(step.max()) + 1)])


def source_mass_bounds(
    source_length: int,
    steps: Int[Tensor, "*steps"],
    max_logit: float | Float[Tensor, "*rows"],
) -> tuple[Float[Tensor, "*bounds"], Float[Tensor, "*bounds"]]:
    """The least and the largest source mass that rows with logits of at most this size can have.

        S e^-2M / (S e^-2M + i),   S e^2M / (S e^2M + i)

    Args:
        source_length: S.
        steps: i, how many target tokens the row sees.
        max_logit: M, the largest absolute value of the row's logits, softmax scale included. It
            broadcasts with the steps.

    Raises:
        ValueError: for a source length below 1, or a negative M.
    """
    if source_length < 1:
        raise ValueError(f"source_length: expected at least 1, got {source_length}.")
    largest = torch.as_tensor(max_logit, dtype=torch.float64)
    if bool((largest < 0).any()):
        raise ValueError(f"max_logit: expected at least 0, got {float(largest.min())}.")
    odds = math.log(source_length) - steps.double().log()
    return torch.sigmoid(odds - 2 * largest), torch.sigmoid(odds + 2 * largest)


def _steps(source_mask: Tensor, target_mask: Tensor) -> tuple[Tensor, Tensor]:
    """The step of each target token, 0 for others; and the source tokens of each sample."""
    if source_mask.dim() != 2 or target_mask.shape != source_mask.shape:
        raise ValueError(
            "source_mask, target_mask: expected [batch, tokens] both, got "
            f"{list(source_mask.shape)} and {list(target_mask.shape)}."
        )
    if bool((source_mask & target_mask).any()):
        raise ValueError("target_mask: expected no token that is source as well.")
    target = target_mask & source_mask.any(1, keepdim=True)
    if not bool(target.any()):
        raise ValueError("source_mask: expected samples with source and target tokens, got none.")
    step = (target.long().cumsum(1) * target).cpu()
    return step, source_mask.sum(1).double().cpu()
