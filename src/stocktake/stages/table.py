"""The one table of stages. A new model is a settings class, a file in models/, a file in this folder, and a row here.

Importing it is cheap: a stage's libraries come when it trains.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from stocktake.config.runs import ImageConfig
from stocktake.config.training import STAGE_CONFIGS

if TYPE_CHECKING:
    from stocktake.models.counting_model import CountingModel


@dataclass(frozen=True)
class Stage:
    """A row of the table."""

    config: type[ImageConfig]
    """Its settings, by which its command is recognised: no other stage has the same class."""
    module: str
    """Of stocktake.stages; has train(run, config, prepared, should_stop), which gives the model that is best on val."""
    search_space: dict[str, Any] = field(default_factory=dict)
    """Of a search that is given none, as its YAML would hold it; empty: there is nothing to search."""
    is_distributed: bool = False
    """Whether torchrun may train it in several processes; such a run has the tag `stage: ddp`."""

    @property
    def train(self) -> Callable[..., CountingModel]:
        """Train on the train split; should_stop gets each epoch's figures and number, and may end the training."""
        train: Callable[..., CountingModel] = importlib.import_module(f"stocktake.stages.{self.module}").train
        return train


STAGES = {
    "majority": Stage(STAGE_CONFIGS["majority"], "majority"),
    "classical": Stage(
        STAGE_CONFIGS["classical"],
        "classical",
        {
            "classical.c": {"type": "float", "low": 0.1, "high": 100.0, "log": True},
            "classical.components": {"type": "int", "low": 20, "high": 200, "log": True},
            "classical.pixels": {"choices": [16, 32, 48]},
        },
    ),
    "frozen": Stage(
        STAGE_CONFIGS["frozen"],
        "linear_probe",
        {
            "head.c": {"type": "float", "low": 1e-5, "high": 1e-1, "log": True},
            "head.class_weight": {"choices": ["balanced", "none"]},
            "image_size": {"choices": [96, 128, 160]},
        },
    ),
    "finetune": Stage(
        STAGE_CONFIGS["finetune"],
        "finetune",
        {
            "lr": {"type": "float", "low": 1e-4, "high": 3e-3, "log": True},
            "weight_decay": {"type": "float", "low": 1e-3, "high": 0.3, "log": True},
            "batch_size": {"choices": [16, 32, 64]},
            "epochs": {"type": "int", "low": 4, "high": 10},
            "training.freeze_epochs": {"type": "int", "low": 0, "high": 2},
        },
        is_distributed=True,
    ),
}
"""By name, weakest first."""


def stage_of(config: ImageConfig) -> str:
    """The stage whose settings these are."""
    return next(name for name, stage in STAGES.items() if stage.config is type(config))


def stage_config(config: Any) -> ImageConfig:
    """The config of the stage that is searched: what all trials have in common.

    Args:
        config: has a `stage`, and every setting of it.
    """
    kind = STAGES[config.stage].config
    names = {field.name for field in dataclasses.fields(kind)} - {"resume"}
    return kind(**{name: getattr(config, name) for name in names})
