"""Fixtures of tests that talk to MLflow: an empty SQLite store, a real `mlflow server` in another process, a model."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # whatever proxy a test before this one set

MLMODEL = """\
flavors:
  python_function:
    loader_module: nothing
    python_version: 3.11.0
mlflow_version: 3.17.2
model_uuid: 0a1b2c3d
utc_time_created: '2026-01-01 00:00:00.000000'
"""
"""The MLmodel file of a model that only has to be there."""


class TrackingServer:
    """`mlflow server` on a loopback port, with its own SQLite file."""

    def __init__(
        self,
        folder: Path,
        laid_out: Path,
        artifacts: Sequence[str] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """`artifacts` are its options that say where artifacts go: by default through the server into the folder."""
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(laid_out, folder / "mlflow.db")
        self.folder = folder
        self._artifacts = artifacts or ["--artifacts-destination", str(folder / "artifacts")]
        self._environment = environment or {}
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> TrackingServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--host", "127.0.0.1"]
        command += ["--port", str(self.port), "--backend-store-uri", f"sqlite:///{self.folder / 'mlflow.db'}"]
        own = {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW_")}
        own |= {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", **self._environment}  # half the processes to start
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                [*command, *self._artifacts], stdout=log, stderr=log, start_new_session=True, cwd=self.folder, env=own
            )
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline:
            try:
                _direct.open(f"{self.uri}/health", timeout=2).close()
            except OSError:
                assert self.process.poll() is None, (self.folder / "server.log").read_text()
                time.sleep(0.2)
            else:
                return
        self.kill()
        raise AssertionError((self.folder / "server.log").read_text())

    def kill(self) -> None:
        """kill -9, workers and all: the group that `start` made, whose number is its leader's."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):  # it ended by itself and left no worker
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SQLite file to copy: laying out a fresh one takes MLflow seconds."""
    from stocktake.tracking.addresses import Stores
    from stocktake.tracking.connection import Connection

    path = tmp_path_factory.mktemp("laid-out") / "empty.db"
    Connection(Stores(f"sqlite:///{path}", f"sqlite:///{path}")).open()
    return path


@pytest.fixture
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither this checkout's stores nor the environment's are seen."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("MLFLOW_")]:
        monkeypatch.delenv(name)
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI", "MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.setenv(name, "")  # so that it is put back even if the test sets it
        monkeypatch.delenv(name)


@pytest.fixture
def sqlite_store(empty_store: Path, in_empty_folder: None, tmp_path: Path) -> str:
    """The URI of an empty store, which is the current folder's default one."""
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path / 'mlflow.db'}"


@pytest.fixture
def server(empty_store: Path, tmp_path: Path) -> Iterator[TrackingServer]:
    with TrackingServer(tmp_path / "server", empty_store) as running:
        yield running


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved MLflow model that only has to be there."""
    folder = tmp_path_factory.mktemp("saved") / "m"
    (folder / "data").mkdir(parents=True)
    (folder / "MLmodel").write_text(MLMODEL)
    (folder / "data" / "weights.bin").write_bytes(b"w" * 1000)
    return folder
