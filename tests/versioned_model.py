"""A registered model with three versions: fixtures for what promotes and rolls back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stocktake.config import TrackingConfig
from stocktake.registry.promotion import Event, challenge, roll_back, set_champion
from stocktake.registry.promotion_lock import promotion_lock
from stocktake.registry.registration import register_run
from stocktake.registry.versions import ModelRegistry
from stocktake.tracking.runs import TrackedRun, start_run

RUNS = Path("workspace/runs")


def make_run(model_folder: Path, name: str, uri: str | None = None) -> TrackedRun:
    """A finished run with a model."""
    tracking = TrackingConfig(uri=uri, system_metrics=False)
    tags = {"stage": name, "task": "1-3", "data.fingerprint": "f1"}
    with start_run(tracking, workspace=Path("workspace"), name=name, tags=tags) as run:
        run.log_metrics({"val/macro_f1": 0.3, "test/macro_f1": 0.25, "test/n": 18})
        run.log_model(model_folder)
    return run


@pytest.fixture
def registry(store: str) -> Iterator[ModelRegistry]:
    """An empty one, opened."""
    with ModelRegistry(TrackingConfig()).opened() as opened:
        yield opened


@pytest.fixture
def three(registry: ModelRegistry, model_folder: Path) -> ModelRegistry:
    """Three versions."""
    for name in ("one", "two", "three"):
        register_run(registry, str(make_run(model_folder, name).run_id), RUNS)
    return registry


def lock_names(registry: ModelRegistry) -> list[str]:
    """Registered models beside the one in question: locks."""
    return [one.name for one in registry.client.search_registered_models() if one.name != registry.name]


def crowned(registry: ModelRegistry, number: int, **settings: Any) -> Event:
    """Make a version the champion."""
    version = registry.version(str(number))
    with promotion_lock(registry.client, registry.name) as lock:
        challenge(registry, version)
        options = {"forced": False, "reason": None, "figures": {}, **settings}
        return set_champion(registry, lock, version, registry.champion(), **options)


def rolled_back(registry: ModelRegistry, reason: str | None = None) -> int:
    """Roll back; the version that is the champion then."""
    with promotion_lock(registry.client, registry.name) as lock:
        return roll_back(registry, lock, reason)[1].number
