"""MLflow's deployments on this machine: `mlflow deployments create -t stocktake-local ...`.

MLflow finds this module by its entry point and asks for one client class, `run_local` and `target_help`.
"""

from __future__ import annotations

import base64
import binascii
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pandas as pd
from mlflow.deployments import BaseDeploymentClient
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import (
    INTERNAL_ERROR,
    INVALID_PARAMETER_VALUE,
    RESOURCE_ALREADY_EXISTS,
    RESOURCE_DOES_NOT_EXIST,
)

from stocktake.data.images import PhotoError
from stocktake.errors import StocktakeError
from stocktake.serving import endpoints
from stocktake.serving.client import Client
from stocktake.serving.endpoints import Endpoint
from stocktake.serving.predictor import record
from stocktake.serving.settings import ServerSettings, setting_descriptions

FLAVOR = "python_function"
COLUMN = "photo"
_TARGET = "stocktake-local"


class LocalDeploymentClient(BaseDeploymentClient):
    """Deployments are endpoints of this machine: servers that outlive the command (serving/endpoints.py)."""

    def create_deployment(
        self,
        name: str,
        model_uri: str,
        flavor: str | None = None,
        config: dict[str, Any] | None = None,
        endpoint: str | None = None,
    ) -> dict[str, Any]:
        """Start a server and wait until it answers.

        Args:
            name: letters, digits, - and _.
            model_uri: models:/NAME@ALIAS, models:/NAME/VERSION, runs:/ID/model, or a model folder.
            flavor: python_function, if any.
            config: settings of ServerSettings.
            endpoint: the same as `name`, if given: this target has no endpoints beside its deployments.

        Returns:
            As `get_deployment`, and the flavor.

        Raises:
            MlflowException: no such model, the name is taken, a bad setting, or it did not come up.
        """
        name = _name(name, endpoint)
        _check_flavor(flavor)
        with _as_mlflow_error(INVALID_PARAMETER_VALUE):
            if any(endpoint.name == name for endpoint in endpoints.list_endpoints()):
                raise MlflowException(
                    f"there is a deployment {name} already: update it, delete it, or choose another name",
                    RESOURCE_ALREADY_EXISTS,
                )
            ServerSettings.read(config or {})
        with _fetched(model_uri) as model, _as_mlflow_error(INTERNAL_ERROR):
            created = endpoints.create(name, model, model_uri=model_uri, settings=config or {})
        return _description(created)

    def update_deployment(
        self,
        name: str,
        model_uri: str | None = None,
        flavor: str | None = None,
        config: dict[str, Any] | None = None,
        endpoint: str | None = None,
    ) -> dict[str, Any]:
        """Serve another model or with other settings, without dropping a request; what fails leaves the old serving.

        Arguments and errors as `create_deployment`; what is not given stays as it is. One whose process was killed
        is started again.
        """
        name = _name(name, endpoint)
        _check_flavor(flavor)
        with _as_mlflow_error(INVALID_PARAMETER_VALUE):
            ServerSettings.read(config or {})
        with _as_mlflow_error(RESOURCE_DOES_NOT_EXIST):
            endpoints.get(name)
        if model_uri is None:
            with _as_mlflow_error(INTERNAL_ERROR):
                return _description(endpoints.update(name, settings=config))
        with _fetched(model_uri) as model, _as_mlflow_error(INTERNAL_ERROR):
            return _description(endpoints.update(name, model, model_uri=model_uri, settings=config))

    def delete_deployment(self, name: str, config: dict[str, Any] | None = None, endpoint: str | None = None) -> None:
        """End its processes and remove what it kept. One that is not there is no error, as MLflow wants it."""
        name = _name(name, endpoint)
        if config:
            raise MlflowException(f"delete takes no settings: {', '.join(config)}", INVALID_PARAMETER_VALUE)
        if any(deployed.name == name for deployed in endpoints.list_endpoints()):
            with _as_mlflow_error(INTERNAL_ERROR):
                endpoints.delete(name)
        else:
            print(f"there is no deployment {name}: nothing to delete", file=sys.stderr)

    def list_deployments(self, endpoint: str | None = None) -> list[dict[str, Any]]:
        """All of them, as `get_deployment` describes one."""
        with _as_mlflow_error(INTERNAL_ERROR):
            return [_description(each) for each in endpoints.list_endpoints() if endpoint in (None, each.name)]

    def get_deployment(self, name: str, endpoint: str | None = None) -> dict[str, Any]:
        """name, flavor, status, address, model_uri, model_version, generation, settings, pid, workers, error, log."""
        with _as_mlflow_error(RESOURCE_DOES_NOT_EXIST):
            return _description(endpoints.get(_name(name, endpoint)))

    def predict(
        self, deployment_name: str | None = None, inputs: Any = None, endpoint: str | None = None
    ) -> pd.DataFrame:
        """Predict for photos.

        Args:
            deployment_name: which deployment.
            inputs: a frame with a column `photo`, a dict of such a column, or a list; each photo as bytes, as base64
                text, or as the path of a file.
            endpoint: the same as `deployment_name`.

        Returns:
            A row a photo, as the MLflow model answers: quantity, confidence, probabilities (by quantity),
            likely_quantities, model_version, error (empty).

        Raises:
            MlflowException: no such deployment, or a photo that cannot be used, by its number from 0.
        """
        with _as_mlflow_error(RESOURCE_DOES_NOT_EXIST):
            deployed = endpoints.get(_name(deployment_name, endpoint))
        if deployed.pid is None:
            raise MlflowException(f"the deployment {deployed.name} is {deployed.status}: {deployed.error}")
        photos = [_bytes_of(photo, number) for number, photo in enumerate(_photos(inputs))]
        rows = []
        with _as_mlflow_error(INTERNAL_ERROR):
            for number, prediction in enumerate(Client(deployed.address).predict_all(photos)):
                if isinstance(prediction, PhotoError):
                    raise MlflowException(f"photo {number}: {prediction}", INVALID_PARAMETER_VALUE)
                rows.append(record(prediction, prediction.model_version))
        return pd.DataFrame(rows)


