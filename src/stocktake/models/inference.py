"""Probabilities of prepared photos, in fp32: the figures that are reported are those of the served graph."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from stocktake import distributed
from stocktake.data.array_cache import ArrayCache
from stocktake.models.counting_model import CountingModel


def predict(
    model: CountingModel, photos: ArrayCache, hashes: Sequence[str], batch_size: int, device: torch.device
) -> npt.NDArray[np.float64]:
    """Class probabilities (n, len(labels)) of the photos with these content hashes.

    The processes of a distributed job call this together. Whole batches are dealt out to them, so that each is computed
    as one process would, and all get all probabilities.
    """
    model.eval().to(device)
    world = distributed.world()
    starts = range(0, len(hashes), batch_size)[world.rank :: world.size]
    parts: dict[int, npt.NDArray[np.float64]] = {}
    hidden = None if distributed.is_rank_zero() else True
    with tqdm(total=len(hashes), desc="predicting", leave=False, disable=hidden) as bar, torch.inference_mode():
        for start in starts:
            batch = torch.from_numpy(photos.read(hashes[start : start + batch_size])).to(device)
            parts[start] = torch.softmax(model(batch).double(), 1).cpu().numpy()
            bar.update(len(batch) * world.size)
    dealt = {start: part for given in distributed.gather(parts) for start, part in given.items()}
    return np.concatenate([np.zeros((0, len(model.spec.labels))), *(dealt[start] for start in sorted(dealt))])


def pick_device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
