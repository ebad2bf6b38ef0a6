"""A GPT-2 of transformers without layer norms and activations, in the variants of the paper.

    model = GPT2LMHeadModel(config)                  # or from_pretrained: then fine-tune it
    reduce_nonlinearities(model, initial_temperature=1.0)
    ...train as before: Trainer, generate, save_pretrained; the class is still GPT2LMHeadModel...
    fold_for_inference(model)

A real model class is changed rather than a small one written anew, because then the tokenizer, the
trainer, the cache, `generate` and the tap go on working, and the baseline differs from the variant
in nothing but what is studied.

| the paper's name | `layer_norm` | `feed_forward` | `initial_temperature` |
| --- | --- | --- | --- |
| SM+LN+G | True | `"keep"` | None |
| SM+LN+R | True | `"relu"` | None |
| SM+LN | True | `"linear"` | None |
| SM+G | False | `"keep"` | None |
| SM+R | False | `"relu"` | None |
| SM | False | `"linear"` | None |
| SM with weight or spectral normalisation | False | `"linear"`, `norm=...` | None |
| SM+ScFFN | False | `"scaled"` | None |
| SM+ScFuFFN | False | `"scaled_fused"` | None |
| SM(t)+ScFuFFN | False | `"scaled_fused"` | a number |

Source: Jha and Reagen, "Entropy-Guided Attention for Private LLMs" (arXiv 2501.03489). Its
repository has no model code. That the last layer norm, before the vocabulary, goes with the others
is inferred from "LN-free".
"""

from typing import Any, Literal, TypeVar, cast, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.utils import parametrize

from attending.nn.linear import linear_weight
from attending.nn.query_temperature import QueryScale, QueryTemperature
from attending.nn.softmax_only import ScaledFeedForward, WeightNorm

FeedForward = Literal["keep", "relu", "linear", "fused", "scaled", "scaled_fused"]
Model = TypeVar("Model", bound=nn.Module)


def reduce_nonlinearities(
    model: Model,
    *,
    layer_norm: bool = False,
    feed_forward: FeedForward = "scaled_fused",
    norm: WeightNorm | None = None,
    initial_temperature: float | None = None,
) -> Model:
    """Take layer norms and activations out of a GPT-2, in place, and put in what replaces them.

    Weights are kept: the two matrices of a feed-forward part become their product where it is
    fused. What the model computes changes, of course; a pretrained one has to be trained on.

    To load such a model again, build it from its config, call this with the same arguments, and
    then `safetensors.torch.load_model(model, folder / "model.safetensors")`.

    Args:
        model: a `GPT2LMHeadModel`, or another model with a `GPT2Model` in it.
        layer_norm: keep the layer norms.
        feed_forward: `"keep"` the activation; `"relu"` in its place; `"linear"`: none; `"fused"`:
            none, so the two matrices become one; `"scaled"`: none, and two learned numbers,
            `beta x + FFN(x) / alpha`, which take the place of layer norms; `"scaled_fused"`: both.
        norm: normalise the matrices of the feed-forward part by themselves, see
            `attending.nn.softmax_only.ScaledFeedForward`; not with an activation.
        initial_temperature: learn a temperature per head and position, starting here (see
            `attending.nn.query_temperature.QueryTemperature`); None for none. The paper starts at
            0.01 and 0.1.

    Returns:
        The same model.

    Raises:
        ValueError: for a model that is no GPT-2, has cross-attention or was changed before, or
            arguments that do not go together. The model is then as it was.
    """
    body = _gpt2(model)
    if feed_forward not in get_args(FeedForward):
        raise ValueError(
            f"feed_forward: expected one of {get_args(FeedForward)}, got {feed_forward!r}."
        )
    if "scaled" in feed_forward and layer_norm:
        raise ValueError(
            f'feed_forward: expected "keep", "relu", "linear" or "fused" with layer_norm=True, got '
            f"{feed_forward!r}: beta scales the input of the feed-forward part, which a layer norm "
            "hides from it."
        )
    if norm is not None and feed_forward in ("keep", "relu"):
        raise ValueError(
            f"norm: expected None with feed_forward={feed_forward!r}, got {norm!r}; it replaces "
            "layer norms where there is no activation."
        )
    config: Any = body.config
    heads, context = config.num_attention_heads, config.max_position_embeddings
    temperatures = [
        None
        if initial_temperature is None
        else QueryTemperature(heads, context, initial_temperature).to(block.mlp.c_fc.weight)
        for block in body.h
    ]
    parts = [_feed_forward(block.mlp, feed_forward, norm) for block in body.h]
    for block, part, temperature in zip(body.h, parts, temperatures, strict=True):
        if not layer_norm:
            block.ln_1, block.ln_2 = nn.Identity(), nn.Identity()
        block.mlp = part
        if feed_forward == "relu":
            block.mlp.act = nn.ReLU()
        if temperature is not None:
            block.attn = TemperedAttention(block.attn, temperature)
    if not layer_norm:
        body.ln_f = nn.Identity()
    if feed_forward != "keep":
        config.activation_function = "relu" if feed_forward == "relu" else "linear"
    return model


