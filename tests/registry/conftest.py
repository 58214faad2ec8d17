"""A registered model with three versions in a real store: made once a session, copied for each test."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from registry_store import make_run
from stocktake.config.runs import TrackingConfig
from stocktake.registry.registration import register_run
from stocktake.registry.versions import ModelRegistry


@pytest.fixture(autouse=True)
def elsewhere(in_empty_folder: None) -> None:
    """No test sees this checkout's stores or the environment's."""


@pytest.fixture(scope="session")
def store_of_three(empty_store: Path, model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with the runs one, two and three, registered in this order."""
    folder = tmp_path_factory.mktemp("three")
    shutil.copy(empty_store, folder / "mlflow.db")
    tracking = TrackingConfig(uri=f"sqlite:///{folder}/mlflow.db", system_metrics=False)
    with pytest.MonkeyPatch.context() as patch, ModelRegistry(tracking).opened() as registry:
        patch.chdir(folder)
        for name in ("one", "two", "three"):
            run = make_run(model_folder, name, tracking)
            register_run(registry, str(run.run_id), folder / "workspace" / "runs")
    return folder / "mlflow.db"


@pytest.fixture
def registry(sqlite_store: str) -> Iterator[ModelRegistry]:
    """An empty one, opened."""
    with ModelRegistry(TrackingConfig()).opened() as opened:
        yield opened


@pytest.fixture
def three(store_of_three: Path, tmp_path: Path) -> Iterator[ModelRegistry]:
    """One with three versions, opened; the current folder's default store."""
    shutil.copy(store_of_three, tmp_path / "mlflow.db")
    with ModelRegistry(TrackingConfig()).opened() as opened:
        yield opened
