"""The support vector machine as a network computes what scikit-learn's computes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.svm import SVC

from stocktake.config.training import PcaSvmConfig
from stocktake.data.array_cache import ArrayCache
from stocktake.models.pca_svm import fit_pca_svm, pooled_pixels

SIZE = 16


def random_photos(folder: Path, n: int, seed: int = 0) -> tuple[ArrayCache, list[str], npt.NDArray[np.uint8]]:
    photos = np.random.default_rng(seed).integers(0, 256, (n, SIZE, SIZE, 3), dtype=np.uint8)
    cache = ArrayCache(folder / "photos.sqlite", (SIZE, SIZE, 3), "uint8")
    hashes = [f"photo{row}" for row in range(n)]
    cache.add(dict(zip(hashes, photos, strict=True)))
    return cache, hashes, photos


@pytest.mark.parametrize("classes", [2, 3, 5, 6])
def test_decisions_are_those_of_scikit_learn(classes: int, tmp_path: Path) -> None:
    cache, hashes, photos = random_photos(tmp_path, 90)
    labels = tuple(range(classes))
    quantities = np.random.default_rng(1).integers(0, classes, 90)
    config = PcaSvmConfig(pixels=8, components=12, c=2.0, gamma=0.05)
    model = fit_pca_svm(labels, cache, hashes, quantities, config, seed=3)

    unseen = np.random.default_rng(2).integers(0, 256, (60, SIZE, SIZE, 3), dtype=np.uint8)
    shown = torch.from_numpy(np.concatenate([photos, unseen]))
    pixels = pooled_pixels(shown, 8).numpy()
    pca = PCA(12, whiten=True, svd_solver="randomized", random_state=3).fit(pixels[:90])
    machine = SVC(C=2.0, gamma=0.05, class_weight="balanced", break_ties=classes > 2).fit(
        pca.transform(pixels[:90]), quantities
    )
    expected = machine.decision_function(pca.transform(pixels))
    with torch.no_grad():
        found = model(shown).numpy()
    assert found.shape == (150, classes)
    assert (np.array(labels)[found.argmax(1)] == machine.predict(pca.transform(pixels))).all()
    if classes == 2:  # scikit-learn gives one column: the second class against the first
        assert (np.sign(found[:, 1] - found[:, 0]) == np.sign(expected)).all()
    else:
        np.testing.assert_allclose(found, expected, atol=2e-4)
    assert len(set(found.argmax(1))) > 1, "a machine that always says the same proves nothing"


def test_labels_need_not_begin_at_zero(tmp_path: Path) -> None:
    cache, hashes, photos = random_photos(tmp_path, 40)
    quantities = np.repeat([3, 4, 5, 6], 10)
    model = fit_pca_svm((3, 4, 5, 6), cache, hashes, quantities, PcaSvmConfig(pixels=8, components=30, c=100), seed=0)
    with torch.no_grad():
        answers = np.array([3, 4, 5, 6])[model(torch.from_numpy(photos)).argmax(1).numpy()]
    assert (answers == quantities).all(), "a hard machine knows its own training photos by heart"


def test_more_than_max_train_is_thinned_out_at_random_but_repeatably(tmp_path: Path) -> None:
    cache, hashes, photos = random_photos(tmp_path, 60)
    quantities = np.tile([1, 2, 3], 20)
    config = PcaSvmConfig(pixels=8, components=20, c=1000, max_train=30)
    first, again, other = (fit_pca_svm((1, 2, 3), cache, hashes, quantities, config, seed=seed) for seed in (0, 0, 1))
    assert first.spec.options["support_vectors"] <= 30
    with torch.no_grad():
        right = (np.array([1, 2, 3])[first(torch.from_numpy(photos)).argmax(1).numpy()] == quantities).sum()
    assert 30 <= right < 60, "those that were left out are noise to it"
    torch.testing.assert_close(first.mean, again.mean, rtol=0, atol=0)
    assert not torch.equal(first.mean, other.mean)


def test_fewer_photos_than_components_is_no_constant(tiny_bench) -> None:
    train, test = tiny_bench.manifest.split("train").head(32), tiny_bench.manifest.split("test")
    model = fit_pca_svm(
        (1, 2, 3),
        tiny_bench.photos,
        train["hash"].tolist(),
        train["quantity"].to_numpy(),
        PcaSvmConfig(components=60),
        seed=0,
    )
    with torch.no_grad():
        answers = model(torch.from_numpy(tiny_bench.photos.read(test["hash"].tolist()))).argmax(1).numpy() + 1
    assert len(set(answers)) > 1
    assert (answers == test["quantity"].to_numpy()).mean() > (test["quantity"] == 3).mean() + 0.1


def test_it_learns_what_can_be_learnt(tiny_bench) -> None:
    train, test = tiny_bench.manifest.split("train"), tiny_bench.manifest.split("test")
    config = PcaSvmConfig(pixels=16, components=20)
    model = fit_pca_svm(
        (1, 2, 3), tiny_bench.photos, train["hash"].tolist(), train["quantity"].to_numpy(), config, seed=0
    )
    with torch.no_grad():
        answers = model(torch.from_numpy(tiny_bench.photos.read(test["hash"].tolist()))).argmax(1).numpy() + 1
    majority = (test["quantity"] == 3).mean()
    assert (answers == test["quantity"].to_numpy()).mean() > majority + 0.2
