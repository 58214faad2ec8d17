from __future__ import annotations

import numpy as np
import pytest
import torch

from stocktake.models.inference import predict
from stocktake.models.majority import fit_majority


def test_probabilities_are_the_shares_of_the_training_split() -> None:
    model = fit_majority((1, 2, 3), 16, np.array([1, 2, 2, 2, 3, 3, 2, 1, 2, 2]))
    photos = torch.randint(0, 256, (5, 16, 16, 3), dtype=torch.uint8)
    shares = torch.softmax(model(photos), 1)
    torch.testing.assert_close(shares, torch.tensor([[0.2, 0.6, 0.2]]).repeat(5, 1))


def test_a_class_without_bins_is_possible_and_never_the_answer() -> None:
    model = fit_majority((0, 1, 2), 16, np.array([0, 2, 2]))
    logits = model(torch.zeros(1, 16, 16, 3, dtype=torch.uint8))[0]
    assert torch.isfinite(logits).all()
    assert logits.argmin() == 1
    assert torch.softmax(logits, 0)[1] == pytest.approx(0.5 / 3.5)


def test_the_answer_for_real_photos_is_the_most_frequent_quantity(tiny_bench) -> None:
    train, test = tiny_bench.manifest.split("train"), tiny_bench.manifest.split("test")
    model = fit_majority(tiny_bench.manifest.labels, 32, train["quantity"].to_numpy())
    shares = predict(model, tiny_bench.photos, test["hash"].tolist(), 7, torch.device("cpu"))
    assert shares.shape == (len(test), 3)
    assert set(np.array(tiny_bench.manifest.labels)[shares.argmax(1)]) == {train["quantity"].mode()[0]}
    assert predict(model, tiny_bench.photos, [], 7, torch.device("cpu")).shape == (0, 3)
