"""Probabilities by two processes are those of one, to the last bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from process_pair import ProcessGroup
from stocktake.data.array_cache import ArrayCache
from stocktake.models.counting_model import CountingModel
from stocktake.models.inference import predict
from stocktake.models.network import create_network
from stocktake.stages.prepare import PreparedData
from tiny_bins import TINY_BACKBONE, TINY_SIZE


def _predict(prepared: PreparedData, photos: int, batch_size: int) -> tuple[npt.NDArray[np.float64], int]:
    """The probabilities, and how many photos this process computed."""
    model = create_network(prepared.manifest.labels, TINY_SIZE, TINY_BACKBONE, "none", seed=0)
    seen = 0

    def count(_model: Any, given: tuple[torch.Tensor]) -> None:
        nonlocal seen
        seen += len(given[0])

    model.register_forward_pre_hook(count)
    hashes = prepared.manifest.bins["hash"].tolist()[:photos]
    return predict(model, prepared.photos, hashes, batch_size, torch.device("cpu")), seen


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("photos", "batch_size"), [(0, 4), (1, 4), (4, 4), (5, 4), (13, 3), (40, 16)])
def test_two_processes_predict_what_one_does(
    photos: int, batch_size: int, pair: ProcessGroup, tiny_bench: PreparedData
) -> None:
    alone, seen = _predict(tiny_bench, photos, batch_size)
    assert alone.shape == (photos, 3)
    assert seen == photos
    first, second = pair.run(_predict, tiny_bench, photos, batch_size)
    for shares, _ in (first, second):
        assert np.array_equal(shares, alone)
        assert shares.dtype == np.float64
    assert first[1] + second[1] == photos, "none is computed twice"
    if photos <= batch_size:
        assert second[1] == 0
    else:
        assert abs(first[1] - second[1]) <= batch_size


def test_each_photo_has_its_own_row(tiny_bench: PreparedData, tmp_path: Path) -> None:
    """Whatever the batch."""

    class Brightness(CountingModel):
        def forward(self, photos: torch.Tensor) -> torch.Tensor:
            return photos.float().mean((1, 2))

    cache = ArrayCache(tmp_path / "photos.sqlite", (2, 2, 3), "uint8")
    cache.add({str(level): np.full((2, 2, 3), [level, 0, 0], np.uint8) for level in range(5)})
    model = Brightness(create_network((1, 2, 3), TINY_SIZE, TINY_BACKBONE, "none").spec)
    for batch_size in (1, 2, 5, 9):
        shares = predict(model, cache, ["4", "0", "2", "2"], batch_size, torch.device("cpu"))
        expected = torch.softmax(torch.tensor([[level, 0.0, 0.0] for level in (4, 0, 2, 2)]).double(), 1)
        assert np.array_equal(shares, expected.numpy())
