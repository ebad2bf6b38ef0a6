"""What ``llava-shapes`` is trained with: heads, losses, quick attention and two optimizers."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attending.zoo._shapes_world import COLORS, KINDS, SHAPES, TEXTURES
from attending.zoo.recipes.llava_shapes_data import IGNORED, DenseTargets, Rows


class Trainee(nn.Module):
    """The model and the heads that only training needs."""

    def __init__(self, llava: Any, hidden: int) -> None:
        super().__init__()
        self.llava = llava
        self.options = (len(SHAPES) + 1, len(COLORS) + 1, len(TEXTURES) + 1)
        self.norm = nn.LayerNorm(hidden)
        self.patch_head = nn.Linear(hidden, sum(self.options))
        self.kinds_head = nn.Linear(hidden, len(KINDS))

    def see(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The patches and the pooled class token of the vision tower."""
        seen = self.llava.model.vision_tower(images)
        return seen.last_hidden_state[:, 1:], seen.pooler_output

    def dense_loss(self, patches: Tensor, pooled: Tensor, targets: DenseTargets) -> Tensor:
        """How badly patches name their objects and the class token the kinds."""
        logits = self.patch_head(self.norm(patches)).float().split(self.options, dim=-1)
        labels = (targets.shape, targets.color, targets.texture)
        named = [
            F.cross_entropy(part.flatten(0, 1), label.flatten())
            for part, label in zip(logits, labels, strict=True)
        ]
        kinds = self.kinds_head(pooled).float()
        return torch.stack(named).sum() + 5 * F.binary_cross_entropy_with_logits(
            kinds, targets.kinds
        )

    def text_loss(
        self, patches: Tensor, rows: Rows, bos: int, weights: Tensor | None = None
    ) -> Tensor:
        """Mean loss of the answers' tokens, each conversation behind the image on its own.

        Args:
            patches: What the tower saw.
            rows: The conversations.
            bos: The token before the image.
            weights: How much each token of the vocabulary counts; ``None`` is 1 for all.
        """
        inner = self.llava.model
        embed = inner.get_input_embeddings()
        images = inner.multi_modal_projector(patches)
        first = torch.full((len(images), 1), bos)
        inputs = torch.cat([embed(first), images, embed(rows.tokens)], dim=1)
        prefix = 1 + images.shape[1]
        positions = torch.cat(
            [torch.arange(prefix).expand(len(images), -1), prefix + rows.positions], dim=1
        )
        states = inner.language_model(
            inputs_embeds=inputs,
            attention_mask=rows.mask(prefix),
            position_ids=positions,
            use_cache=False,
        ).last_hidden_state[:, prefix:]
        learned = rows.targets != IGNORED
        logits = self.llava.lm_head(states[learned])
        return F.cross_entropy(logits.float(), rows.targets[learned], weight=weights)
