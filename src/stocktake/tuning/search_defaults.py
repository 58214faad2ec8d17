"""What can be searched: the stages, and for each its config and the space that it has when none is given."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeAlias

from stocktake.config import ClassicalConfig, FinetuneConfig, FrozenConfig, TuneConfig

StageConfig: TypeAlias = FinetuneConfig | FrozenConfig | ClassicalConfig
STAGES: dict[str, type[StageConfig]] = {
    "finetune": FinetuneConfig,
    "frozen": FrozenConfig,
    "classical": ClassicalConfig,
}
"""What can be searched, and the config whose settings are varied."""

TRAINED_BY = {"finetune": "train", "frozen": "frozen", "classical": "classical"}
"""The command that trains one model of a stage."""

TRIALS = 20
"""Of a search that is given no number."""

DEFAULT_SPACES: dict[str, dict[str, Any]] = {
    "finetune": {
        "lr": {"type": "float", "low": 1e-4, "high": 3e-3, "log": True},
        "weight_decay": {"type": "float", "low": 1e-3, "high": 0.3, "log": True},
        "batch_size": {"choices": [16, 32, 64]},
        "epochs": {"type": "int", "low": 4, "high": 10},
        "training.freeze_epochs": {"type": "int", "low": 0, "high": 2},
    },
    "frozen": {
        "head.c": {"type": "float", "low": 1e-5, "high": 1e-1, "log": True},
        "head.class_weight": {"choices": ["balanced", "none"]},
        "image_size": {"choices": [96, 128, 160]},
    },
    "classical": {
        "classical.c": {"type": "float", "low": 0.1, "high": 100.0, "log": True},
        "classical.components": {"type": "int", "low": 20, "high": 200, "log": True},
        "classical.pixels": {"choices": [16, 32, 48]},
    },
}
"""The space of a stage that is given none, as its YAML would hold it."""


def stage_config(config: Any) -> StageConfig:
    """The config of what is searched: what all trials have in common.

    Args:
        config: has a `stage`, and every setting of it.
    """
    kind = STAGES[config.stage]
    names = {field.name for field in dataclasses.fields(kind)} - {"resume"}
    return kind(**{name: getattr(config, name) for name in names})


def choose_pruner(config: TuneConfig) -> str:
    """The pruner of a study: asha, hyperband, median or none."""
    if config.pruner != "auto":
        return config.pruner
    return "asha" if config.stage == "finetune" and len(config.objectives) == 1 else "none"
