"""The registry of models: a run's model becomes a version with the alias `candidate`, and models are fetched."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stocktake.config import TrackingConfig
from stocktake.errors import StocktakeError
from stocktake.tracking.addresses import resolve
from stocktake.tracking.connection import Connection, brief
from stocktake.tracking.local_store import LocalRun, Registration, now_ms

if TYPE_CHECKING:
    from stocktake.tracking.runs import TrackedRun

CANDIDATE = "candidate"
ASKED_TAG = "registered_ms"
COPIED_TAGS = ("task", "stage", "data.fingerprint")
_MODEL_DESCRIPTION = (
    "Counts the items in a warehouse bin: image bytes in; quantity, confidence and probabilities out."
    " The alias `candidate` is the last version that a ladder proposed, `champion` the one that is deployed."
)


def register_candidate(
    run: TrackedRun, model_name: str, *, tags: Mapping[str, object], description: str, model: str = "model"
) -> str | None:
    """Make the run's model a version of `model_name`, and point the alias `candidate` at it.

    Besides `tags`, the version gets the run's task, stage and data.fingerprint and its val/macro_f1. Asked twice for
    the same model it is the same version.

    Args:
        run: a run whose `log_model` was called.
        model_name: the registered model, created if it is missing.
        tags: further tags of the version.
        description: of the version, Markdown.
        model: the name that was given to `log_model`.

    Returns:
        The version, or None while the store cannot be reached: then `stocktake sync` registers it.

    Raises:
        StocktakeError: the run holds no such model.
    """
    folder = run.run_folder
    if model not in folder.model_names():
        held = ", ".join(folder.model_names()) or "none"
        raise StocktakeError(f"the run {folder.state.name} has no model {model!r} to register; it has {held}")
    wanted = [one for one in folder.state.registrations if (one.model, one.registered_name) == (model, model_name)]
    if not wanted:
        version_tags = {key: folder.tags[key] for key in COPIED_TAGS if key in folder.tags}
        score = folder.final_metrics().get("val/macro_f1")
        if score is not None:
            version_tags["val/macro_f1"] = f"{score:.6g}"
        version_tags.update({key: str(value) for key, value in tags.items()})
        wanted = [Registration(model, model_name, version_tags, description, asked_ms=now_ms())]
        folder.state.registrations += wanted
        folder.save()
    run.flush()
    return wanted[0].version


def register_pending(folder: LocalRun, connection: Connection) -> None:
    """Create the versions that the folder asks for and the registry lacks. A step of the mirror."""
    client, upload = connection.client, folder.state.upload
    for wanted in folder.state.registrations:
        if wanted.version is not None:
            continue
        entry = upload.models.get(wanted.model)
        if entry is None or not entry.done:
            raise StocktakeError(f"the model {wanted.model!r} is not uploaded yet")
        tags = {**wanted.tags, ASKED_TAG: str(wanted.asked_ms)}
        version = version_of_model(
            client, wanted.registered_name, str(entry.id), upload.run_id, tags, wanted.description
        )
        if not _is_newer(client, wanted.registered_name, wanted.asked_ms):
            client.set_registered_model_alias(wanted.registered_name, CANDIDATE, version)
        wanted.version = version


def version_of_model(
    client: Any, name: str, model_id: str, run_id: str | None, tags: Mapping[str, str], description: str
) -> str:
    """The version of a registered model that a logged model is: the one there is, else a new one."""
    _ensure_registered_model(client, name)
    source = f"models:/{model_id}"
    held = next((one for one in _versions(client, name) if one.source == source), None)
    version = held or client.create_model_version(
        name,
        source,
        run_id=run_id,
        tags=dict(tags),
        description=description,
        await_creation_for=0,
        model_id=model_id,
    )
    return str(version.version)


def fetch_model(uri: str, destination: Path, tracking: TrackingConfig | None = None) -> Path:
    """The local folder of a model, which holds MLmodel.

    Args:
        uri: models:/NAME/VERSION, models:/NAME@ALIAS, models:/NAME/latest, runs:/ID/NAME, or a model folder.
        destination: where a model from a store is put, replacing a model that is there. A folder given as `uri`
            is returned as it is.
        tracking: the stores; default: those of the environment.

    Raises:
        StocktakeError: there is no such model, naming those that there are; or the store does not answer.
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
    connection = Connection(resolve(tracking or TrackingConfig()), request_seconds=60)
    connection.open()
    client = connection.client
    from mlflow.artifacts import download_artifacts
    from mlflow.exceptions import MlflowException

    destination.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=destination.parent, prefix=".model-") as beside, connection.bounded():
        try:
            stores = connection.stores
            found = download_artifacts(uri, dst_path=beside, tracking_uri=stores.tracking, registry_uri=stores.registry)
        except (MlflowException, OSError) as error:
            existing = _existing(client, uri)
            raise StocktakeError(
                f"no model {uri} in {connection.shown} ({brief(error)}); there is {existing}"
            ) from error
        if not (Path(found) / "MLmodel").is_file():
            raise StocktakeError(f"{uri} in {connection.shown} holds no MLmodel; there is {_existing(client, uri)}")
        if destination.exists():
            shutil.rmtree(destination)
        shutil.move(found, destination)
    return destination


