"""Trees of parts, from the soft dependency masks of reversed attention (DependencyViT).

`attending.nn.reversed_attention` says how much token i sends to j, `A_M[j, i]`. Who sends to j
depends on it: j is the parent. Three readings are here:

- **a tree of one mask**: the one whose product of dependencies is largest, by Chu-Liu and Edmonds.
  (Each token's favourite parent alone always makes a cycle: n edges on n tokens.)
- **masks of all layers in one**: early layers merge leaves, later ones merge what has been merged,
  so messages are followed through all of them, as in attention rollout [inferred].
- **parts**: the tokens below each child of the root, or below those further down [inferred].

The paper's own procedure is only outlined where it could be read (2304.03282): "induced
progressively from leaves to root". What is marked [inferred] is ours.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from attending.probes._arborescence import Matrix, best_tree

if TYPE_CHECKING:
    import networkx

Method = Literal["edmonds", "argmax"]


def dependency_tree(
    dependency: Float[Tensor, "*batch tokens tokens"],
    root: int | Literal["received"] | None = None,
    method: Method = "edmonds",
) -> Int[Tensor, "*batch tokens"]:
    """The parent of each token; -1 for the root.

        tree = dependency_tree(layer(hidden, need_dependency=True).dependency)

    Args:
        dependency: `[parent, child]`, not negative. The diagonal plays no part: a token may send to
            itself, but is not its own parent.
        root: the token at the root; "received" for that which receives most from the others; None
            for that of the best tree.
        method: "edmonds" for the tree with the largest sum of logarithms; "argmax" for each token's
            favourite parent with the root's edge left out, which may have cycles, tokens that never
            come to the root, and then is no tree. Among equals the lowest index is taken.

    Returns:
        Parents, on the device of `dependency`.

    Raises:
        ValueError: for a mask that is not square, has negative or non-finite entries, or for a
            root that is not there.
    """
    if dependency.dim() < 2 or dependency.shape[-1] != dependency.shape[-2]:
        raise ValueError(
            "dependency: expected [..., tokens, tokens], parents by children, got "
            f"{list(dependency.shape)}."
        )
    tokens = dependency.shape[-1]
    if method not in ("edmonds", "argmax"):
        raise ValueError(f'method: expected "edmonds" or "argmax", got {method!r}.')
    if tokens == 0 or not (root in (None, "received") or 0 <= int(root) < tokens):
        raise ValueError(
            f'root: expected a token, 0 to {tokens - 1}, "received" or None, got {root!r}.'
        )
    masks = dependency.detach().cpu().double().numpy().reshape(-1, tokens, tokens)
    if not np.isfinite(masks).all() or (masks < 0).any():
        raise ValueError("dependency: expected finite entries of at least 0, got others.")
    trees = np.stack([_tree(mask, root, method) for mask in masks])
    parents = torch.from_numpy(trees).reshape(dependency.shape[:-1])
    return parents.to(dependency.device)


def _tree(mask: Matrix, root: int | str | None, method: str) -> NDArray[np.int64]:
    others = mask * (1 - np.eye(len(mask)))
    chosen = int(others.sum(1).argmax()) if root == "received" else root
    weight = np.log(np.maximum(others, np.finfo(np.float64).tiny))
    if method == "edmonds":
        return best_tree(weight, None if chosen is None else int(chosen))
    np.fill_diagonal(weight, -np.inf)
    parents: NDArray[np.int64] = weight.argmax(0)
    if chosen is None:  # the edge that is worth least
        chosen = int(weight.max(0).argmin())
    parents[int(chosen)] = -1
    return parents


def accumulated_dependency(
    masks: Sequence[Float[Tensor, "batch tokens tokens"]],
    residual: float = 0.0,
) -> Float[Tensor, "batch tokens tokens"]:
    """Where the messages of the first layer's tokens are after all layers, `D[j, i]` [inferred].

        D = F_L ... F_2 F_1,    F_l = r I + (1 - r) ((1 - m_l) I + A_l)

    m_l, the sum of a column of A_l, is what the token sends; the rest stays with it. Columns of D
    sum to 1.

    Args:
        masks: of the layers, first one first, over the same tokens; columns of at most 1.
        residual: r, the share that goes past attention.
    """
    if not masks:
        raise ValueError("masks: expected at least one layer's, got none.")
    if not 0.0 <= residual < 1.0:
        raise ValueError(f"residual: expected a share from 0 to below 1, got {residual}.")
    found = None
    for index, mask in enumerate(masks):
        if mask.shape != masks[0].shape:
            raise ValueError(
                f"masks[{index}]: expected {list(masks[0].shape)}, as of the first layer, got "
                f"{list(mask.shape)}. For pruned layers use pruned_tree."
            )
        stays = 1 - (1 - residual) * mask.sum(-2)
        step = (1 - residual) * mask + torch.diag_embed(stays)
        found = step if found is None else step @ found
    assert found is not None
    return found


def pruned_tree(
    masks: Sequence[Float[Tensor, "_tokens _tokens"]],
    indices: Sequence[Int[Tensor, " _tokens"]],
    root: int | Literal["received"] | None = None,
) -> Int[Tensor, " tokens"]:
    """One tree over all tokens of a model that prunes some on the way.

    The tokens that are there to the end have the tree of the last mask. A token that was dropped is
    a leaf: its parent is the one, among those kept, to whom it sent most in its last layer.

    Args:
        masks: of the layers of one image, first one first.
        indices: for each mask, which of the first layer's tokens it is over, ascending.
        root: of the last tree, as in `dependency_tree`; an index counts among the last tokens.

    Returns:
        The parents, as indices of the first layer's tokens; -1 for the root.
    """
    if not masks or len(masks) != len(indices):
        raise ValueError(
            f"indices: expected one for each of at least one mask, got {len(indices)} for "
            f"{len(masks)}."
        )
    last = indices[-1]
    parents = torch.full((len(indices[0]),), -1, dtype=torch.long, device=last.device)
    tree = dependency_tree(masks[-1], root)
    parents[last] = torch.where(tree < 0, tree, last[tree.clamp_min(0)])
    for mask, here, after in zip(masks, indices, indices[1:], strict=False):
        kept = torch.isin(here, after)
        favourite = mask[kept].argmax(0)
        parents[here[~kept]] = here[kept][favourite[~kept]]
    return parents


def tree_segments(
    parents: Int[Tensor, "*batch tokens"], depth: int = 1
) -> Int[Tensor, "*batch tokens"]:
    """The part that each token belongs to, if the tree is cut below `depth` [inferred].

    The tokens at `depth` are the heads of the parts, and all that hangs on one is of its part. The
    root and others above are parts of their own.

    Returns:
        The token at the head of each token's part.

    Raises:
        ValueError: for parents with a cycle, as "argmax" may give, or a depth below 1.
    """
    if depth < 1:
        raise ValueError(f"depth: expected at least 1, got {depth}.")
    tokens = parents.shape[-1]
    own = torch.arange(tokens, device=parents.device).expand(parents.shape)
    up = torch.where(parents < 0, own, parents)
    path = [own]  # the token itself, its parent, ...
    for _ in range(tokens):
        path.append(up.gather(-1, path[-1]))
        if torch.equal(path[-1], path[-2]):
            break
    else:
        raise ValueError("parents: expected a tree, got parents with a cycle.")
    ways = torch.stack(path)
    below = (ways[1:] != ways[:-1]).sum(0)  # how deep a token is
    return ways.gather(0, (below - depth).clamp_min(0)[None]).squeeze(0)


def to_networkx(
    parents: Int[Tensor, " tokens"], dependency: Float[Tensor, "tokens tokens"] | None = None
) -> "networkx.DiGraph":
    """The tree as a `networkx.DiGraph` with edges from parent to child, to draw and to search.

    Args:
        parents: of one image.
        dependency: to write the dependency of each edge to it, as "dependency".

    Raises:
        ImportError: without networkx; the extra `graphs` brings it.
    """
    try:
        import networkx
    except ImportError as error:
        raise ImportError('to_networkx needs networkx: pip install "attending[graphs]"') from error
    graph = networkx.DiGraph()
    graph.add_nodes_from(range(len(parents)))
    for child, parent in enumerate(parents.tolist()):
        if parent >= 0:
            graph.add_edge(parent, child)
            if dependency is not None:
                graph.edges[parent, child]["dependency"] = float(dependency[parent, child])
    return graph
