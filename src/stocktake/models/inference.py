"""Probabilities of prepared photos, in fp32: the figures that are reported are those of the served graph."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from stocktake.bins.array_cache import ArrayCache
from stocktake.models.counting_model import CountingModel
from stocktake.progress import progress


def predict(
    model: CountingModel, photos: ArrayCache, hashes: Sequence[str], batch_size: int, device: torch.device
) -> npt.NDArray[np.float64]:
    """Class probabilities (n, len(labels)) of the photos with these content hashes."""
    model.eval().to(device)
    parts = [np.zeros((0, len(model.spec.labels)))]
    with progress("predicting", len(hashes)) as advance, torch.inference_mode():
        for start in range(0, len(hashes), batch_size):
            batch = torch.from_numpy(photos.read(hashes[start : start + batch_size])).to(device)
            parts.append(torch.softmax(model(batch).double(), 1).cpu().numpy())
            advance(len(batch))
    return np.concatenate(parts)


def pick_device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
