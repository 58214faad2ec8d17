"""`stocktake majority`: the most frequent quantity of the training split."""

from __future__ import annotations

from stocktake.config.training import MajorityConfig
from stocktake.stages.prepare import prepare_data
from stocktake.stages.run import StageResult, train_stage


def majority(config: MajorityConfig) -> StageResult:
    """Train, evaluate and log."""
    return train_stage("majority", config, prepare_data(config))
