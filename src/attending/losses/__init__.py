"""Objectives and regularisers to train with: one file per method.

- `entropy_regularization`, `EntropyRegularizer`, `entropy_quartiles`: a band around the entropy of
  every attention head.
"""

from attending.losses.entropy_regularization import (
    entropy_quartiles,
    entropy_regularization,
)
from attending.losses.entropy_regularizer import EntropyRegularizer

__all__ = ["EntropyRegularizer", "entropy_quartiles", "entropy_regularization"]
