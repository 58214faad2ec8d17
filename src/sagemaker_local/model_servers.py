"""A model's container: its data unpacked, the image's `serve` on a port of this machine, asked over HTTP."""

from __future__ import annotations

import http
import shutil
import socket
import tarfile
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import urllib3
from moto.sagemaker.models import SageMakerModelBackend

from sagemaker_local.cloudwatch import LogStream
from sagemaker_local.containers import Container, stop
from sagemaker_local.context import EmulatorContext
from sagemaker_local.permissions import role_variables
from sagemaker_local.storage import Storage, UnsafePathError

HOST = "127.0.0.1"
_POLL_SECONDS = 0.1


class ModelServerError(Exception):
    """Why a server did not come up; goes on from "The container"."""


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
            OSError: the container cannot be started.
        """
        model = backend.describe_model(model_name)
        container = model.primary_container or model.containers[0]
        self.image: str = container.get("Image", "")
        self._context = context
        self._scratch = context.folder / str(context.next_number())
        folder = self._scratch / "ml"
        (folder / "model").mkdir(parents=True)
        uri, is_archive = model_data(container)
        storage = Storage(backend)
        try:
            if uri and is_archive:
                storage.unpack(uri, folder / "model")
            elif uri:
                storage.download(storage.objects(uri), folder / "model")
        except (OSError, tarfile.TarError, UnsafePathError) as error:
            shutil.rmtree(self._scratch, ignore_errors=True)
            raise ModelServerError(f"failed to download model data from {uri}: {type(error).__name__}") from None
        self._port = reserve_port()
        variables = context.container_environment(self._scratch, role_variables(backend, model.execution_role_arn))
        variables["SAGEMAKER_BIND_TO_PORT"] = str(self._port.getsockname()[1])
        variables |= {**(container.get("Environment") or {}), **(environment or {})}
        command = [*context.entry_point(self.image), "serve"]
        try:
            self._container = Container(context, command, folder, variables, stream.write)
        except OSError:
            self._port.close()
            raise

    def wait_ready(self, is_given_up: Callable[[], bool] = lambda: False) -> None:
        """Wait until GET /ping is answered with 200.

        Raises:
            ModelServerError: the program ended, did not answer in time, or `is_given_up` returned True.
        """
        deadline = time.monotonic() + self._context.startup
        while time.monotonic() < deadline and self._container.exit_code is None and not is_given_up():
            try:
                if self._request("GET", "/ping", None, {}, 2.0).status == http.HTTPStatus.OK:
                    return
            except urllib3.exceptions.HTTPError:
                pass
            time.sleep(_POLL_SECONDS)
        raise ModelServerError("did not pass the ping health check")

    def invoke(
        self, body: bytes, headers: Mapping[str, str], timeout: float = 60.0
    ) -> urllib3.response.BaseHTTPResponse:
        """POST /invocations.

        Raises:
            urllib3.exceptions.HTTPError: no answer; its TimeoutError: none in `timeout` seconds.
        """
        return self._request("POST", "/invocations", body, headers, timeout)

    def close(self) -> None:
        """Send SIGTERM, then SIGKILL; return when all of it has ended."""
        stop([self._container], self._context.grace)
        self._port.close()
        shutil.rmtree(self._scratch, ignore_errors=True)

    def close_later(self) -> None:
        """Close it in the background."""
        threading.Thread(target=self.close, daemon=True).start()

    def _request(
        self, method: str, path: str, body: bytes | None, headers: Mapping[str, str], timeout: float
    ) -> urllib3.response.BaseHTTPResponse:
        host, port = self._port.getsockname()
        with urllib3.HTTPConnectionPool(host, port, timeout=timeout, retries=False) as connection:
            return connection.urlopen(method, path, body, headers, decode_content=False)


def model_data(container: Mapping[str, Any]) -> tuple[str | None, bool]:
    """Return where a container's model data lies in S3, and if that is a .tar.gz."""
    source = (container.get("ModelDataSource") or {}).get("S3DataSource") or {}
    return container.get("ModelDataUrl") or source.get("S3Uri"), source.get("CompressionType") != "None"


def reserve_port() -> socket.socket:
    """Bind a free port of the loopback and return the socket, which keeps it from others until it is closed.

    It does not listen: a program that sets SO_REUSEADDR, as servers do, can bind the port beside it and listen.
    """
    reservation = socket.socket()
    reservation.bind((HOST, 0))
    reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    return reservation
