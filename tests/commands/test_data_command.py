"""`stocktake data`: what it tells, what it writes, and that an export is the manifest's photos and nothing else."""

from __future__ import annotations

import dataclasses
import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from stocktake.commands.data import data
from stocktake.config.data import DataConfig
from stocktake.data.manifest import build_manifest
from stocktake.data.sources import Source
from stocktake.errors import StocktakeError

QUANTITIES = [1, 2, 3, 4, 5] * 8


@pytest.fixture
def config(tmp_path: Path, make_root: Callable[..., Path]) -> DataConfig:
    root = make_root(tmp_path / "root", [*QUANTITIES, 6, 0])
    return DataConfig(root=str(root), workspace=str(tmp_path / "workspace"))


@pytest.fixture
def export(config: DataConfig, tmp_path: Path) -> DataConfig:
    return dataclasses.replace(config, export=str(tmp_path / "tree"))


def root_of(config: DataConfig) -> Path:
    return Path(config.root or "")


def tree(config: DataConfig) -> set[str]:
    """Everything in the exported tree: files and empty folders."""
    folder = Path(config.export or "")
    return {
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.name != ".stocktake-export" and (path.is_file() or path.is_symlink() or not any(path.iterdir()))
    }


def expected(config: DataConfig) -> set[str]:
    bins = build_manifest(config).bins
    return {f"{row.split}/{row.quantity}/{row.id}.jpg" for row in bins.itertuples()}


def test_counts_are_returned_and_printed(config: DataConfig, capsys: pytest.CaptureFixture[str]) -> None:
    counts = data(config)
    assert (counts["bins"], counts["out_of_range"], counts["rejected"]) == (40, 2, 0)
    assert counts["train"] + counts["val"] + counts["test"] == 40
    printed = capsys.readouterr().out
    lines = [line.split() for line in printed.splitlines()]
    assert ["quantity", "train", "val", "test", "all"] in lines
    assert ["all", *(str(int(counts[split])) for split in ("train", "val", "test")), "40"] in lines
    assert [line[-1] for line in lines if line and line[0] in "12345" and len(line) == 5] == ["8"] * 5
    assert "2 bins have another quantity and are left out" in printed
    assert "40 groups of snapshots; 0% of the bins are seen again" in printed
    manifest = build_manifest(config)
    assert manifest.fingerprint in printed
    assert str(manifest.folder / "manifest.parquet") in printed


def test_what_is_set_aside_is_listed(
    config: DataConfig, write_bin: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(12):
        write_bin(root_of(config), f"910{number:02d}", photo=b"")
    assert data(config)["rejected"] == 12
    printed = capsys.readouterr().out
    assert "12 bins rejected, listed in" in printed
    assert "  bin-images/91009.jpg: photo is empty" in printed
    assert "  ... and 2 more" in printed
    assert "91011" not in printed
    listed = pd.read_csv(build_manifest(config).folder / "rejected.csv", dtype=str)
    assert listed["id"].tolist() == [f"910{number:02d}" for number in range(12)]
    assert listed["file"].iloc[11] == "bin-images/91011.jpg"


def test_a_second_run_reads_no_photo_and_tells_the_same(
    config: DataConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    counts = data(config)
    printed = capsys.readouterr().out

    def unread(self: Source, bin_id: str) -> bytes:
        raise AssertionError(f"{bin_id} was read again")

    monkeypatch.setattr(Source, "photo", unread)
    assert data(config) == counts
    assert capsys.readouterr().out == printed


def test_an_export_is_the_manifests_photos_by_hard_link(export: DataConfig) -> None:
    data(export)
    assert tree(export) == expected(export)
    for name in tree(export):
        path = Path(export.export or "") / name
        assert path.stat().st_ino == (root_of(export) / "bin-images" / path.name).stat().st_ino


def test_where_there_are_no_hard_links_photos_are_copied(export: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    data(export)
    assert tree(export) == expected(export)
    for name in tree(export):
        path = Path(export.export or "") / name
        original = root_of(export) / "bin-images" / path.name
        assert path.read_bytes() == original.read_bytes()
        assert path.stat().st_ino != original.stat().st_ino


def test_exporting_again_changes_nothing(export: DataConfig) -> None:
    data(export)
    before = tree(export)
    data(export)
    assert tree(export) == before


def test_exporting_again_follows_what_changed(
    export: DataConfig, bin_photo: Callable[..., bytes], write_bin: Callable[..., None]
) -> None:
    data(export)
    write_bin(root_of(export), "00001", quantity=5)  # another class
    write_bin(root_of(export), "90000", quantity=2)
    (root_of(export) / "bin-images" / "00002.jpg").unlink()  # another file in its place, and none
    (root_of(export) / "bin-images" / "00002.jpg").write_bytes(bin_photo("another"))
    (root_of(export) / "metadata" / "00003.json").unlink()
    data(export)
    assert tree(export) == expected(export)
    of_name = {Path(name).name: Path(export.export or "") / name for name in tree(export)}
    assert of_name["00002.jpg"].read_bytes() == bin_photo("another")
    assert of_name["00001.jpg"].parent.name == "5"
    assert "00003.jpg" not in of_name


def test_exporting_a_narrower_task_leaves_no_class_behind(export: DataConfig) -> None:
    """A folder without a photo is an error to those who read such trees."""
    data(dataclasses.replace(export, task="0-6"))
    narrow = dataclasses.replace(export, task="2-3")
    data(narrow)
    assert tree(export) == expected(narrow)
    assert {path.name for path in Path(export.export or "").glob("*/*")} <= {"2", "3"}


def test_other_files_in_an_export_are_not_touched(export: DataConfig) -> None:
    data(export)
    mine = Path(export.export or "") / "extra" / "cats" / "mine.jpg"
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"mine")
    notes = Path(export.export or "") / "train" / "notes.txt"
    notes.write_text("mine too")
    data(dataclasses.replace(export, task="2-3"))
    assert mine.read_bytes() == b"mine"
    assert notes.read_text() == "mine too"


def test_photos_that_are_symbolic_links_are_exported_as_photos(export: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    for photo in (root_of(export) / "bin-images").iterdir():
        photo.rename(tmp_path / "store" / photo.name)
        photo.symlink_to(Path("../../store") / photo.name)
    data(export)
    assert tree(export) == expected(export)
    assert all((Path(export.export or "") / name).read_bytes() for name in tree(export))


@pytest.mark.parametrize("target", ["a folder of mine", "the root"])
def test_a_folder_with_other_files_is_refused(export: DataConfig, tmp_path: Path, target: str) -> None:
    folder = root_of(export) if target == "the root" else tmp_path / "mine"
    folder.mkdir(exist_ok=True)
    (folder / "thesis.tex").write_text("three years")
    before = sorted(folder.rglob("*"))
    with pytest.raises(StocktakeError, match=r"--export .* holds other files: give an empty or a new folder"):
        data(dataclasses.replace(export, export=str(folder)))
    assert sorted(folder.rglob("*")) == before


def test_an_export_below_a_file_is_refused(export: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "tree"):
        with pytest.raises(StocktakeError, match=f"--export {path} cannot be written: Not a directory"):
            data(dataclasses.replace(export, export=str(path)))
