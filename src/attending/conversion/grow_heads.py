"""Grow a trained model by copying signal heads only, without changing what it computes.

    from attending.conversion.grow_heads import grow_heads, grow_signal_heads

    layer = grow_signal_heads(layer, 2)        # 4 + 2 heads become 8 + 2
    grow_heads(model, 2, noise_snr_db=20)      # all layers of a model of convert_differential

Each signal head is copied `factor` times beside itself, within its group; noise heads, keys,
values, lambda and the norm stay. The columns of the output projection that read a head are shared
out among its copies: `W / factor` each. So the output is the same, to rounding. Copies beside each
other keep their keys and their noise head; a tiled list of heads would not.

Equal copies get equal gradients and stay equal. `noise_snr_db` breaks that without changing the
function: to the columns of the copies random numbers are added whose sum over the copies is 0.
(HyperCloning, apple/ml-hypercloning, has the same device for cloned layers; there, too, noise that
is added in one copy is taken away in another.)

`hidden_factor` clones the width as well, in the way of HyperCloning: a layer for hidden states
`[x, ..., x]` whose output is `[y, ..., y]`. It is for use in a model whose every part is cloned so;
`grow_heads` does not do that.

Source: 2510.06949 says that only signal heads are replicated; that was at hand as an abstract. The
exact rule is inferred. It fits Motif's two models: 8 + 8 heads at width 2048, 32 + 8 at 4096.
"""

import math

import torch
from torch import Tensor, nn

from attending.conversion.differential import differential_layers, record_layers
from attending.nn.grouped_differential_attention import GroupedDifferentialAttention


def grow_signal_heads(
    layer: GroupedDifferentialAttention,
    factor: int,
    *,
    hidden_factor: int = 1,
    noise_snr_db: float | None = None,
    seed: int = 0,
) -> GroupedDifferentialAttention:
    """A layer with `factor` times the signal heads that computes the same.

    Args:
        layer: the layer to grow; it stays as it is.
        factor: copies of each signal head, itself included.
        hidden_factor: times the width of the hidden states, see the module's docstring.
        noise_snr_db: how far the noise in the output projection is below its weights, in decibels:
            `20 log10(std of the weights / std of the noise)`. None: no noise. The function stays
            the same in any case.
        seed: of the noise.

    Returns:
        The new layer, on the same device, in the same mode.

    Raises:
        ValueError: for a factor below 1, or noise without copies that it could be shared among.
    """
    if factor < 1 or hidden_factor < 1:
        raise ValueError(
            f"factor, hidden_factor: expected at least 1, got {factor} and {hidden_factor}."
        )
    if noise_snr_db is not None and (factor == 1 or not math.isfinite(noise_snr_db)):
        raise ValueError(
            "noise_snr_db: expected a finite number with a factor above 1, since the noise has to "
            f"cancel between copies, got {noise_snr_db} with factor {factor}."
        )
    heads, weight = layer.heads, layer.out_proj.weight
    options = layer.options()
    options["num_signal_heads"] *= factor
    for width in ("embed_dim", "kdim", "vdim"):
        options[width] *= hidden_factor
    grown = GroupedDifferentialAttention(**options, device=weight.device, dtype=weight.dtype).train(
        layer.training
    )
    new = {name: parameter.detach() for name, parameter in layer.named_parameters()}
    new["q_proj.weight"] = _copy_heads(new["q_proj.weight"], heads.grown_from(factor))
    if layer.q_proj.bias is not None:
        new["q_proj.bias"] = _copy_heads(new["q_proj.bias"], heads.grown_from(factor))
    copies = [head for head in range(heads.num_signal) for _ in range(factor)]
    new["out_proj.weight"] = _copy_heads(weight.detach().T, tuple(copies)).T / factor
    if layer.lambda_mode == "token":
        for name in ("lambda_proj.weight", "lambda_proj.bias"):
            if name in new:
                new[name] = new[name][copies]
    if noise_snr_db is not None:
        new["out_proj.weight"] = _add_noise(
            new["out_proj.weight"], factor, heads.num_signal, noise_snr_db, seed
        )
    if hidden_factor > 1:
        for name in ("q_proj", "k_proj", "v_proj", "lambda_proj"):
            if f"{name}.weight" in new:
                new[f"{name}.weight"] = (
                    new[f"{name}.weight"].repeat(1, hidden_factor) / hidden_factor
                )
        new["out_proj.weight"] = new["out_proj.weight"].repeat(hidden_factor, 1)
        if "out_proj.bias" in new:
            new["out_proj.bias"] = new["out_proj.bias"].repeat(hidden_factor)
    grown.load_state_dict(new)
    for name, parameter in layer.named_parameters():
        grown.get_parameter(name).requires_grad_(parameter.requires_grad)
    return grown


def grow_heads(
    model: nn.Module, factor: int, *, noise_snr_db: float | None = None, seed: int = 0
) -> nn.Module:
    """Grow the signal heads of all differential layers of a model, in place.

    The model computes the same and is larger: train it on. Optimizers hold parameters that are
    gone, so make a new one. `save_pretrained` and `load_differential` go on working.

    Args:
        model: of `attending.conversion.differential`.
        factor, noise_snr_db: as in `grow_signal_heads`.
        seed: of the noise; each layer has its own.

    Returns:
        The same model.

    Raises:
        ValueError: for a model without such layers, or options that do not fit; the model is then
            as it was.
    """
    layers = differential_layers(model)
    grown = [
        grow_signal_heads(layer.attention, factor, noise_snr_db=noise_snr_db, seed=seed + index)
        for index, layer in enumerate(layers)
    ]
    for layer, attention in zip(layers, grown, strict=True):
        layer.attention = attention
    record_layers(model)
    return model


def _copy_heads(rows: Tensor, heads: tuple[int, ...]) -> Tensor:
    """Blocks of rows, one for each head, in a new order."""
    count = max(heads) + 1
    blocks: Tensor = rows.unflatten(0, (count, -1))
    return blocks[list(heads)].flatten(0, 1)


def _add_noise(weight: Tensor, factor: int, heads: int, snr_db: float, seed: int) -> Tensor:
    """Noise on the columns `[out, heads * factor * width]`, whose sum over the copies is 0."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
    copies: Tensor = noise.unflatten(1, (heads, factor, -1))
    copies = copies - copies.mean(2, keepdim=True)
    copies = copies * (weight.double().std().cpu() / copies.std() / 10 ** (snr_db / 20))
    return weight + copies.flatten(1).to(weight)
