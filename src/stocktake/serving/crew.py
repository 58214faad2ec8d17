"""Workers as the supervisor sees them: processes that it starts on its socket, hears from, and ends."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from stocktake.serving.deployment import Deployment, Process

START_SECONDS = 120.0
"""A worker that is not ready by then has failed. It takes about one; a machine may be busy."""
_METRICS = "PROMETHEUS_MULTIPROC_DIR"
_LATER_SECONDS = 5.0  # beyond drain_seconds, then a worker that was told to end is killed


class Worker:
    """A process of serving/worker.py, seen from the supervisor."""

    def __init__(self, deployment: Deployment, listener: socket.socket, metrics: Path | None) -> None:
        """Start it. `metrics`: folder in which all workers of a server keep their counts for Prometheus."""
        self.line, theirs = socket.socketpair()
        order = {
            "model": deployment.model,
            "version": deployment.version,
            "settings": dataclasses.asdict(deployment.server),
            "listener": listener.fileno(),
            "line": theirs.fileno(),
        }
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "stocktake.serving.worker", json.dumps(order)],
                pass_fds=(listener.fileno(), theirs.fileno()),
                stdin=subprocess.DEVNULL,
                env=with_this_package() | ({_METRICS: str(metrics)} if metrics else {}),
                process_group=0,  # a terminal's Ctrl-C reaches the supervisor, which ends the workers in order
            )
        self.identity = Process.known_as(self.process.pid)
        self.drain_seconds = deployment.server.drain_seconds
        self.deadline: float | None = time.monotonic() + START_SECONDS
        """When it is killed, unless it has become ready, or has ended, by then."""
        self.ready_since: float | None = None
        self.version: str | None = None
        """Of the model, once it is ready."""
        self.reason = ""

    def end(self) -> None:
        """Ask it to answer what it has begun, and to end; it is killed if it does not."""
        self.process.terminate()
        self.deadline = time.monotonic() + self.drain_seconds + _LATER_SECONDS

    def gone(self) -> str:
        """Wait for the process whose line is cut; why it ended."""
        try:
            code = self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = self.process.wait()
        self.line.close()
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return self.reason or f"a worker ended with {how}"


@dataclasses.dataclass
class Crew:
    """The workers of one deployment."""

    deployment: Deployment
    workers: list[Worker]
    deaths: int = 0
    """In a row, each before its worker was well."""
    again_at: list[float] = dataclasses.field(default_factory=list)
    """When to start the workers that are missing."""


def with_this_package() -> dict[str, str]:
    """The environment, such that a process finds this package where this one did."""
    here = str(Path(__file__).parents[2])
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH"))))}