def pinned(uri: str, tracking: TrackingConfig) -> str:
    """models:/NAME/VERSION for models:/NAME@ALIAS and models:/NAME/latest; what else there is, as it is.

    What does not exist comes back as it is too: `fetch_model` says what there is.

    Raises:
        StocktakeError: the store cannot be used.
    """
    place = uri.removeprefix("models:/")
    name, mark, alias = place.partition("@")
    if not uri.startswith("models:/") or not (mark or place.endswith("/latest")):
        return uri
    connection = Connection(resolve(tracking), request_seconds=60)
    connection.open()
    from mlflow.exceptions import MlflowException

    with connection.bounded():
        if not mark:
            name = place.removesuffix("/latest")
            numbers = [int(one.version) for one in _versions(connection.client, name)]
            return f"models:/{name}/{max(numbers)}" if numbers else uri
        try:
            return f"models:/{name}/{connection.client.get_model_version_by_alias(name, alias).version}"
        except MlflowException:
            return uri


def _ensure_registered_model(client: Any, name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name, description=_MODEL_DESCRIPTION)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _versions(client: Any, name: str) -> list[Any]:
    quoted = name.replace("'", "''")
    return list(client.search_model_versions(f"name = '{quoted}'"))


def _is_newer(client: Any, name: str, asked_ms: int) -> bool:
    """Whether the alias is on a version asked for later: an old run that is uploaded late does not take it."""
    aliases = client.get_registered_model(name).aliases
    if CANDIDATE not in aliases:
        return False
    held = client.get_model_version(name, aliases[CANDIDATE])
    return int(held.tags.get(ASKED_TAG, 0)) > asked_ms


def _existing(client: Any, uri: str) -> str:
    """What somebody who asked for `uri` may have meant, in words."""
    from mlflow.exceptions import MlflowException

    if uri.startswith("runs:/"):
        run_id = uri.removeprefix("runs:/").partition("/")[0]
        try:
            run = client.get_run(run_id)
        except MlflowException:
            return f"no run {run_id}"
        where = f"source_run_id = '{run_id}'"
        models = client.search_logged_models([run.info.experiment_id], filter_string=where)
        names = ", ".join(f"runs:/{run_id}/{model.name}" for model in models)
        return names or f"no model in the run {run_id} ({run.info.run_name})"
    found = []
    for registered in client.search_registered_models(max_results=20):
        aliases: dict[str, list[str]] = {}
        for alias, version in registered.aliases.items():
            aliases.setdefault(str(version), []).append(f"@{alias}")
        numbers = sorted((str(one.version) for one in _versions(client, registered.name)), key=int)
        found += [
            " ".join([f"models:/{registered.name}/{number}", *aliases.get(number, [])]) for number in numbers[-5:]
        ]
    return ", ".join(found) or "no registered model"
