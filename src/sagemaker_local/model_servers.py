"""A model's container: its data unpacked, the serving image's program on a port of this machine, asked over HTTP."""

from __future__ import annotations

import http.client
import shutil
import socket
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from moto.sagemaker.models import SageMakerModelBackend

from sagemaker_local.container_init import MODEL_FOLDER
from sagemaker_local.containers import Container, Machine, stop
from sagemaker_local.permissions import role_variables
from sagemaker_local.records import LogStream
from sagemaker_local.storage import Storage

HOST = "127.0.0.1"
_POLL_SECONDS = 0.1


class ModelServerError(Exception):
    """A server that did not come up: the reason, as AWS words it."""


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
        machine: Machine,
        backend: SageMakerModelBackend,
        model_name: str,
        stream: LogStream,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Start it; `wait_ready` tells whether it came up.

        Raises:
            ModelServerError: the model's data cannot be had.
        """
        self.container_spec = container_of(backend, model_name)
        self._machine = machine
        self._scratch = machine.folder / str(machine.new_number())
        folder = self._scratch / "ml"
        try:
            _fetch_model(Storage(backend), self.container_spec, folder)
        except (OSError, tarfile.TarError) as error:
            shutil.rmtree(self._scratch, ignore_errors=True)
            raise ModelServerError(
                f'Failed to download model data for container "container_1" from URL: '
                f'"{model_uri(self.container_spec)}". Please ensure that there is an object located at the URL, and '
                f"that it is a .tar.gz: "
                f"{type(error).__name__}."
            ) from None
        self.port = free_port()
        root = MODEL_FOLDER if machine.confined else str(folder)
        variables = machine.environment(self._scratch) | role_variables(backend, role_of(backend, model_name))
        variables |= {
            "SAGEMAKER_BIND_TO_PORT": str(self.port),
            "STOCKTAKE_HOST": HOST,  # the image says 0.0.0.0: here it would be the machine's
            "STOCKTAKE_MODEL_DIR": f"{root}/model",
        }
        variables |= self.container_spec.get("Environment") or {}
        image = self.container_spec.get("Image", "")
        words = [*machine.entry_point(image), "serve"]
        if len(words) == 1:
            words = [sys.executable, "-m", "stocktake.serving.serve"]
        self._container = Container(machine, words, folder, variables | dict(environment or {}), stream.write)

    def wait_ready(self, is_given_up: Callable[[], bool] = lambda: False) -> None:
        """Until GET /ping is answered with 200.

        Raises:
            ModelServerError: the program ended, or did not answer in time.
        """
        deadline = time.monotonic() + self._machine.startup
        while time.monotonic() < deadline and not is_given_up():
            if self._container.exit_code is not None:
                break
            try:
                if self._ask("GET", "/ping", b"", {}, 2.0).status == http.client.OK:
                    return
            except (OSError, http.client.HTTPException):
                pass
            time.sleep(_POLL_SECONDS)
        raise ModelServerError("did not pass the ping health check")

    def invoke(self, body: bytes, headers: Mapping[str, str], timeout: float = 60.0) -> Reply:
        """POST /invocations.

        Raises:
            OSError, http.client.HTTPException: no answer, or none in time.
        """
        return self._ask("POST", "/invocations", body, headers, timeout)

    def close(self) -> None:
        """SIGTERM, then SIGKILL; returns when all of it has ended."""
        stop([self._container], self._machine.grace)
        shutil.rmtree(self._scratch, ignore_errors=True)

    def close_later(self) -> None:
        """The same, in the background."""
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
    """A model's only container, as CreateModel was given it.

    Raises:
        ValidationError: there is no such model.
    """
    model = backend.describe_model(model_name)
    specs = [model.primary_container] if model.primary_container else list(model.containers)
    return dict(specs[0]) if specs else {}


def role_of(backend: SageMakerModelBackend, model_name: str) -> str:
    """The role that a model's containers run as."""
    return str(backend.describe_model(model_name).execution_role_arn)


def model_uri(spec: Mapping[str, Any]) -> str | None:
    """Where a container's model data lies in S3; None if it has none."""
    source = (spec.get("ModelDataSource") or {}).get("S3DataSource") or {}
    uri: str | None = spec.get("ModelDataUrl") or source.get("S3Uri")
    return uri


def free_port() -> int:
    """One of this machine's loopback."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def _fetch_model(storage: Storage, spec: Mapping[str, Any], folder: Any) -> None:
    into = folder / "model"
    into.mkdir(parents=True)
    uri = model_uri(spec)
    source = (spec.get("ModelDataSource") or {}).get("S3DataSource") or {}
    if uri is None:
        return
    if source.get("CompressionType") == "None":
        storage.download(storage.objects({"S3Uri": uri, "S3DataType": "S3Prefix"}), into)
    else:
        storage.unpack(uri, into)
