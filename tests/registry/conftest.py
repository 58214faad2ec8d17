"""A registered model with three versions in a real store: made once a session, copied for each test."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from registry_store import make_run
from stocktake.config.runs import TrackingConfig
from stocktake.registry.registration import register_run
from stocktake.registry.versions import ModelRegistry
from tracking_server import MLMODEL, TrackingServer, lay_out_store


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test sees this checkout's stores or the environment's."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("MLFLOW_")]:
        monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lay_out_store(tmp_path_factory)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "m"
    (folder / "data").mkdir(parents=True)
    (folder / "MLmodel").write_text(MLMODEL)
    (folder / "data" / "weights.bin").write_bytes(b"w" * 1000)
    return folder


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
def store(empty_store: Path, tmp_path: Path) -> str:
    """The URI of an empty store, which is the current folder's default one."""
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path / 'mlflow.db'}"


@pytest.fixture
def registry(store: str) -> Iterator[ModelRegistry]:
    """An empty one, opened."""
    with ModelRegistry(TrackingConfig()).opened() as opened:
        yield opened


@pytest.fixture
def three(store_of_three: Path, tmp_path: Path) -> Iterator[ModelRegistry]:
    """One with three versions, opened; the current folder's default store."""
    shutil.copy(store_of_three, tmp_path / "mlflow.db")
    with ModelRegistry(TrackingConfig()).opened() as opened:
        yield opened


@pytest.fixture
def server(empty_store: Path, tmp_path: Path) -> Iterator[TrackingServer]:
    with TrackingServer(tmp_path / "server", empty_store) as running:
        yield running
