"""Prepared photos: each decoded once, read by its content, and never mistaken for another."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from stocktake.config.data import BinsConfig
from stocktake.data import photos as photos_module
from stocktake.data.images import decode, resize_to_square
from stocktake.data.manifest import build_manifest
from stocktake.data.photos import prepare_photos
from stocktake.errors import StocktakeError

SIZE = 24


@pytest.fixture
def config(tmp_path: Path, make_root: Callable[..., Path]) -> BinsConfig:
    return BinsConfig(root=str(make_root(tmp_path / "root", [1, 2, 3])), workspace=str(tmp_path / "workspace"))


def test_every_photo_is_prepared_under_its_hash(config: BinsConfig) -> None:
    manifest = build_manifest(config)
    photos = prepare_photos(manifest.source, manifest.bins, SIZE, Path(config.workspace))
    assert len(photos) == 3
    for bin_id, key in zip(manifest.bins["id"], manifest.bins["hash"], strict=True):
        assert (photos[key] == resize_to_square(decode(manifest.source.photo(bin_id)), SIZE)).all()


def test_prepared_photos_are_not_read_again(config: BinsConfig) -> None:
    manifest = build_manifest(config)
    first = prepare_photos(manifest.source, manifest.bins, SIZE, Path(config.workspace)).read(manifest.bins["hash"])
    for photo in (Path(manifest.source.root) / "bin-images").iterdir():
        photo.unlink()
    again = prepare_photos(manifest.source, manifest.bins, SIZE, Path(config.workspace)).read(manifest.bins["hash"])
    assert np.array_equal(first, again)


def test_photos_of_another_preprocessing_are_not_used(config: BinsConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = build_manifest(config)
    prepare_photos(manifest.source, manifest.bins, SIZE, Path(config.workspace))
    monkeypatch.setattr(photos_module, "PREPROCESSING_VERSION", photos_module.PREPROCESSING_VERSION + 1)
    monkeypatch.setattr(photos_module, "resize_to_square", lambda photo, size: 255 - resize_to_square(photo, size))
    photos = prepare_photos(manifest.source, manifest.bins, SIZE, Path(config.workspace))
    for bin_id, key in zip(manifest.bins["id"], manifest.bins["hash"], strict=True):
        assert (photos[key] == 255 - resize_to_square(decode(manifest.source.photo(bin_id)), SIZE)).all()


def test_a_photo_that_changed_since_the_manifest_ends_the_run(
    config: BinsConfig, bin_photo: Callable[..., bytes]
) -> None:
    manifest = build_manifest(config)
    (Path(manifest.source.root) / "bin-images" / "00002.jpg").write_bytes(bin_photo("another"))
    with pytest.raises(StocktakeError, match=r"photo 00002 of .* changed while it was read: start again"):
        prepare_photos(manifest.source, manifest.bins, SIZE, Path(config.workspace))


def test_a_photo_that_went_since_the_manifest_ends_the_run(config: BinsConfig) -> None:
    manifest = build_manifest(config)
    (Path(manifest.source.root) / "bin-images" / "00003.jpg").unlink()
    with pytest.raises(StocktakeError, match=r"photo 00003 of .* cannot be read: No such file"):
        prepare_photos(manifest.source, manifest.bins, SIZE, Path(config.workspace))


def test_a_cache_that_cannot_be_written_is_named(config: BinsConfig) -> None:
    manifest = build_manifest(config)
    (Path(config.workspace) / "cache").write_text("in the way")
    with pytest.raises(StocktakeError, match=f"{config.workspace}/cache"):
        prepare_photos(manifest.source, manifest.bins, SIZE, Path(config.workspace))
