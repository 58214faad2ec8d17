"""A laid-out SQLite store to copy, a real tracking server, and a model folder."""

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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

MLMODEL = """\
flavors:
  python_function:
    loader_module: nothing
    python_version: 3.11.0
mlflow_version: 3.17.2
model_uuid: 0a1b2c3d
utc_time_created: '2026-01-01 00:00:00.000000'
"""


_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # whatever proxy a test before this one set


class Server:
    """`mlflow server` on a loopback port, with its own SQLite file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--host", "127.0.0.1"]
        command += ["--port", str(self.port), "--backend-store-uri", f"sqlite:///{self.folder / 'mlflow.db'}"]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, start_new_session=True, cwd=self.folder, env=_own_environment()
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
        raise AssertionError((self.folder / "server.log").read_text())

    def kill(self) -> None:
        """kill -9, workers and all: the group that `start` made, whose number is its leader's."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):  # it ended by itself and left no worker
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


def _own_environment() -> dict[str, str]:
    own = {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW_")}
    return {**own, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}  # half the processes to start


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test sees this checkout's stores or the environment's."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("MLFLOW_")]:
        monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def laid_out_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Laying out a fresh store takes MLflow seconds: once a session is enough (see tests/workflows/test_sync.py)."""
    path = tmp_path_factory.getbasetemp() / "laid-out.db"
    if not path.exists():
        from stocktake.tracking.addresses import Stores
        from stocktake.tracking.connection import Connection

        Connection(Stores(f"sqlite:///{path}", f"sqlite:///{path}")).open()
    return path


@pytest.fixture
def store(laid_out_store: Path, tmp_path: Path) -> str:
    """The URI of an empty store, which is the current folder's default one."""
    shutil.copy(laid_out_store, tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path / 'mlflow.db'}"


@pytest.fixture
def server(laid_out_store: Path, tmp_path: Path) -> Iterator[Server]:
    folder = tmp_path / "server"
    folder.mkdir()
    shutil.copy(laid_out_store, folder / "mlflow.db")
    running = Server(folder)
    try:
        running.start()
        yield running
    finally:
        running.kill()


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
