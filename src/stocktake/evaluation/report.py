"""The report of one model on one split: metrics with intervals, tables, the confusion matrix, predictions."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from stocktake.evaluation.calibration import (
    Calibration,
    coverage,
    expected_calibration_error,
    reliability,
    tempered,
)
from stocktake.evaluation.figures import confusion_figure, reliability_figure, replacing, save
from stocktake.evaluation.intervals import bootstrap_intervals
from stocktake.evaluation.metrics import confusion_matrix, cross_entropy, per_class, scores

HEADLINES = ("accuracy", "macro_f1", "rmse", "mae", "within_1")
"""The scores whose intervals are metrics of their own; those of the others are in metrics.json."""


def write_report(
    folder: Path,
    predictions: pd.DataFrame,
    labels: Sequence[int],
    *,
    split: str,
    title: str,
    seed: int = 0,
    calibration: Calibration | None = None,
) -> dict[str, float]:
    """Score predictions and write what a reader needs to run_gate them.

    Written into `folder`, each file beside its place and then moved there:
    `<split>_metrics.json` (name -> value, low, high, n), `<split>_confusion_matrix.json` (labels, matrix with
    recorded quantities as rows), `<split>_confusion_matrix.png`, `<split>_per_class.csv`,
    `<split>_predictions.parquet`, and with a calibration `<split>_reliability.png` and `.csv`.

    Args:
        folder: made when it is not there.
        predictions: one row a bin with columns id, group, quantity (recorded), predicted, confidence and a
            calibrated probability p_<label> for each label; further columns are kept in the parquet file.
        labels: the task's quantities.
        split: train, val or test; the prefix of metrics and files.
        title: heads the confusion matrix.
        seed: seeds the bootstrap.
        calibration: what the probabilities were calibrated with.

    Returns:
        `<split>/<score>` for every score of `metrics.scores`, `<split>/loss` (nats), `<split>/n` (bins), and
        `<split>/<score>_low` and `_high`, the 95 % bootstrap interval over groups, for HEADLINES. With a calibration
        also ece and loss with and without it (`_uncalibrated`), set_coverage (with its interval) and set_size (mean
        number of quantities in a conformal set).

    Raises:
        StocktakeError: a quantity is none of the labels.
        ValueError: a column is missing, or there are no bins.
    """
    shares = [f"p_{label}" for label in labels]
    needed = ["id", "group", "quantity", "predicted", "confidence", *shares]
    if missing := [name for name in needed if name not in predictions]:
        raise ValueError(f"predictions lack the columns {', '.join(missing)}")
    if predictions.empty:
        raise ValueError(f"the {split} split has no bins to report on")
    quantities = predictions["quantity"].to_numpy(dtype=np.int64)
    predicted = predictions["predicted"].to_numpy(dtype=np.int64)
    groups = predictions["group"].to_numpy()

    confusion = confusion_matrix(labels, quantities, predicted)
    values = {name: float(value) for name, value in scores(confusion, labels).items()}
    values["loss"] = cross_entropy(predictions[shares].to_numpy(dtype=np.float64), quantities, labels)
    intervals = bootstrap_intervals(labels, quantities, predicted, groups, seed=seed)
    headlines = [*HEADLINES]
    if calibration is not None:
        values |= _calibration_values(folder, predictions, labels, calibration, split, title)
        sets = calibration.sets(predictions[shares].to_numpy(dtype=np.float64))
        values["set_size"] = float(sets.sum(1).mean())
        values["set_coverage"], intervals["set_coverage"] = coverage(sets, quantities, labels, groups, seed=seed)
        headlines.append("set_coverage")
    n = len(predictions)

    entries: dict[str, dict[str, float | int | None]] = {}
    for name, value in values.items():
        interval = intervals.get(name)
        low, high = interval if interval else (None, None)
        entries[name] = {"value": value if math.isfinite(value) else None, "low": low, "high": high, "n": n}
    record = {"split": split, "level": 0.95, "groups": len(set(groups)), "metrics": entries}
    _write_json(folder / f"{split}_metrics.json", record)
    matrix = {"labels": list(map(int, labels)), "rows": "recorded", "matrix": confusion.tolist()}
    _write_json(folder / f"{split}_confusion_matrix.json", matrix)
    with replacing(folder / f"{split}_per_class.csv") as path:
        per_class_table(confusion, labels).to_csv(path, index=False)
    with replacing(folder / f"{split}_predictions.parquet") as path:
        predictions.to_parquet(path, index=False)
    save(confusion_figure(confusion, labels, title), folder / f"{split}_confusion_matrix.png")

    metrics = {f"{split}/{name}": value for name, value in values.items()}
    metrics[f"{split}/n"] = float(n)
    for name in headlines:
        metrics[f"{split}/{name}_low"], metrics[f"{split}/{name}_high"] = intervals[name]
    return metrics


def _calibration_values(
    folder: Path,
    predictions: pd.DataFrame,
    labels: Sequence[int],
    calibration: Calibration,
    split: str,
    title: str,
) -> dict[str, float]:
    quantities = predictions["quantity"].to_numpy(dtype=np.int64)
    calibrated = predictions[[f"p_{label}" for label in labels]].to_numpy(dtype=np.float64)
    raw = tempered(calibrated, 1 / calibration.temperature)
    tables = {
        "uncalibrated": reliability(raw, quantities, labels),
        "calibrated": reliability(calibrated, quantities, labels),
    }
    save(reliability_figure(tables, f"{title}: reliability"), folder / f"{split}_reliability.png")
    with replacing(folder / f"{split}_reliability.csv") as path:
        pd.concat(tables, names=["probabilities"]).reset_index(level=0).to_csv(path, index=False)
    return {
        "ece": expected_calibration_error(tables["calibrated"]),
        "ece_uncalibrated": expected_calibration_error(tables["uncalibrated"]),
        "loss_uncalibrated": cross_entropy(raw, quantities, labels),
    }


def per_class_table(confusion: NDArray[Any], labels: Sequence[int]) -> pd.DataFrame:
    """One row a label: n (bins recorded with it), precision, recall, f1, share_predicted (of all bins).

    Args:
        confusion: (K, K) counts, row = recorded, column = counted.
        labels: the K quantities.
    """
    counts = np.asarray(confusion)
    total = max(int(counts.sum()), 1)
    table = {"label": list(labels), "n": counts.sum(axis=1), **per_class(counts)}
    return pd.DataFrame({**table, "share_predicted": counts.sum(axis=0) / total})


def _write_json(path: Path, content: dict[str, Any]) -> None:
    with replacing(path) as beside:
        beside.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
