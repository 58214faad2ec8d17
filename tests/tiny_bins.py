"""A tiny root that can be learnt in seconds, and what is prepared from it: fixtures for the rooms' conftests."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from stocktake.config.data import SplitConfig
from stocktake.config.runs import ImageConfig, TrackingConfig
from stocktake.config.training import PcaSvmConfig
from stocktake.models.counting_model import CountingModel
from stocktake.models.majority import fit_majority
from stocktake.models.network import create_network
from stocktake.models.pca_svm import fit_pca_svm
from stocktake.stages.prepare import PreparedData, prepare_data

TINY_BINS = 96
TINY_SIZE = 32
TINY_BACKBONE = "test_resnet"
"""Has batch normalisation, and its checkpoints have 1.5 MB."""
PLAIN_BACKBONE = "test_vit"
"""Has none; it learns the tiny root in a few epochs and is exported in a second or two."""
TINY_JOB = {
    "task": "1-3",
    "image_size": str(TINY_SIZE),
    "split.fractions": "[0.6,0.2,0.2]",
    "split.near_duplicate_distance": "0",
    "backbone": PLAIN_BACKBONE,
    "weights": "none",
    "precision": "fp32",
    "tracking.system_metrics": "false",
}
"""What `-P` gives for a training of seconds on tiny_root."""
_COLOURS = {1: (200, 60, 50), 2: (60, 170, 60), 3: (60, 80, 200)}


def draw_bin(quantity: int, seed: int, size: int = 40) -> bytes:
    """A photo: as many squares as items, in the quantity's colour, on noise. No two seeds give the same."""
    rng = np.random.default_rng((seed, quantity))
    photo = Image.fromarray(rng.integers(60, 140, (size, size, 3), dtype=np.uint8))
    draw = ImageDraw.Draw(photo)
    for _ in range(quantity):
        x, y = rng.integers(0, size - 12, 2)
        draw.rectangle((x, y, x + 11, y + 11), fill=_COLOURS[quantity])
    data = io.BytesIO()
    photo.save(data, "JPEG", quality=92)
    return data.getvalue()


def tiny_model(kind: str, prepared: PreparedData) -> CountingModel:
    """A fitted majority or pca_svm, or a network whose statistics are not fresh ones."""
    train, labels = prepared.manifest.split("train"), prepared.manifest.labels
    if kind == "majority":
        return fit_majority(labels, 32, train["quantity"].to_numpy())
    if kind == "pca_svm":
        config = PcaSvmConfig(pixels=8, components=10)
        return fit_pca_svm(
            labels, prepared.photos, train["hash"].tolist(), train["quantity"].to_numpy(), config, seed=0
        )
    model = create_network(labels, 32, TINY_BACKBONE, "none", seed=4)
    model.train()(torch.randint(0, 256, (4, 32, 32, 3), dtype=torch.uint8))
    return model.eval()


@pytest.fixture(scope="session")
def tiny_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """96 bins of quantities 1 to 3 in the public bucket's layout, each with an item of its own."""
    root = tmp_path_factory.mktemp("tiny") / "root"
    (root / "bin-images").mkdir(parents=True)
    (root / "metadata").mkdir()
    for number in range(TINY_BINS):
        quantity = (1, 2, 3, 3)[number % 4]
        items = {f"ITEM{number:04d}": {"asin": f"ITEM{number:04d}", "quantity": quantity}}
        record = {"BIN_FCSKU_DATA": items, "EXPECTED_QUANTITY": quantity}
        (root / "bin-images" / f"{number:05d}.jpg").write_bytes(draw_bin(quantity, number))
        (root / "metadata" / f"{number:05d}.json").write_text(json.dumps(record))
    return root


@pytest.fixture(scope="session")
def tiny_settings(tiny_root: Path) -> dict[str, Any]:
    """What every config of a run over the tiny root is given, besides its workspace."""
    return {
        "root": str(tiny_root),
        "task": "1-3",
        "image_size": TINY_SIZE,
        "split": SplitConfig(fractions=(0.6, 0.2, 0.2), near_duplicate_distance=0),
        "tracking": TrackingConfig(system_metrics=False),
    }


@pytest.fixture(scope="session")
def tiny_bench(tiny_settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    """The manifest of the tiny root and its prepared photos: read only."""
    return prepare_data(ImageConfig(**tiny_settings, workspace=str(tmp_path_factory.mktemp("tiny-prepared"))))


@pytest.fixture(scope="session")
def few_bins(tiny_bench: PreparedData) -> PreparedData:
    """Four bins of a quantity and split, for what must be quick."""
    bins = tiny_bench.manifest.bins
    few = bins[bins.groupby(["split", "quantity"]).cumcount() < 4].reset_index(drop=True)
    return replace(tiny_bench, manifest=replace(tiny_bench.manifest, bins=few))
