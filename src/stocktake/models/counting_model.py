"""What all models have in common: prepared photos in, one logit a quantity out.

The majority class and the support vector machine are networks too, so that every model is saved, loaded,
evaluated, exported and served in one way, and never through pickle.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class ModelSpec:
    """All that is needed to build a model again, weights aside; written as JSON beside them."""

    kind: str
    """The module in models/ that has its class: majority, pca_svm or network."""
    labels: tuple[int, ...]
    """The quantities that the logits stand for, ascending."""
    image_size: int
    """Side of the square photos, in pixels."""
    options: dict[str, Any] = field(default_factory=dict)
    """What this kind needs besides: the backbone's name, numbers of components, ..."""

    def to_json(self) -> dict[str, Any]:
        """Plain types."""
        return asdict(self) | {"labels": list(self.labels)}


class CountingModel(nn.Module):
    """A model of one kind; build it from its spec, then train or load it."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec

    @abstractmethod
    def forward(self, photos: Tensor) -> Tensor:
        """Logits (n, len(labels)) float32 of photos (n, size, size, 3) uint8."""

    def buffer(self, name: str, *shape: int) -> None:
        """Room for fitted numbers, filled after fitting or by loading."""
        self.register_buffer(name, torch.zeros(shape, dtype=torch.float32))
