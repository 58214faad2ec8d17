from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from stocktake.errors import StocktakeError
from stocktake.models import linear_probe as frozen_module
from stocktake.models.linear_probe import backbone_fingerprint, extract_features, fit_head
from stocktake.models.network import NetworkModel, create_network
from stocktake.models.precision import Precision
from tiny_bins import TINY_BACKBONE

CPU = torch.device("cpu")


def network(labels: tuple[int, ...] = (1, 2, 3), size: int = 32, seed: int = 0) -> NetworkModel:
    return create_network(labels, size, TINY_BACKBONE, "none", seed=seed)


def extract(prepared, model: NetworkModel, workspace: Path, rows: int = 40, precision: Precision = "fp32"):
    hashes = prepared.manifest.bins["hash"].tolist()[:rows]
    return extract_features(
        model, prepared.photos, hashes, batch_size=7, precision=precision, device=CPU, workspace=workspace
    )


class Untouchable(torch.nn.Module):
    def __init__(self, allowed: int, inside: torch.nn.Module) -> None:
        super().__init__()
        self.allowed = allowed
        self.inside = inside

    def forward(self, photos: torch.Tensor) -> torch.Tensor:
        self.allowed -= len(photos)
        if self.allowed < 0:
            raise KeyboardInterrupt
        return self.inside(photos)

    def state_dict(self, *arguments, **options):
        return self.inside.state_dict(*arguments, **options)


def test_a_second_extraction_touches_no_backbone(tiny_bench, tmp_path: Path) -> None:
    first, computed = extract(tiny_bench, network(), tmp_path)
    assert computed == 40
    assert first.shape == (40, 96)
    model = network()
    model.backbone = Untouchable(0, model.backbone)
    again, computed = extract(tiny_bench, model, tmp_path)
    assert computed == 0
    np.testing.assert_array_equal(again, first)
    with pytest.raises(KeyboardInterrupt):
        extract(tiny_bench, model, tmp_path, rows=41)


def test_features_are_the_networks_in_the_order_of_the_photos(tiny_bench, tmp_path: Path) -> None:
    found, _ = extract(tiny_bench, network(), tmp_path)
    photos = torch.from_numpy(tiny_bench.photos.read(tiny_bench.manifest.bins["hash"].tolist()[:40]))
    with torch.inference_mode():
        expected = network().eval().features(photos).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)


def test_an_interrupted_extraction_goes_on_where_it_was(
    tiny_bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = extract(tiny_bench, network(), tmp_path / "whole")
    monkeypatch.setattr(frozen_module, "_CHUNK", 14)
    model = network()
    model.backbone = Untouchable(30, model.backbone)
    with pytest.raises(KeyboardInterrupt):
        extract(tiny_bench, model, tmp_path / "cut")
    found, computed = extract(tiny_bench, network(), tmp_path / "cut")
    assert computed == 40 - 28, "two whole chunks of 14 were kept"
    np.testing.assert_allclose(found, whole, rtol=1e-3, atol=1e-5)


def test_the_fingerprint_tells_weights_sizes_and_formats_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = backbone_fingerprint(network(), "fp32")
    assert plain == backbone_fingerprint(network(labels=(1, 2)), "fp32"), "the head is no part of it"
    nudged = network()
    with torch.no_grad():
        nudged.backbone.get_parameter("conv1.0.weight")[0, 0, 0, 0] += 1e-6
    statistics = network()
    dict(statistics.backbone.named_buffers())["bn1.running_mean"][0] += 1e-6
    scaled = network()
    scaled.mean += 0.01
    with monkeypatch.context() as patched:
        patched.setattr(frozen_module, "PREPROCESSING_VERSION", frozen_module.PREPROCESSING_VERSION + 1)
        later = backbone_fingerprint(network(), "fp32")
    others = [
        later,
        backbone_fingerprint(network(seed=1), "fp32"),
        backbone_fingerprint(network(size=40), "fp32"),
        backbone_fingerprint(network(), "bf16"),
        *(backbone_fingerprint(one, "fp32") for one in (nudged, statistics, scaled)),
    ]
    assert len({plain, *others}) == 8


@pytest.mark.parametrize("balanced", [True, False])
@pytest.mark.parametrize("labels", [(1, 2), (1, 2, 3), (0, 1, 2, 3, 4, 5)])
def test_the_head_is_scikit_learns_on_standardised_features(labels: tuple[int, ...], balanced: bool) -> None:
    rng = np.random.default_rng(0)
    quantities = rng.choice(labels, 200)
    model = network(labels)
    features = rng.normal(3, 2, (200, model.head.in_features)) + rng.normal(0, 0.6, 96) * quantities[:, None]
    features[:, 5] = 0.25  # a feature that never moves
    features = features.astype(np.float32)
    fit_head(model, features, quantities, c=1e-3, balanced=balanced)
    expected = make_pipeline(
        StandardScaler(),
        LogisticRegression(C=1e-3, class_weight="balanced" if balanced else None, max_iter=2000, tol=1e-6),
    ).fit(features, quantities)
    with torch.inference_mode():
        shares = torch.softmax(model.head(torch.from_numpy(features)), 1).numpy()
    np.testing.assert_allclose(shares, expected.predict_proba(features), atol=5e-3)
    agree = np.array(labels)[shares.argmax(1)] == expected.predict(features)
    assert agree.mean() > 0.95
    assert len(set(shares.argmax(1))) > 1


def test_features_that_are_no_numbers_are_one_clear_error() -> None:
    features = np.ones((4, 96), dtype=np.float32)
    features[1, 7] = np.nan
    with pytest.raises(StocktakeError, match=f"--backbone {TINY_BACKBONE} gives features that are not finite"):
        fit_head(network((1, 2)), features, np.array([1, 2, 1, 2]), c=1.0, balanced=False)


def test_bf16_features_are_near_but_kept_apart(tiny_bench, tmp_path: Path) -> None:
    plain, _ = extract(tiny_bench, network(), tmp_path, rows=8)
    rough, computed = extract(tiny_bench, network(), tmp_path, rows=8, precision="bf16")
    assert computed == 8
    assert not np.array_equal(plain, rough)
    np.testing.assert_allclose(rough, plain, atol=0.05 * float(np.abs(plain).max()))
