"""`stocktake classical`: PCA of the pixels and a support vector machine."""

from __future__ import annotations

from stocktake.config.training import ClassicalConfig
from stocktake.stages.prepare import prepare_data
from stocktake.stages.run import StageResult, train_stage


def classical(config: ClassicalConfig) -> StageResult:
    """Train, evaluate and log."""
    return train_stage("classical", config, prepare_data(config))
