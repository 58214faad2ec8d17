"""The emulator in a process of its own, for programs and tests that use it."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Self

from sagemaker_local.cli import READY

_PATIENCE = 60.0
"""Seconds between SIGTERM and SIGKILL."""
_NOT_PASSED_ON = ("AWS_", "SAGEMAKER_", "MLFLOW_")
"""Variables that would reach the containers' programs."""


@dataclass
class EmulatorProcess:
    """`sagemaker-local` in another process, and boto3 clients of it."""

    process: subprocess.Popen[str]
    environment: dict[str, str]
    """Variables that lead a program's AWS clients to it."""
    _clients: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def start(cls, *options: str) -> Self:
        """Start it with options of the command line; return once it answers.

        Raises:
            RuntimeError: it ended; what it printed on standard error says why.
        """
        kept = {name: value for name, value in os.environ.items() if not name.startswith(_NOT_PASSED_ON)}
        command = [sys.executable, "-P", "-m", "sagemaker_local", *options]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=kept)
        environment: dict[str, str] = {}
        for line in process.stdout or ():
            if line.startswith("export "):
                name, _, value = shlex.split(line)[1].partition("=")
                environment[name] = value
            if line.startswith(READY):
                return cls(process, environment)
        raise RuntimeError(f"sagemaker-local ended with exit code {process.wait()}")

    @property
    def endpoint(self) -> str:
        """URL of the emulator."""
        return self.environment["AWS_ENDPOINT_URL"]

    @property
    def bucket(self) -> str:
        """Name of a bucket."""
        return self.environment["SAGEMAKER_LOCAL_BUCKET"]

    @property
    def role(self) -> str:
        """ARN of a role that SageMaker may assume and that may do everything."""
        return self.environment["SAGEMAKER_LOCAL_ROLE"]

    def client(self, service: str) -> Any:
        """Return a boto3 client."""
        import boto3

        if service not in self._clients:
            self._clients[service] = boto3.client(
                service,
                endpoint_url=self.endpoint,
                region_name=self.environment["AWS_DEFAULT_REGION"],
                aws_access_key_id=self.environment["AWS_ACCESS_KEY_ID"],
                aws_secret_access_key=self.environment["AWS_SECRET_ACCESS_KEY"],
            )
        return self._clients[service]

    def close(self) -> None:
        """End it, with everything that runs in it."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(_PATIENCE)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()


@contextmanager
def running(*options: str) -> Iterator[EmulatorProcess]:
    """Run the emulator for the length of a block."""
    emulator = EmulatorProcess.start(*options)
    try:
        yield emulator
    finally:
        emulator.close()
