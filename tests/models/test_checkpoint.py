from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from stocktake.errors import StocktakeError
from stocktake.models.checkpoint import load_model, save_model
from stocktake.models.majority import fit_majority
from stocktake.models.network import create_network
from tiny_bins import TINY_BACKBONE, tiny_model


@pytest.mark.parametrize("kind", ["majority", "pca_svm", "network"])
def test_a_model_is_the_same_after_saving_and_loading(kind: str, few_bins, tmp_path: Path) -> None:
    model = tiny_model(kind, few_bins)
    save_model(model, tmp_path / "saved")
    loaded = load_model(tmp_path / "saved")
    assert type(loaded) is type(model)
    assert loaded.spec == model.spec
    assert loaded.spec.kind == kind
    assert not loaded.training
    photos = torch.from_numpy(few_bins.photos.read(few_bins.manifest.bins["hash"].tolist()))
    with torch.inference_mode():
        torch.testing.assert_close(loaded(photos), model(photos), rtol=1e-4, atol=1e-4)
    for key, value in model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[key]), key
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == ["model.json", "model.safetensors"]
    content = json.loads((tmp_path / "saved" / "model.json").read_text())
    assert content["labels"] == [1, 2, 3]


def test_saving_again_replaces(few_bins, tmp_path: Path) -> None:
    save_model(tiny_model("network", few_bins), tmp_path)
    save_model(fit_majority((0, 1), 16, np.array([1, 1, 0])), tmp_path)
    assert load_model(tmp_path).spec.kind == "majority"


def test_a_models_weights_start_another_one(few_bins, tmp_path: Path) -> None:
    model = tiny_model("network", few_bins)
    save_model(model, tmp_path)
    other = create_network((0, 1, 2, 3), 48, TINY_BACKBONE, str(tmp_path / "model.safetensors"), seed=9)
    for key, value in model.backbone.state_dict().items():
        assert torch.equal(value, other.backbone.state_dict()[key]), key


@pytest.mark.parametrize(
    "damage",
    [
        "nothing there",
        "no weights",
        "torn weights",
        "torn spec",
        "a list",
        "unknown kind",
        "no backbone",
        "other labels",
    ],
)
def test_a_damaged_folder_is_told(damage: str, few_bins, tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    save_model(tiny_model("network", few_bins), folder)
    spec, weights = folder / "model.json", folder / "model.safetensors"
    content = json.loads(spec.read_text())
    if damage == "nothing there":
        folder = tmp_path / "elsewhere"
    elif damage == "no weights":
        weights.unlink()
    elif damage == "torn weights":
        weights.write_bytes(weights.read_bytes()[:-100])
    else:
        spec.write_text(
            {
                "torn spec": spec.read_text()[:20],
                "a list": "[]",
                "unknown kind": json.dumps(content | {"kind": "oracle"}),
                "no backbone": json.dumps(content | {"options": {}}),
                "other labels": json.dumps(content | {"labels": [1, 2]}),
            }[damage]
        )
    with pytest.raises(StocktakeError, match="holds no model that can be loaded") as caught:
        load_model(folder)
    assert str(folder) in str(caught.value)
