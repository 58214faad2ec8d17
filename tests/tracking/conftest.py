from __future__ import annotations

from typing import Any

import pytest


@pytest.fixture(autouse=True)
def elsewhere(in_empty_folder: None) -> None:
    """No test sees this checkout's stores or the environment's."""


@pytest.fixture
def client(sqlite_store: str) -> Any:
    import mlflow

    return mlflow.MlflowClient(sqlite_store, sqlite_store)
