"""A backbone with a linear head: frozen or trained whole."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from stocktake.models.backbones import create_backbone, load_backbone_weights, pixel_scale
from stocktake.models.counting_model import CountingModel, ModelSpec


class NetworkModel(CountingModel):
    """Normalise, backbone, linear head."""

    mean: Tensor
    std: Tensor

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__(spec)
        name = str(spec.options["backbone"])
        self.backbone, features = create_backbone(name, spec.image_size)
        self.backbone.to(memory_format=torch.channels_last)
        self.head = nn.Linear(features, len(spec.labels))
        mean, std = pixel_scale(name)
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def forward(self, photos: Tensor) -> Tensor:
        """Logits of photos (n, size, size, 3)."""
        logits: Tensor = self.head(self.features(photos))
        return logits.float()

    def features(self, photos: Tensor) -> Tensor:
        """(n, features) of photos (n, size, size, 3) uint8; the permuted photos are channels-last in memory."""
        scaled = (photos.permute(0, 3, 1, 2).float() / 255 - self.mean) / self.std
        features: Tensor = self.backbone(scaled)
        return features


def create_network(
    labels: Sequence[int], image_size: int, backbone: str, weights: str, *, seed: int = 0
) -> NetworkModel:
    """A network for these quantities with the given weights in its backbone and a fresh head."""
    spec = ModelSpec("network", tuple(labels), image_size, {"backbone": backbone})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = NetworkModel(spec)
    load_backbone_weights(model.backbone, backbone, weights, image_size)
    return model
