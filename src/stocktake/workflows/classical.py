"""`stocktake classical`: PCA of the pixels and a support vector machine."""

from __future__ import annotations

import time

from stocktake.config import ClassicalConfig
from stocktake.models.classical import PcaSvmModel, fit_pca_svm
from stocktake.tracking.runs import TrackedRun
from stocktake.workflows.rung import Bench, Rung, record_model, rung_run, set_up


def classical(config: ClassicalConfig, bench: Bench | None = None, parent: TrackedRun | None = None) -> Rung:
    """Fit, evaluate and log; alone or as a rung of a ladder."""
    bench = bench or set_up(config)
    with rung_run(config, ClassicalConfig, bench, "classical", parent) as (run, began):
        model = train_classical(run, config, bench)
        metrics = record_model(run, model, config, bench)
    return Rung("classical", metrics, run, time.monotonic() - began, None)


def train_classical(run: TrackedRun, config: ClassicalConfig, bench: Bench) -> PcaSvmModel:
    """Fit on the train split."""
    began = time.monotonic()
    train = bench.manifest.split("train")
    model = fit_pca_svm(
        bench.manifest.labels,
        bench.photos,
        train["hash"].tolist(),
        train["quantity"].to_numpy(),
        config.classical,
        config.seed,
    )
    run.log_metrics({"fit_seconds": time.monotonic() - began})
    return model
