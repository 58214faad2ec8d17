"""Always answer the most frequent quantity."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stocktake.models.counting_model import CountingModel, ModelSpec


class MajorityModel(CountingModel):
    """Answers with the class shares of the training split, whatever the photo shows."""

    log_shares: Tensor

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__(spec)
        self.buffer("log_shares", len(spec.labels))

    def forward(self, photos: Tensor) -> Tensor:
        """The same logits for every photo."""
        seen = photos.reshape(photos.shape[0], -1)[:, :1].float()  # keeps the batch dimension in an exported graph
        return self.log_shares + 0 * seen


def fit_majority(labels: Sequence[int], image_size: int, quantities: npt.NDArray[np.integer]) -> MajorityModel:
    """The model of a training split's quantities, shape (n,). A class without bins counts as half a bin."""
    model = MajorityModel(ModelSpec("majority", tuple(labels), image_size))
    counts = np.array([max(0.5, float(np.sum(quantities == label))) for label in labels])
    model.log_shares.copy_(torch.from_numpy(np.log(counts / counts.sum())))
    return model.eval()
