"""The two passes of hierarchical attention over a tree: energies up, attention down."""

from typing import NamedTuple

import torch
from torch import Tensor

from attending.nn.partition_tree import PartitionTree


class Up(NamedTuple):
    """What the pass up finds.

    Attributes:
        stay: by table, `-phi` of each node: the log weight of staying within it.
        shares: by families `[..., families, children, children]`: how a child divides what its
            parent has, among itself (on the diagonal) and its siblings; rows sum to 1.
    """

    stay: list[Tensor]
    shares: list[Tensor]


def pass_up(
    tree: PartitionTree,
    query: Tensor,
    key: Tensor,
    weights: Tensor | None,
    include_self: bool,
    node_embedding: Tensor | None,
) -> Up:
    """Energies of all nodes, from the leaves to the roots.

    Args:
        tree: over the tokens.
        query: scaled, `[batch, heads, tokens, dim]`.
        key: likewise, with as many heads.
        weights: 1 or 0 for each leaf, `[batch or 1, 1, tokens]`; 0 takes it out of the tree.
        include_self: whether leaves see themselves.
        node_embedding: `[nodes, embedding]`, in the tree's numbering.
    """
    layout = tree.layout(query.device)
    queries, keys = tree.pool_tables(query, weights), tree.pool_tables(key, weights)
    if weights is None:
        weights = query.new_ones(1, 1, tree.num_leaves)
    counts = [table[..., None] for table in tree.weight_tables(weights)]
    leaf = (query * key).sum(-1, keepdim=True)
    embeddings = None
    if node_embedding is not None:
        embeddings = list(node_embedding.to(query.dtype).split(list(layout.sizes)))
        leaf = leaf + embeddings[0].square().sum(-1, keepdim=True)
    stay = [leaf if include_self else torch.full_like(leaf, -torch.inf)]
    shares = []
    for number, family in enumerate(layout.families):
        scores = family.take(queries, 0.0) @ family.take(keys, 0.0).transpose(-1, -2)
        if embeddings is not None:
            nodes = family.take(embeddings, 0.0)
            scores = scores + nodes @ nodes.transpose(-1, -2)
        count = family.take(counts, 0.0)
        scores = scores + count.log().transpose(-1, -2)
        own = torch.eye(scores.shape[-1], dtype=torch.bool, device=scores.device)
        scores = torch.where(own, family.take(stay, -torch.inf), scores)
        # A child that sees nothing (alone, and not itself) has no mass to divide either.
        empty = (scores == -torch.inf).all(-1, keepdim=True)
        scores = scores.masked_fill(empty, 0.0)
        total = scores.logsumexp(-1, keepdim=True)
        shares.append((scores - total).exp().masked_fill(empty, 0.0))
        whole = counts[number + 1]
        part = count.squeeze(-1) / whole.masked_fill(whole == 0, 1.0)
        inside = part * total.squeeze(-1).masked_fill(empty.squeeze(-1), -torch.inf)
        stay.append(inside.masked_fill(part == 0, 0.0).sum(-1, keepdim=True))
    return Up([table.squeeze(-1) for table in stay], shares)


def pass_down(tree: PartitionTree, up: Up, value: Tensor, weights: Tensor | None) -> Tensor:
    """The output of each leaf: what each node on its way from the root takes from its siblings."""
    layout = tree.layout(value.device)
    values = tree.pool_tables(value, weights)
    front = value.shape[:2]
    whole = value.new_ones(*front, 1, 1)
    nothing = value.new_zeros(*front, 1, value.shape[-1])
    masses: list[Tensor | None] = [None] * len(layout.families)
    outputs: list[Tensor | None] = [None] * len(layout.families)
    for number in reversed(range(len(layout.families))):
        mass = layout.rows(masses, number + 1, whole)[..., None]
        share = up.shares[number]
        own = torch.eye(share.shape[-1], dtype=torch.bool, device=share.device)
        taken = share.masked_fill(own, 0.0) @ layout.families[number].take(values, 0.0)
        masses[number] = mass * share.diagonal(dim1=-2, dim2=-1)[..., None]
        outputs[number] = layout.rows(outputs, number + 1, nothing)[..., None, :] + mass * taken
    mass, output = layout.rows(masses, 0, whole), layout.rows(outputs, 0, nothing)
    # A leaf that is a root itself sees itself alone, and with include_self=False nothing.
    mass = mass.masked_fill(up.stay[0][..., None] == -torch.inf, 0.0)
    output = output + mass * value
    return output if weights is None else output * weights[..., None]
