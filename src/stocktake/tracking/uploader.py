"""Upload a run folder to a store: while the run is alive, at its end, and by `stocktake sync`.

A run is replayed whole, and replaying changes nothing: MLflow's SQL store keeps a metric point, a param, a tag and
an input once and overwrites artifacts. Runs are found by a tag, and models by one, before they are created again.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from stocktake.errors import StocktakeError
from stocktake.redaction import without_credentials
from stocktake.tracking.addresses import sqlite_file
from stocktake.tracking.connection import Connection, brief, no_retries
from stocktake.tracking.local_store import RUNNING, LocalRun, MetricPoint, files_below, folder_digest
from stocktake.tracking.mlflow_view import show_in_mlflow

_T = TypeVar("_T")
_Stamps = dict[str, tuple[int, int]]

FOLDER_TAG = "stocktake.folder"
"""Of a run: the name of its folder."""
DIGEST_TAG = "stocktake.digest"
"""Of a logged model: `folder_digest` of its files."""
_MODEL_TAGS = ("stage", "task", "data.fingerprint")
_METRICS, _PARAMS, _TAGS = 1000, 100, 100  # MLflow's limits of one request
_MODEL_METRICS = 100  # of more, MLflow 3.17 stores none if it has some of them


class UploadError(Exception):
    """Something could not be uploaded; the message says what and why, without secrets."""


class StoreAwayError(UploadError):
    """The server does not answer."""


class RunUploader:
    """Uploads one run to one store. It keeps in memory what it has sent, so that a live run is not sent twice."""

    def __init__(self, run: LocalRun, connection: Connection) -> None:
        self.run = run
        self._connection = connection
        self._uri = without_credentials(connection.stores.tracking)
        self._run_id = ""
        self._sent: dict[str, Any] = {}
        """Part of the run -> its content, or what tells it from a later one, when it was sent."""
        self._params: set[str] = set()
        """Names of the params that the store has."""
        self._models: dict[str, str] = {}
        """Name of a model's folder -> id of the logged model."""
        self.is_complete = False
        """Whether all of an ended run was uploaded."""

    def upload(self) -> None:
        """Send what is new since the last call; the first call sends everything.

        A part that the store refuses does not keep the others from being sent, unless the server is away.

        Raises:
            UploadError: with the first failure; StoreAwayError if the server does not answer.
            StocktakeError: the experiment was deleted.
        """
        digest = None if self.run.state.status == RUNNING else self.run.digest()
        if not self._run_id:
            with _upload_errors("run"):
                self._run_id = self._find_or_create()
        failure = None
        for part, content, send in self._parts():
            if self._sent.get(part) == content:
                continue
            try:
                with _upload_errors(part):
                    send()
                self._sent[part] = content
            except UploadError as error:
                if self._connection.health_check() is not None:
                    raise StoreAwayError(str(error)) from error
                failure = failure or error
        if failure is not None:
            raise failure
        if digest is not None:
            self.run.remember_upload(self._uri, self._run_id, digest)
            self.is_complete = True

    def _parts(self) -> Iterator[tuple[str, object, Callable[[], object]]]:
        """Every part of the run with its content, or what tells it from a later one, and what sends it."""
        run, state = self.run, self.run.state
        yield "tags", dict(run.tags), self._send_tags
        yield "params", dict(run.params), self._send_params
        yield "datasets", len(run.inputs), self._send_inputs
        points, end = run.read_metrics(self._sent.get("metrics", 0))
        yield "metrics", end, partial(self._log_metrics, points, _METRICS)
        for name, stamp in _stamps(run.artifacts).items():
            folder = Path(name).parent.as_posix()
            source, target = str(run.artifacts / name), None if folder == "." else folder
            yield f"artifact {name}", stamp, partial(self._connection.client.log_artifact, self._run_id, source, target)
        for name in state.models:
            yield f"model {name}", _stamps(run.folder / "models" / name), partial(self._send_model, name)
        if state.status != RUNNING:
            scores = [point for point in run.last_points() if point.name.startswith(("val/", "test/"))]
            for model_id in self._models.values():
                yield f"scores of {model_id}", scores, partial(self._log_metrics, scores, _MODEL_METRICS, model_id)
        yield "status", state.status, self._send_status

    def _find_or_create(self) -> str:
        """The MLflow run: the one that is remembered, that `mlflow run` opened, that has the tag, or a new one."""
        client, state = self._connection.client, self.run.state
        remembered = state.uploads.get(self._uri)
        ids = [remembered.run_id if remembered else None, state.attach_run_id]
        existing = (get_run(self._connection, run_id) for run_id in ids if run_id)
        run = next(filter(None, existing), None) or self._tagged_or_new()
        run_id = str(run.info.run_id)
        if run_id == state.attach_run_id:
            client.set_tag(run_id, FOLDER_TAG, self.run.folder.name)
            if is_generated(run.info.run_name):
                client.update_run(run_id, name=state.name)
            state.experiment = client.get_experiment(run.info.experiment_id).name
            show_in_mlflow(client, run.info.experiment_id)
        if "failure" in run.data.tags and "failure" not in self.run.tags:  # of a run that was continued
            client.delete_tag(run_id, "failure")
        # `mlflow run -P lr=1e-3` has logged it as it was typed, and a param never changes.
        self._params = set(run.data.params)
        self._sent["status"] = run.info.status if run.info.status == RUNNING else None
        self.run.remember_upload(self._uri, run_id)
        return run_id

    def _tagged_or_new(self) -> Any:
        client, state, folder = self._connection.client, self.run.state, self.run.folder.name
        parent = self._parent()
        experiment_id = parent.info.experiment_id if parent else ensure_experiment(self._connection, state.experiment)
        if tagged := client.search_runs([experiment_id], f"tags.`{FOLDER_TAG}` = '{folder}'", max_results=1):
            return tagged[0]
        tags = {FOLDER_TAG: folder, **({"mlflow.parentRunId": parent.info.run_id} if parent else {})}
        with no_retries():
            return client.create_run(experiment_id, start_time=state.start_ms, tags=tags, run_name=state.name)

    def _parent(self) -> Any:
        """The MLflow run of the parent, which is uploaded first; None without one, or where its folder is gone."""
        folder = self.run.folder.parent / str(self.run.state.parent)
        if self.run.state.parent is None or not (folder / "run.json").is_file():
            return None
        parent = LocalRun.open(folder)
        if self._uri not in parent.state.uploads:
            if not parent.try_lock():
                raise UploadError(f"its parent {folder.name} is not uploaded yet")
            try:
                RunUploader(parent, self._connection).upload()
            finally:
                parent.release()
        return self._connection.client.get_run(parent.state.uploads[self._uri].run_id)

    def _send_tags(self) -> None:
        from mlflow.entities import RunTag

        for batch in _batches([RunTag(key, value) for key, value in self.run.tags.items()], _TAGS):
            self._connection.client.log_batch(self._run_id, tags=batch)

    def _send_params(self) -> None:
        from mlflow.entities import Param

        new = [Param(key, value) for key, value in self.run.params.items() if key not in self._params]
        for batch in _batches(new, _PARAMS):
            self._connection.client.log_batch(self._run_id, params=batch)
            self._params |= {param.key for param in batch}

    def _send_inputs(self) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        inputs = []
        for record in self.run.inputs:
            scheme = record["source"].partition("://")[0]
            dataset = Dataset(
                name=record["name"],
                digest=record["digest"],
                source_type=scheme if scheme in ("s3", "http", "https") else "local",
                source=json.dumps({"uri": record["source"]}),
                profile=json.dumps({"num_rows": record["rows"], **record["profile"]}),
            )
            inputs.append(DatasetInput(dataset, [InputTag("mlflow.data.context", record["context"])]))
        if inputs:
            self._connection.client.log_inputs(self._run_id, inputs)

    def _log_metrics(self, points: Sequence[MetricPoint], size: int, model_id: str | None = None) -> None:
        from mlflow.entities import Metric

        metrics = [
            Metric(point.name, point.value, point.timestamp_ms, point.step, model_id=model_id, run_id=self._run_id)
            for point in points
        ]
        for batch in _batches(metrics, size):
            self._connection.client.log_batch(self._run_id, metrics=batch)

    def _send_model(self, name: str) -> None:
        from mlflow.entities import LoggedModelOutput

        client, source = self._connection.client, self.run.folder / "models" / name
        run = client.get_run(self._run_id)
        digest = folder_digest(source)
        models = client.search_logged_models(
            [run.info.experiment_id], filter_string=f"source_run_id = '{self._run_id}' AND name = '{name}'"
        )
        model = next((model for model in models if model.tags.get(DIGEST_TAG) == digest), None)
        if model is None:
            tags = {key: self.run.tags[key] for key in _MODEL_TAGS if key in self.run.tags}
            with no_retries():
                model = client.create_logged_model(
                    run.info.experiment_id,
                    name=name,
                    source_run_id=self._run_id,
                    tags={DIGEST_TAG: digest, **tags},
                    params={key: value[:500] for key, value in sorted(self.run.params.items())[:100]},
                    model_type=self.run.tags.get("stage"),
                )
        model_id = str(model.model_id)
        if str(model.status) != "READY":
            with tempfile.TemporaryDirectory() as temporary:
                _copy_with_ids(source, Path(temporary), model_id, self._run_id)
                client.log_model_artifacts(model_id, temporary)
            outputs = run.outputs.model_outputs if run.outputs else []
            if model_id not in {output.model_id for output in outputs}:
                client.log_outputs(self._run_id, [LoggedModelOutput(model_id, step=0)])
            client.finalize_logged_model(model_id, "READY")
        self._models[name] = model_id

    def _send_status(self) -> None:
        state = self.run.state
        if state.status == RUNNING:
            self._connection.client.update_run(self._run_id, status=RUNNING)
        else:
            self._connection.client.set_terminated(self._run_id, state.status, state.end_ms)