def fold_for_inference(model: Model) -> Model:
    """Make what `reduce_nonlinearities` put in as cheap as it gets, in place; outputs stay.

    Each feed-forward part, scales and norms included, becomes one `[hidden, hidden]` matrix:
    `(beta - 1) I + W_out W_in / alpha`. Temperatures become a table of `1 / temperature` per head
    and position. They cannot go into the query matrix, which is the same for all positions.

    Raises:
        ValueError: if there is nothing to fold.
    """
    found = False
    for block in _blocks(model):
        if isinstance(block.mlp, LinearFeedForward):
            with torch.no_grad():
                linear = block.mlp.feed_forward.fold()
                linear.weight.sub_(torch.eye(len(linear.weight)).to(linear.weight))
            block.mlp, found = linear, True
        if isinstance(block.attn, TemperedAttention):
            projection = cast(TemperedProjection, block.attn.attention.c_attn)
            if isinstance(projection.temperature, QueryTemperature):
                projection.temperature, found = projection.temperature.fold(), True
    if not found:
        raise ValueError(
            f"model: expected one that reduce_nonlinearities made linear in some part, got "
            f"{type(model).__name__} without such a part."
        )
    return model


class LinearFeedForward(nn.Module):
    """A `ScaledFeedForward` in a block that adds its input by itself."""

    def __init__(self, feed_forward: ScaledFeedForward) -> None:
        super().__init__()
        self.feed_forward = feed_forward

    def forward(
        self, hidden: Float[Tensor, "*batch embed_dim"]
    ) -> Float[Tensor, "*batch embed_dim"]:
        """What is added to the residual stream."""
        return self.feed_forward.branch(hidden)


class TemperedProjection(nn.Module):
    """The joint query, key and value projection of GPT-2, with temperatures on the query."""

    def __init__(self, projection: nn.Module, temperature: QueryTemperature) -> None:
        super().__init__()
        self.projection = projection
        self.temperature: QueryTemperature | QueryScale = temperature
        self.positions: int | Int[Tensor, "#batch queries"] = 0

    def forward(
        self, hidden: Float[Tensor, "batch tokens dim"]
    ) -> Float[Tensor, "batch tokens qkv"]:
        """Query, key and value in one, as GPT-2 has them."""
        query, key, value = self.projection(hidden).chunk(3, -1)
        heads = (
            self.temperature.log_temperature
            if isinstance(self.temperature, QueryTemperature)
            else self.temperature.scale
        ).shape[0]
        split = query.unflatten(-1, (heads, -1)).transpose(1, 2)
        query = self.temperature(split, self.positions).transpose(1, 2).flatten(2)
        return torch.cat([query, key, value], -1)


class TemperedAttention(nn.Module):
    """The attention of GPT-2 with a temperature per head and position."""

    def __init__(self, attention: nn.Module, temperature: QueryTemperature) -> None:
        super().__init__()
        attention.c_attn = TemperedProjection(cast(nn.Module, attention.c_attn), temperature)
        self.attention = attention

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As the attention does, telling the projection where in the text the tokens are."""
        projection = cast(TemperedProjection, self.attention.c_attn)
        positions = kwargs.get("position_ids")
        if positions is None:  # a version of transformers that keeps them to itself
            cache = next((kwargs[k] for k in ("cache", "past_key_values") if kwargs.get(k)), None)
            positions = 0 if cache is None else cache.get_seq_length(self.attention.layer_idx)
        projection.positions = positions
        try:
            return self.attention(hidden_states, *args, **kwargs)
        finally:
            projection.positions = 0


def _blocks(model: nn.Module) -> list[Any]:
    return list(cast(Any, _body(model)).h)


def _body(model: nn.Module) -> nn.Module:
    from transformers import GPT2Model

    bodies = [module for module in model.modules() if isinstance(module, GPT2Model)]
    if len(bodies) != 1:
        raise ValueError(
            f"model: expected a GPT-2 of transformers, such as GPT2LMHeadModel, got "
            f"{type(model).__name__}. For others, build the block with attending.nn.softmax_only."
        )
    return cast(nn.Module, bodies[0])


def _gpt2(model: nn.Module) -> Any:
    body: Any = _body(model)
    if body.config.add_cross_attention:
        raise ValueError("model: expected a decoder alone, got one with add_cross_attention=True.")
    changed = [
        part for block in body.h for part in (block.attn, block.mlp, block.ln_1)
        if isinstance(part, TemperedAttention | LinearFeedForward | nn.Linear | nn.Identity)
    ]  # fmt: skip
    if changed:
        raise ValueError(
            "model: expected a GPT-2 as transformers makes it, got one that reduce_nonlinearities "
            "has changed before; start from a fresh one."
        )
    return body


@torch.no_grad()
def _feed_forward(mlp: Any, kind: FeedForward, norm: WeightNorm | None) -> nn.Module:
    """The new feed-forward part, with the weights of the old one."""
    if kind in ("keep", "relu"):
        return cast(nn.Module, mlp)
    weights = [cast(Tensor, linear_weight(part)) for part in (mlp.c_fc, mlp.c_proj)]
    biases = [mlp.c_fc.bias, mlp.c_proj.bias]
    fused = "fused" in kind
    if fused:
        weights, biases = [weights[1] @ weights[0]], [weights[1] @ biases[0] + biases[1]]
    made = ScaledFeedForward(
        weights[0].shape[1],
        None if fused else weights[0].shape[0],
        scaled="scaled" in kind,
        norm=norm,
        bias=True,
        dropout=mlp.dropout.p,
        device=weights[0].device,
        dtype=weights[0].dtype,
    )
    for linear, weight, bias in zip(made.linears, weights, biases, strict=True):
        layer = cast(nn.Linear, linear)
        if parametrize.is_parametrized(layer):
            layer.weight = weight.contiguous()
        else:
            layer.weight.copy_(weight)
        layer.bias.copy_(bias)
    return LinearFeedForward(made).train(mlp.training)
