"""`stocktake frozen`: a linear head on the features of a frozen backbone."""

from __future__ import annotations

from stocktake.config.training import FrozenConfig
from stocktake.stages.prepare import prepare_data
from stocktake.stages.run import StageResult, train_stage


def frozen(config: FrozenConfig) -> StageResult:
    """Train, evaluate and log."""
    return train_stage("frozen", config, prepare_data(config))
