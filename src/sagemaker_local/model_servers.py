"""A model's container: its data unpacked, the serving image's program on a port of this machine, asked over HTTP."""

from __future__ import annotations

import http.client
import shutil
import socket
import tarfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moto.sagemaker.models import SageMakerModelBackend

from sagemaker_local.cloudwatch import LogStream
from sagemaker_local.containers import Container, stop
from sagemaker_local.context import EmulatorContext
from sagemaker_local.permissions import role_variables
from sagemaker_local.storage import Storage, UnsafePathError

HOST = "127.0.0.1"
_POLL_SECONDS = 0.1


class ModelServerError(Exception):
    """A server that cannot be started: the reason, as AWS words it."""


class NotReadyError(ModelServerError):
    """A server whose program ended, or did not answer /ping in time."""


@dataclass(frozen=True)
class Reply:
    """What a model's container answered."""

    status: int
    headers: dict[str, str]
    """Names in lower case."""
    body: bytes


class ModelServer:
    """One container of a model."""

    def __init__(
        self,
        context: EmulatorContext,
        backend: SageMakerModelBackend,
        model_name: str,
        stream: LogStream,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Start it; `wait_ready` waits until it is up.

        Raises:
            ModelServerError: the model's data cannot be fetched.
        """
        self.container_spec = container_of(backend, model_name)
        self._context = context
        self._scratch = context.folder / str(context.next_number())
        folder = self._scratch / "ml"
        try:
            _fetch_model(Storage(backend), self.container_spec, folder)
        except (OSError, tarfile.TarError, UnsafePathError) as error:
            shutil.rmtree(self._scratch, ignore_errors=True)
            raise ModelServerError(
                f'Failed to download model data for container "container_1" from URL: '
                f'"{model_uri(self.container_spec)}". Please ensure that there is an object located at the URL, and '
                f"that it is a .tar.gz: "
                f"{type(error).__name__}."
            ) from None
        self._port = reserve_port()
        self.port = int(self._port.getsockname()[1])
        variables = context.container_environment(self._scratch, role_variables(backend, role_of(backend, model_name)))
        variables["SAGEMAKER_BIND_TO_PORT"] = str(self.port)
        variables |= self.container_spec.get("Environment") or {}
        command = [*context.entry_point(self.container_spec.get("Image", "")), "serve"]
        try:
            self._container = Container(context, command, folder, variables | dict(environment or {}), stream.write)
        except OSError:
            self._port.close()
            raise

    def wait_ready(self, is_given_up: Callable[[], bool] = lambda: False) -> None:
        """Wait until GET /ping is answered with 200.

        Raises:
            NotReadyError: the program ended, did not answer in time, or `is_given_up` returned True.
        """
        deadline = time.monotonic() + self._context.startup
        while time.monotonic() < deadline and not is_given_up():
            if self._container.exit_code is not None:
                break
            try:
                if self._ask("GET", "/ping", b"", {}, 2.0).status == http.client.OK:
                    return
            except (OSError, http.client.HTTPException):
                pass
            time.sleep(_POLL_SECONDS)
        raise NotReadyError("did not pass the ping health check")

    def invoke(self, body: bytes, headers: Mapping[str, str], timeout: float = 60.0) -> Reply:
        """POST /invocations.

        Raises:
            OSError, http.client.HTTPException: no answer, or none in time.
        """
        return self._ask("POST", "/invocations", body, headers, timeout)

    def close(self) -> None:
        """Send SIGTERM, then SIGKILL; return when all of it has ended."""
        stop([self._container], self._context.grace)
        self._port.close()
        shutil.rmtree(self._scratch, ignore_errors=True)

    def close_later(self) -> None:
        """Close it in the background."""
        threading.Thread(target=self.close, daemon=True).start()

    def _ask(self, method: str, path: str, body: bytes, headers: Mapping[str, str], timeout: float) -> Reply:
        connection = http.client.HTTPConnection(HOST, self.port, timeout=timeout)
        try:
            connection.request(method, path, body if method == "POST" else None, dict(headers))
            answer = connection.getresponse()
            named = {name.lower(): value for name, value in answer.getheaders()}
            return Reply(answer.status, named, answer.read())
        finally:
            connection.close()


def container_of(backend: SageMakerModelBackend, model_name: str) -> dict[str, Any]:
    """Return a model's only container, as in the CreateModel request.

    Raises:
        ValidationError: there is no such model.
    """
    model = backend.describe_model(model_name)
    specs = [model.primary_container] if model.primary_container else list(model.containers)
    return dict(specs[0]) if specs else {}


def role_of(backend: SageMakerModelBackend, model_name: str) -> str:
    """Return the role that a model's containers run as."""
    return str(backend.describe_model(model_name).execution_role_arn)


def model_uri(spec: Mapping[str, Any]) -> str | None:
    """Return where a container's model data lies in S3; None if it has none."""
    source = (spec.get("ModelDataSource") or {}).get("S3DataSource") or {}
    uri: str | None = spec.get("ModelDataUrl") or source.get("S3Uri")
    return uri


def reserve_port() -> socket.socket:
    """Bind a free port of the loopback and return the socket, which keeps it from others until it is closed.

    It does not listen: a program that sets SO_REUSEADDR, as servers do, can bind the port beside it and listen.
    """
    reservation = socket.socket()
    reservation.bind((HOST, 0))
    reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    return reservation


def _fetch_model(storage: Storage, spec: Mapping[str, Any], folder: Path) -> None:
    into = folder / "model"
    into.mkdir(parents=True)
    uri = model_uri(spec)
    source = (spec.get("ModelDataSource") or {}).get("S3DataSource") or {}
    if uri is None:
        return
    if source.get("CompressionType") == "None":
        storage.download(storage.objects(uri), into)
    else:
        storage.unpack(uri, into)
