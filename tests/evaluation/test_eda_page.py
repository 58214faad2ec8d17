"""The page of an exploration: its figures and metrics, and that no record injects markup into it."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stocktake.config.data import BinsConfig
from stocktake.data.manifest import build_manifest
from stocktake.evaluation.eda import Exploration, explore

HOSTILE = "<script>alert(1)</script>"


def make_root(root: Path, n: int = 24) -> Path:
    """Bins in pairs of snapshots, one item apart; one record that is an attack, one photo that is no photo."""
    rng = np.random.default_rng(0)
    (root / "bin-images").mkdir(parents=True)
    (root / "metadata").mkdir()
    for i in range(n):
        quantity = 1 + (i // 2) % 4 + i % 2
        items = {f"item-{i // 2}": {"quantity": quantity}}
        record = {"EXPECTED_QUANTITY": quantity, "BIN_FCSKU_DATA": items}
        (root / "metadata" / f"{i:05d}.json").write_text(json.dumps(record))
        pixels = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        photo = Image.fromarray(pixels).resize((96, 72) if i % 3 else (72, 72), Image.Resampling.NEAREST)
        photo.save(root / "bin-images" / f"{i:05d}.jpg")
    (root / "metadata" / "90000.json").write_text(json.dumps({"EXPECTED_QUANTITY": HOSTILE}))
    (root / "metadata" / "90001.json").write_text(json.dumps({"EXPECTED_QUANTITY": 2, "BIN_FCSKU_DATA": {}}))
    (root / "bin-images" / "90001.jpg").write_bytes(b"no photo")
    return root


class Page(HTMLParser):
    """Tags, and the addresses that a browser would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.alts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "srcset")]
        self.alts += [value or "" for name, value in attrs if name == "alt"]


def settings(tmp_path: Path, root: Path, task: str = "1-5") -> BinsConfig:
    return BinsConfig(root=str(root), workspace=str(tmp_path / "workspace"), task=task)


def explored(tmp_path: Path, root: Path, task: str = "1-5") -> Exploration:
    return explore(build_manifest(settings(tmp_path, root, task)), seed=0, near=4)


def saved(exploration: Exploration, folder: Path, root: str = "bins") -> str:
    return exploration.save(folder, root=root, task="1-5", fingerprint="f1").read_text()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read only: 24 bins and two that cannot be used."""
    return make_root(tmp_path_factory.mktemp("eda") / "bins")


def test_page_figures_and_metrics(tmp_path: Path, root: Path) -> None:
    exploration = explored(tmp_path, root)
    metrics = exploration.metrics
    assert metrics["eda/bins"] == 24
    assert metrics["eda/rejected"] == 2
    assert metrics["eda/out_of_range"] == 0
    assert metrics["eda/repeated_share"] == 1
    assert metrics["eda/groups"] == 12
    assert metrics["eda/neighbours"] == 12
    assert metrics["eda/groups_across_splits"] == 0
    assert metrics["eda/imbalance_ratio"] == 2
    assert metrics["eda/photos_measured"] == 24
    assert sum(metrics[f"eda/bins_{label}"] for label in range(1, 6)) == 24

    folder = tmp_path / "out"
    text = saved(exploration, folder, root="<img src=x> & co")
    figures = {"classes", "sizes", "light", "extremes", "snapshots", "near_duplicates"}
    figures |= {f"samples_{label}" for label in range(1, 6)}
    assert {path.name for path in folder.iterdir()} == {f"{name}.png" for name in figures} | {"eda.html"}
    page = Page(text)
    assert page.tags.count("img") == len(figures)
    assert all(page.alts)
    assert all(address.startswith("data:image/") for address in page.addresses)
    assert not re.search(r"url\(|@import|https?://", text)
    assert "script" not in page.tags
    assert "&lt;script&gt;" in text
    assert "&lt;img src=x&gt; &amp; co" in text
    for number in ("24", "12", "2.0 : 1", "100%"):
        assert number in text


def test_a_sample_is_bounded_lost_photos_and_leaking_groups_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stocktake.evaluation.eda.SAMPLE", 8)
    root = make_root(tmp_path / "bins")
    config = settings(tmp_path, root, "1-2")
    config.split.by = "id"
    manifest = build_manifest(config)
    assert len(manifest.bins) == 9
    first, second = (root / "bin-images" / f"{bin_id}.jpg" for bin_id in manifest.bins["id"][:2])
    first.unlink()
    second.write_bytes(b"")
    exploration = explore(manifest, seed=0, near=4)
    lost = exploration.metrics["eda/photos_lost"]
    assert lost in (1, 2)
    assert exploration.metrics["eda/photos_measured"] == 8 - lost
    assert exploration.metrics["eda/groups_across_splits"] > 0
    page = saved(exploration, tmp_path / "out")
    assert "a random sample of 8 of 9 photos" in page
    assert f"{lost:.0f} of them could not be read again" in page


def test_one_bin_and_the_same_seed_again(tmp_path: Path) -> None:
    root = make_root(tmp_path / "bins", 1)
    first, second = (explored(tmp_path, root, "1-2") for _ in range(2))
    assert (first.metrics["eda/bins"], first.metrics["eda/empty_classes"]) == (1, 1)
    assert first.metrics == second.metrics
    page = saved(first, tmp_path / "out")
    assert "one photo only" in page
    assert saved(second, tmp_path / "again") == page
