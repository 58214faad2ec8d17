"""Runs and promotions as tests of the registry need them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stocktake.config.runs import TrackingConfig
from stocktake.registry.promotion import Event, set_challenger, set_champion
from stocktake.registry.versions import ModelRegistry
from stocktake.tracking.runs import TrackedRun, start_run

WORKSPACE = Path("workspace")
RUNS = WORKSPACE / "runs"


def make_run(model_folder: Path, name: str, tracking: TrackingConfig | None = None) -> TrackedRun:
    """A finished run with a model."""
    tracking = tracking or TrackingConfig(system_metrics=False)
    tags = {"stage": name, "task": "1-3", "data.fingerprint": "f1"}
    with start_run(tracking, workspace=WORKSPACE, name=name, tags=tags) as run:
        run.log_metrics({"val/macro_f1": 0.3, "test/macro_f1": 0.25, "test/n": 18})
        run.log_model(model_folder)
    return run


def promoted(registry: ModelRegistry, number: int, **options: Any) -> Event:
    """Make a version the champion."""
    version = registry.version(str(number))
    set_challenger(registry, version)
    return set_champion(registry, version, registry.champion(), **options)
