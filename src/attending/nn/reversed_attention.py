"""Reversed attention (DependencyViT): tokens send to the tokens they look at.

In softmax attention a token gathers from those it attends to. Here it sends: token i, the child,
shares one unit of message out among its parents j, and a parent receives whatever its children send
(Ding et al., "Visual Dependency Transformers", 2304.03282, CVPR 2023):

    A_F[h, i, j] = softmax_j(scale * query[h, i] . key[h, j])         over the parents of a sender
    A_R[h, j, i] = A_F[h, i, j] * w[h, i]                             transposed, the sender gated
    output[h, j] = sum_i A_R[h, j, i] value[h, i]

Rows of A_R are not normalised: a parent receives between nothing and all there is. Columns are:
`sum_j A_R[h, j, i] = w[h, i]`. `ReversedAttention` makes the gates of two parts that are learned,
`w[h, i] = p[i, h] * m[i]`: which head token i sends through, and whether it sends at all. Summed
over the heads, A_R is the soft dependency mask, of which `attending.probes.dependency_tree` makes
trees.

**No map is stored.** With the lse of each row, the transposed product is itself an attention with
the roles exchanged: keys ask, queries answer with the bias -lse, and the output times
`exp(lse')` undoes the second normalisation (`attending.core.statistics.received_features`). The
backward pass needs no new kernel either: reversed attention is the gradient of ordinary attention
with respect to its values, so its own gradient with respect to what is sent is *ordinary attention*
whose values are the incoming gradient, and that to query and key the ordinary backward pass. Maps
of up to `DENSE_BYTES` in all are made, since that is faster.

Sources: no official code was published. Formulas follow the figure of the paper and a third-party
port to timm (fffffgggg54/pytorch-image-models, 11e8739), which the golden vectors come from. Where
we chose for ourselves it says so: [inferred].
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from attending.core.check import check_arguments, check_tensor
from attending.nn._head_counts import check_head_counts
from attending.nn._reversed import Reversed, hidden_senders, sender_gates, sender_shares

DENSE_BYTES = 2**23  # of the map; smaller ones are faster to make than to avoid

CAUSAL_REASON = (
    "reversed attention has no causal form. A token receives from those that attend to it, so "
    "under a causal mask from itself and later ones; and turned round, what it gets from earlier "
    "ones is divided by the sum over all that they may send to, the later ones among them"
)


def reversed_attention(
    query: Float[Tensor, "batch heads queries dim"],
    key: Float[Tensor, "batch kv_heads keys dim"],
    value: Float[Tensor, "batch kv_heads queries value_dim"],
    *,
    sender_weights: Float[Tensor, "*weight_batch queries"] | None = None,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    padding_sends: bool = False,
) -> Float[Tensor, "batch heads keys value_dim"]:
    """What each key receives if each query sends its value: `(w * softmax(q k^T))^T value`.

    Queries are the senders and keys the receivers, so **values belong to the queries**, and there
    is an output for every key. In self-attention all are the same tokens. Memory grows with the
    number of tokens; half precision is computed in float32 going forward.

    With all gates at 1 and a symmetric map it is ordinary attention. The output of a token that
    nobody sends to is 0.

    Args:
        query, key, scale, enable_gqa: as in `scaled_dot_product_attention`.
        value: what is sent; with `enable_gqa` the heads of the key, each shared by a group.
        sender_weights: the gates w; 1 by default. `[queries]`, or with leading dimensions that
            broadcast to `[batch, heads, queries]`. Any sign, and they have a gradient.
        attn_mask: to whom a query may send, boolean (True = it may) or a float bias; broadcasts to
            `[batch, heads, queries, keys]`. A query that may send to nobody sends nothing.
        is_causal: must be False; here for the sake of an error that says why.
        padding_sends: with as many queries as keys they are taken to be the same tokens, and one
            that is hidden from all queries as a key is padding and sends nothing. True lets it
            send, for senders and receivers that are different tokens.

    Returns:
        The output, in query's dtype.

    Raises:
        ValueError: for arguments that do not fit together, and for `is_causal`.
    """
    if is_causal:
        raise ValueError(f"is_causal: expected False: {CAUSAL_REASON}.")
    arguments = check_arguments(query, key, None, attn_mask, False, scale, enable_gqa)
    check_tensor("value", value, query)
    if value.shape[:3] != (*key.shape[:2], query.shape[2]):
        raise ValueError(
            "value: expected batch and heads of key and the length of query, "
            f"{[*key.shape[:2], query.shape[2]]}, since queries send, got {list(value.shape)}."
        )
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    sent = value.to(torch.promote_types(value.dtype, torch.float32))
    gates = sender_gates(query, sender_weights)
    if gates is not None:
        sent = sent * gates[..., None]
    if not padding_sends:
        padding = hidden_senders(arguments.bias, query, key)
        if padding is not None:
            sent = sent.masked_fill(padding[..., None], 0.0)
    bias, dtype = arguments.bias, query.dtype
    with torch.autocast(query.device.type, enabled=False):
        if query.shape[:3].numel() * key.shape[2] * sent.element_size() <= DENSE_BYTES:
            query, key = query.to(sent.dtype), key.to(sent.dtype)
            return (sender_shares(query, key, bias, arguments.scale).mT @ sent).to(dtype)
        received: Tensor = Reversed.apply(query, key, sent, bias, arguments.scale)  # type: ignore[no-untyped-call]
    return received.to(dtype)


def dependency_mask(
    query: Float[Tensor, "batch heads queries dim"],
    key: Float[Tensor, "batch kv_heads keys dim"],
    *,
    sender_weights: Float[Tensor, "*weight_batch queries"] | None = None,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    padding_sends: bool = False,
) -> Float[Tensor, "batch keys queries"]:
    """The soft dependency mask `A_M[j, i]`: how much token i sends to j, summed over the heads.

    Its columns sum to the gates of the sender summed over the heads, exactly. This one is a map of
    keys x queries, made a head at a time: it is for parsing, not for running the layer. What each
    token receives in all, the sums of its rows, can be had without it:
    `attending.statistics.column_mass(query, key, query_weights)`, summed over the heads.

    Args:
        query, key, sender_weights, attn_mask, scale, enable_gqa, padding_sends: as in
            `reversed_attention`.

    Returns:
        The mask, at least in float32.
    """
    arguments = check_arguments(query, key, None, attn_mask, False, scale, enable_gqa)
    dtype = torch.promote_types(query.dtype, torch.float32)
    gates, bias = sender_gates(query, sender_weights), arguments.bias
    padding = None if padding_sends else hidden_senders(bias, query, key)
    batch, heads, queries, _ = query.shape
    found = torch.zeros(batch, key.shape[2], queries, dtype=dtype, device=query.device)
    with torch.autocast(query.device.type, enabled=False):
        for head in range(heads):
            of_group = key[:, head * key.shape[1] // heads].to(dtype)
            of_head = None if bias is None else bias[:, head if bias.shape[1] > 1 else 0]
            sent = sender_shares(query[:, head].to(dtype), of_group, of_head, arguments.scale)
            if padding is not None:
                silent = padding[:, head if padding.shape[1] > 1 else 0]
                sent = sent.masked_fill(silent[..., None], 0.0)
            found = found + (sent if gates is None else sent * gates[:, head, :, None]).mT
    return found


class Sent(NamedTuple):
    """What a layer of reversed attention returns.

    Attributes:
        output: what the tokens received, projected, `[batch, tokens, embed_dim]`.
        message: the gate of each token after this layer, `[batch, tokens]`, to hand to the next.
        dependency: the soft dependency mask `[batch, parents, children]`, if it was asked for.
    """

    output: Float[Tensor, "batch tokens dim"]
    message: Float[Tensor, "batch tokens"]
    dependency: Float[Tensor, "batch tokens tokens"] | None


class ReversedAttention(nn.Module):
    """Multi-head reversed attention with head selector and message controller.

        p[i, h] = softmax_h(W_p x[i] / selector_temperature)       through which head i sends
        c[i]    = sigmoid(W_2 gelu(W_1 x[i]) + b)                  how much it wants to send
        m[i]    = c[i] * (m[i] of the layer before)                once quiet, a token stays so
        output  = out_proj(reversed_attention(..., sender_weights=p * m))

        layer = ReversedAttention(64, 4)
        output, message, _ = layer(hidden)                         # the first layer: m = 1
        output, message, _ = next_layer(hidden, message)           # the others go on from there

    Gates are computed in float32 or wider, whatever autocast says: with a temperature of 0.1 they
    are nearly one-hot, and m is a product over the layers. There is no dropout on the map, since
    with it a token would no longer send as much as its gate says.

    Args:
        embed_dim: width in and out.
        num_heads: heads, each `embed_dim // num_heads` wide.
        bias: a bias in the output projection.
        qkv_bias: biases in the projections to query, key and value; none in the port.
        selector_temperature: of p; 0.1 (appendix D.1 of the paper, says the port).
        controller_dim: width of the controller's hidden layer; `embed_dim // 2` by default.
        controller_bias: where b starts. Without a bias c starts near 0.5, and after 12 layers
            m is about 2e-4 with hardly a gradient, so ours starts at 4, c = 0.98 [inferred]. None
            leaves b out, as the port does.
        device, dtype: of the parameters.

    Raises:
        ValueError: for sizes that do not divide, or a temperature that is not positive.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        bias: bool = True,
        qkv_bias: bool = False,
        selector_temperature: float = 0.1,
        controller_dim: int | None = None,
        controller_bias: float | None = 4.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_head_counts(embed_dim, num_heads)
        if not selector_temperature > 0:
            raise ValueError(
                f"selector_temperature: expected more than 0, got {selector_temperature}."
            )
        hidden = max(embed_dim // 2, 1) if controller_dim is None else controller_dim
        if hidden < 1:
            raise ValueError(f"controller_dim: expected at least 1, got {controller_dim}.")
        self.num_heads, self.selector_temperature = num_heads, selector_temperature
        factory = {"device": device, "dtype": dtype}
        self.q_proj, self.k_proj, self.v_proj = (
            nn.Linear(embed_dim, embed_dim, bias=qkv_bias, **factory) for _ in range(3)
        )
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias, **factory)
        self.head_selector = nn.Linear(embed_dim, num_heads, bias=False, **factory)
        # Small, or from the start some heads would be chosen by nobody.
        nn.init.normal_(self.head_selector.weight, std=0.02)
        last = nn.Linear(hidden, 1, bias=controller_bias is not None, **factory)
        if controller_bias is not None:
            nn.init.constant_(last.bias, controller_bias)
        first = nn.Linear(embed_dim, hidden, bias=False, **factory)
        self.message_controller = nn.Sequential(first, nn.GELU(), last)

    def forward(
        self,
        hidden: Float[Tensor, "batch tokens dim"],
        message: Float[Tensor, "batch tokens"] | None = None,
        attn_mask: Tensor | None = None,
        need_dependency: bool = False,
    ) -> Sent:
        """Send.

        Args:
            hidden: the tokens, after the block's norm.
            message: the gates that the layer before returned; 1 by default.
            attn_mask: as in `reversed_attention`, True = may send to. Padding is `[batch, 1, 1,
                tokens]`; its tokens send nothing and their message becomes 0.
            need_dependency: return the soft dependency mask, too: a map of tokens x tokens.
        """
        query, key, value = self.project(hidden)
        gates, message = self.gates(hidden, message)
        if attn_mask is not None:
            bias = check_arguments(query, key, None, attn_mask).bias
            padding = hidden_senders(bias, query, key)
            if padding is not None:
                message = message.masked_fill(padding.all(1), 0.0)
        received = reversed_attention(query, key, value, sender_weights=gates, attn_mask=attn_mask)
        dependency = None
        if need_dependency:
            dependency = dependency_mask(query, key, sender_weights=gates, attn_mask=attn_mask)
        return Sent(self.out_proj(received.transpose(1, 2).flatten(2)), message, dependency)

    def gates(
        self,
        hidden: Float[Tensor, "batch tokens dim"],
        message: Float[Tensor, "batch tokens"] | None = None,
    ) -> tuple[Float[Tensor, "batch heads tokens"], Float[Tensor, "batch tokens"]]:
        """`p * m` of every head, and m, of the arguments of `forward`."""
        with torch.autocast(hidden.device.type, enabled=False):
            wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
            chosen = _wide(self.head_selector, wide) / self.selector_temperature
            first, act, last = self.message_controller
            control = _wide(last, act(_wide(first, wide))).sigmoid().squeeze(-1)
            message = control if message is None else control * message
            return chosen.softmax(-1).mT * message[:, None], message

    def project(self, hidden: Float[Tensor, "batch tokens dim"]) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value, `[batch, heads, tokens, head_dim]`."""
        query, key, value = (
            layer(hidden).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        return query, key, value

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, selector_temperature={self.selector_temperature}"


def _wide(layer: nn.Module, hidden: Tensor) -> Tensor:
    """A linear layer in the precision of its input, wider than its parameters may be."""
    assert isinstance(layer, nn.Linear)
    bias = None if layer.bias is None else layer.bias.to(hidden.dtype)
    return nn.functional.linear(hidden, layer.weight.to(hidden.dtype), bias)
