"""The table of stages is all that commands, parser, entry points and searches know of a model."""

from __future__ import annotations

from pathlib import Path

import yaml

from stocktake.cli import COMMANDS
from stocktake.config.training import STAGE_CONFIGS, AnyStageConfig
from stocktake.stages.table import STAGES, stage_of

MLPROJECT = Path(__file__).parents[2] / "MLproject"


def test_each_stage_has_settings_a_command_and_an_entry_point() -> None:
    entry_points = yaml.safe_load(MLPROJECT.read_text())["entry_points"]
    assert list(STAGES) == list(STAGE_CONFIGS)
    for name, stage in STAGES.items():
        assert stage.config is STAGE_CONFIGS[name]
        assert issubclass(AnyStageConfig, stage.config), "ladder and search have its settings"
        assert COMMANDS[name].config is stage.config
        assert entry_points[name]["command"].endswith(f" {name}")
        assert callable(stage.train)


def test_a_stage_is_recognised_by_its_settings() -> None:
    assert [stage_of(stage.config()) for stage in STAGES.values()] == list(STAGES)
