"""`stocktake majority`, `classical`, `frozen`, `finetune`: train one stage of the table."""

from __future__ import annotations

from stocktake import distributed
from stocktake.config.runs import ImageConfig
from stocktake.config.training import TrainingConfig
from stocktake.stages.prepare import prepare_data
from stocktake.stages.run import StageResult, train_stage
from stocktake.stages.table import stage_of


def train(config: ImageConfig) -> StageResult:
    """Train, evaluate and log, alone or as one of the processes that torchrun has started, which have one run."""
    training = getattr(config, "training", TrainingConfig())
    with distributed.process_group(timeout=training.collective_timeout, expected=training.world_size):
        return train_stage(stage_of(config), config, prepare_data(config))
