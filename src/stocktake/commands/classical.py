"""`stocktake classical`: PCA of the pixels and a support vector machine."""

from __future__ import annotations

import time

from stocktake.commands.stage_runs import PreparedData, StageResult, evaluate_and_log, prepare_data, stage_run
from stocktake.config import ClassicalConfig
from stocktake.models.pca_svm import PcaSvmModel, fit_pca_svm
from stocktake.tracking.runs import TrackedRun


def classical(
    config: ClassicalConfig, prepared: PreparedData | None = None, parent: TrackedRun | None = None
) -> StageResult:
    """Fit, evaluate and log; alone or as a rung of a ladder."""
    prepared = prepared or prepare_data(config)
    with stage_run(config, ClassicalConfig, prepared, "classical", parent) as (run, began):
        model = train_classical(run, config, prepared)
        metrics = evaluate_and_log(run, model, config, prepared)
    return StageResult("classical", metrics, run, time.monotonic() - began, None)


def train_classical(run: TrackedRun, config: ClassicalConfig, prepared: PreparedData) -> PcaSvmModel:
    """Fit on the train split."""
    began = time.monotonic()
    train = prepared.manifest.split("train")
    model = fit_pca_svm(
        prepared.manifest.labels,
        prepared.photos,
        train["hash"].tolist(),
        train["quantity"].to_numpy(),
        config.classical,
        config.seed,
    )
    run.log_metrics({"fit_seconds": time.monotonic() - began})
    return model
