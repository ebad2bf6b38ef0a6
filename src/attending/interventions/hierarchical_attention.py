"""Hierarchical self-attention in chosen layers of a pretrained encoder, without training.

To ask how much of an encoder's attention needs single tokens: in the chosen layers, what a token
takes from another sentence no longer depends on which token of the sentence it is, and the dot
products are a fraction. The paper (Amizadeh et al. 2509.15448) finds that late, alternating layers
of RoBERTa bear it (7, 9 and 11 of 12), that all layers at once do not, and that a task which has to
find single tokens (QNLI) does not either. See `attending.nn.hierarchical_attention` for what is
computed, and `hierarchical_gap` there for how far that is from each head's own attention.

The paper uses windows of fixed size. Trees from sentence boundaries, as `sentence_trees` makes
them, are ours.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from attending.core.masks import mask_parts
from attending.interventions.intervention import Counted, Run, with_counters
from attending.nn.hierarchical_attention import Tree, hierarchical_attention
from attending.nn.partition_tree import PartitionTree
from attending.taps import AttentionCall, Handler, Proceed
from attending.taps.where import layer_of


@dataclass(frozen=True, eq=False)
class HierarchicalAttention:
    """Tie the self-attention of some layers along a tree, while a block runs.

        batch = tokenizer(texts, padding=True, return_tensors="pt")
        ends = tokenizer.convert_tokens_to_ids([".", "!", "?"])
        trees = sentence_trees(batch["input_ids"], ends)
        with HierarchicalAttention(tree=trees, layers=(-1, -3))(model):
            model(**batch)

    Padding is read from the model's mask, and is in no branch.

    Attributes:
        tree: a tree for each sequence of the batch, one for all, or the sizes of nested windows
            such as `(4, 4)`, which fit every batch; as in `hierarchical_attention`.
        layers: which layers, from 0, or from the end with -1 the last.
        include_self: whether a token sees itself.
    """

    tree: Tree
    layers: Sequence[int]
    include_self: bool = True

    def __post_init__(self) -> None:
        if not self.layers or any(int(layer) != layer for layer in self.layers):
            raise ValueError(
                f"layers: expected the numbers of layers, such as (-1, -3), got {self.layers!r}."
            )

    def __call__(self, model: nn.Module) -> Counted:
        """The context manager within which the model's layers are changed; it yields a `Run`.

        Raises:
            ValueError: if the model has no such layer. Within the block: for a layer that is
                causal, has a mask that is more than padding, or drops attention weights; or if the
                tree does not fit the batch.
        """
        chosen = self._number(model)

        def start(run: Run) -> Handler:
            def tie(call: AttentionCall, proceed: Proceed) -> Tensor:
                if call.layer not in chosen or call.is_cross:
                    run.left(call, "its layer is not among those to tie")
                    return proceed(call)
                visible = _padding(call)
                output = hierarchical_attention(
                    call.query,
                    call.key,
                    call.value,
                    None if visible is None else visible[:, None, None, :],
                    scale=call.scale,
                    enable_gqa=call.enable_gqa,
                    tree=self.tree,
                    include_self=self.include_self,
                )
                run.edited(call, range(call.num_heads), output[..., 0].numel())
                return output

            return tie

        return with_counters(model, start, name="HierarchicalAttention")

    def _number(self, model: nn.Module) -> frozenset[int]:
        found = {layer_of(model, name) for name, _ in model.named_modules()} - {None}
        count = max((layer for layer in found if layer is not None), default=-1) + 1
        for layer in self.layers:
            if not -count <= layer < count:
                raise ValueError(
                    f"layers: expected numbers from {-count} to {count - 1}, as the model has "
                    f"{count} layers, got {layer}."
                )
        return frozenset(int(layer) % count for layer in self.layers)


def sentence_trees(
    input_ids: Int[Tensor, "batch tokens"],
    ends: Collection[int],
    alone: Collection[int] = (),
) -> list[PartitionTree]:
    """A tree for each sequence: its tokens in sentences, its sentences under the root.

    Args:
        input_ids: the tokens; padding goes to the last sentence, which the model's mask then hides.
        ends: ids that end a sentence and belong to it, such as those of ".", "!" and "?".
        alone: ids that are a branch of their own, such as that of "[CLS]".

    Raises:
        ValueError: for ids that are not whole numbers, or have no batch dimension.
    """
    if input_ids.dim() != 2 or input_ids.is_floating_point() or input_ids.shape[1] == 0:
        raise ValueError(
            "input_ids: expected whole numbers [batch, tokens], at least one token, got "
            f"{input_ids.dtype} {list(input_ids.shape)}."
        )
    single = _is_in(input_ids, alone)
    starts = torch.zeros_like(single)
    starts[:, 1:] = _is_in(input_ids, ends)[:, :-1] | single[:, :-1]
    sentence = (starts | single).cumsum(1)
    return [PartitionTree.from_labels(labels) for labels in sentence.cpu()]


def _is_in(input_ids: Tensor, tokens: Collection[int]) -> Bool[Tensor, "batch tokens"]:
    wanted = torch.tensor(list(tokens), dtype=input_ids.dtype, device=input_ids.device)
    return torch.isin(input_ids, wanted)


def _padding(call: AttentionCall) -> Bool[Tensor, "batch tokens"] | None:
    if call.dropout_p:
        raise ValueError(
            f"model: expected no dropout on attention weights, got {call.dropout_p} in {call!r}. "
            "Call model.eval() first."
        )
    length = call.query_length
    if call.is_causal and length > 1:
        raise _refusal(call)
    if call.attn_mask is None:
        return None
    mask = call.attn_mask.reshape((1,) * (4 - call.attn_mask.dim()) + tuple(call.attn_mask.shape))
    parts = mask_parts(mask, call.query.shape[0], length, call.key_length)
    if not parts.is_full:
        raise _refusal(call)
    return parts.key_visible


def _refusal(call: AttentionCall) -> ValueError:
    return ValueError(
        "model: expected an encoder, whose mask hides padding and no more, as hierarchical "
        "attention has no causal form (later tokens would leak through the mean queries of "
        f"branches), got {call!r}. Leave this layer out of layers."
    )
