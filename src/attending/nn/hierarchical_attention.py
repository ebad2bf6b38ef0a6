"""Hierarchical self-attention: softmax attention that treats a distant branch of a tree as one.

For nested signals: tokens in sentences in paragraphs, patches in quarters of an image, an image
beside several texts. A tree over the tokens (`attending.nn.partition_tree`) ties the attention:
for two siblings B and C, every token of B gives every token of C the same weight. Among all such
maps, this is the one nearest to softmax attention S = scale * query . key, in the sum over the rows
of KL(tied row || softmax row). It has no parameters and costs `tree.num_sibling_pairs` dot products
in place of tokens squared.

With |B| the tokens below B, and for siblings B and C of parent A

    -psi(B, C) = mean of S over the pairs of B and C     (+ e_B . e_C, if nodes have embeddings)
    -phi(leaf) = S of the leaf with itself               (-inf: a token does not see itself)
    z(B)       = log(exp(-phi(B)) + sum_C |C| exp(-psi(B, C)))
    -phi(A)    = sum_B |B| / |A| z(B)

the weights follow from above: `mass(root) = 1`, `mass(B) = mass(A) exp(-phi(B) - z(B))`, and each
token of C gets `mass(A) exp(-psi(B, C) - z(B))` from each token of B. The means come from pooled
queries and keys, so that one pass up and one pass down the tree do it all.

**There is no causal form.** Seeing earlier siblings only is not enough: psi(B, C) and phi(B) hold
the mean query of B, later tokens included, and these would change earlier rows.

Source: Amizadeh et al., "Hierarchical Self-Attention" (2509.15448), of which no official code
exists. Energies (equations 7 and 8), optimality (Theorem 3.2) and complexity are known to us from
notes of others on the paper [3rd]; the closed form of the weights and of the gap is derived here
and held against a constrained optimiser in the tests. The paper's convention for leaves is not
confirmed: with `include_self=True` a flat tree is softmax attention, which its Proposition 3.1
needs; False is what a third party's code does [inferred]. The code of that party
differs in the scale, in the value of a leaf and in normalised queries, and is no optimum.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from attending.core.check import check_arguments
from attending.core.state import attention_state
from attending.nn._key_padding import compact, key_padding, restore
from attending.nn._tree_passes import pass_down, pass_up
from attending.nn.partition_tree import PartitionTree, windows_tree

Tree: TypeAlias = PartitionTree | Sequence[PartitionTree] | Sequence[int]
Energy = Literal["dot", "sqdist"]


def hierarchical_attention(
    query: Float[Tensor, "batch heads tokens dim"],
    key: Float[Tensor, "batch kv_heads tokens dim"],
    value: Float[Tensor, "batch kv_heads tokens value_dim"],
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    tree: Tree,
    include_self: bool = True,
    energy: Energy = "dot",
    node_embedding: Float[Tensor, "nodes embedding"] | None = None,
) -> Float[Tensor, "batch heads tokens value_dim"]:
    """Attention tied along a tree, the nearest to softmax attention; see the module's help.

        tree = PartitionTree.from_labels(sentence_of_token, paragraph_of_token)
        hierarchical_attention(query, key, value, tree=tree)
        hierarchical_attention(query, key, value, tree=(4, 8))     # windows of 4, and of 32 tokens

    Args:
        query, key, value: as in `scaled_dot_product_attention`, of one length. Half precision is
            computed in float32.
        attn_mask: hides keys, the same for all queries: boolean `[batch, 1, 1, tokens]`, True =
            visible. Hidden tokens leave the tree, also as queries, and get output 0. Windows are
            laid over the visible tokens; other trees stay as they are.
        is_causal: refused, see the module's help.
        scale: of the scores, `dim ** -0.5` by default.
        enable_gqa: let key and value have fewer heads, each shared by a group of query heads.
        tree: one tree for all sequences, a tree for each, or the sizes of nested windows as in
            `PartitionTree.windows`. With `()` it is softmax attention.
        include_self: whether a token sees itself.
        energy: "dot", the scores; "sqdist", `-scale / 2 * |query - key|^2` as the paper prints it,
            which is the same for queries and keys of one norm, such as after a LayerNorm.
        node_embedding: e of the nodes, in the numbering of the tree, which it adds to the scores
            of siblings (and of a leaf with itself): the paper's position within a family. Needs
            one tree for all sequences.

    Returns:
        The output in query's dtype. Differentiable in query, key, value and node_embedding.

    Raises:
        ValueError: for a causal mask, a mask that depends on the query, or a tree of other length.
    """
    _refuse_causal(is_causal)
    scale = _check(query, key, value, scale, enable_gqa)
    visible = key_padding(attn_mask, query)
    order = None
    if visible is not None and _is_windows(tree):
        (query, key, value), visible, order = compact((query, key, value), visible)
    batch, tokens, dtype = query.shape[0], query.shape[2], query.dtype
    one, forest = _one_tree(tree, tokens, batch, node_embedding)
    query, key, value = _prepare(query, key, value, scale, energy)
    if forest:
        query, key, value = (_side_by_side(tensor) for tensor in (query, key, value))
        visible = None if visible is None else visible.reshape(1, -1)
    weights = None if visible is None else visible[:, None].to(query.dtype)
    up = pass_up(one, query, key, weights, include_self, node_embedding)
    output = pass_down(one, up, value, weights)
    if forest:
        output = output.squeeze(0).unflatten(1, (batch, tokens)).transpose(0, 1)
    return (output if order is None else restore(output, order)).to(dtype)


def hierarchical_map(
    query: Float[Tensor, "batch heads tokens dim"],
    key: Float[Tensor, "batch kv_heads tokens dim"],
    attn_mask: Tensor | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    tree: Tree,
    include_self: bool = True,
    energy: Energy = "dot",
    node_embedding: Float[Tensor, "nodes embedding"] | None = None,
) -> Float[Tensor, "batch heads tokens tokens"]:
    """The whole map of `hierarchical_attention`, for those who want to see it; arguments as there.

    Rows sum to 1, and the map is constant on the block of two siblings.
    """
    tokens = key.shape[2]
    eye = torch.eye(tokens, dtype=key.dtype, device=key.device)
    return hierarchical_attention(
        query,
        key,
        eye.expand(*key.shape[:2], tokens, tokens),
        attn_mask,
        scale=scale,
        enable_gqa=enable_gqa,
        tree=tree,
        include_self=include_self,
        energy=energy,
        node_embedding=node_embedding,
    )


def hierarchical_gap(
    query: Float[Tensor, "batch heads tokens dim"],
    key: Float[Tensor, "batch kv_heads tokens dim"],
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    tree: PartitionTree | Sequence[int],
    energy: Energy = "dot",
) -> Float[Tensor, "batch heads"]:
    """What the tree costs: the sum over the rows of KL(hierarchical || softmax), in nats.

        gap = sum_i log sum_j exp S[i, j] + tokens * phi(root)

    0 for a flat tree. It tells, without a map, in which layers and heads the tree is near what the
    model does. Joining fewer nodes (attaching a node's children to its parent) can only lower it.

    Args:
        query, key, scale, enable_gqa, energy: as in `hierarchical_attention`.
        tree: one tree with one root, or the sizes of nested windows.
    """
    scale = _check(query, key, key, scale, enable_gqa)
    one, _ = _one_tree(tree, query.shape[2], query.shape[0], None)
    if len(one.roots) != 1:
        raise ValueError(f"tree: expected one root, got {one}. Join the trees under a root.")
    query, key, _ = _prepare(query, key, key, scale, energy)
    stay = pass_up(one, query, key, None, True, None).stay
    flat = attention_state(query, key, key, scale=1.0).lse.sum(-1)
    return flat - one.num_leaves * stay[-1][..., -1]


def _refuse_causal(is_causal: bool) -> None:
    if is_causal:
        raise ValueError(
            "is_causal: expected False. Hierarchical attention has no causal form: the weights "
            "between two branches hold the mean query of a branch, its later tokens included, so "
            "the future would leak into earlier rows even where only earlier branches are seen. "
            "attending.nn.combiner attends causally to summaries of closed regions."
        )


def _check(
    query: Tensor, key: Tensor, value: Tensor, scale: float | None, enable_gqa: bool
) -> float:
    scale = check_arguments(query, key, value, scale=scale, enable_gqa=enable_gqa).scale
    if query.shape[2] != key.shape[2]:
        raise ValueError(
            "key: expected as many tokens as query, since queries and keys share the tree, got "
            f"query {list(query.shape)} and key {list(key.shape)}."
        )
    return scale


def _is_windows(tree: Tree) -> bool:
    return not isinstance(tree, PartitionTree) and all(isinstance(part, int) for part in tree)


def _one_tree(
    tree: Tree, tokens: int, batch: int, node_embedding: Tensor | None
) -> tuple[PartitionTree, bool]:
    """The tree to work on, and whether it is that of all sequences side by side."""
    forest = False
    if isinstance(tree, PartitionTree):
        one, expected = tree, tokens
    elif all(isinstance(part, int) for part in tree):
        sizes = tuple(part for part in tree if isinstance(part, int))
        one, expected = windows_tree(tokens, sizes), tokens
    elif all(isinstance(part, PartitionTree) for part in tree):
        trees = [part for part in tree if isinstance(part, PartitionTree)]
        wrong = [part for part in trees if part.num_leaves != tokens]
        if len(trees) != batch or wrong:
            raise ValueError(
                f"tree: expected a tree of {tokens} leaves for each of the {batch} sequences, got "
                f"{len(trees)} trees" + (f", one of them {wrong[0]}." if wrong else ".")
            )
        one, expected, forest = _forest(tuple(trees)), batch * tokens, True
    else:
        raise ValueError(
            "tree: expected a PartitionTree, a list with one for each sequence, or the sizes of "
            f"nested windows such as (4, 8), got {tree!r}."
        )
    if one.num_leaves != expected:
        raise ValueError(f"tree: expected {tokens} leaves, the tokens of query, got {one}.")
    if node_embedding is None:
        return one, forest
    if forest or node_embedding.dim() != 2 or node_embedding.shape[0] != one.num_nodes:
        raise ValueError(
            "node_embedding: expected [nodes, embedding] with one tree for all sequences, got "
            f"{list(node_embedding.shape)} for {one}."
        )
    return one, forest


@lru_cache(maxsize=8)  # the layers of a model share the trees of a batch
def _forest(trees: tuple[PartitionTree, ...]) -> PartitionTree:
    return PartitionTree.join(*trees, root=False)


def _prepare(
    query: Tensor, key: Tensor, value: Tensor, scale: float, energy: Energy
) -> tuple[Tensor, Tensor, Tensor]:
    """As many heads everywhere, no half precision, and the scores as plain dot products."""
    if energy not in ("dot", "sqdist"):
        raise ValueError(f'energy: expected "dot" or "sqdist", got {energy!r}.')
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    dtype = torch.promote_types(query.dtype, torch.float32)
    query, key, value = query.to(dtype) * scale, key.to(dtype), value.to(dtype)
    if energy == "sqdist":
        # -scale / 2 |q - k|^2 = scale q . k - scale / 2 |q|^2 - scale / 2 |k|^2, two more features.
        plain = query / scale if scale else query
        ones = torch.ones_like(query[..., :1])
        half_query = -scale / 2 * plain.square().sum(-1, keepdim=True)
        half_key = -scale / 2 * key.square().sum(-1, keepdim=True)
        query, key = torch.cat([query, half_query, ones], -1), torch.cat([key, ones, half_key], -1)
    return query, key, value


def _side_by_side(tensor: Tensor) -> Tensor:
    return tensor.transpose(0, 1).flatten(1, 2).unsqueeze(0)