def run_local(name: str, model_uri: str, flavor: str | None = None, config: dict[str, Any] | None = None) -> None:
    """Serve in the foreground until Ctrl-C; `name` is for MLflow only, nothing is kept.

    Raises:
        MlflowException: as `create_deployment`.
    """
    _check_flavor(flavor)
    with _as_mlflow_error(INVALID_PARAMETER_VALUE):
        ServerSettings.read(config or {})
    with _fetched(model_uri) as model, _as_mlflow_error(INTERNAL_ERROR):
        print(f"{name}: serving in the foreground (Ctrl-C ends it)", flush=True)
        settings = {f"STOCKTAKE_{setting.upper()}": str(value) for setting, value in (config or {}).items()}
        # a process of its own: uvicorn's workers import their parent's main module, and mlflow's takes seconds
        server = subprocess.Popen(
            [sys.executable, "-P", "-m", "stocktake.serving.serve", str(model)], env=os.environ | settings
        )
        while server.poll() is None:
            with suppress(KeyboardInterrupt):  # a terminal sends it to the server too
                server.wait()
                continue
            server.send_signal(signal.SIGINT)
        if server.returncode:
            raise MlflowException(f"{model_uri} is not served: see above", INTERNAL_ERROR)


def target_help() -> str:
    """What `mlflow deployments help -t stocktake-local` says."""
    settings = "\n".join(f"  {name:18} {text}" for name, text in setting_descriptions().items())
    return f"""A model of stocktake, served by processes of this machine that outlive the command.

  mlflow deployments create -t {_TARGET} -m models:/stocktake@champion --name bins -C port=0 -C page=true
  mlflow deployments update -t {_TARGET} -m models:/stocktake/4 --name bins      without dropping a request
  mlflow deployments get -t {_TARGET} --name bins                                its address, status, model, log
  mlflow deployments predict -t {_TARGET} --name bins -I photos.json             {{"{COLUMN}": ["bin.jpg", ...]}}
  mlflow deployments list -t {_TARGET}
  mlflow deployments delete -t {_TARGET} --name bins
  mlflow deployments run-local -t {_TARGET} -m FOLDER --name trial -C port=0     in the foreground, nothing kept

The target URI is {_TARGET}. Models come from MLFLOW_TRACKING_URI and MLFLOW_REGISTRY_URI. What endpoints keep lies in
{endpoints.state_folder()} (STOCKTAKE_STATE). An update that fails leaves the old model serving; an update of a
deployment whose process was killed starts it again.

Settings, each as -C NAME=VALUE (their defaults):
{settings}
"""


