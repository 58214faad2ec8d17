"""Fixtures of the rooms that talk to MLflow: an empty SQLite store, a real tracking server, a model folder."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tracking_server import MLMODEL, TrackingServer, lay_out_store


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test sees this checkout's stores or the environment's."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("MLFLOW_")]:
        monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def laid_out_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of an empty store."""
    return lay_out_store(tmp_path_factory)


@pytest.fixture
def store(laid_out_store: Path, tmp_path: Path) -> str:
    """The URI of an empty store, which is the current folder's default one."""
    shutil.copy(laid_out_store, tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path / 'mlflow.db'}"


@pytest.fixture
def server(laid_out_store: Path, tmp_path: Path) -> Iterator[TrackingServer]:
    with TrackingServer(tmp_path / "server", laid_out_store) as running:
        yield running


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "saved" / "m"
    (folder / "data").mkdir(parents=True)
    (folder / "MLmodel").write_text(MLMODEL)
    (folder / "data" / "weights.bin").write_bytes(b"w" * 1000)
    return folder


@pytest.fixture
def client(store: str) -> Any:
    import mlflow

    return mlflow.MlflowClient(store, store)