@contextmanager
def _upload_errors(part: str) -> Iterator[None]:
    try:
        yield
    except (UploadError, StocktakeError):
        raise
    except Exception as error:
        raise UploadError(f"{part}: {brief(error)}") from error


def ensure_experiment(connection: Connection, name: str) -> str:
    """The id of the experiment, which is created if it is missing. StocktakeError if it was deleted."""
    from mlflow.exceptions import MlflowException

    client = connection.client
    experiment = client.get_experiment_by_name(name)
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


def get_run(connection: Connection, run_id: str) -> Any:
    """The store's run of this id; None if it has none. Raises UploadError if the store does not say."""
    from mlflow.exceptions import MlflowException

    try:
        return connection.client.get_run(run_id)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise UploadError(f"run: {brief(error)}") from error


def is_generated(name: str) -> bool:
    """Whether MLflow made the name up: nobody asked for `bold-shrike-512`."""
    from mlflow.utils.name_utils import _GENERATOR_NOUNS, _GENERATOR_PREDICATES

    words = name.split("-")
    return len(words) == 3 and words[0] in _GENERATOR_PREDICATES and words[1] in _GENERATOR_NOUNS and words[2].isdigit()


def _artifact_location(connection: Connection, name: str) -> str | None:
    """Beside the database, also when that is not in the current folder, which is where MLflow would put it."""
    database = sqlite_file(connection.stores.tracking)
    if database is None or database.parent == Path.cwd():
        return None
    return (database.parent / "mlruns" / quote(name, safe=" ")).as_uri()


def _copy_with_ids(source: Path, copy: Path, model_id: str, run_id: str | None) -> None:
    """Copy a model folder; its MLmodel says which logged model it is, as MLflow writes it itself."""
    import yaml

    for path in files_below(source):
        (copy / path.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy / path.relative_to(source))
    content = yaml.safe_load((source / "MLmodel").read_text(encoding="utf-8"))
    content |= {"model_id": model_id, "run_id": run_id, "artifact_path": f"models:/{model_id}"}
    (copy / "MLmodel").write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")


def _stamps(root: Path) -> _Stamps:
    """(bytes, modification time in ns) of the files below a folder, by their paths."""
    stamps = {}
    for path in files_below(root):
        try:
            status = path.stat()
        except FileNotFoundError:  # a live run may take a file away
            continue
        stamps[path.relative_to(root).as_posix()] = (status.st_size, status.st_mtime_ns)
    return stamps


def _batches(values: Sequence[_T], size: int) -> list[Sequence[_T]]:
    return [values[start : start + size] for start in range(0, len(values), size)]
