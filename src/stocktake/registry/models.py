"""Models in a store: fetched into a folder by their address, and addresses resolved to versions."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from stocktake.config.runs import TrackingConfig
from stocktake.errors import StocktakeError
from stocktake.tracking.addresses import resolve
from stocktake.tracking.connection import Connection, brief

_SHOWN = 5
"""Versions of each registered model that an error names."""


def fetch_model(uri: str, destination: Path, tracking: TrackingConfig | None = None) -> Path:
    """Download a model; return its local folder, which holds MLmodel.

    Args:
        uri: models:/NAME/VERSION, models:/NAME@ALIAS, models:/NAME/latest, runs:/ID/NAME, or a model folder.
        destination: where a model from a store is put, replacing a model that is there. A folder given as `uri`
            is returned as it is.
        tracking: the stores; default: those of the environment.

    Raises:
        StocktakeError: there is no such model, naming those that exist; or the store does not answer.
    """
    if not uri.startswith(("models:/", "runs:/")):
        folder = Path(uri.removeprefix("file://"))
        if not (folder / "MLmodel").is_file():
            raise StocktakeError(
                f"{uri} is no model folder (no MLmodel in it): give a folder, models:/NAME/VERSION, models:/NAME@ALIAS"
                " or runs:/ID/model"
            )
        return folder
    if destination.exists() and any(destination.iterdir()) and not (destination / "MLmodel").is_file():
        raise StocktakeError(f"{destination} holds something that is no model: choose another folder")
    connection = Connection(resolve(tracking or TrackingConfig()))
    connection.open()
    from mlflow.artifacts import download_artifacts
    from mlflow.exceptions import MlflowException

    destination.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=destination.parent, prefix=".model-") as temporary:
        stores = connection.stores
        try:
            model = download_artifacts(
                uri, dst_path=temporary, tracking_uri=stores.tracking, registry_uri=stores.registry
            )
        except (MlflowException, OSError) as error:
            raise StocktakeError(
                f"no model {uri} in {connection.shown} ({brief(error)}); {_existing(connection.client, uri)}"
            ) from error
        if not (Path(model) / "MLmodel").is_file():
            existing = _existing(connection.client, uri)
            raise StocktakeError(f"{uri} in {connection.shown} holds no MLmodel; {existing}")
        if destination.exists():
            shutil.rmtree(destination)
        shutil.move(model, destination)
    return destination


def resolve_alias(uri: str, tracking: TrackingConfig) -> str:
    """Return models:/NAME/VERSION for models:/NAME@ALIAS and models:/NAME/latest; any other address as it is.

    An address that does not exist is returned as it is too: `fetch_model` names those that do.

    Raises:
        StocktakeError: the store cannot be used.
    """
    name, mark, alias = uri.removeprefix("models:/").partition("@")
    is_latest = name.endswith("/latest")
    if not uri.startswith("models:/") or not (mark or is_latest):
        return uri
    connection = Connection(resolve(tracking))
    connection.open()
    from mlflow.exceptions import MlflowException

    if is_latest:
        name = name.removesuffix("/latest")
        numbers = version_numbers(connection.client, name)
        return f"models:/{name}/{numbers[-1]}" if numbers else uri
    try:
        return f"models:/{name}/{connection.client.get_model_version_by_alias(name, alias).version}"
    except MlflowException:
        return uri


def version_label(address: str) -> str | None:
    """Return `stocktake/3` for models:/stocktake/3; None for an address of no version."""
    name, _, number = address.removeprefix("models:/").rpartition("/")
    return f"{name}/{number}" if address.startswith("models:/") and name and number.isdecimal() else None


def search_versions(client: Any, name: str) -> list[Any]:
    """Return MLflow's versions of a registered model."""
    quoted = name.replace("'", "''")
    return list(client.search_model_versions(f"name = '{quoted}'"))


def version_numbers(client: Any, name: str) -> list[int]:
    """Return the numbers of a registered model's versions, ascending."""
    return sorted(int(version.version) for version in search_versions(client, name))


def _existing(client: Any, uri: str) -> str:
    """What exists beside the address that was asked for."""
    from mlflow.exceptions import MlflowException

    if uri.startswith("runs:/"):
        run_id = uri.removeprefix("runs:/").partition("/")[0]
        try:
            run = client.get_run(run_id)
        except MlflowException:
            return f"there is no run {run_id}"
        models = client.search_logged_models([run.info.experiment_id], filter_string=f"source_run_id = '{run_id}'")
        names = ", ".join(f"runs:/{run_id}/{model.name}" for model in models)
        return f"the run has {names}" if names else f"the run {run_id} ({run.info.run_name}) has no model"
    addresses = []
    for registered in client.search_registered_models(max_results=20):
        numbers = version_numbers(client, registered.name)[-_SHOWN:]
        addresses += [f"models:/{registered.name}/{number}" for number in numbers]
        addresses += [f"models:/{registered.name}@{alias}" for alias in registered.aliases]
    return f"there is {', '.join(addresses) or 'no registered model'}"
