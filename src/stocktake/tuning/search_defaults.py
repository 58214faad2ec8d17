"""What can be searched: the stages, and for each its config and the space that it has when none is given."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, TypeAlias

from stocktake.config import ClassicalConfig, FinetuneConfig, FrozenConfig, TuneConfig
from stocktake.errors import StocktakeError
from stocktake.tuning.space import Space, parse_space, read_space

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
        "lr": {"log_uniform": [1e-4, 3e-3]},
        "weight_decay": {"log_uniform": [1e-3, 0.3]},
        "batch_size": {"categorical": [16, 32, 64]},
        "epochs": {"integer": [4, 10]},
        "training.freeze_epochs": {"integer": [0, 2]},
    },
    "frozen": {
        "head.c": {"log_uniform": [1e-5, 1e-1]},
        "head.class_weight": {"categorical": ["balanced", "none"]},
        "image_size": {"categorical": [96, 128, 160]},
    },
    "classical": {
        "classical.c": {"log_uniform": [0.1, 100.0]},
        "classical.components": {"integer": [20, 200], "log": True},
        "classical.pixels": {"categorical": [16, 32, 48]},
    },
}
"""The space of a stage that is given none, as its YAML would hold it."""


def find_space(given: str | None, stage: str, config: StageConfig) -> Space:
    """The search space of a file, or the stage's own.

    Raises:
        StocktakeError: no such file, or no space over the stage's settings.
    """
    if given is None:
        return parse_space(DEFAULT_SPACES[stage], config, f"the space of {stage}")
    for path in (Path(given), Path("experiments") / f"{given}.space.yaml"):
        if path.is_file():
            return read_space(path, config)
    there = ", ".join(
        sorted(path.name.removesuffix(".space.yaml") for path in Path("experiments").glob("*.space.yaml"))
    )
    raise StocktakeError(f"--space {given}: no such file; in experiments/ there are: {there or 'none'}")


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
