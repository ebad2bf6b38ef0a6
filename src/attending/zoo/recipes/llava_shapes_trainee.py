"""What ``llava-shapes`` is trained with: heads, losses, quick attention and two optimizers."""

from collections.abc import Iterator
from contextlib import contextmanager
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


def training_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it, by what is fastest to train with on a processor.

    PyTorch's kernel is slow backward in bfloat16: without a mask and with few tokens, plain
    products take a third of its time, and with one the same kernel in float32 takes half of it.
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if attention_mask is None:
        weights = (scale * query @ key.mT).softmax(-1)
        return (weights.to(value.dtype) @ value).transpose(1, 2).contiguous(), None
    with torch.autocast(query.device.type, enabled=False):
        mixed = F.scaled_dot_product_attention(
            query.float(), key.float(), value.float(), attn_mask=attention_mask, scale=scale
        )
    return mixed.to(query.dtype).transpose(1, 2).contiguous(), None


@contextmanager
def fast_attention(model: Any) -> Iterator[None]:
    """Lend the model :func:`training_attention` and give it its own back."""
    from transformers import AttentionInterface

    AttentionInterface.register("llava_shapes_training", training_attention)
    usual = model.config._attn_implementation
    model.set_attn_implementation("llava_shapes_training")
    try:
        yield
    finally:
        model.set_attn_implementation(usual)


class TwoOptimizers:
    """Muon for the matrices of the layers and the projector, AdamW for everything else.

    Muon turns the momentum of a matrix into the nearest matrix with equal singular values before
    it takes the step; its rate is scaled so that a step is as large as one of AdamW.  State and
    loading are as of one optimizer, Muon's parameters first.
    """

    def __init__(self, model: nn.Module, muon: dict[str, Any], adamw: dict[str, Any]) -> None:
        matrices: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for name, parameter in model.named_parameters():
            inner = ".layers." in name or "multi_modal_projector" in name
            (matrices if inner and parameter.ndim == 2 else others).append(parameter)
        self.muon = torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw", **muon)
        self.adamw = torch.optim.AdamW(others, fused=True, **adamw)
        self.full = [group["lr"] for group in self._groups()]
        self.offset = len(matrices)

    def _groups(self) -> list[dict[str, Any]]:
        return [*self.muon.param_groups, *self.adamw.param_groups]

    def set_rate(self, share: float) -> None:
        """Set both learning rates to a share of the full ones."""
        for group, full in zip(self._groups(), self.full, strict=True):
            group["lr"] = share * full

    def step(self) -> None:
        """Change the parameters that have gradients."""
        self.muon.step()
        self.adamw.step()

    def zero_grad(self) -> None:
        """Drop the gradients."""
        self.muon.zero_grad()
        self.adamw.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """The tensors of both, the parameters numbered through."""
        later = self.adamw.state_dict()["state"].items()
        return {
            "state": {
                **self.muon.state_dict()["state"],
                **{index + self.offset: moments for index, moments in later},
            }
        }

    def load_state_dict(self, stored: dict[str, Any]) -> None:
        """Take up what :meth:`state_dict` gave."""
        first = {i: m for i, m in stored["state"].items() if i < self.offset}
        later = {i - self.offset: m for i, m in stored["state"].items() if i >= self.offset}
        self.muon.load_state_dict({**self.muon.state_dict(), "state": first})
        self.adamw.load_state_dict({**self.adamw.state_dict(), "state": later})
