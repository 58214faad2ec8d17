"""Upload what a run folder has and the store does not: while the run is alive, at its end, and by `stocktake sync`.

Every step notes how far it came in run.json, and repeating a step that was cut off changes nothing: the store
drops a metric point that it already has, runs, models and versions are looked up by a tag before they are created
a second time.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import quote

from stocktake.errors import StocktakeError
from stocktake.tracking.addresses import sqlite_file, without_credentials
from stocktake.tracking.connection import Connection, brief
from stocktake.tracking.leaderboard import show_in_mlflow
from stocktake.tracking.local_store import RUNNING, LocalRun, ModelUpload, Upload, file_stamps

if TYPE_CHECKING:
    from mlflow.entities import Experiment

_T = TypeVar("_T")

FOLDER_TAG = "stocktake.folder"
_BATCH = {"metrics": 1000, "params": 100, "tags": 100}  # MLflow's limits


class UploadError(Exception):
    """Something could not be uploaded; the message says what and why, without secrets."""


def upload(folder: LocalRun, connection: Connection) -> list[str]:
    """Upload what is pending; returns what was uploaded, in words.

    The parent, if there is one, has to be in the same store already. A step that the store refuses does not keep
    the following steps from being tried, unless the store is away.

    Raises UploadError with the first failure, after the remaining steps.
    """

    try:
        with connection.bounded():
            _ensure_run(folder, connection)
    except (UploadError, StocktakeError):
        raise
    except Exception as error:
        raise UploadError(f"run: {brief(error)}") from error
    steps: dict[str, Callable[[LocalRun, Connection], None]] = {
        "tags": _tags,
        "params": _params,
        "datasets": _inputs,
        "metrics": _metrics,
        "artifacts": _artifacts,
        "models": _models,
        "model metrics": _model_metrics,
        "status": _status,
    }
    done, failure = [], None
    for name, step in steps.items():
        if name not in folder.pending():
            continue
        try:
            with connection.bounded():
                step(folder, connection)
            done.append(name)
        except Exception as error:
            failure = failure or UploadError(f"{name}: {brief(error)}")
            if connection.trouble() is not None:
                break
        finally:
            folder.save()
    if failure is not None:
        raise failure
    return done


def ensure_experiment(connection: Connection, name: str) -> str:
    """The id of the experiment, which is created if it is missing. StocktakeError if it was deleted."""
    from mlflow.exceptions import MlflowException

    client = connection.client
    experiment: Experiment | None = client.get_experiment_by_name(name)
    if experiment is None:
        try:
            created = client.create_experiment(name, artifact_location=_artifact_location(connection, name))
        except MlflowException as error:
            # Another process was first.
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            experiment = client.get_experiment_by_name(name)
        else:
            show_in_mlflow(client, created)
            return str(created)
    if experiment is None or experiment.lifecycle_stage == "deleted":
        raise StocktakeError(
            f"the experiment {name!r} in {connection.shown} was deleted: restore it (`mlflow experiments restore`)"
            " or choose another --tracking.experiment"
        )
    return str(experiment.experiment_id)


def holds_run(connection: Connection, run_id: str) -> bool:
    """Whether the store has this run."""
    from mlflow.exceptions import MlflowException

    try:
        with connection.bounded():
            connection.client.get_run(run_id)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return False
        raise UploadError(f"run: {brief(error)}") from error
    return True


def _artifact_location(connection: Connection, name: str) -> str | None:
    """Beside the database, also when that is not in the current folder, which is where MLflow would put it."""
    database = sqlite_file(connection.stores.tracking)
    if database is None or database.parent == Path.cwd():
        return None
    return (database.parent / "mlruns" / quote(name, safe=" ")).as_uri()


def _ensure_run(folder: LocalRun, connection: Connection) -> None:
    """Find or create the MLflow run."""
    client, state = connection.client, folder.state
    uri = without_credentials(connection.stores.tracking)
    if state.upload.run_id and state.upload.uri == uri:
        return
    if state.upload.run_id and state.upload.uri and holds_run(connection, state.upload.run_id):
        state.upload.uri = uri  # the same store under another address
        folder.save()
        return
    if not (state.upload.attempted and state.upload.uri == uri):
        state.upload = Upload(uri=uri)
    if state.attach_run_id and _attach(folder, connection):
        folder.save()
        return
    parent = _parent_upload(folder, uri)
    experiment_id = (parent and parent.experiment_id) or ensure_experiment(connection, state.experiment)
    run = None
    if state.upload.attempted:
        # An earlier attempt may have reached the store although its answer never came back.
        found = client.search_runs([experiment_id], f"tags.`{FOLDER_TAG}` = '{folder.path.name}'", max_results=1)
        run = found[0] if found else None
    if run is None:
        state.upload.attempted = True
        folder.save()
        tags = {FOLDER_TAG: folder.path.name, "mlflow.runName": state.name}
        if parent and parent.run_id:
            tags["mlflow.parentRunId"] = parent.run_id
        with connection.bounded(retries=0):
            run = client.create_run(experiment_id, start_time=state.start_ms, tags=tags, run_name=state.name)
    state.upload.run_id, state.upload.experiment_id = run.info.run_id, run.info.experiment_id
    state.upload.status = RUNNING
    folder.save()


def _attach(folder: LocalRun, connection: Connection) -> bool:
    """Go on in the run that `mlflow run` opened; False if this store does not have it."""
    client, state = connection.client, folder.state
    if state.attach_run_id is None or not holds_run(connection, state.attach_run_id):
        return False
    run = client.get_run(state.attach_run_id)
    upload = state.upload
    upload.run_id, upload.experiment_id = run.info.run_id, run.info.experiment_id
    upload.params = list(run.data.params)
    upload.status = run.info.status
    if upload.status != RUNNING and state.status == RUNNING:
        client.update_run(run.info.run_id, status=RUNNING)
        upload.status = RUNNING
    client.set_tag(run.info.run_id, FOLDER_TAG, folder.path.name)
    if is_generated(run.info.run_name):
        client.update_run(run.info.run_id, name=state.name)
    experiment = client.get_experiment(run.info.experiment_id)
    state.experiment = experiment.name
    show_in_mlflow(client, experiment.experiment_id)
    return True


def _parent_upload(folder: LocalRun, uri: str) -> Upload | None:
    if folder.state.parent is None:
        return None
    path = folder.path.parent / folder.state.parent
    if not (path / "run.json").is_file():
        return None  # thrown away: the child stands alone
    upload = LocalRun.open(path).state.upload
    if not upload.run_id or upload.uri != uri:
        raise UploadError(f"its parent {folder.state.parent} is not uploaded yet")
    return upload


def is_generated(name: str) -> bool:
    """Whether MLflow made the name up: nobody asked for `bold-shrike-512`."""
    from mlflow.utils.name_utils import _GENERATOR_NOUNS, _GENERATOR_PREDICATES

    words = name.split("-")
    return len(words) == 3 and words[0] in _GENERATOR_PREDICATES and words[1] in _GENERATOR_NOUNS and words[2].isdigit()


def _tags(folder: LocalRun, connection: Connection) -> None:
    from mlflow.entities import RunTag

    upload = folder.state.upload
    changed = [(key, value) for key, value in folder.tags.items() if upload.tags.get(key) != value]
    for batch in _batches(changed, _BATCH["tags"]):
        connection.client.log_batch(upload.run_id, tags=[RunTag(key, value) for key, value in batch])
        upload.tags.update(batch)
    for gone in upload.tags.keys() - folder.tags.keys():  # such as the failure of a run that was gone on with
        connection.client.delete_tag(upload.run_id, gone)
        del upload.tags[gone]


def _params(folder: LocalRun, connection: Connection) -> None:
    from mlflow.entities import Param

    upload = folder.state.upload
    # `mlflow run -P lr=1e-3` has logged it as it was typed, and a param never changes.
    known = set(connection.client.get_run(upload.run_id).data.params)
    fresh = [(key, value) for key, value in folder.params.items() if key not in known]
    for batch in _batches(fresh, _BATCH["params"]):
        connection.client.log_batch(upload.run_id, params=[Param(key, value) for key, value in batch])
    upload.params = sorted(folder.params)


def _inputs(folder: LocalRun, connection: Connection) -> None:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    upload = folder.state.upload
    inputs = []
    for record in folder.inputs[upload.inputs :]:
        source = record["source"]
        scheme = source.partition("://")[0] if "://" in source else "local"
        dataset = Dataset(
            name=record["name"],
            digest=record["digest"],
            source_type=scheme if scheme in ("s3", "http", "https") else "local",
            source=json.dumps({"uri": source}),
            profile=json.dumps({"num_rows": record["rows"], **record["profile"]}),
        )
        inputs.append(DatasetInput(dataset, [InputTag("mlflow.data.context", record["context"])]))
    connection.client.log_inputs(upload.run_id, inputs)
    upload.inputs = len(folder.inputs)


def _metrics(folder: LocalRun, connection: Connection) -> None:
    from mlflow.entities import Metric

    upload = folder.state.upload
    points, end = folder.read_metrics(upload.metrics)
    for batch in _batches(points, _BATCH["metrics"]):
        metrics = [Metric(point.name, point.value, point.timestamp_ms, point.step) for point in batch]
        connection.client.log_batch(upload.run_id, metrics=metrics)
    upload.metrics = end


def _artifacts(folder: LocalRun, connection: Connection) -> None:
    upload, root = folder.state.upload, folder.path / "artifacts"
    stamps = file_stamps(root)
    for name in folder.changed_artifacts():
        inside = PurePosixPath(name).parent.as_posix()
        connection.client.log_artifact(upload.run_id, str(root / name), None if inside == "." else inside)
        upload.artifacts[name] = stamps[name]


def _models(folder: LocalRun, connection: Connection) -> None:
    from mlflow.entities import LoggedModelOutput

    client, upload = connection.client, folder.state.upload
    for name in folder.changed_models():
        source = folder.path / "models" / name
        stamps = file_stamps(source)
        entry = upload.models.get(name)
        if entry is None or entry.files != stamps:
            # Files that changed after they were uploaded are another model.
            entry = upload.models[name] = ModelUpload(files=stamps)
        if entry.id is None:
            entry.id = _create_model(folder, connection, name, entry)
            folder.save()
        client.log_model_artifacts(entry.id, str(source))
        with tempfile.TemporaryDirectory() as beside:
            client.log_model_artifact(
                entry.id, str(_with_ids(source / "MLmodel", Path(beside), entry.id, upload.run_id))
            )
        client.log_outputs(upload.run_id, [LoggedModelOutput(entry.id, step=0)])
        client.finalize_logged_model(entry.id, "READY")
        entry.done = True


def _create_model(folder: LocalRun, connection: Connection, name: str, entry: ModelUpload) -> str:
    client, upload = connection.client, folder.state.upload
    if entry.attempted:
        where = f"name = '{name}' AND source_run_id = '{upload.run_id}'"
        unfinished = [
            model
            for model in client.search_logged_models([upload.experiment_id], filter_string=where)
            if str(model.status) != "READY" and model.model_id not in {one.id for one in upload.models.values()}
        ]
        if unfinished:
            return str(unfinished[0].model_id)
    entry.attempted = True
    folder.save()
    with connection.bounded(retries=0):
        model = client.create_logged_model(
            upload.experiment_id,
            name=name,
            source_run_id=upload.run_id,
            tags={key: folder.tags[key] for key in ("stage", "task", "data.fingerprint") if key in folder.tags},
            params={key: value[:500] for key, value in sorted(folder.params.items())[:100]},
            model_type=folder.tags.get("stage"),
        )
    return str(model.model_id)


def _with_ids(mlmodel: Path, beside: Path, model_id: str, run_id: str | None) -> Path:
    """A copy of MLmodel that says which logged model it is, as MLflow writes it itself."""
    import yaml

    content = yaml.safe_load(mlmodel.read_text(encoding="utf-8"))
    content |= {"model_id": model_id, "run_id": run_id, "artifact_path": f"models:/{model_id}"}
    path = beside / "MLmodel"
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path


def _model_metrics(folder: LocalRun, connection: Connection) -> None:
    """Link the run's last scores to its models. The same points again: the run does not get them twice."""
    from mlflow.entities import Metric

    upload = folder.state.upload
    last = {
        point.name: point for point in sorted(folder.read_metrics()[0], key=lambda one: (one.step, one.timestamp_ms))
    }
    scores = [point for name, point in last.items() if name.startswith(("val/", "test/"))]
    for entry in upload.models.values():
        if entry.measured or not entry.done:
            continue
        for batch in _batches(scores, _BATCH["metrics"]):
            metrics = [
                Metric(one.name, one.value, one.timestamp_ms, one.step, model_id=entry.id, run_id=upload.run_id)
                for one in batch
            ]
            connection.client.log_batch(upload.run_id, metrics=metrics)
        entry.measured = True


def _status(folder: LocalRun, connection: Connection) -> None:
    state = folder.state
    if state.status == RUNNING:
        connection.client.update_run(state.upload.run_id, status=RUNNING)
    else:
        connection.client.set_terminated(state.upload.run_id, state.status, state.end_ms)
    state.upload.status = state.status


def _batches(values: list[_T], size: int) -> list[list[_T]]:
    return [values[start : start + size] for start in range(0, len(values), size)]
