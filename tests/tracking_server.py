"""A real `mlflow server` in another process, over a SQLite store that is laid out once a session."""

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
from collections.abc import Mapping, Sequence
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


def lay_out_store(factory: pytest.TempPathFactory) -> Path:
    """A SQLite file to copy: laying out a fresh one takes MLflow seconds, and once a session is enough."""
    path = factory.getbasetemp() / "laid-out.db"
    if not path.exists():
        from stocktake.tracking.addresses import Stores
        from stocktake.tracking.connection import Connection

        Connection(Stores(f"sqlite:///{path}", f"sqlite:///{path}")).open()
    return path
