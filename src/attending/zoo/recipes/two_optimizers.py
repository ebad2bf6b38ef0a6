"""Muon and AdamW as one optimizer, and how the rate of both rises and falls."""

from typing import Any, Protocol

import torch
from torch import nn

# What the names of the matrices inside a model have in common.
INNER = (".layers.", ".blocks.", "multi_modal_projector")


class Settings(Protocol):
    """What a recipe says of both."""

    @property
    def learning_rate(self) -> float:
        """Of AdamW."""
        ...

    @property
    def muon_learning_rate(self) -> float:
        """Of Muon."""
        ...

    @property
    def weight_decay(self) -> float:
        """Of Muon."""
        ...

    @property
    def momentum(self) -> float:
        """Of Muon."""
        ...

    @property
    def beta1(self) -> float:
        """Of AdamW."""
        ...

    @property
    def beta2(self) -> float:
        """Of AdamW."""
        ...


def share_of_rate(since: int, warmup_steps: int, left: int, cooldown_steps: float) -> float:
    """Linear up over the first steps, level at 1, linear down to 0 over the last.

    Args:
        since: steps since the (last) start.
        warmup_steps: of the rise.
        left: steps up to the end.
        cooldown_steps: of the fall.
    """
    return min(1.0, (since + 1) / warmup_steps, left / max(1.0, cooldown_steps))


class TwoOptimizers:
    """Muon for the matrices of layers, blocks and projector, AdamW for all else trained.

    Muon turns the momentum of a matrix into the nearest matrix with equal singular values before
    it takes the step; its rate is scaled so that a step is as large as one of AdamW.  State and
    loading are as of one optimizer, Muon's parameters first.
    """

    def __init__(self, model: nn.Module, muon: dict[str, Any], adamw: dict[str, Any]) -> None:
        matrices: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            inner = any(part in name for part in INNER)
            (matrices if inner and parameter.ndim == 2 else others).append(parameter)
        self.muon = torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw", **muon)
        self.adamw = torch.optim.AdamW(others, fused=True, **adamw)
        self.full = [group["lr"] for group in self._groups()]
        self.offset = len(matrices)

    @classmethod
    def of(cls, model: nn.Module, recipe: Settings) -> "TwoOptimizers":
        """With the settings of a recipe; the weights of AdamW do not decay."""
        return cls(
            model,
            muon={
                "lr": recipe.muon_learning_rate,
                "momentum": recipe.momentum,
                "weight_decay": recipe.weight_decay,
            },
            adamw={
                "lr": recipe.learning_rate,
                "betas": (recipe.beta1, recipe.beta2),
                "weight_decay": 0.0,
            },
        )

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
