"""The evaluation of one model on one split: probabilities in; metrics, tables and plots out."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from stocktake.evaluation.calibration import Calibration, coverage, expected_calibration_error, reliability
from stocktake.evaluation.figures import confusion_figure, reliability_figure, save
from stocktake.evaluation.intervals import Interval, bootstrap_intervals
from stocktake.evaluation.metrics import (
    Confusion,
    confusion_matrix,
    cross_entropy,
    expected_quantities,
    floors,
    scores,
)
from stocktake.files import atomic_path, atomic_write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FOLDER = "evaluation"
"""Of a run's artifacts."""
HEADLINES = ("accuracy", "macro_f1", "rmse", "rmse_expected", "mae", "mae_expected", "within_1")
"""The scores whose intervals are metrics of their own; those of the others are in metrics.json."""


class Run(Protocol):
    """What an evaluation is logged to."""

    @property
    def artifacts(self) -> Path:
        """The folder that becomes the run's artifacts."""

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Log metrics at a step."""


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What one model's probabilities say about one split. Everything is computed at most once, when first asked for.

    Args:
        probabilities: (N, K), the model's own, each row summing to 1, columns in the order of the labels.
        bins: N rows with columns id, group and quantity (recorded).
        labels: the task's K quantities.
        split: train, val or test; the prefix of metrics and files.
        title: heads the plots.
        calibration: what calibrates the probabilities; without one they are taken as they are.
        seed: seeds the bootstrap.

    Raises:
        StocktakeError: a quantity is none of the labels.
        ValueError: a column is missing, there are no bins, or the shapes do not fit.
    """

    probabilities: NDArray[np.float64]
    bins: pd.DataFrame
    labels: Sequence[int]
    split: str
    title: str = ""
    calibration: Calibration | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if missing := [name for name in ("id", "group", "quantity") if name not in self.bins]:
            raise ValueError(f"bins lack the columns {', '.join(missing)}")
        if self.bins.empty:
            raise ValueError(f"the {self.split} split has no bins to evaluate on")
        if self.probabilities.shape != (shape := (len(self.bins), len(self.labels))):
            raise ValueError(f"probabilities of {self.split} are of shape {shape}, not {self.probabilities.shape}")

    @cached_property
    def predictions(self) -> pd.DataFrame:
        """A row a bin: id, group, quantity, predicted (argmax), expected (rounded mean), confidence, and calibrated
        p_<label> for each label."""
        shares = self._calibrated
        best = shares.argmax(1)
        columns = {f"p_{label}": shares[:, column] for column, label in enumerate(self.labels)}
        return self.bins[["id", "group", "quantity"]].assign(
            predicted=np.array(self.labels)[best],
            expected=expected_quantities(shares, self.labels),
            confidence=shares.max(1),
            **columns,
        )

    @cached_property
    def confusion(self) -> Confusion:
        """(K, K) counts; row = recorded, column = predicted."""
        return confusion_matrix(self.labels, self._quantities, self.predictions["predicted"].to_numpy())

    @cached_property
    def metrics(self) -> dict[str, float]:
        """Every score as `<split>/<score>`.

        The scores of `metrics.scores`, by argmax; rmse_expected and mae_expected, by the rounded mean of the calibrated
        probabilities; loss (nats) and n (bins). Of HEADLINES also `_low` and `_high`, the 95 % bootstrap interval over
        bin groups, and `_floor`, the best that one answer for every bin reaches (`metrics.floors`). With a calibration
        also ece and loss with and without it (`_uncalibrated`), set_coverage (with its interval) and set_size (mean
        number of quantities in a conformal set).
        """
        metrics = {f"{self.split}/{name}": value for name, value in self._scores.items()}
        metrics[f"{self.split}/n"] = float(len(self.bins))
        for name in [*HEADLINES, "set_coverage"]:
            if name in self._intervals:
                metrics[f"{self.split}/{name}_low"], metrics[f"{self.split}/{name}_high"] = self._intervals[name]
        metrics |= {f"{self.split}/{name}_floor": value for name, value in self._floors.items()}
        return metrics

    @cached_property
    def tables(self) -> dict[str, pd.DataFrame]:
        """Tables by name.

        predictions; per_class (label, n, precision, recall, f1, share_predicted of all bins); with a calibration also
        reliability (rows as of `calibration.reliability`, calibrated or not in the column probabilities).
        """
        tables = {"predictions": self.predictions, "per_class": self._per_class}
        if self._reliability:
            tables["reliability"] = pd.concat(self._reliability, names=["probabilities"]).reset_index(level=0)
        return tables

    @property
    def plots(self) -> dict[str, Figure]:
        """Figures by name: confusion_matrix and, with a calibration, reliability."""
        plots = {"confusion_matrix": confusion_figure(self.confusion, self.labels, self.title)}
        if self._reliability:
            plots["reliability"] = reliability_figure(self._reliability, f"{self.title}: reliability")
        return plots

    @property
    def summary(self) -> str:
        """Loss, scores, their floors and confusion matrix in lines that begin with the split: `TEST: loss=…`."""
        values, floor = self._scores, self._floors
        word = self.split.upper()
        return (
            f"{word}: loss={values['loss']:.6f} acc={values['accuracy']:.6f} macro_f1={values['macro_f1']:.6f}\n"
            f"{word}: macro_precision={values['macro_precision']:.6f} macro_recall={values['macro_recall']:.6f}\n"
            f"{word}: rmse={values['rmse']:.6f} rmse_expected={values['rmse_expected']:.6f} mae={values['mae']:.6f}\n"
            f"{word}: floor of one answer for all: acc={floor['accuracy']:.6f} macro_f1={floor['macro_f1']:.6f} "
            f"rmse={floor['rmse']:.6f}\n"
            f"{word}: confusion_matrix=\n{self.confusion}"
        )

    def save(self, folder: Path) -> None:
        """Write `<split>_<name>` files into a folder, which is created.

        metrics.json (name -> value, low, high, floor, n), confusion_matrix.json (labels, matrix with recorded
        quantities as rows), predictions.parquet, the other tables as CSV, the plots as PNG.
        """
        beginning = f"{self.split}_"
        for name, table in self.tables.items():
            suffix = "parquet" if name == "predictions" else "csv"
            with atomic_path(folder / f"{beginning}{name}.{suffix}") as path:
                table.to_parquet(path, index=False) if suffix == "parquet" else table.to_csv(path, index=False)
        for name, figure in self.plots.items():
            save(figure, folder / f"{beginning}{name}.png")
        labels, matrix = [*map(int, self.labels)], self.confusion.tolist()
        for name, content in {
            "metrics": self._described_metrics(),
            "confusion_matrix": {"labels": labels, "rows": "recorded", "matrix": matrix},
        }.items():
            text = json.dumps(content, indent=2, allow_nan=False)
            atomic_write(folder / f"{beginning}{name}.json", text + "\n")

    def log(self, run: Run, step: int = 0) -> None:
        """Log the metrics to a run, and the files of `save` to `evaluation/` of its artifacts."""
        self.save(run.artifacts / FOLDER)
        run.log_metrics(self.metrics, step=step)

    @cached_property
    def _calibrated(self) -> NDArray[np.float64]:
        return self.calibration.apply(self.probabilities) if self.calibration else self.probabilities

    @property
    def _quantities(self) -> NDArray[np.int64]:
        return self.bins["quantity"].to_numpy(dtype=np.int64)

    @cached_property
    def _floors(self) -> dict[str, float]:
        return floors(self._quantities, self.labels)

    @cached_property
    def _scores(self) -> dict[str, float]:
        values = {name: float(value) for name, value in scores(self.confusion, self.labels).items()}
        expected = self.predictions["expected"].to_numpy()
        by_mean = scores(confusion_matrix(self.labels, self._quantities, expected), self.labels)
        values |= {f"{name}_expected": float(by_mean[name]) for name in ("rmse", "mae")}
        values["loss"] = cross_entropy(self._calibrated, self._quantities, self.labels)
        if self._reliability and self._coverage:
            values["ece"] = expected_calibration_error(self._reliability["calibrated"])
            values["ece_uncalibrated"] = expected_calibration_error(self._reliability["uncalibrated"])
            values["loss_uncalibrated"] = cross_entropy(self.probabilities, self._quantities, self.labels)
            values["set_coverage"], values["set_size"], _ = self._coverage
        return values

    @cached_property
    def _intervals(self) -> dict[str, Interval]:
        groups = self.bins["group"].to_numpy()
        intervals, by_mean = (
            bootstrap_intervals(
                self.labels, self._quantities, self.predictions[decoded].to_numpy(), groups, seed=self.seed
            )
            for decoded in ("predicted", "expected")
        )
        intervals |= {f"{name}_expected": by_mean[name] for name in ("rmse", "mae")}
        return intervals | ({"set_coverage": self._coverage[2]} if self._coverage else {})

    @cached_property
    def _coverage(self) -> tuple[float, float, Interval] | None:
        """Coverage of the conformal sets, their mean size, and the interval of the coverage."""
        if self.calibration is None:
            return None
        sets = self.calibration.sets(self._calibrated)
        groups = self.bins["group"].to_numpy()
        share, interval = coverage(sets, self._quantities, self.labels, groups, seed=self.seed)
        return share, float(sets.sum(1).mean()), interval

    @cached_property
    def _reliability(self) -> dict[str, pd.DataFrame]:
        if self.calibration is None:
            return {}
        both = {"uncalibrated": self.probabilities, "calibrated": self._calibrated}
        return {name: reliability(shares, self._quantities, self.labels) for name, shares in both.items()}

    @cached_property
    def _per_class(self) -> pd.DataFrame:
        from sklearn.metrics import precision_recall_fscore_support

        predicted = self.predictions["predicted"].to_numpy()
        precision, recall, f1, n = precision_recall_fscore_support(
            self._quantities, predicted, labels=list(self.labels), zero_division=0
        )
        columns = {"n": n, "precision": precision, "recall": recall, "f1": f1}
        return pd.DataFrame(
            {"label": list(self.labels), **columns, "share_predicted": self.confusion.sum(0) / len(self.bins)}
        )

    def _described_metrics(self) -> dict[str, Any]:
        entries = {}
        for name, value in self._scores.items():
            low, high = self._intervals.get(name, (None, None))
            n = len(self.bins)
            entries[name] = {
                "value": value if math.isfinite(value) else None,
                "low": low,
                "high": high,
                "floor": self._floors.get(name.removesuffix("_expected")),
                "n": n,
            }
        return {"split": self.split, "level": 0.95, "groups": self.bins["group"].nunique(), "metrics": entries}
