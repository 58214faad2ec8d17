"""`stocktake eda` on a small root with odd bins: page, figures, metrics, and nothing that a record can inject."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stocktake.commands.eda import eda, explore
from stocktake.config import EdaConfig, TrackingConfig
from stocktake.data.manifest import build_manifest
from stocktake.errors import StocktakeError

HOSTILE = "<script>alert(1)</script>"


def make_root(root: Path, n: int = 24) -> Path:
    """Bins in pairs of looks, one item apart; one record that is an attack, one photo that is no photo."""
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


def config(tmp_path: Path, root: Path, **changes: object) -> EdaConfig:
    return EdaConfig(root=str(root), workspace=str(tmp_path / "workspace"), **changes)


def explored(tmp_path: Path, root: Path, folder: str = "out", **changes: object) -> tuple[dict[str, float], Path]:
    settings = config(tmp_path, root, **changes)
    manifest = build_manifest(settings)
    out = tmp_path / folder
    return explore(manifest, out, task=settings.task, seed=0, twin_distance=4), out


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Read only: 24 bins and two that cannot be used."""
    return make_root(tmp_path_factory.mktemp("eda") / "bins")


def test_page_figures_and_metrics(tmp_path, root):
    metrics, out = explored(tmp_path, root)
    assert metrics["eda/bins"] == 24
    assert metrics["eda/rejected"] == 2
    assert metrics["eda/outside"] == 0
    assert metrics["eda/twins_share"] == 1
    assert metrics["eda/groups"] == 12
    assert metrics["eda/neighbours"] == 12
    assert metrics["eda/groups_across_splits"] == 0
    assert metrics["eda/imbalance_ratio"] == 2
    assert metrics["eda/photos_measured"] == 24
    assert sum(metrics[f"eda/bins_{label}"] for label in range(1, 6)) == 24

    figures = {"classes", "sizes", "light", "extremes", "twins", "near_duplicates"}
    figures |= {f"samples_{label}" for label in range(1, 6)}
    assert {path.stem for path in out.glob("*.png")} == figures
    assert {path.name for path in out.iterdir()} == {f"{name}.png" for name in figures} | {"eda.html"}

    text = (out / "eda.html").read_text()
    page = Page(text)
    assert page.tags.count("img") == len(figures)
    assert all(page.alts)
    assert all(address.startswith("data:image/") for address in page.addresses)
    assert not re.search(r"url\(|@import|https?://", text)
    assert "script" not in page.tags
    assert "&lt;script&gt;" in text
    for number in ("24", "12", "2.0 : 1", "100%"):
        assert number in text


def test_names_from_outside_are_escaped(tmp_path):
    root = make_root(tmp_path / "<img src=x> & co", 4)
    _, out = explored(tmp_path, root, task="1-2")
    text = (out / "eda.html").read_text()
    assert "&lt;img src=x&gt; &amp; co" in text
    assert "x" not in Page(text).addresses


def test_same_seed_same_page(tmp_path, root):
    first, a = explored(tmp_path, root, "a", task="1-2")
    second, b = explored(tmp_path, root, "b", task="1-2")
    assert first == second
    assert (a / "eda.html").read_bytes() == (b / "eda.html").read_bytes()


def test_sample_is_bounded_and_said_so(tmp_path, root, monkeypatch):
    monkeypatch.setattr("stocktake.commands.eda.SAMPLE", 3)
    metrics, out = explored(tmp_path, root, task="1-2")
    assert metrics["eda/photos_measured"] == 3
    assert "a random sample of 3 of 9 photos" in (out / "eda.html").read_text()


def test_photos_that_go_away_do_not_end_the_run(tmp_path):
    root = make_root(tmp_path / "bins")
    settings = config(tmp_path, root)
    manifest = build_manifest(settings)
    (root / "bin-images" / "00003.jpg").unlink()
    (root / "bin-images" / "00004.jpg").write_bytes(b"")
    metrics = explore(manifest, tmp_path / "out", task="1-5", seed=0, twin_distance=4)
    assert metrics["eda/photos_measured"] == 22
    assert "2 of them could not be read again" in (tmp_path / "out" / "eda.html").read_text()


def test_random_split_is_seen_to_leak(tmp_path):
    settings = config(tmp_path, make_root(tmp_path / "bins", 60), task="1-2")
    settings.split.by = "id"
    metrics = explore(build_manifest(settings), tmp_path / "out", task="1-2", seed=0, twin_distance=4)
    assert metrics["eda/groups_across_splits"] > 0
    assert "flatter the model" in (tmp_path / "out" / "eda.html").read_text()


def test_one_bin(tmp_path):
    metrics, out = explored(tmp_path, make_root(tmp_path / "bins", 1), task="1-2")
    assert metrics["eda/bins"] == 1
    assert metrics["eda/empty_classes"] == 1
    assert (out / "eda.html").exists()


def test_tracked_run(tmp_path, root):
    tracking = TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db", system_metrics=False)
    metrics = eda(config(tmp_path, root, task="1-2", tracking=tracking))

    from mlflow import MlflowClient

    client = MlflowClient(tracking.uri)
    [run] = client.search_runs([client.get_experiment_by_name("stocktake").experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.tags["stage"] == "eda"
    logged = {name: value for name, value in run.data.metrics.items() if name.startswith("eda/")}
    assert logged == pytest.approx(metrics)
    [dataset] = run.inputs.dataset_inputs
    assert dataset.dataset.digest == run.data.tags["data.fingerprint"]
    assert {"eda.html", "classes.png"} <= {file.path for file in client.list_artifacts(run.info.run_id)}


def test_missing_root_is_one_clear_line(tmp_path):
    with pytest.raises(StocktakeError, match="nowhere"):
        eda(config(tmp_path, tmp_path / "nowhere"))
