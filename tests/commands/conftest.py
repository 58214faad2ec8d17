"""The tiny root, shared with the other rooms that train on it, and an empty store in the current folder."""

import shutil
from pathlib import Path

import pytest

from stocktake.tracking.addresses import Stores
from stocktake.tracking.connection import Connection
from tiny_bins import few_bins, sqlite_store, tiny_bench, tiny_root, tiny_settings

__all__ = ["few_bins", "sqlite_store", "tiny_bench", "tiny_root", "tiny_settings"]


@pytest.fixture
def store(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> str:
    """The current folder, with an empty store laid out in it: MLflow needs seconds for a fresh one."""
    monkeypatch.chdir(tmp_path)
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI", "MLFLOW_RUN_ID"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    laid_out = tmp_path_factory.getbasetemp() / "laid-out.db"
    if not laid_out.exists():
        uri = f"sqlite:///{laid_out}"
        Connection(Stores(uri, uri)).open()
    shutil.copy(laid_out, tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path}/mlflow.db"
