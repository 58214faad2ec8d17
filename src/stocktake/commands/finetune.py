"""`stocktake finetune`, also `train`: train the whole network, stop early, keep the best checkpoint."""

from __future__ import annotations

from stocktake import distributed
from stocktake.config.training import FinetuneConfig
from stocktake.stages.prepare import prepare_data
from stocktake.stages.run import StageResult, train_stage


def finetune(config: FinetuneConfig) -> StageResult:
    """Train, evaluate and log, alone or as one of the processes that torchrun has started, which have one run."""
    training = config.training
    with distributed.process_group(timeout=training.collective_timeout, expected=training.world_size):
        return train_stage("finetune", config, prepare_data(config))
