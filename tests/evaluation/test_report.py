"""The report on a split: every file is there, they agree with the metrics, and the figures show something."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from stocktake.evaluation.figures import confusion_figure, plot_curves, replacing, save
from stocktake.evaluation.report import HEADLINES, write_report

LABELS = (0, 1, 2, 3)


def predictions(n: int = 120) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    shares = rng.dirichlet(np.ones(4), n)
    frame = pd.DataFrame(
        {
            "id": [f"{i:05d}" for i in range(n)],
            "group": [f"{i // 2:05d}" for i in range(n)],
            "quantity": rng.integers(0, 3, n),  # no bin of quantity 3
            "predicted": shares.argmax(axis=1),
            "confidence": shares.max(axis=1),
        }
    )
    return frame.assign(**{f"p_{label}": shares[:, label] for label in LABELS})


def shades(path: Path) -> int:
    with Image.open(path) as image:
        return len(np.unique(np.asarray(image.convert("L"))))


def test_files_agree_with_the_metrics(tmp_path):
    frame = predictions()
    metrics = write_report(tmp_path / "report", frame, LABELS, split="test", title="A test")
    folder = tmp_path / "report"
    names = ["confusion_matrix.json", "confusion_matrix.png", "metrics.json", "per_class.csv", "predictions.parquet"]
    assert sorted(path.name for path in folder.iterdir()) == sorted(f"test_{name}" for name in names)

    assert all(isinstance(value, float) for value in metrics.values())
    assert metrics["test/n"] == 120
    assert metrics["test/accuracy"] == np.mean(frame["quantity"] == frame["predicted"])
    for name in HEADLINES:
        low, value, high = (metrics[f"test/{name}{end}"] for end in ("_low", "", "_high"))
        assert low <= value <= high

    written = json.loads((folder / "test_metrics.json").read_text())
    assert written["groups"] == 60
    for name, entry in written["metrics"].items():
        assert entry["value"] == metrics[f"test/{name}"]
        assert entry["n"] == 120
    assert written["metrics"]["rmse"]["high"] == metrics["test/rmse_high"]
    assert written["metrics"]["loss"]["low"] is None

    matrix = json.loads((folder / "test_confusion_matrix.json").read_text())
    assert matrix["labels"] == list(LABELS)
    counts = np.array(matrix["matrix"])
    assert counts.sum() == 120
    assert counts[1, 2] == ((frame["quantity"] == 1) & (frame["predicted"] == 2)).sum()

    table = pd.read_csv(folder / "test_per_class.csv")
    assert list(table.columns) == ["label", "n", "precision", "recall", "f1", "share_predicted"]
    assert table["n"].tolist() == [*np.bincount(frame["quantity"]), 0]
    assert table["f1"].mean() == pytest.approx(metrics["test/macro_f1"])
    assert table["recall"].tolist() == [metrics[f"test/recall_{label}"] for label in LABELS]
    assert table["share_predicted"].sum() == pytest.approx(1)

    pd.testing.assert_frame_equal(pd.read_parquet(folder / "test_predictions.parquet"), frame)
    assert shades(folder / "test_confusion_matrix.png") > 50


def test_same_seed_same_report(tmp_path):
    frame = predictions(40)
    both = [write_report(tmp_path / x, frame, LABELS, split="val", title="t", seed=2) for x in "ab"]
    assert both[0] == both[1]
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def test_report_needs_its_columns_and_bins(tmp_path):
    frame = predictions(10)
    with pytest.raises(ValueError, match="group, p_2"):
        write_report(tmp_path, frame.drop(columns=["p_2", "group"]), LABELS, split="test", title="t")
    with pytest.raises(ValueError, match="the val split has no bins"):
        write_report(tmp_path, frame.head(0), LABELS, split="val", title="t")


@pytest.mark.parametrize("k", [1, 2, 6, 15, 30])
def test_confusion_figure_of_any_size(tmp_path, k):
    counts = np.random.default_rng(0).integers(0, 400, (k, k))
    counts[0] = 0
    title = "A title that costs $1 and $2 and is far too long to fit into the width of a narrow figure"
    save(confusion_figure(counts, range(k), title), tmp_path / "c.png", dpi=60)
    assert shades(tmp_path / "c.png") > 20


def test_curves(tmp_path):
    rows = pd.DataFrame(
        {
            "epoch": [1, 2, 3, 3],
            "train/loss": [1.5, 1.4, 1.3, 1.2],
            "train/accuracy": [0.2, 0.3, 0.4, 0.5],
            "val/loss": [1.6, np.nan, 1.4, 1.4],
            "val/accuracy": [0.2, 0.3, 0.25, 0.25],
            "val/macro_f1": [0.1, 0.3, 0.2, 0.2],
        }
    )
    for name, frame in {"all": rows, "one": rows.head(1), "losses": rows[["epoch", "train/loss"]]}.items():
        plot_curves(frame, tmp_path / name / "curves.png")
        assert shades(tmp_path / name / "curves.png") > 50
    with pytest.raises(ValueError, match="at least one row"):
        plot_curves(rows.head(0), tmp_path / "none.png")


def test_a_file_that_fails_halfway_leaves_the_old_one(tmp_path):
    target = tmp_path / "a.json"
    target.write_text("old")

    def fail() -> None:
        with replacing(target) as beside:
            beside.write_text("ne")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_figures_touch_no_global_state(tmp_path):
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    save(confusion_figure(np.eye(2), (0, 1), "t"), tmp_path / "c.png")
    assert dict(mpl.rcParams) == before
