"""Classical pipeline: PCA of the pixels and a support vector machine."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from stocktake.config.training import ClassicalConfig
from stocktake.models.pca_svm import PcaSvmModel, fit_pca_svm
from stocktake.stages.prepare import PreparedData
from stocktake.tracking.runs import TrackedRun

if TYPE_CHECKING:
    from stocktake.training.fit import EpochVerdict  # Lightning takes seconds to import


def train(
    run: TrackedRun, config: ClassicalConfig, prepared: PreparedData, _should_stop: EpochVerdict | None = None
) -> PcaSvmModel:
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
