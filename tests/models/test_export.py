"""The exported graph computes what torch computes, for batches of any length."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from stocktake.config.training import PcaSvmConfig
from stocktake.models.counting_model import CountingModel
from stocktake.models.export import export_model
from stocktake.models.network import create_network
from stocktake.models.pca_svm import fit_pca_svm
from tiny_bins import tiny_model


def exported(model: CountingModel, folder: Path) -> onnxruntime.InferenceSession:
    export_model(model, folder)
    assert sorted(path.name for path in folder.iterdir()) == ["model.json", "model.onnx"], "no weights beside it"
    onnx.checker.check_model(onnx.load(folder / "model.onnx"))
    return onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])


def assert_same_logits(model: CountingModel, session: onnxruntime.InferenceSession) -> None:
    size = model.spec.image_size
    rng = np.random.default_rng(1)
    for n in (1, 7):
        photos = rng.integers(0, 256, (n, size, size, 3), dtype=np.uint8)
        with torch.inference_mode():
            expected = model(torch.from_numpy(photos)).numpy()
        (found,) = session.run(["logits"], {"photos": photos})
        assert found.shape == (n, len(model.spec.labels))
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("kind", ["majority", "pca_svm"])
def test_models_that_are_no_networks(kind: str, few_bins, tmp_path: Path) -> None:
    model = tiny_model(kind, few_bins)
    assert_same_logits(model, exported(model, tmp_path / "e"))
    description = json.loads((tmp_path / "e" / "model.json").read_text())
    assert description["format"] == 2
    assert description["labels"] == [1, 2, 3]
    assert description["preprocessing"]["size"] == 32
    assert description["kind"] == kind
    assert description["calibration"] == {"temperature": 1.0}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backbone", "weights"),
    [
        ("resnet18", "none"),
        ("efficientnet_lite0", "imagenet"),
        ("mobilenetv3_small_050", "none"),
        ("test_vit", "none"),  # attention
    ],
)
def test_networks(backbone: str, weights: str, tmp_path: Path) -> None:
    model = create_network((0, 1, 2, 3, 4, 5), 64, backbone, weights, seed=0)
    model.train()
    with torch.no_grad():  # statistics as of a trained network, not a fresh one's
        model(torch.randint(0, 256, (8, 64, 64, 3), dtype=torch.uint8))
    assert_same_logits(model, exported(model, tmp_path / "e"))
    assert not model.training


def test_a_photo_smaller_than_the_pixels_of_pca(few_bins, tmp_path: Path) -> None:
    train = few_bins.manifest.split("train")
    config = PcaSvmConfig(pixels=48, components=6)
    model = fit_pca_svm(
        (1, 2, 3), few_bins.photos, train["hash"].tolist(), train["quantity"].to_numpy(), config, seed=0
    )
    assert_same_logits(model, exported(model, tmp_path / "e"))
