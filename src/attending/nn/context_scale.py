"""An output gate per token and head, computed from the input: explicit context-aware scaling.

An et al. (2502.06415) find that the outliers of language models stand in for a scale that softmax
attention does not have: a head that has nothing to add must put its attention somewhere, and puts
it on a token whose value is tiny. With the scale as a parameter, their models grow no outliers:

    y = S(x) * attention(x),    S(x) = max_scale * sigmoid(x W + b)    one number per token and head

(variant e of the paper; the gated attention of Qwen, 2505.06708, is its relative). It multiplies
the output of attention, so it goes with any kernel.

The official code draws W from normal(0, 0.02), so that S starts near 1. Here W is 0 and b is such
that S starts at exactly 1: a model that gets the gate computes what it did before.
"""

import math
import re
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from attending.nn.linear import linear_weight


class ContextScale(nn.Module):
    """`max_scale * sigmoid(x W + b)`: a factor in (0, max_scale) for every token and head.

        gate = ContextScale(dim=64, num_heads=4)
        output = output * gate(hidden).transpose(1, 2)[..., None]    # [batch, heads, tokens, dim]

    Starts as 1 everywhere.

    Args:
        dim: width of the hidden state that the factor is computed from: the input of the attention
            module, after its norm.
        num_heads: factors per token.
        max_scale: bound of the factor, above 1 (the start) and 2 in the paper. A gate in (0, 1)
            could only shrink what a pretrained model computes.
        device, dtype: of the parameters, `dim * num_heads + num_heads` numbers.

    Raises:
        ValueError: for a size below 1 or a `max_scale` that is not above 1.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        max_scale: float = 2.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, size in (("dim", dim), ("num_heads", num_heads)):
            if size < 1:
                raise ValueError(f"{name}: expected at least 1, got {size}.")
        if not 1.0 < max_scale < math.inf:
            raise ValueError(
                f"max_scale: expected a finite number above 1, where the factor starts, got "
                f"{max_scale}."
            )
        self.max_scale = float(max_scale)
        self.gate = nn.Linear(dim, num_heads, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Make the factor 1 for every input."""
        nn.init.zeros_(self.gate.weight)
        nn.init.constant_(self.gate.bias, -math.log(self.max_scale - 1.0))

    def forward(self, hidden: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch heads"]:
        """The factor of each token and head."""
        return self.max_scale * torch.sigmoid(self.gate(hidden))

    def extra_repr(self) -> str:
        return f"max_scale={self.max_scale}"


# The projection after the heads are merged, by the names that transformers' models give it.
OUTPUT_PROJECTIONS = ("o_proj", "out_proj", "c_proj", "dense", "wo", "o")
_ATTENTION = re.compile("Attention|Attn")


class Site(NamedTuple):
    """An attention module, and the child in it that projects the merged heads."""

    name: str
    attention: nn.Module
    projection: nn.Module
    num_heads: int
    hidden_dim: int


class ContextScaleHandle:
    """What `add_context_scale` returns: its gates, and the way back.

    As a context manager it takes the gates off at the end of the block.

    Attributes:
        scales: the gates by the name of their attention module; they are submodules of the model,
            so its `parameters()`, `state_dict()` and `to()` include them.
    """

    def __init__(self, sites: Sequence[Site], max_scale: float) -> None:
        self.scales: dict[str, ContextScale] = {}
        self._hooks: list[RemovableHandle] = []
        self._sites = list(sites)
        for site in sites:
            weight = next(site.projection.parameters())
            scale = ContextScale(
                site.hidden_dim, site.num_heads, max_scale, weight.device, weight.dtype
            ).train(site.attention.training)
            site.attention.add_module("context_scale", scale)
            self.scales[site.name] = scale
            gated = _Gated(scale, site.name)
            self._hooks += [
                site.attention.register_forward_pre_hook(gated.compute, with_kwargs=True),
                site.projection.register_forward_pre_hook(gated.apply),
            ]

    def parameters(self) -> list[nn.Parameter]:
        """Those of the gates: what to train when the rest of the model stays as it is."""
        return [parameter for scale in self.scales.values() for parameter in scale.parameters()]

    def remove(self) -> None:
        """Take hooks and gates off: the model is what it was. A second call does nothing."""
        for hook in self._hooks:
            hook.remove()
        for site in self._sites:
            site.attention._modules.pop("context_scale", None)
        self._hooks, self._sites = [], []

    def __enter__(self) -> "ContextScaleHandle":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.remove()


class _Gated:
    """The hooks of one attention module: an object, so that a deepcopy has its own gate."""

    def __init__(self, scale: ContextScale, name: str) -> None:
        self.scale = scale
        self.name = name
        self.factor: Tensor | None = None

    def compute(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = kwargs.get("hidden_states", args[0] if args else None)
        if not isinstance(hidden, Tensor):
            raise ValueError(
                f"{self.name or 'the model'}: expected its input as the argument hidden_states or "
                f"first, got {type(hidden).__name__}."
            )
        self.factor = self.scale(hidden)

    def apply(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        factor, self.factor = self.factor, None
        if factor is None:  # the projection was called by itself
            return None
        merged = args[0]
        if merged.shape[:-1] != factor.shape[:-1]:
            raise ValueError(
                f"{self.name}: expected the merged heads as {[*factor.shape[:-1], -1]}, the tokens "
                f"of its input, got {list(merged.shape)}; this module reshapes between its input "
                "and its output projection."
            )
        heads = merged.unflatten(-1, (factor.shape[-1], -1))
        return ((heads * factor[..., None].to(heads.dtype)).flatten(-2), *args[1:])


def add_context_scale(
    model: nn.Module,
    max_scale: float = 2.0,
    select: Callable[[str, nn.Module], bool] | None = None,
) -> ContextScaleHandle:
    """Give the attention modules of a pretrained model a `ContextScale` before their projection.

        gates = add_context_scale(model)             # model(x) is unchanged
        optimizer = torch.optim.AdamW(gates.parameters(), lr=1e-3)
        ...
        model.state_dict()                           # has '...self_attn.context_scale.gate.weight'

    The gates are submodules, so they are trained, moved and saved with the model. To load them,
    make the model, call this, then `model.load_state_dict`. Works on the attention modules of
    transformers that hold their own output projection (Llama, Mistral, Qwen, GPT-2, OPT, T5,
    ViT, ...), as forward hooks: on any attention implementation, with any cache.

    Args:
        model: a transformers model, or any with such attention modules.
        max_scale: see `ContextScale`.
        select: `select(name, module)` says which attention modules get a gate; all by default.

    Returns:
        The handle: `.scales`, `.parameters()`, `.remove()`.

    Raises:
        ValueError: if the model has no such attention module, or has gates already.
    """
    sites = [site for site in _sites(model) if select is None or select(site.name, site.attention)]
    if not sites:
        names = ", ".join(OUTPUT_PROJECTIONS)
        raise ValueError(
            f"model: expected attention modules that hold their output projection ({names}) and "
            f"know their number of heads, found none in {type(model).__name__}"
            f"{' that `select` accepts' if select else ''}. nn.MultiheadAttention never calls its "
            "projection, so no hook sees it; build with attending.nn.self_attention.SelfAttention."
        )
    taken = [site.name for site in sites if hasattr(site.attention, "context_scale")]
    if taken:
        raise ValueError(
            f"model: expected attention without a context scale, got one in {taken[0]!r} already. "
            "Take it off first, with remove() of its handle."
        )
    return ContextScaleHandle(sites, max_scale)


def _sites(model: nn.Module) -> list[Site]:
    found = []
    for name, module in model.named_modules():
        if not _ATTENTION.search(type(module).__name__) or isinstance(
            module, nn.MultiheadAttention
        ):
            continue
        heads = _num_heads(module)
        for child in OUTPUT_PROJECTIONS:
            projection = module._modules.get(child)
            weight = None if projection is None else linear_weight(projection)
            if projection is not None and weight is not None and heads:
                if weight.shape[1] % heads == 0:
                    found.append(Site(name, module, projection, heads, weight.shape[0]))
                break
    return found


def _num_heads(module: nn.Module) -> int | None:
    config = getattr(module, "config", None)
    for owner, name in (
        (module, "num_heads"),
        (module, "n_heads"),
        (module, "num_attention_heads"),
        (config, "num_attention_heads"),
    ):
        heads = getattr(owner, name, None)
        if isinstance(heads, int) and heads > 0:
            return heads
    return None