def _name(name: str | None, endpoint: str | None) -> str:
    """Deployment and endpoint are one thing here."""
    if name and endpoint and name != endpoint:
        raise MlflowException(
            f"{_TARGET} has no endpoints beside deployments: leave --endpoint {endpoint} out", INVALID_PARAMETER_VALUE
        )
    if not (chosen := name or endpoint):
        raise MlflowException("which deployment? Give its name", INVALID_PARAMETER_VALUE)
    return chosen


def _check_flavor(flavor: str | None) -> None:
    if flavor not in (None, FLAVOR):
        raise MlflowException(f"{_TARGET} serves the flavor {FLAVOR}, not {flavor}", INVALID_PARAMETER_VALUE)


@contextmanager
def _as_mlflow_error(code: int) -> Iterator[None]:
    """Raise MlflowException for StocktakeError."""
    try:
        yield
    except StocktakeError as error:
        raise MlflowException(str(error), code) from None


@contextmanager
def _fetched(model_uri: str) -> Iterator[Path]:
    """The model's folder, for as long as the block lasts."""
    from mlflow.artifacts import download_artifacts

    if "://" not in model_uri and not model_uri.startswith(("models:/", "runs:/")):
        if not Path(model_uri).is_dir():
            raise MlflowException(f"there is no model folder {model_uri}", RESOURCE_DOES_NOT_EXIST)
        yield Path(model_uri)
        return
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    with tempfile.TemporaryDirectory(prefix="stocktake-model-") as temporary:
        try:
            folder = Path(download_artifacts(artifact_uri=model_uri, dst_path=temporary))
        except OSError as error:
            raise MlflowException(
                f"the model {model_uri} cannot be fetched: {error}", RESOURCE_DOES_NOT_EXIST
            ) from None
        yield folder


def _description(endpoint: Endpoint) -> dict[str, Any]:
    return {
        "name": endpoint.name,
        "flavor": FLAVOR,
        "status": endpoint.status,
        "address": endpoint.address,
        "model_uri": endpoint.model_uri,
        "model_version": endpoint.version,
        "generation": endpoint.generation,
        "settings": endpoint.settings,
        "pid": endpoint.pid,
        "workers": list(endpoint.workers),
        "error": endpoint.error,
        "log": str(endpoint.log),
    }


def _photos(inputs: Any) -> list[Any]:
    if isinstance(inputs, pd.DataFrame):
        if COLUMN in inputs:
            return list(inputs[COLUMN])
        raise MlflowException(
            f"the input has no column {COLUMN!r} but {', '.join(map(str, inputs.columns)) or 'none'}: name it so",
            INVALID_PARAMETER_VALUE,
        )
    if isinstance(inputs, Mapping):
        if set(inputs) != {COLUMN}:
            raise MlflowException(f'the input must look like {{"{COLUMN}": [...]}}', INVALID_PARAMETER_VALUE)
        inputs = inputs[COLUMN]
    return list(inputs) if isinstance(inputs, (list, tuple, pd.Series)) else [inputs]


def _bytes_of(photo: Any, number: int) -> bytes:
    """A photo given as bytes, as base64 text, or as a path."""
    if isinstance(photo, (bytes, bytearray, memoryview)):
        return bytes(photo)
    if isinstance(photo, (str, Path)):
        with suppress(OSError, ValueError):  # such as a text that is too long to be a path
            return Path(photo).read_bytes()
        with suppress(binascii.Error, ValueError):
            return base64.b64decode(str(photo), validate=True)
    raise MlflowException(
        f"photo {number} is neither bytes, nor base64 text, nor the path of a file: {str(photo)[:80]!r}",
        INVALID_PARAMETER_VALUE,
    )
