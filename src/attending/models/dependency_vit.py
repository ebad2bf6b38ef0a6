"""DependencyViT: a small vision transformer in which tokens send, and a tree can be read.

Blocks are those of a pre-norm vision transformer with reversed attention (2304.03282):

    x <- x + s_1 * ReversedAttention(LayerNorm(x), m)          m: the gates of the layer before
    [DependencyViT-Lite: after chosen blocks keep the tokens with the largest m]
    x <- x + s_2 * MLP(LayerNorm(x))
    logits = Linear(mean over the tokens of m * LayerNorm(x))

No class token. There is no official code; the outline follows a third-party port to timm, whose
author reports an accuracy two points below the paper's and open questions, such as where the last
product with m belongs.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from attending.nn.message_pruning import kept_tokens, prune_by_message
from attending.nn.operator_attention import OperatorAttention
from attending.nn.reversed_attention import ReversedAttention

Attention = Literal["reversed", "forward"]
Pooling = Literal["mean", "message_mean"]
Ranking = Literal["message", "received", "random"]


class Parse(NamedTuple):
    """What the layers of a model said of who depends on whom.

    Attributes:
        logits: of the classes.
        dependencies: of each block, `[batch, parents, children]`.
        indices: which of the first tokens each of these is over, `[batch, tokens]`.
    """

    logits: Float[Tensor, "batch classes"]
    dependencies: list[Float[Tensor, "batch tokens tokens"]]
    indices: list[Int[Tensor, "batch tokens"]]


class DependencyViT(nn.Module):
    """A vision transformer over images `[batch, channels, image_size, image_size]`.

        model = DependencyViT(16, 1, num_classes=10, patch_size=2, depth=4)
        logits = model(images)
        lite = DependencyViT(16, 1, num_classes=10, patch_size=2, depth=4, prune_after=(0, 1, 2))
        parse = model.parse(images)         # for attending.probes.dependency_tree

    The paper's tiny model is `DependencyViT(224, 3, 1000, patch_size=16, embed_dim=192, depth=12,
    num_heads=12, layer_scale=1e-6)`, Lite with `prune_after=(2, 5, 8, 11)`.

    Args:
        image_size: height and width.
        channels: of the image.
        num_classes: classes.
        patch_size: a token is a patch of `patch_size * patch_size`.
        embed_dim, depth, num_heads, mlp_ratio: as in any vision transformer.
        attention: "reversed"; or "forward", a plain vision transformer of the same size but for
            head selector, controller and the biases of query, key and value. Its m is 1.
        controller_bias: of `ReversedAttention`.
        layer_scale: where the scales s of the two branches start; 1e-6 in the port, which takes a
            long training. None leaves them out.
        prune_after: the blocks, 0 the first, between whose halves tokens are dropped.
        prune_ratio: the share of the first tokens that goes at each.
        rank_by: what decides who stays: "message", the gates m; "received", the mass that a token
            receives; "random", to compare with. "forward" has no m: only the other two.
        pooling: "mean" of m * x; "message_mean" divides by the sum of m instead of the number of
            tokens [inferred].

    Raises:
        ValueError: for sizes that do not fit or unknown words.
    """

    def __init__(
        self,
        image_size: int,
        channels: int,
        num_classes: int,
        patch_size: int = 2,
        embed_dim: int = 48,
        depth: int = 4,
        num_heads: int = 4,
        mlp_ratio: int = 4,
        attention: Attention = "reversed",
        controller_bias: float | None = 4.0,
        layer_scale: float | None = None,
        prune_after: Sequence[int] = (),
        prune_ratio: float = 0.16,
        rank_by: Ranking = "message",
        pooling: Pooling = "mean",
    ) -> None:
        super().__init__()
        if image_size < 1 or patch_size < 1 or image_size % patch_size:
            raise ValueError(
                f"patch_size: expected a divisor of image_size {image_size}, got {patch_size}."
            )
        for name, given, words in (
            ("attention", attention, get_args(Attention)),
            ("rank_by", rank_by, get_args(Ranking)),
            ("pooling", pooling, get_args(Pooling)),
        ):
            if given not in words:
                raise ValueError(f"{name}: expected one of {words}, got {given!r}.")
        self.image_size, self.channels, self.pooling = image_size, channels, pooling
        self.patches = nn.Conv2d(channels, embed_dim, patch_size, stride=patch_size)
        self.positions = nn.Parameter(
            torch.randn((image_size // patch_size) ** 2, embed_dim) * 0.02
        )
        self.blocks = nn.ModuleList(
            DependencyBlock(
                embed_dim, num_heads, mlp_ratio, attention, controller_bias, layer_scale
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(embed_dim)
        self.head = nn.Linear(embed_dim, num_classes)
        self.set_pruning(prune_after, prune_ratio, rank_by)

    def set_pruning(
        self, prune_after: Sequence[int], prune_ratio: float = 0.16, rank_by: Ranking = "message"
    ) -> None:
        """Prune a model otherwise from now on; arguments as in the constructor."""
        if len(set(prune_after)) != len(prune_after) or not all(
            0 <= index < len(self.blocks) for index in prune_after
        ):
            raise ValueError(
                f"prune_after: expected different blocks, 0 to {len(self.blocks) - 1}, got "
                f"{tuple(prune_after)}."
            )
        forward = any(isinstance(part, OperatorAttention) for part in self.modules())
        if prune_after and forward and rank_by == "message":
            raise ValueError(
                'rank_by: expected "received" or "random" with attention="forward", in which no '
                'token has a message, got "message".'
            )
        for point in range(1, len(prune_after) + 1):
            kept_tokens(len(self.positions), point, prune_ratio)  # raises if none is left
        self.prune_after, self.prune_ratio = tuple(sorted(prune_after)), prune_ratio
        self.rank_by: Ranking = rank_by

    def forward(
        self, image: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch classes"]:
        """Logits of images.

        Raises:
            ValueError: for images of another size than the model is for.
        """
        return self._run(image, need_dependency=False).logits

    def parse(self, image: Float[Tensor, "batch channels height width"]) -> Parse:
        """Logits, and the soft dependency mask of every block.

        With `attention="forward"` it is the mean of the heads' maps, `[gatherer, source]`: there,
        too, the first index receives. Its rows sum to 1, not its columns.
        """
        return self._run(image, need_dependency=True)

    def _run(self, image: Tensor, need_dependency: bool) -> Parse:
        if image.shape[1:] != (self.channels, self.image_size, self.image_size):
            raise ValueError(
                f"image: expected [batch, {self.channels}, {self.image_size}, {self.image_size}], "
                f"got {list(image.shape)}."
            )
        hidden = self.patches(image).flatten(2).mT + self.positions
        message = hidden.new_ones(hidden.shape[:2])
        places = torch.arange(hidden.shape[1], device=hidden.device).expand(hidden.shape[:2])
        dependencies, indices = [], []
        for number, block in enumerate(self.blocks):
            assert isinstance(block, DependencyBlock)
            prune = number in self.prune_after
            need = need_dependency or (prune and self.rank_by == "received")
            hidden, message, dependency = block.attend(hidden, message, need)
            if need_dependency and dependency is not None:
                dependencies.append(dependency)
                indices.append(places)
            if prune:
                point = self.prune_after.index(number) + 1
                keep = kept_tokens(hidden.shape[1], point, self.prune_ratio)
                kept = prune_by_message(hidden, message, keep, self._rank(message, dependency))
                hidden, message = kept.hidden, kept.message
                places = places.gather(1, kept.indices)
            hidden = block.transform(hidden)
        weighted = self.norm(hidden) * message[..., None].to(hidden.dtype)
        if self.pooling == "message_mean":
            total = message.sum(1, keepdim=True).clamp_min(1e-12).to(hidden.dtype)
            pooled = weighted.sum(1) / total
        else:
            pooled = weighted.mean(1)
        return Parse(self.head(pooled), dependencies, indices)

    def _rank(self, message: Tensor, dependency: Tensor | None) -> Tensor | None:
        if self.rank_by == "random":
            return torch.rand_like(message)
        return dependency.sum(-1) if self.rank_by == "received" and dependency is not None else None


class DependencyBlock(nn.Module):
    """A block, in its two halves; arguments as in `DependencyViT`."""

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        mlp_ratio: int,
        attention: Attention,
        controller_bias: float | None,
        layer_scale: float | None,
    ) -> None:
        super().__init__()
        self.attention: ReversedAttention | OperatorAttention
        if attention == "reversed":
            self.attention = ReversedAttention(
                embed_dim, num_heads, controller_bias=controller_bias
            )
        else:
            self.attention = OperatorAttention(embed_dim, num_heads, scaled_dot_product_attention)
        self.first, self.second = nn.LayerNorm(embed_dim), nn.LayerNorm(embed_dim)
        wide = mlp_ratio * embed_dim
        self.mlp = nn.Sequential(nn.Linear(embed_dim, wide), nn.GELU(), nn.Linear(wide, embed_dim))
        self.scales: nn.Parameter | None = None
        if layer_scale is not None:
            self.scales = nn.Parameter(torch.full((2, embed_dim), layer_scale))

    def attend(
        self,
        hidden: Float[Tensor, "batch tokens dim"],
        message: Float[Tensor, "batch tokens"],
        need_dependency: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The first half: hidden states, messages and, if asked for, the dependency mask."""
        before, dependency = self.first(hidden), None
        if isinstance(self.attention, ReversedAttention):
            output, message, dependency = self.attention(
                before, message, need_dependency=need_dependency
            )
        else:
            output = self.attention(before)
            if need_dependency:
                query, key, _ = self.attention.project(before)
                scores = query @ key.mT * query.shape[-1] ** -0.5
                dependency = scores.softmax(-1).mean(1)
        return hidden + self._scaled(output, 0), message, dependency

    def transform(
        self, hidden: Float[Tensor, "batch tokens dim"]
    ) -> Float[Tensor, "batch tokens dim"]:
        """The second half."""
        return hidden + self._scaled(self.mlp(self.second(hidden)), 1)

    def _scaled(self, branch: Tensor, index: int) -> Tensor:
        return branch if self.scales is None else branch * self.scales[index]
