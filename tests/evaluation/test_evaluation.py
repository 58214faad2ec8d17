"""An evaluation: its files agree with its metrics, and it is logged in one call."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from stocktake.errors import StocktakeError
from stocktake.evaluation.calibration import Calibration, temperature_scale
from stocktake.evaluation.evaluation import HEADLINES, Evaluation

LABELS = (0, 1, 2, 3)
CALIBRATION = Calibration(temperature=1.5, set_threshold=0.2, n=50)


def evaluation(n: int = 120, calibration: Calibration | None = None, seed: int = 0) -> Evaluation:
    rng = np.random.default_rng(0)
    shares = rng.dirichlet(np.ones(4), n)
    bins = pd.DataFrame(
        {
            "id": [f"{i:05d}" for i in range(n)],
            "group": [f"{i // 2:05d}" for i in range(n)],
            "quantity": rng.integers(0, 3, n),  # no bin of quantity 3
            "flags": "not part of the predictions",
        }
    )
    return Evaluation(shares, bins, LABELS, "test", title="A test", calibration=calibration, seed=seed)


def shades(path: Path) -> int:
    with Image.open(path) as image:
        return len(np.unique(np.asarray(image.convert("L"))))


class Run:
    """What a run receives."""

    def __init__(self, artifacts: Path) -> None:
        self.artifacts = artifacts
        self.logged: list[tuple[dict[str, float], int]] = []

    def log_metrics(self, metrics: dict[str, float], step: int = 0) -> None:
        self.logged.append((metrics, step))


def test_files_agree_with_the_metrics(tmp_path: Path) -> None:
    evaluated, run = evaluation(), Run(tmp_path)
    evaluated.log(run, step=3)
    metrics, folder = evaluated.metrics, tmp_path / "evaluation"
    assert run.logged == [(metrics, 3)]
    names = ["confusion_matrix.json", "confusion_matrix.png", "metrics.json", "per_class.csv", "predictions.parquet"]
    assert sorted(path.name for path in folder.iterdir()) == sorted(f"test_{name}" for name in names)

    predictions = evaluated.predictions
    assert all(isinstance(value, float) for value in metrics.values())
    assert metrics["test/n"] == 120
    assert metrics["test/accuracy"] == np.mean(predictions["quantity"] == predictions["predicted"])
    for decoded, suffix in (("predicted", ""), ("expected", "_expected")):
        off = (predictions["quantity"] - predictions[decoded]).to_numpy()
        assert metrics[f"test/rmse{suffix}"] == pytest.approx(np.sqrt(np.mean(off**2)))
        assert metrics[f"test/mae{suffix}"] == pytest.approx(np.mean(abs(off)))
    assert metrics["test/rmse_expected"] < metrics["test/rmse"]
    assert metrics["test/accuracy_floor"] == predictions["quantity"].value_counts().max() / 120

    written = json.loads((folder / "test_metrics.json").read_text())
    assert written["groups"] == 60
    for name, entry in written["metrics"].items():
        assert entry["value"] == metrics[f"test/{name}"]
        assert entry["n"] == 120
    for name in ("rmse", "rmse_expected"):
        assert written["metrics"][name]["floor"] == metrics["test/rmse_floor"]
    assert written["metrics"]["rmse"]["high"] == metrics["test/rmse_high"]
    assert written["metrics"]["loss"]["low"] is None

    matrix = json.loads((folder / "test_confusion_matrix.json").read_text())
    assert matrix["labels"] == list(LABELS)
    counts = np.array(matrix["matrix"])
    assert counts.sum() == 120
    assert counts[1, 2] == ((predictions["quantity"] == 1) & (predictions["predicted"] == 2)).sum()

    table = pd.read_csv(folder / "test_per_class.csv")
    assert list(table.columns) == ["label", "n", "precision", "recall", "f1", "share_predicted"]
    assert table["n"].tolist() == [*np.bincount(predictions["quantity"]), 0]
    assert table["f1"].mean() == pytest.approx(metrics["test/macro_f1"])
    assert table["recall"].tolist() == [metrics[f"test/recall_{label}"] for label in LABELS]
    assert table["share_predicted"].sum() == pytest.approx(1)

    kept = pd.read_parquet(folder / "test_predictions.parquet")
    pd.testing.assert_frame_equal(kept, predictions)
    shares = [f"p_{label}" for label in LABELS]
    assert list(kept.columns) == ["id", "group", "quantity", "predicted", "expected", "confidence", *shares]
    assert shades(folder / "test_confusion_matrix.png") > 50


def test_intervals_resample_whole_groups() -> None:
    """Every bin four times in its group says as much as once; as bins of their own, the intervals would be half."""
    once = evaluation(100, CALIBRATION)
    once = replace(once, bins=once.bins.assign(group=once.bins["id"]))
    bins = pd.concat([once.bins] * 4, ignore_index=True)
    repeated = replace(once, probabilities=np.tile(once.probabilities, (4, 1)), bins=bins.assign(id=[*range(400)]))
    for name in [*HEADLINES, "set_coverage"]:
        (low, high), (expected_low, expected_high) = (
            (evaluated.metrics[f"test/{name}_low"], evaluated.metrics[f"test/{name}_high"])
            for evaluated in (repeated, once)
        )
        assert low < once.metrics[f"test/{name}"] < high
        assert (low, high) == pytest.approx((expected_low, expected_high), abs=0.25 * (expected_high - expected_low))


def test_a_calibration_is_applied_once_and_its_effect_is_measured(tmp_path: Path) -> None:
    raw, calibrated = evaluation(), evaluation(calibration=CALIBRATION)
    expected = temperature_scale(raw.probabilities, 1.5)
    np.testing.assert_array_equal(calibrated.predictions[[f"p_{label}" for label in LABELS]], expected)
    before, after = raw.metrics, calibrated.metrics
    assert after["test/loss_uncalibrated"] == before["test/loss"]
    assert after["test/loss"] == replace(raw, probabilities=expected).metrics["test/loss"] != before["test/loss"]
    assert after["test/macro_f1"] == before["test/macro_f1"]
    assert after["test/ece"] != after["test/ece_uncalibrated"]
    assert after["test/set_coverage_low"] <= after["test/set_coverage"] <= after["test/set_coverage_high"]
    sets = CALIBRATION.sets(expected)
    assert after["test/set_size"] == sets.sum() / 120
    assert after["test/set_coverage"] == np.mean(sets[np.arange(120), calibrated.bins["quantity"]])
    calibrated.save(tmp_path)
    table = pd.read_csv(tmp_path / "test_reliability.csv")
    assert table.groupby("probabilities")["n"].sum().to_dict() == {"calibrated": 120, "uncalibrated": 120}
    assert shades(tmp_path / "test_reliability.png") > 50


def test_the_summary_has_the_lines_that_a_tuner_reads() -> None:
    evaluated = evaluation()
    first, second, *_ = evaluated.summary.splitlines()
    figures = dict(word.split("=") for word in f"{first} {second}".replace("TEST: ", "").split())
    assert float(figures["macro_f1"]) == pytest.approx(evaluated.metrics["test/macro_f1"], abs=1e-6)
    assert float(figures["acc"]) == pytest.approx(evaluated.metrics["test/accuracy"], abs=1e-6)
    assert figures.keys() == {"loss", "acc", "macro_f1", "macro_precision", "macro_recall"}
    assert all(
        line.startswith("TEST: ") for line in evaluated.summary.partition("TEST: confusion_matrix=")[0].splitlines()
    )


def test_same_seed_same_files(tmp_path: Path) -> None:
    for folder in "ab":
        evaluation(40, CALIBRATION, seed=2).save(tmp_path / folder)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def test_what_does_not_fit_is_an_error() -> None:
    whole = evaluation(10)
    for probabilities, bins, message in (
        (whole.probabilities, whole.bins.drop(columns=["group"]), "group"),
        (whole.probabilities[:0], whole.bins.head(0), "no bins"),
        (whole.probabilities[:, :3], whole.bins, "shape"),
    ):
        with pytest.raises(ValueError, match=message):
            Evaluation(probabilities, bins, LABELS, "test")
    with pytest.raises(StocktakeError, match="7"):
        _ = Evaluation(whole.probabilities, whole.bins.assign(quantity=7), LABELS, "test").metrics
